"""How many directions features use: scores of a backbone that need no labels.

Both are exponentials of an entropy, so that they count: D for features spread evenly over D
directions, 1 for features on a line. A collapsed backbone has a low one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7
RIDGE = 1e-4  # of the covariance within an image, section 3.3 of LiDAR


def rankme(features: Tensor) -> float:
    """RankMe (arXiv 2210.02885, equation 1): the smooth rank of features (N, D), any float dtype.

    exp of the entropy of the singular values, scaled to sum to 1. Between 1 and min(N, D).
    """
    x = features.double()
    x = x if x.shape[0] >= x.shape[1] else x.t()
    # of the products: ten times sooner than singular values, which go down to 1e-8 of the largest
    return _smooth_count(torch.linalg.eigvalsh(x.t() @ x).clamp(min=0).sqrt())


def lidar(features: Tensor, ridge: float = RIDGE) -> float:
    """LiDAR (arXiv 2312.04000, equations 2 to 4): the smooth rank of what tells images apart.

    features (n, q, D): q views, at least 2, of each of n images, at least 2. The covariance between
    the images' means is whitened by that within the images, so that what differs between views of
    one image does not count. Between 1 and min(n - 1, D); nan where that within the images has no
    inverse.
    """
    n, q, dim = features.shape
    if n < 2 or q < 2:
        raise ValueError(
            f"LiDAR takes two views or more of two images or more, not {q} of {n}: give more."
        )
    x = features.double()
    means = x.mean(1)  # (n, D)
    inside = (x - means[:, None]).flatten(0, 1)
    within = inside.t() @ inside / (n * (q - 1)) + ridge * torch.eye(dim, dtype=x.dtype)
    # of within = L Lt, the eigenvalues of L^-1 between L^-t are those of within^-1 between; by the
    # smaller of two Gram matrices, at 2,048 numbers an image in an eighth of eigh's time
    root, failed = torch.linalg.cholesky_ex(within)
    if failed:
        return math.nan  # no finite features, or too large for the ridge to count
    white = torch.linalg.solve_triangular(root, (means - means.mean(0)).t(), upper=False)  # (D, n)
    gram = white.t() @ white if n < dim else white @ white.t()
    found = torch.linalg.eigvalsh(gram / (n - 1)).clamp(min=0)
    return _smooth_count(F.pad(found, (0, dim - len(found))))


def _smooth_count(values: Tensor) -> float:
    """exp of the entropy of values (n,) that are not negative; 1 where all are 0."""
    share = values / values.sum().clamp(min=1e-300) + EPSILON
    return max(1.0, float(torch.exp(-(share * share.log()).sum())))
