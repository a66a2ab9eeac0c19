"""Retrieval by cosine: which images are nearest to a query, and how many of them are of its
class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from ...runtime.image_progress import ImageProgress
from ...runtime.terminal import printable, say
from ...runtime.words import counted
from ...validation import check_output, check_outside
from ..frozen import FrozenBackbone, check_batches, features_and_rows, load_frozen
from ..images import Batches, EvalTransform, given_halves, has_halves, image_files, listed_images
from .contact_sheet import OTHER, SAME, Cell, contact_sheet

CHUNK_ELEMENTS = 2**24  # similarities held at a time: 64 MiB
PRECISION_AT = (1, 5, 10)


class ClassRetrieval(NamedTuple):
    """In percent, means over queries. chance: of the mean average precision, about. skipped:
    queries without another image of their class, which do not count."""

    mean_average_precision: float
    precision_at: dict[int, float]
    chance: float
    n_queries: int
    skipped: int


class Found(NamedTuple):
    """Images, and of those that could be read features (n, D) and rows (n,) in them."""

    images: Batches
    features: Tensor
    rows: Tensor

    def labels(self) -> Tensor:
        """(n,) int64, -1 where there are none."""
        return torch.as_tensor(np.asarray(self.images.labels))[self.rows]

    def path(self, i: int) -> str:
        return str(self.images.path(int(self.rows[i])))

    def class_of(self, i: int) -> str:
        label = self.images.labels[int(self.rows[i])]
        return self.images.classes[label] if label >= 0 else ""


def retrieve_classes(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    leave_one_out: bool = False,
) -> ClassRetrieval:
    """How early the images of a query's class come among all of the gallery, sorted by cosine.

        average precision = mean over relevant images of (relevant ones up to it) / (its rank)

    queries (Q, D) and gallery (N, D), any float dtype, L2-normalized here; labels (Q,) and (N,)
    int64. leave_one_out: the queries are the gallery, and none finds itself. Of images with equal
    cosines the first comes first. A precision at more images than there are is left out. Raises
    `ValueError` if no query has a relevant image.
    """
    columns, others = F.normalize(gallery.float(), dim=1).t(), len(gallery) - leave_one_out
    at = [k for k in PRECISION_AT if k <= others]
    labels, own = gallery_labels.cpu().numpy(), query_labels.cpu().numpy()
    average, share = np.zeros(len(queries)), np.zeros((len(queries), len(at)))
    n_relevant = np.zeros(len(queries), np.int64)

    def look(i: int, similarity: np.ndarray) -> None:
        relevant = labels == own[i]
        if leave_one_out:
            similarity[i], relevant[i] = -np.inf, False
        ranks = ranks_of(similarity, relevant)
        n_relevant[i] = len(ranks)
        if len(ranks):
            average[i] = (np.arange(1, len(ranks) + 1) / (ranks + 1)).mean()
            share[i] = [(ranks < k).sum() / k for k in at]

    size = max(1, CHUNK_ELEMENTS // len(gallery))
    progress = ImageProgress(len(queries), brief=True)
    with ThreadPoolExecutor(cores()) as pool:  # sorting does not hold the GIL
        for start in range(0, len(queries), size):
            chunk = F.normalize(queries[start : start + size].float(), dim=1) @ columns
            rows = range(start, start + len(chunk))
            list(pool.map(look, rows, chunk.cpu().numpy()))
            progress.show(rows.stop)
    progress.end()
    counts = n_relevant > 0
    if not counts.any():
        raise ValueError(
            "no image has another one of its class to find: give folders of two images or more."
        )
    shares = 100 * share[counts].mean(0)
    return ClassRetrieval(
        100 * float(average[counts].mean()),
        dict(zip(at, shares.tolist(), strict=True)),
        100 * float(n_relevant[counts].mean()) / others,
        int(counts.sum()),
        int((~counts).sum()),
    )


def ranks_of(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Places of the relevant images, counted from 0, ascending, when all (N,) are sorted by falling
    similarity; of equal ones the first comes first. relevant: (N,) bool.

    NumPy sorts values alone several times as fast as it sorts with indices, or torch does: of
    20,000 images each against the others 13 s instead of 82 s (2 busy cores, 2026-11-27).
    """
    ascending, own = np.sort(similarity), np.sort(similarity[relevant])[::-1]
    below = np.searchsorted(ascending, own, "right")
    if (below - np.searchsorted(ascending, own, "left") > 1).any():  # twins
        return np.flatnonzero(relevant[np.argsort(-similarity, kind="stable")])
    return len(similarity) - below


