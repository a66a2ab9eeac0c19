"""Copy detection on Copydays, the protocol of the official eval_copy_detection.py: features are the
CLS token beside patch tokens pooled by GeM, images are squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...data.dataset import ImageDataset, scan
from ...runtime.backends import cores
from ...runtime.terminal import say
from ...runtime.words import counted
from ..frozen import FrozenBackbone, check_batches, features_and_rows, load_frozen
from ..images import IMAGENET_MEAN, IMAGENET_STD, Batches, ListedImages, image_files, to_tensor
from .revisited import average_precision, complete

ORIGINAL, STRONG = "original", "strong"
BLOCKS = (
    *(ORIGINAL, STRONG),
    *(f"jpegqual/{quality}" for quality in (3, 5, 8, 10, 15, 20, 30, 50, 75)),
    *(f"crops/{share}" for share in (10, 15, 20, 30, 40, 50, 60, 70, 80)),
)
PREFIX = 4  # letters of a name that a copy shares with its original
FOUND = 20  # images found for a query that are looked at
GEM_POWER, GEM_MIN = 4, 1e-6
LEAST_VARIANCE = 1e-5  # of the largest


@dataclass(frozen=True)
class Square:
    """RGB image -> normalized (3, side, side) fp32, whatever its shape."""

    side: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Image.Image) -> Tensor:
        square = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return to_tensor(square, self.mean, self.std)


def cls_and_gem(backbone: nn.Module, images: Tensor) -> Tensor:
    """Of the last block's normalized output the CLS token, beside the patch tokens' generalized
    mean with exponent 4 (GeM, arXiv 1711.02512): images (B, 3, h, w) -> (B, 2 D)."""
    tokens = backbone.get_intermediate_layers(images, 1)[0]  # type: ignore[operator]  # (B, N, D)
    patches = tokens[:, 1:].clamp(min=GEM_MIN)
    pooled = patches.pow(GEM_POWER).mean(1).pow(1 / GEM_POWER)
    return torch.cat((tokens[:, 0], pooled), 1)


def whitening(features: Tensor) -> Callable[[Tensor], Tensor]:
    """What takes features (n, D) to the principal components of `features` (N, D), each divided by
    its standard deviation.

    As in the official code the components are of second moments about 0, while the mean of
    `features` is taken from what is whitened; moments below LEAST_VARIANCE of the largest count as
    that.
    """
    mean = features.mean(0)
    second = (features.t() @ features / len(features)).cpu().double()
    variance, directions = torch.linalg.eigh(second)  # ascending
    variance = variance.clamp(min=LEAST_VARIANCE * variance[-1].item()).flip(0)
    matrix = (directions.flip(1) / variance.sqrt()).to(features)  # (D, D)
    return lambda others: (others - mean) @ matrix


def copy_map(queries: Tensor, gallery: Tensor, originals: list[list[int]]) -> float:
    """Mean average precision in percent of queries (Q, D) among a gallery (N, D), any lengths, the
    first FOUND of which count. originals: of each query, in the gallery."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).t()
    found = similarity.topk(min(FOUND, len(gallery)), dim=1).indices.tolist()
    averages = [
        average_precision([rank for rank, i in enumerate(own) if i in wanted], len(wanted))
        for own, wanted in zip(found, originals, strict=True)
    ]
    return 100 * float(np.mean(averages))


