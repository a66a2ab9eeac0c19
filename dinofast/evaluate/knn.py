"""Weighted k-NN classification of frozen features (arXiv 1805.01978, section 3.4), as in the
official evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.terminal import say
from ..runtime.words import counted
from .frozen import check_batches, labeled_halves, load_frozen

CHUNK_ELEMENTS = 2**26  # of the similarity matrix held at a time: 256 MiB in fp32


def knn_classify(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    temperature: float = 0.07,
    n_classes: int | None = None,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of the k-NN classifier.

        for each test image: s = cosine with every training image;
        the k largest vote for their class with exp(s / temperature)

    train_features (M, D) and test_features (N, D), any float dtype, L2-normalized here; labels (M,)
    and (N,) int64 from 0. n_classes: default one more than the largest label. Top-5 looks at min(5,
    k, n_classes) classes, as the official code does; of classes with equal votes the first comes
    first. Raises ValueError when k is not within 1..M or a set is empty.
    """
    similarity, neighbors = nearest(train_features, test_features, k)
    n_classes = n_classes or int(torch.cat((train_labels, test_labels)).max()) + 1
    return vote(similarity, train_labels[neighbors], test_labels, temperature, n_classes)


def nearest(train_features: Tensor, test_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine of the k nearest training images, largest first, (N, k) fp32, and their rows (N,
    k)."""
    n_train, n_test = len(train_features), len(test_features)
    if not n_test:
        raise ValueError("there are no images to classify: give at least one.")
    if not 1 <= k <= n_train:
        raise ValueError(
            f"k is {k} but there are {n_train} training images: choose k between 1 and {n_train}."
        )
    train = F.normalize(train_features.float(), dim=1).t()
    chunks = F.normalize(test_features.float(), dim=1).split(max(1, CHUNK_ELEMENTS // n_train))
    found = [(chunk @ train).topk(k) for chunk in chunks]
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def vote(
    similarity: Tensor, labels: Tensor, truth: Tensor, temperature: float, n_classes: int
) -> tuple[float, float]:
    """Top-1 and top-5 in percent from the neighbors' similarity and labels (N, k) and the true
    labels (N,)."""
    k, hits = labels.shape[1], torch.zeros(2, dtype=torch.long, device=labels.device)
    rows = max(1, CHUNK_ELEMENTS // 4 // n_classes)
    for s, label, target in zip(
        similarity.split(rows), labels.split(rows), truth.split(rows), strict=True
    ):
        votes = torch.zeros(len(s), n_classes, dtype=torch.float64, device=s.device)
        # the largest is first: same order, no overflow
        weights = ((s.double() - s[:, :1]) / temperature).exp()
        for j in range(k):  # one at a time: no (N, k, classes) tensor, and sums in a fixed order
            votes.scatter_add_(1, label[:, j : j + 1], weights[:, j : j + 1])
        correct = (
            votes.sort(dim=1, descending=True, stable=True).indices[:, : min(5, k)]
            == target[:, None]
        )
        hits += torch.stack((correct[:, 0].sum(), correct.sum()))
    top1, top5 = hits.tolist()
    return 100 * top1 / len(truth), 100 * top5 / len(truth)


def _fitting(nb_knn: Sequence[int], n_images: int) -> list[int]:
    """Those of nb_knn for which there are neighbors enough. Raises ValueError if none remains."""
    fitting = [k for k in nb_knn if k <= n_images]
    if not fitting:
        raise ValueError(
            f"`nb_knn` is {' '.join(map(str, nb_knn))} but there "
            f"{'is' if n_images == 1 else 'are'} only {counted(n_images, 'training image')}: give "
            "a smaller number."
        )
    return fitting


def knn(
    pretrained_weights: str | Path,
    data_path: str | Path,
    *,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    nb_knn: int | Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    resize: int | None = None,
    crop: int | None = None,
    batch_size_per_gpu: int = 128,
    num_workers: int = 10,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> dict[int, tuple[float, float]]:
    """Classify `data_path/val` by its neighbors in `data_path/train` and print one line for each k
    in `nb_knn`.

    The backbone, its device and the size of its images: see `frozen.load_frozen`. Without train/
    and val/ every fourth image of each class folder is held out. Channels are normalized, gray
    values scaled and images turned (`value_range`, `exif`) as in training. Returns {k: (top-1,
    top-5)} in percent; k larger than the training set are left out. Raises ValueError if none
    remains.
    """
    nb_knn = (nb_knn,) if isinstance(nb_knn, int) else tuple(nb_knn)
    if min(nb_knn) < 1:
        raise ValueError(f"`nb_knn` is {min(nb_knn)}: a number of neighbors is at least 1.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` is {temperature}: it must be a number above 0.")
    check_batches(batch_size_per_gpu, num_workers)
    frozen = load_frozen(
        pretrained_weights,
        checkpoint_key=checkpoint_key,
        arch=arch,
        patch_size=patch_size,
        resize=resize,
        crop=crop,
        device=device,
        backbone=backbone,
    )
    train, val = labeled_halves(data_path, frozen)
    where = frozen.device
    fitting = _fitting(nb_knn, len(train))
    (train_features, train_labels), (test_features, test_labels) = (
        frozen.features(images, batch_size_per_gpu, num_workers) for images in (train, val)
    )
    fitting = _fitting(fitting, len(train_labels))
    if left_out := [k for k in nb_knn if k not in fitting]:
        say(
            f"Left out: k = {', '.join(map(str, left_out))}, more than the "
            f"{counted(len(train_labels), 'training image')}."
        )
    similarity, neighbors = nearest(train_features.to(where), test_features.to(where), max(fitting))
    labels, truth = train_labels.to(where)[neighbors], test_labels.to(where)
    results = {}
    for k in fitting:
        top1, top5 = results[k] = vote(
            similarity[:, :k], labels[:, :k], truth, temperature, len(train.classes)
        )
        say(f"{k}-NN classifier result: Top1: {top1:.1f}, Top5: {top5:.1f}")
    return results