def neighbors(
    queries: Tensor, gallery: Tensor, k: int, without: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, Tensor]:
    """Cosine of the k nearest of the gallery, largest first, (Q, k) fp32, and their rows (Q, k).

    queries (Q, D), gallery (N, D), any float dtype. without: of each query rows that it must not
    find; of k more than is left for one, the last are at -inf.
    """
    columns, k = F.normalize(gallery.float(), dim=1).t(), min(k, len(gallery))
    found = []
    for i, query in enumerate(F.normalize(queries.float(), dim=1)):
        similarity = query @ columns
        if without and len(without[i]):
            similarity[torch.as_tensor(without[i], device=similarity.device)] = -torch.inf
        found.append(similarity.topk(k))
    return torch.stack([values for values, _ in found]), torch.stack([rows for _, rows in found])


def retrieve(
    pretrained_weights: str | Path,
    data_path: str | Path,
    sheet: str | Path = "neighbors.png",
    *,
    queries: Sequence[str | Path] = (),
    n_queries: int = 8,
    n_neighbors: int = 8,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    batch_size_per_gpu: int = 128,
    num_workers: int = 10,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> dict[str, Any]:
    """Draw the nearest others of some images into a PNG and, where there are classes, say how well
    all images find those of their class.

    data_path: any source that pretraining takes; with train/ and val/ of class folders those of
    val/ look for those of train/, else each looks among the others. queries: image files, default
    n_queries from all over the source. The backbone, its device and the size of its images: see
    `frozen.load_frozen`. Returns plain values: `queries`, a list of path, class and neighbors, and
    with classes what `ClassRetrieval` holds. Raises `ValueError` for what cannot be.
    """
    for name, value in (("n_queries", n_queries), ("n_neighbors", n_neighbors)):
        if not 1 <= value <= 100:
            raise ValueError(f"`{name}` is {value}: give 1 to 100.")
    for query in queries:
        if not os.path.isfile(query):
            raise ValueError(f"`queries`: there is no file '{query}'.")
    check_output("sheet", str(sheet))
    check_outside("sheet", str(sheet), str(data_path))
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
    extract = partial(_found, frozen, batch_size_per_gpu, min(num_workers, cores()))
    asked, gallery = _asked_and_gallery(data_path, frozen, extract)
    results, title = _evaluated(asked, gallery, frozen)
    if queries:
        asked = extract(image_files(list(map(Path, queries)), frozen.transform, frozen.decode))
    else:
        asked = _spread(asked, n_queries)
    rows = _rows(asked, gallery, n_neighbors, frozen)
    title = [f"nearest by cosine, features of {frozen.told}", *title]
    drawn = [(query, cells) for query, cells, _ in rows]
    contact_sheet([printable(line) for line in title], drawn).save(sheet, "PNG")
    say(f"{counted(len(rows), 'query', 'queries')} in '{sheet}', a row each with its nearest")
    return {**results, "queries": [told for _, _, told in rows]}


def _found(frozen: FrozenBackbone, batch_size: int, workers: int, images: Batches) -> Found:
    frozen.module.eval()
    features = partial(features_of, frozen.module)
    return Found(images, *features_and_rows(features, images, frozen.device, batch_size, workers))


def _asked_and_gallery(
    data_path: str | Path, frozen: FrozenBackbone, extract: Callable[[Batches], Found]
) -> tuple[Found, Found]:
    """The images that look for others, and among which; the same object if they are the same."""
    root = Path(data_path)
    if has_halves(root):
        train, val, _ = given_halves(root, frozen.transform)
        train, val = (replace(images, decode=frozen.decode) for images in (train, val))
        for ignored in dict.fromkeys(filter(None, (train.ignored, val.ignored))):
            say(printable(ignored))
        say(f"{counted(len(val), 'query', 'queries')} (val/) among {len(train):,} images (train/)")
        say(f"features of {frozen.told}")
        return extract(val), extract(train)
    images = listed_images(data_path, frozen.transform, frozen.decode)
    say(f"{counted(len(images), 'image')}; features of {frozen.told}")
    found = extract(images)
    if len(found.rows) < 2:
        raise ValueError(f"`data_path` {data_path} has one readable image: give two or more.")
    return found, found


def _evaluated(
    asked: Found, gallery: Found, frozen: FrozenBackbone
) -> tuple[dict[str, Any], list[str]]:
    """What `ClassRetrieval` holds as plain values, and in lines for a title; nothing without
    classes."""
    if not gallery.images.classes:
        return {}, []
    queries, others = (
        (one.features.to(frozen.device), one.labels().to(frozen.device)) for one in (asked, gallery)
    )
    found = retrieve_classes(*queries, *others, leave_one_out=asked is gallery)
    at = ", ".join(f"{value:.1f} at {k}" for k, value in found.precision_at.items())
    line = (
        f"mean average precision {found.mean_average_precision:.1f} % (chance "
        f"{found.chance:.1f} %), precision {at}; {counted(found.n_queries, 'query', 'queries')}"
    )
    say(line)
    if found.skipped:
        say(f"{found.skipped:,} without another image of their class, left out")
    return found._asdict(), [line, "green frame: the query's class; red: another one"]


def _spread(found: Found, n: int) -> Found:
    """n of the images, from all over them."""
    total = len(found.rows)
    at = [(2 * i + 1) * total // (2 * min(n, total)) for i in range(min(n, total))]
    return found._replace(features=found.features[at], rows=found.rows[at])


def _rows(
    asked: Found, gallery: Found, k: int, frozen: FrozenBackbone
) -> list[tuple[Cell, list[Cell], dict[str, Any]]]:
    """Of each query its cell, its neighbors' cells, and both as plain values."""
    itself = _itself(asked, gallery)
    similarity, found = neighbors(
        asked.features.to(frozen.device), gallery.features.to(frozen.device), k, itself
    )
    rows = []
    for i, (values, own) in enumerate(zip(similarity.tolist(), found.tolist(), strict=True)):
        label = asked.class_of(i) or next((gallery.class_of(j) for j in itself[i]), "")
        cells, told = [], []
        for value, j in zip(values, own, strict=True):
            if value == -float("inf"):
                continue
            other = gallery.class_of(j)
            frame = (SAME if other == label else OTHER) if label and other else None
            lines = (f"{value:.3f}", *((other,) if other else (_name(gallery.path(j)),)))
            cells.append(Cell(_picture(gallery, j, frozen.transform), lines, frame))
            told.append({"path": gallery.path(j), "similarity": value, "class": other or None})
        path = asked.path(i)
        query = Cell(_picture(asked, i, frozen.transform), (_name(path), label))
        rows.append((query, cells, {"path": path, "class": label or None, "neighbors": told}))
    return rows


def _itself(asked: Found, gallery: Found) -> list[list[int]]:
    """Of each query the rows of the gallery that are the same image."""
    if asked.images is gallery.images:
        at = {int(row): i for i, row in enumerate(gallery.rows)}
        return [[at[int(row)]] for row in asked.rows]
    files: dict[str, list[int]] = {}
    for i in range(len(gallery.rows)):
        files.setdefault(os.path.realpath(gallery.path(i)), []).append(i)
    return [files.get(os.path.realpath(asked.path(i)), []) for i in range(len(asked.rows))]


def _picture(found: Found, i: int, transform: EvalTransform) -> Image.Image | None:
    """What the backbone has seen; None if it can no longer be read."""
    seen = found.images[int(found.rows[i])][1]
    if seen is None:
        return None
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (transform.mean, transform.std))
    pixels = ((seen * std + mean).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _name(path: str) -> str:
    return printable(os.path.basename(path))
