"""A trained backbone as every evaluation takes it: its weights, and images prepared as in its
training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import arguments, load_backbone
from ..checkpoint.weights import VIT_OF_WIDTH, check_rgb
from ..data.decode import decode
from ..nn.features import features as features_of
from ..nn.vit import VisionTransformer
from ..runtime.backends import cores
from ..runtime.distributed import pick_device
from ..runtime.idle_threads import let_idle_threads_sleep
from ..runtime.image_progress import ImageProgress
from ..runtime.terminal import printable, say
from ..runtime.words import counted
from .images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batches,
    EvalTransform,
    LabeledImages,
    train_and_val,
)


@dataclass(frozen=True)
class FrozenBackbone:
    """module: in eval mode, on `device`. name: its architecture and patches, in words. patch_size:
    1 for backbones that are not our ViTs. transform: RGB image -> normalized (3, crop, crop).
    decode: bytes -> RGB image, with the gray values and EXIF turns of the training. told: which
    weights these are, in words."""

    module: nn.Module
    name: str
    patch_size: int
    transform: EvalTransform
    decode: Callable[[bytes], Image.Image]
    device: torch.device
    told: str

    def features(
        self, images: Batches, batch_size: int = 128, num_workers: int = 0
    ) -> tuple[Tensor, Tensor]:
        """`extract_features`, with at most one worker a core."""
        workers = min(num_workers, cores())
        return extract_features(self.module, images, self.device, batch_size, workers)


def load_frozen(
    pretrained_weights: str | Path,
    *,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    resize: int | None = None,
    crop: int | None = None,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> FrozenBackbone:
    """The backbone of `checkpoint.load_backbone(pretrained_weights, checkpoint_key, arch,
    patch_size, backbone)`, on `device`, by default a GPU if there is one.

    crop: default the size of the global crops that the checkpoint was trained with, 224 for
    official ones; resize: default 8/7 of it (256 for 224). Raises `ValueError` for weights that do
    not fit, and for sizes that cannot be.
    """
    where = pick_device(device)
    let_idle_threads_sleep()
    for option, value in (("`resize`", resize), ("`crop`", crop)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}: it must be at least 1.")
    trained_with = arguments(pretrained_weights)
    crop = crop or trained_with.get("global_crops_size", 224)
    name = arch or trained_with.get("arch") or "backbone"
    if backbone is not None:
        name = type(backbone).__name__
    with torch.random.fork_rng([]):  # where they are not trained
        torch.manual_seed(0)
        module = load_backbone(pretrained_weights, checkpoint_key, arch, patch_size, backbone)
    patch = 1
    check_rgb(pretrained_weights, module, trained_with)
    if isinstance(module, VisionTransformer):
        patch = module.patch_embed.patch_size
        name = f"{VIT_OF_WIDTH.get(module.embed_dim, name)} with patches of {patch} x {patch}"
    if crop % patch:
        raise ValueError(
            f"`crop` {crop} is not a multiple of the patch size {patch}: take "
            f"{max(crop // patch, 1) * patch}."
        )
    low, high = trained_with.get("value_range", (0, 0))
    untrained = checkpoint_key == "untrained"
    told = f"an untrained {name}, as" if untrained else f"the {checkpoint_key}'s {name}"
    return FrozenBackbone(
        module.to(where),
        name,
        patch,
        EvalTransform(
            resize or round(crop * 256 / 224),
            crop,
            tuple(trained_with.get("image_mean", IMAGENET_MEAN)),
            tuple(trained_with.get("image_std", IMAGENET_STD)),
        ),
        partial(
            decode,
            value_range=(low, high) if low < high else None,
            exif=bool(trained_with.get("exif", False)),
        ),
        where,
        f"{told} in '{pretrained_weights}'",
    )


def check_batches(batch_size_per_gpu: int, num_workers: int) -> None:
    """Raise `ValueError` for numbers of images or of workers that cannot be."""
    if batch_size_per_gpu < 1:
        raise ValueError(f"`batch_size_per_gpu` is {batch_size_per_gpu}: it must be at least 1.")
    if num_workers < 0:
        raise ValueError(f"`num_workers` is {num_workers}: it must not be negative.")


def labeled_halves(
    data_path: str | Path, frozen: FrozenBackbone
) -> tuple[LabeledImages, LabeledImages]:
    """Images to compare with and to classify, prepared for a backbone; says what they are, what is
    ignored, and whose features are taken."""
    transform = frozen.transform
    train, val, sentence = train_and_val(data_path, transform)
    say(f"{sentence} Shorter side {transform.resize}, center crop {transform.crop}.")
    for ignored in dict.fromkeys(filter(None, (train.ignored, val.ignored))):
        say(printable(ignored))
    say(f"features of {frozen.told}")
    return replace(train, decode=frozen.decode), replace(val, decode=frozen.decode)


def extract_features(
    backbone: nn.Module,
    images: Batches,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) fp32 and labels (N,), -1 where there are none, on the CPU, in the order of
    the files. Unreadable images are named and left out."""
    features, rows = features_and_rows(
        partial(features_of, backbone.to(device).eval()), images, device, batch_size, num_workers
    )
    return features, torch.as_tensor(np.asarray(images.labels))[rows]


@torch.no_grad()
def features_and_rows(
    features: Callable[[Tensor], Tensor],
    images: Batches,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """What `features` makes (N, D) of batches on `device`, fp32, and the rows (N,) of those images
    in `images`, on the CPU. Unreadable images are named and left out."""
    found, rows = list[Tensor](), list[Tensor]()
    progress, n_bad = ImageProgress(len(images), brief=True), 0
    for batch, index, bad_files in images.batches(batch_size, num_workers):
        tell_left_out(bad_files, progress)
        if len(index):
            found.append(finite(features(batch.to(device, non_blocking=True)).float().cpu()))
            rows.append(index)
        n_bad += len(bad_files)
        progress.show(progress.done + len(index) + len(bad_files), n_bad)
    progress.end()
    if not found:
        raise ValueError(none_readable(len(images)))
    return torch.cat(found), torch.cat(rows)


def finite(features: Tensor) -> Tensor:
    """Features as they are. Raises `ValueError` where some are not finite, from which neighbors and
    classifiers would be made all the same."""
    if not features.isfinite().all():
        raise ValueError(
            "features are not finite, as of weights that went astray in training: take an earlier "
            "checkpoint."
        )
    return features


def tell_left_out(bad_files: list[tuple[str | Path, str]], progress: ImageProgress) -> None:
    for path, reason in bad_files:
        progress.log(left_out(path, reason))


def left_out(path: str | Path, reason: object) -> str:
    return f"left out, cannot be read: {printable(str(path))} ({reason})"


def none_readable(n_images: int) -> str:
    return f"{counted(n_images, 'image')}, and none can be read: look at the reasons above."
