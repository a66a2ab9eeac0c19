"""Features of every image of a source, in a file that other programs read. A run that was ended
goes on where it stopped."""

from __future__ import annotations

import hashlib
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ... import __version__
from ...data.decode import BadFiles
from ...nn.features import features as features_of
from ...runtime.backends import cores
from ...runtime.image_progress import ImageProgress
from ...runtime.signals import Interrupted, StopSignal
from ...runtime.terminal import say
from ...runtime.words import counted
from ...validation import check_output
from ..frozen import (
    FrozenBackbone,
    check_batches,
    finite,
    load_frozen,
    none_readable,
    tell_left_out,
)
from ..images import ListedImages, listed_images
from .feature_file import FeatureTable, check_features_file, write_features
from .feature_parts import PART_IMAGES, PART_S, FeatureParts

BATCH_S = 10.0
DTYPES, PRECISIONS = ("float32", "float16"), ("fp32", "bf16")


class Embedded(NamedTuple):
    """n features of `width` numbers in `path`, images left out as (path, reason), and images/s of
    this run, 0 if nothing was left to do."""

    path: Path
    n: int
    width: int
    left_out: BadFiles
    images_per_s: float


def embed(
    pretrained_weights: str | Path,
    data_path: str | Path,
    features: str | Path = "features.npz",
    *,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    dtype: str = "float32",
    precision: str = "fp32",
    batch_size_per_gpu: int = 128,
    num_workers: int = 10,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> Embedded:
    """Write the features of every image of `data_path`, any source that pretraining takes, into the
    file `features`, .npz or .parquet: see `feature_file.write_features`.

    The backbone, its device and the size of its images: see `frozen.load_frozen`; what of its
    output is the feature: see `nn.features`. precision bf16 computes under autocast. Finished parts
    lie in `features`.parts/ until the file is there; the same call goes on with them. Images that
    cannot be read are named and left out. Raises `ValueError` for what cannot be, and for parts
    made with anything else, `Interrupted` for a signal.
    """
    path = Path(features)
    _check(str(features), dtype, precision)
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
    images = listed_images(data_path, frozen.transform, frozen.decode)
    sizes = f"shorter side {frozen.transform.resize}, center crop {frozen.transform.crop}"
    say(f"{counted(len(images), 'image')}, {sizes}; features of {frozen.told}")
    made_with = _made_with(frozen, images, data_path, dtype, precision)
    folder = path.with_name(path.name + ".parts")
    with StopSignal() as stop, FeatureParts(folder, made_with) as parts:
        if parts.done:
            say(f"{parts.done:,} of them are in '{parts.folder}' already")
        how = dtype, precision, batch_size_per_gpu, min(num_workers, cores())
        try:
            rate = _extract(frozen, images, parts, stop, *how)
            table, left_out = _table(images, parts, {"features_of": frozen.told, **made_with})
            write_features(path, table)
        except Interrupted as error:
            raise _stopped(error, parts, len(images)) from error
        parts.remove()
    found = Embedded(path, table.n, table.width, left_out, rate)
    say(_told(found))
    return found


def _check(features: str, dtype: str, precision: str) -> None:
    """Raise `ValueError` for what cannot be, before anything is read."""
    check_output("features", features, is_replaced=True)
    check_features_file(features)
    for name, value, known in (("dtype", dtype, DTYPES), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f"`{name}` is '{value}': choose from {', '.join(known)}.")


def _stopped(error: Interrupted, parts: FeatureParts, n: int) -> Interrupted:
    told = f"stopped after {parts.done:,} of {counted(n, 'image')}"
    return Interrupted(error.signum, f"{told}; the same command goes on from there.")


def _told(found: Embedded) -> str:
    left_out = f", {counted(len(found.left_out), 'image')} left out" if found.left_out else ""
    rate = f"; {found.images_per_s:,.1f} images/s" if found.images_per_s else ""
    features = f"{counted(found.n, 'feature')} of {found.width} numbers"
    return f"{features} in '{found.path}'{left_out}{rate}"


def weights_fingerprint(module: nn.Module) -> str:
    """Equal for the same names, types, shapes and values of parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _made_with(
    frozen: FrozenBackbone,
    images: ListedImages,
    data_path: str | Path,
    dtype: str,
    precision: str,
) -> dict[str, str]:
    """What features depend on, by names that a sentence can take. The size of a batch is not among
    them: it changes rounding alone."""
    shown, how = frozen.transform, getattr(frozen.decode, "keywords", {})
    return {
        "weights": weights_fingerprint(frozen.module),
        "backbone": frozen.name,
        "images": f"{len(images):,}, {images.listed.fingerprint}",
        "data_path": str(Path(data_path).absolute()),
        "resize": str(shown.resize),
        "crop": str(shown.crop),
        "normalization": f"mean {shown.mean}, std {shown.std}",
        "decoding": ", ".join(f"{name} {value}" for name, value in sorted(how.items())),
        "dtype": dtype,
        "precision": precision,
    }


@torch.no_grad()
def _extract(
    frozen: FrozenBackbone,
    images: ListedImages,
    parts: FeatureParts,
    stop: StopSignal,
    dtype: str,
    precision: str,
    batch_size: int,
    workers: int,
) -> float:
    """Add what is missing to the parts; images/s. Whatever ends it, all finished batches are in the
    parts then. A signal ends it after a batch, or at once where one takes longer than
    BATCH_S."""
    frozen.module.eval()
    progress, n_bad = ImageProgress(len(images), parts.done), sum(len(p.bad) for p in parts.parts)
    since = began = time.monotonic()
    stop.begin(lambda: max(0.0, time.monotonic() - began - BATCH_S), several=False)
    try:
        for batch, rows, bad_files in images.batches(batch_size, workers, parts.done):
            tell_left_out(bad_files, progress)
            found = np.empty((0, 0), dtype)
            if len(rows):
                with _autocast(frozen.device, precision):
                    made = features_of(frozen.module, batch.to(frozen.device, non_blocking=True))
                found = _as(dtype, finite(made))
            bad = [(str(path), reason) for path, reason in bad_files]
            parts.add(len(rows) + len(bad), rows.numpy(), found, bad)
            n_bad += len(bad)
            progress.show(parts.done + parts.pending, n_bad)
            if parts.pending >= PART_IMAGES or time.monotonic() - since >= PART_S:
                parts.flush()
                since = time.monotonic()
            if stop.signum:
                raise Interrupted(stop.signum, "")
            began = time.monotonic()
    finally:
        parts.flush()
        progress.end()
    return progress.rate()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _as(dtype: str, made: Tensor) -> np.ndarray:
    """Features (B, D) on the CPU. Raises `ValueError` if float16 does not hold them."""
    found = made.to(getattr(torch, dtype))
    if dtype == "float16" and not found.isfinite().all():
        raise ValueError(
            f"`dtype` is float16, which ends at 65504, and features reach {made.abs().max():.3g}: "
            "take float32."
        )
    return found.cpu().numpy()


def _table(
    images: ListedImages, parts: FeatureParts, told: dict[str, str]
) -> tuple[FeatureTable, BadFiles]:
    """All parts as the file takes them, with what is told of them, and what is left out. Raises
    `ValueError` if that is all."""
    rows = np.concatenate([part.rows for part in parts.parts])
    if not len(rows):
        parts.remove()
        raise ValueError(none_readable(len(images)))
    left_out = [*images.listed.bad_files, *(one for part in parts.parts for one in part.bad)]
    first = next(parts.features())
    metadata = {"dinofast": __version__, **told, "left_out": left_out}
    table = FeatureTable(
        len(rows),
        first.shape[1],
        first.dtype,
        lambda i: images.path(int(rows[i])),
        parts.features,
        np.asarray(images.labels)[rows],
        images.classes,
        metadata,
    )
    return table, left_out
