"""Linear classification of frozen features by the protocol of the official eval_linear.py: one
layer, trained on random crops whose features are computed as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint import SaveFailed, is_linear, lock_output_dir, read
from ...checkpoint.storage import reason, write
from ...nn.features import features
from ...nn.vit import VisionTransformer
from ...runtime.json_lines import JsonLines
from ...runtime.terminal import say
from ...runtime.words import counted, one_line
from ..frozen import FrozenBackbone
from ..images import LabeledImages
from .crops import training_crops
from .features import batches, hits, percent

NAME = "checkpoint.pth.tar"
EPOCHS, LR, MOMENTUM, INIT_STD = 100, 0.001, 0.9, 0.01
SMALL = 384  # widest ViT of which the official evaluation takes four blocks: ViT-S


@dataclass(frozen=True)
class Inputs:
    """What the layer sees: CLS of the last n_last_blocks blocks and, if avgpool_patchtokens, the
    mean of the last one's patch tokens; of other backbones than ViTs (n_last_blocks 0) their pooled
    output."""

    n_last_blocks: int
    avgpool_patchtokens: bool

    def __call__(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """images (B, 3, h, w) -> (B, D). Of one block CLS and mean alternate, c0 m0 c1 m1 ..., as
        the official code stacks them and its released classifiers expect; for several blocks with
        the mean that code fails, and the mean stands behind."""
        if not isinstance(backbone, VisionTransformer):
            return features(backbone, images)
        layers = backbone.get_intermediate_layers(images, self.n_last_blocks)
        x = torch.cat([tokens[:, 0] for tokens in layers], dim=1)
        if not self.avgpool_patchtokens:
            return x
        mean = layers[-1][:, 1:].mean(1)
        if self.n_last_blocks == 1:
            return torch.stack((x, mean), dim=2).flatten(1)
        return torch.cat((x, mean), dim=1)

    def __str__(self) -> str:
        if not self.n_last_blocks:
            return "pooled output"
        blocks = counted(self.n_last_blocks, "block")
        mean = ", mean of its patch tokens" if self.avgpool_patchtokens else ""
        return f"CLS of the last {blocks}{mean}"


def inputs_of(backbone: nn.Module, n_last_blocks: int | None, avgpool: bool | None) -> Inputs:
    """Those given, else as published: four blocks of ViT-S and smaller ones, for wider ones the
    last block with the mean of patches. Raises `ValueError` for blocks that are not there."""
    if not isinstance(backbone, VisionTransformer):
        if n_last_blocks is not None or avgpool:
            option = "avgpool_patchtokens" if avgpool else "n_last_blocks"
            raise ValueError(
                f"`{option}` is for our ViTs, not for {type(backbone).__name__}, of which the "
                "pooled output is taken: leave it out."
            )
        return Inputs(0, False)
    depth, small = len(backbone.blocks), backbone.embed_dim <= SMALL
    if n_last_blocks is not None and not 1 <= n_last_blocks <= depth:
        raise ValueError(
            f"`n_last_blocks` is {n_last_blocks}, but the backbone has {counted(depth, 'block')}: "
            f"give 1 to {depth}."
        )
    n = n_last_blocks or min(4 if small else 1, depth)
    return Inputs(n, not small if avgpool is None else avgpool)


class LinearClassifier(nn.Module):
    """One layer with the official names: (B, D) -> (B, C). Weights N(0, 0.01), biases 0."""

    def __init__(self, dim: int, num_labels: int, seed: int = 0) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.linear = nn.Linear(dim, num_labels)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=INIT_STD, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class Official:
    """How the layer is trained; lr for 256 images at a time."""

    inputs: Inputs
    num_labels: int
    epochs: int = EPOCHS
    lr: float = LR
    val_freq: int = 1
    batch_size: int = 128
    num_workers: int = 10
    seed: int = 0


@torch.no_grad()
def validate(
    frozen: FrozenBackbone,
    classifier: LinearClassifier,
    val: LabeledImages,
    how: Official,
    told: set[str | Path],
) -> dict[str, float]:
    """Official keys: loss (mean over batches), acc1 and, of five classes and more, acc5, in
    percent."""
    losses, found, n = list[float](), torch.zeros(2, dtype=torch.long), 0
    for x, y in batches(frozen, val, how.batch_size, how.num_workers, "validation", told):
        scores = classifier(how.inputs(frozen.module, x))
        losses.append(F.cross_entropy(scores, y).item())
        found += hits(scores, y).cpu()
        n += len(y)
    accuracy = percent(found, n, how.num_labels)
    return {
        "loss": sum(losses) / len(losses),
        **{name.replace("top", "acc"): value for name, value in accuracy.items()},
    }


def train(
    frozen: FrozenBackbone,
    train_images: LabeledImages,
    val: LabeledImages,
    how: Official,
    output_dir: Path,
) -> dict[str, Any]:
    """Train a layer, save it in `output_dir` after each epoch, and return {"top1", "top5" of the
    last epoch, "best_top1" of all}, in percent. What is found there is gone on with, exactly.

    Raises `ValueError` if another run lies there, `SaveFailed` if it cannot be saved.
    """
    _check_folder(output_dir)
    with lock_output_dir(output_dir):
        return _train(frozen, train_images, val, how, output_dir)


def _train(
    frozen: FrozenBackbone,
    train_images: LabeledImages,
    val: LabeledImages,
    how: Official,
    output_dir: Path,
) -> dict[str, Any]:
    classifier = LinearClassifier(_width(frozen, how.inputs), how.num_labels, how.seed)
    classifier.to(frozen.device)
    lr = how.lr * how.batch_size / 256
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=MOMENTUM, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs, eta_min=0)
    path, told = output_dir / NAME, set[str | Path]()
    log = JsonLines(output_dir / "log.txt", "epoch")
    settings = _settings(frozen, how, len(train_images))
    start, best = _resume(path, classifier, optimizer, scheduler, settings)
    log.drop_from(start)
    last: dict[str, float] = {}
    if start >= how.epochs:
        say(f"training already complete ({counted(start, 'epoch')}), in '{path}': evaluates it")
        last = validate(frozen, classifier, val, how, told)
    for epoch in range(start, how.epochs):
        crops, losses = training_crops(train_images, how.seed, epoch), list[Tensor]()
        name, rate = f"epoch {epoch} of 0-{how.epochs - 1}", optimizer.param_groups[0]["lr"]
        for x, y in batches(frozen, crops, how.batch_size, how.num_workers, name, told):
            with torch.no_grad():
                x = how.inputs(frozen.module, x)
            loss = F.cross_entropy(classifier(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step()
        mean = torch.stack(losses).double().mean().item()
        line = {"train_loss": mean, "train_lr": rate, "epoch": epoch}
        words = f"end of {name}: mean loss {mean:.4f}"
        if epoch % how.val_freq == 0 or epoch == how.epochs - 1:
            last = validate(frozen, classifier, val, how, told)
            best = max(best, last["acc1"])
            line.update({f"test_{key}": value for key, value in last.items()})
            words += f", top-1 on val {last['acc1']:.1f}, best so far {best:.1f}"
        say(words)
        _save(path, classifier, optimizer, scheduler, epoch + 1, best, settings)
        if problem := log.append(line):
            say(f"'{log.path}' cannot be written ({problem}): kept for the next epoch")
    return {**_named(last), "best_top1": best}


def _named(found: dict[str, float]) -> dict[str, float]:
    """Accuracies by the names of the other protocols."""
    return {key.replace("acc", "top"): value for key, value in found.items() if key != "loss"}


# ---- what is saved
def _settings(frozen: FrozenBackbone, how: Official, n_images: int) -> dict[str, Any]:
    """What makes another run of a run, under the names of its options where it has them."""
    state = hashlib.blake2b(digest_size=8)
    for value in frozen.module.state_dict().values():
        state.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return {
        "n_last_blocks": how.inputs.n_last_blocks,
        "avgpool_patchtokens": how.inputs.avgpool_patchtokens,
        "num_labels": how.num_labels,
        "epochs": how.epochs,
        "lr": how.lr,
        "batch_size_per_gpu": how.batch_size,
        "seed": how.seed,
        "crop": frozen.transform.crop,
        "images": n_images,
        "backbone": state.hexdigest(),
    }


def _check_folder(folder: Path) -> None:
    if (folder / "checkpoint.pth").exists():
        raise ValueError(
            f"`output_dir` '{folder}' is the folder of a pretraining run, which has a log.txt of "
            f"its own: give another, such as '{folder / 'linear'}'."
        )


def _save(
    path: Path,
    classifier: LinearClassifier,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
    best: float,
    settings: dict[str, Any],
) -> None:
    """The official keys, with the names that the layer has in DistributedDataParallel there, and
    one more."""
    state = {
        "epoch": epoch,
        "state_dict": {f"module.{k}": v for k, v in classifier.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "best_acc": best,
        "dinofast": settings,
    }
    try:
        write(path, partial(torch.save, state), _check)
    except Exception as error:
        system = reason(error)
        problem = (system.strerror or str(system)) if system else one_line(error)
        stays = "; that of the epoch before is as it was" if path.exists() else ""
        raise SaveFailed(f"'{path}' could not be saved ({problem}){stays}.", True) from error


def _check(file: Path) -> None:
    read(file)


def _resume(
    path: Path,
    classifier: LinearClassifier,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    settings: dict[str, Any],
) -> tuple[int, float]:
    """Load what is saved; the next epoch, and the best top-1 so far. Raises `ValueError` for what
    another run has saved."""
    if not path.exists():
        return 0, 0.0
    state = read(path)
    saved = state.get("dinofast", {})
    for name, value in settings.items():
        if (before := saved.get(name, value)) != value:
            what = f"`{name}` {before}, not {value}"
            if name in ("images", "backbone"):
                what = f"another {'number of images' if name == 'images' else 'backbone'}"
            raise ValueError(
                f"'{path}' was trained with {what}: give the same to go on with it, or another "
                "`output_dir`."
            )
    known = scheduler.state_dict()
    try:
        classifier.load_state_dict(read_classifier(path))
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict({k: v for k, v in state["scheduler"].items() if k in known})
        epoch, best = int(state["epoch"]), float(state["best_acc"])
    except Exception as error:  # what lacks a key or has another shape raises all kinds
        raise ValueError(
            f"'{path}' cannot be gone on with ({one_line(error)}): give another `output_dir`."
        ) from error
    say(f"resumed from '{path}' after {counted(epoch, 'epoch')}")
    return epoch, best


# ---- a layer that is given
def evaluate(
    frozen: FrozenBackbone, val: LabeledImages, how: Official, file: Path
) -> dict[str, Any]:
    """{"top1", "top5"} in percent of the layer in a file: a checkpoint of `train` or of
    eval_linear.py, or a released dino_..._linearweights.pth."""
    weights = read_classifier(file)
    classes, width = weights["linear.weight"].shape
    if classes != how.num_labels:
        raise ValueError(
            f"'{file}' knows {counted(classes, 'class', 'classes')}, but the images are of "
            f"{how.num_labels}: give the folders of all its classes, or `num_labels` {classes} if "
            "these are the first of them, sorted by name."
        )
    wanted = _width(frozen, how.inputs)
    if width != wanted:
        raise ValueError(
            f"'{file}' takes {width:,} features, but there are {wanted:,} ({how.inputs}): "
            f"{_way_out(frozen.module, width)}."
        )
    classifier = LinearClassifier(width, classes)
    classifier.load_state_dict(weights)
    found = validate(frozen, classifier.to(frozen.device), val, how, set())
    return _named(found)


def read_classifier(file: Path) -> dict[str, Tensor]:
    """`linear.weight` (C, D) and `linear.bias` (C,) fp32 of a file. Raises `ValueError` if it holds
    something else."""
    state = read(file)
    held = state.get("state_dict", state)
    weights = held if isinstance(held, Mapping) else {}
    found = {name.rpartition(".")[2]: value for name, value in weights.items()}
    if not is_linear(weights) or "bias" not in found:
        raise ValueError(
            f"'{file}' holds no linear classifier (linear.weight and linear.bias): give a "
            f"{NAME} of this command or of eval_linear.py, or a released ..._linearweights.pth."
        )
    return {f"linear.{name}": value.float() for name, value in found.items()}


@torch.no_grad()
def _width(frozen: FrozenBackbone, inputs: Inputs) -> int:
    side = frozen.transform.crop
    return inputs(frozen.module, torch.zeros(1, 3, side, side, device=frozen.device)).shape[1]


def _way_out(backbone: nn.Module, width: int) -> str:
    """How a layer of this width may have been trained."""
    d = backbone.embed_dim if isinstance(backbone, VisionTransformer) else 0
    if not d or width % d:
        return "give the backbone that it was trained on"
    n = width // d
    plain = f"`n_last_blocks` {n} with `avgpool_patchtokens` false"
    more = f", or `n_last_blocks` {n - 1} with it true" if n > 1 else ""
    return f"it may have been trained with {plain}{more}"