def copy_detection(
    pretrained_weights: str | Path,
    data_path: str | Path,
    *,
    whitening_path: str | Path | None = None,
    distractors_path: str | Path | None = None,
    imsize: int = 320,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    batch_size_per_gpu: int = 16,
    num_workers: int = 10,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> dict[str, float]:
    """Mean average precision in percent of each block of Copydays that is there, "strong" among
    them.

    data_path: a folder with original/ and strong/, perhaps jpegqual/ and crops/, of .jpg files.
    whitening_path, distractors_path: any source of images, to learn the whitening from, and to be
    searched beside the originals. imsize: side of the squares. Raises `ValueError` for data that is
    not complete, and for a backbone that is not a ViT.
    """
    check_batches(batch_size_per_gpu, num_workers)
    blocks = _blocks(Path(data_path))
    wanted = {name: _originals(name, paths, blocks[ORIGINAL]) for name, paths in blocks.items()}
    more = {
        name: _scan(name, path)
        for name, path in (("whitening", whitening_path), ("distractors", distractors_path))
        if path
    }
    frozen = load_frozen(
        pretrained_weights,
        checkpoint_key=checkpoint_key,
        arch=arch,
        patch_size=patch_size,
        device=device,
        backbone=backbone,
    )
    _check_vit(frozen, imsize)
    shown = Square(imsize, frozen.transform.mean, frozen.transform.std)
    told = "".join(f", {len(images):,} for {name}" for name, images in more.items())
    say(
        f"{counted(len(blocks[ORIGINAL]), 'original')}, "
        f"{counted(len(blocks[STRONG]), 'copy', 'copies')} in {STRONG}/{told}; "
        f"squares of {imsize}, features of {frozen.told}"
    )
    extract = partial(_extract, frozen, batch_size_per_gpu, min(num_workers, cores()))
    features = {
        name: complete(*extract(image_files(paths, shown, frozen.decode)), len(paths))
        for name, paths in blocks.items()
    }
    others = {
        name: extract(ListedImages(images, shown, frozen.decode))[0]
        for name, images in more.items()
    }
    results = _scores(features, others, wanted, frozen.device)
    for name, value in results.items():
        say(f"eval on {name} mAP={value / 100:.3f}")
    return results


def _scores(
    features: dict[str, Tensor],
    others: dict[str, Tensor],
    wanted: dict[str, list[list[int]]],
    where: torch.device,
) -> dict[str, float]:
    """Of each block, from its features and those of other images."""
    gallery = features[ORIGINAL]
    if "distractors" in others:
        gallery = torch.cat((gallery, others["distractors"]))
    whiten = whitening(others["whitening"]) if "whitening" in others else lambda x: x
    gallery = whiten(gallery).to(where)
    return {
        name: copy_map(whiten(queries).to(where), gallery, wanted[name])
        for name, queries in features.items()
    }


def _scan(name: str, path: str | Path) -> ImageDataset:
    """The images of a source, of which messages speak by its own option."""
    try:
        return scan(str(path))
    except ValueError as error:
        raise ValueError(str(error).replace("`data_path`", f"`{name}_path`")) from error


def _extract(
    frozen: FrozenBackbone, batch_size: int, workers: int, images: Batches
) -> tuple[Tensor, Tensor]:
    frozen.module.eval()
    take = partial(cls_and_gem, frozen.module)
    return features_and_rows(take, images, frozen.device, batch_size, workers)


def _check_vit(frozen: FrozenBackbone, imsize: int) -> None:
    if not hasattr(frozen.module, "get_intermediate_layers"):
        raise ValueError(f"{frozen.name} has no patch tokens to pool: choose a ViT.")
    if imsize < frozen.patch_size:
        raise ValueError(f"`imsize` is {imsize}: it must be at least {frozen.patch_size}, a patch.")


def _blocks(root: Path) -> dict[str, list[Path]]:
    """The .jpg files of each block that is there, sorted. Raises `ValueError` if the data is not
    complete."""
    found = {
        name: sorted(path for path in (root / name).iterdir() if path.name.endswith(".jpg"))
        for name in BLOCKS
        if (root / name).is_dir()
    }
    for name in (ORIGINAL, STRONG):
        if not found.get(name):
            raise ValueError(
                f"`data_path` '{root}' holds no .jpg files in {name}/: unpack Copydays there, "
                f"{ORIGINAL}/ and {STRONG}/."
            )
    return found


def _originals(name: str, copies: list[Path], originals: list[Path]) -> list[list[int]]:
    """Of each copy its originals: in strong/ by the beginning of the name, elsewhere by its place,
    as there is one copy of each. Raises `ValueError` where there is none."""
    if name != STRONG:
        if len(copies) != len(originals):
            raise ValueError(
                f"{name}/ has {counted(len(copies), 'image')} for "
                f"{counted(len(originals), 'original')}: it needs one for each."
            )
        return [[i] for i in range(len(copies))]
    places: dict[str, list[int]] = {}
    for i, path in enumerate(originals):
        places.setdefault(path.name[:PREFIX], []).append(i)
    for copy in copies:
        if copy.name[:PREFIX] not in places:
            raise ValueError(
                f"'{copy}' has no original whose name begins with {copy.name[:PREFIX]}: complete "
                f"{ORIGINAL}/."
            )
    return [places[copy.name[:PREFIX]] for copy in copies]
