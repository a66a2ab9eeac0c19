"""Logistic regression on frozen features by scikit-learn, as DINOv2 evaluates (arXiv 2304.07193):
features as the backbone gives them, in float64, and an L2 penalty chosen on held-out images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...runtime.words import first_line

# inverse strengths of the penalty: DINOv2's range; it takes 45 values there, here it is one a
# decade, as each fit is of minutes on a CPU where the data is large
STRENGTHS = tuple(10.0**power for power in range(-6, 6))
MOST_ITERATIONS = 1000
# elements of x below which BLAS gets one thread: on 2 busy cores two took 62 s, one 1.0 s for 3,000
# images of width 64, as they wait for each other in each of its 560 iterations (2026-11-27)
SMALL = 2**24


def unavailable_reason() -> str | None:
    """Why scikit-learn cannot be used, in a sentence without an end; None if it can."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        return f"scikit-learn cannot be imported ({first_line(error)})"
    return None


def fit(x: Tensor, y: Tensor, strength: float) -> Any:
    """The regression on x (N, D) and y (N,); `n_iter_` tells whether it has come to its end."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # scikit-learn needs it itself

    model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS)
    threads = 1 if x.numel() < SMALL else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x.double().numpy(), y.numpy())


def scores(model: Any, x: Tensor, n_classes: int) -> Tensor:
    """x (N, D) -> probabilities (N, C) fp64; a class of which no image was fitted has -1."""
    out = torch.full((len(x), n_classes), -1.0, dtype=torch.float64)
    out[:, torch.from_numpy(model.classes_)] = torch.from_numpy(
        model.predict_proba(x.double().numpy())
    ).double()
    return out


def choose(
    x: Tensor, y: Tensor, chooses: Tensor, tell: Callable[[int, int], None]
) -> tuple[float, dict[float, float]]:
    """The strength whose regression, fitted without them, knows most of the images that `chooses`
    (N,) bool; of equals the smallest. Also the top-1 in percent of each."""
    top1 = {}
    for i, strength in enumerate(STRENGTHS):
        model = fit(x[~chooses], y[~chooses], strength)
        top1[strength] = 100 * float(model.score(x[chooses].double().numpy(), y[chooses].numpy()))
        tell(i + 1, len(STRENGTHS))
    return max(top1, key=lambda strength: top1[strength]), top1
