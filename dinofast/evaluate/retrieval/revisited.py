"""Retrieval on revisited Oxford and Paris (arXiv 1803.11285), the protocol of the official
eval_image_retrieval.py: whole images, whose longer side is at most `imsize`, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...nn.features import features as features_of
from ...runtime.backends import cores
from ...runtime.terminal import say
from ...runtime.words import counted
from ..frozen import features_and_rows, load_frozen
from ..images import IMAGENET_MEAN, IMAGENET_STD, image_files, to_tensor
from .plain_pickle import PickledArray, load_plain

PROTOCOLS = ("roxford5k", "rparis6k")
PRECISION_AT = (1, 5, 10)
SCALES = (1.0, 2**-0.5, 0.5)  # of multiscale


class Truth(NamedTuple):
    """Names of the gallery's images and of the queries', without .jpg, and of each query the
    images that show the same, easily and hardly to be seen, and those that do not count: numbers
    in the gallery."""

    images: list[str]
    queries: list[str]
    easy: list[np.ndarray]
    hard: list[np.ndarray]
    junk: list[np.ndarray]


class Score(NamedTuple):
    """In percent, means over the queries that have any image to find."""

    mean_average_precision: float
    precision_at: dict[int, float]


@dataclass(frozen=True)
class Thumbnail:
    """RGB image -> normalized (3, h, w) fp32, the longer side at most `longest`; smaller images
    keep their size."""

    longest: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        image = image.copy()
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        return to_tensor(image, self.mean, self.std)


def average_precision(ranks: Sequence[int], n_relevant: int) -> float:
    """The official one: the area under precision over recall, in trapezoids.

    ranks: of the images found, counted from 0, ascending. n_relevant: how many there are to find.
    """
    total = 0.0
    for found, rank in enumerate(ranks):
        before = found / rank if rank else 1.0
        total += (before + (found + 1) / (rank + 1)) / 2
    return total / n_relevant


def score(order: np.ndarray, relevant: list[np.ndarray], junk: list[np.ndarray]) -> Score:
    """order (Q, N): the gallery's images by falling similarity to each query. relevant, junk: of
    each query; junk is taken out before ranks are counted. A query without relevant images does not
    count."""
    averages, precisions = [], []
    for own, wanted, out in zip(order, relevant, junk, strict=True):
        if not len(wanted):
            continue
        kept = own[~np.isin(own, out)]
        ranks = np.flatnonzero(np.isin(kept, wanted))
        averages.append(average_precision(ranks.tolist(), len(wanted)))
        # not past the last one that is found, as in the official code
        at = [min(int(ranks.max()) + 1, k) for k in PRECISION_AT]
        precisions.append([(ranks < k).sum() / k for k in at])
    if not averages:
        raise ValueError("no query has an image to find: the ground truth is another one's.")
    means = 100 * np.mean(precisions, 0)
    return Score(
        100 * float(np.mean(averages)), dict(zip(PRECISION_AT, means.tolist(), strict=True))
    )


def read_truth(path: Path) -> Truth:
    """gnd_roxford5k.pkl or gnd_rparis6k.pkl, of which nothing is run. Raises `ValueError`."""
    content = load_plain(path)
    try:
        images, queries = (_names(content[name]) for name in ("imlist", "qimlist"))
        sets = [
            [_numbers(one[name], len(images)) for one in content["gnd"]]
            for name in ("easy", "hard", "junk")
        ]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"'{path}' is no ground truth of revisited Oxford or Paris ({error!r}): it needs "
            "imlist, qimlist, and gnd with easy, hard and junk."
        ) from error
    if not queries or len(queries) != len(sets[0]):
        raise ValueError(
            f"'{path}' has {counted(len(queries), 'query', 'queries')} and {len(sets[0])} answers."
        )
    return Truth(images, queries, *sets)


def _names(value: Any) -> list[str]:
    names = value.array().tolist() if isinstance(value, PickledArray) else list(value)
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    for name in names:
        if not isinstance(name, str) or not name or name.startswith("/") or ".." in name:
            raise ValueError(f"an image is called {name!r}")
    return names


def _numbers(value: Any, n_images: int) -> np.ndarray:
    """Numbers of images (m,) int64."""
    given = value.array() if isinstance(value, PickledArray) else np.array(list(value))
    numbers = given.reshape(-1).astype(np.int64)
    if (numbers != given.reshape(-1)).any() or ((numbers < 0) | (numbers >= n_images)).any():
        raise ValueError("a number of no image")
    return numbers


def revisited(
    pretrained_weights: str | Path,
    data_path: str | Path,
    protocol: str = "roxford5k",
    *,
    imsize: int = 224,
    multiscale: bool = False,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    num_workers: int = 10,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> dict[str, Score]:
    """`Score` of "medium" (easy and hard images are to be found) and "hard" (easy ones do not
    count).

    data_path holds `protocol`/gnd_`protocol`.pkl and `protocol`/jpg/, or these themselves.
    multiscale: the mean of features at SCALES. As in the official code queries are whole images,
    without their boxes. Raises `ValueError` for data that is not complete.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` is '{protocol}': choose from {', '.join(PROTOCOLS)}.")
    if imsize < 1:
        raise ValueError(f"`imsize` is {imsize}: it must be at least 1.")
    truth, folder = _data(Path(data_path), protocol)
    frozen = load_frozen(
        pretrained_weights,
        checkpoint_key=checkpoint_key,
        arch=arch,
        patch_size=patch_size,
        device=device,
        backbone=backbone,
    )
    frozen.module.eval()
    shown = Thumbnail(imsize, frozen.transform.mean, frozen.transform.std)
    say(
        f"{protocol}: {counted(len(truth.queries), 'query', 'queries')} among "
        f"{len(truth.images):,} images, longer side at most {imsize}; features of {frozen.told}"
    )
    extract = partial(_multiscale if multiscale else features_of, frozen.module)
    workers = min(num_workers, cores())
    features = []
    for names in (truth.images, truth.queries):
        paths = [folder / f"{name}.jpg" for name in names]
        images = image_files(paths, shown, frozen.decode, (imsize, imsize))
        made = features_and_rows(extract, images, frozen.device, 1, workers)
        features.append(F.normalize(complete(*made, len(names)).to(frozen.device), dim=1))
    order = (features[1] @ features[0].t()).argsort(dim=1, descending=True, stable=True)
    found = _scores(truth, order.cpu().numpy())
    for name, (mean, at) in found.items():
        shares = ", ".join(f"{value:.2f} at {k}" for k, value in at.items())
        say(f"{name}: mean average precision {mean:.2f} %, mean precision {shares}")
    return found


def _scores(truth: Truth, order: np.ndarray) -> dict[str, Score]:
    """Of "medium" and "hard", for an order (Q, N) as `score` takes it."""
    both, junk_or_easy = (
        [np.concatenate(pair) for pair in zip(a, b, strict=True)]
        for a, b in ((truth.easy, truth.hard), (truth.junk, truth.easy))
    )
    return {
        "medium": score(order, both, truth.junk),
        "hard": score(order, truth.hard, junk_or_easy),
    }


def complete(features: Tensor, rows: Tensor, n: int) -> Tensor:
    """The features of all n images. Raises `ValueError` if one could not be read: a protocol counts
    all of them."""
    if len(rows) < n:
        raise ValueError(
            f"{counted(n - len(rows), 'image')} of {n:,} cannot be read, which the protocol needs: "
            "fetch the data anew."
        )
    return features


def _multiscale(module: nn.Module, images: Tensor) -> Tensor:
    """Mean of the features of images (B, 3, h, w) at each of SCALES, L2-normalized: (B, D)."""
    sizes = [
        images if s == 1 else F.interpolate(images, scale_factor=s, mode="bilinear") for s in SCALES
    ]
    return F.normalize(torch.stack([features_of(module, x) for x in sizes]).mean(0), dim=1)


def _data(root: Path, protocol: str) -> tuple[Truth, Path]:
    """The ground truth, and the folder of the images, all of which are there."""
    name = f"gnd_{protocol}.pkl"
    for folder in (root / protocol, root):
        if (folder / name).is_file():
            break
    else:
        raise ValueError(
            f"`data_path` '{root}' holds neither {protocol}/{name} nor {name}: prepare it as "
            "github.com/filipradenovic/revisitop tells."
        )
    truth = read_truth(folder / name)
    paths = [folder / "jpg" / f"{image}.jpg" for image in (*truth.images, *truth.queries)]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"{counted(len(missing), 'image')} of {len(paths):,} missing, such as '{missing[0]}': "
            "fetch them."
        )
    return truth, folder / "jpg"
