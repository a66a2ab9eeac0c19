"""Where a run goes on: a checkpoint loaded into freshly built parts, and the step after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import (
    TrainState,
    arguments_in,
    check_fit,
    finite,
    mapping_of,
    numbered,
    read,
)
from .config import Config
from .data import Loader
from .nn.dino import Model

# Options that change neither the weights nor, but for rounding, the trajectory, so that another
# value on resuming is nobody's concern.
RESUME_MUTABLE_OPTIONS = {
    "data_path",
    "output_dir",
    "saveckp_freq",
    "saveckp_steps",
    "log_steps",
    "num_workers",
    "data_backend",
    "device",
    "dist_url",
    "local_rank",
    "gpu",
    "rank",
    "world_size",
    "dist_backend",
    "max_bad_files",
    "attention",
    "linear",
    "compile",
    "cuda_graph",
    "grad_checkpointing",
}


def go_on(
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    cfg: Config,
) -> tuple[Path | None, TrainState, list[str]]:
    """`restore` what a run that saves to `path` has left: that file, or where it is gone the newest
    numbered one beside it. Returns which, None for a new run."""
    found, notes = path, list[str]()
    if path.is_symlink():
        notes = [
            f"'{path}' is a link to '{path.readlink()}': the next save takes the place of the "
            "link, and what it points to stays as it is"
        ]
    elif not path.exists():
        others = numbered(path.parent)
        if not others:
            return None, TrainState(), []
        found = others[0]
        notes = [f"there is no '{path}': '{found.name}' beside it is taken instead"]
    position, changed = restore(found, model, optimizer, scaler, cfg)
    return found, position, notes + changed


def restore(
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    cfg: Config,
) -> tuple[TrainState, list[str]]:
    """Load a training checkpoint, ours or an official one, into freshly built parts.

    Returns where the run stands (`n_images` 0 when the file does not tell: an official one, to go
    on at the start of its epoch) and sentences about what has changed. Raises `ValueError`
    when the file does not fit; nothing is half loaded then.
    """
    state = _read(path)
    missing = [
        key for key in ("student", "teacher", "optimizer", "epoch", "dino_loss") if key not in state
    ]
    if missing:
        raise ValueError(
            f"'{path}' is no DINO training checkpoint (it lacks {', '.join(missing)}): it was left "
            "as it is; choose another `output_dir` or move the file away."
        )
    saved_args = arguments_in(state)
    parts = (
        (model.student, mapping_of(state["student"], "module."), "student"),
        (model.teacher, mapping_of(state["teacher"], "module."), "teacher"),
        (model.dino_loss, mapping_of(state["dino_loss"]), "dino_loss"),
    )
    notes = []
    for module, weights, what in parts:
        for name in check_fit(path, module, weights, what, saved_args):
            notes.append(f"'{name}' of the {what} holds numbers that are not finite")
    position = _position(path, state)
    _check_optimizer(path, optimizer, state["optimizer"], saved_args)
    for module, weights, _ in parts:
        module.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    if scaler is not None and "fp16_scaler" in state:
        scaler.load_state_dict(state["fp16_scaler"])
    now = cfg.to_dict()
    notes += [
        f"`{name}` was {_told(saved_args[name])} and is now {_told(now[name])}"
        for name in now
        if name in saved_args
        and name not in RESUME_MUTABLE_OPTIONS
        and _plain(saved_args[name]) != _plain(now[name])
    ]
    notes += [
        f"'{other.name}' is of a later epoch than '{path}': it is replaced when this run gets there"
        for other in numbered(path.parent)
        if int(other.stem.removeprefix("checkpoint")) >= position.epoch
    ]
    return position, notes


def first_step(position: TrainState, loader: Loader, batch: int) -> tuple[int, list[str]]:
    """Where to go on, and why not exactly there: the very step if images and batch are as they
    were, else near it."""
    start = position.epoch * loader.steps_per_epoch
    if not position.fingerprint:  # an official checkpoint, or a new run
        return start, []
    if position.fingerprint != loader.fingerprint:
        return start, [
            f"the images are not those of the save ({position.n_images} then, {loader.n_images} "
            f"now): epoch {position.epoch + 1} starts anew from the saved weights"
        ]
    inside, rest = divmod(position.images_in_epoch, batch)
    notes = []
    if position.global_batch != batch:
        notes = [
            f"the global batch was {position.global_batch} and is now {batch}, and the learning "
            "rate is scaled with it"
        ]
        if rest:
            notes.append(f"the last {rest} images before the save are seen again")
    return start + min(inside, loader.steps_per_epoch), notes


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint; where it cannot be read the error names one beside it that can."""
    try:
        return read(path)
    except ValueError as error:
        good = next((other for other in numbered(path.parent) if _can_be_read(other)), None)
        if good is None:
            raise
        raise ValueError(
            f"{error} '{good.name}' beside it can be read: with '{path.name}' moved away the run "
            "goes on from there."
        ) from error


def _can_be_read(path: Path) -> bool:
    try:
        return bool(read(path, mmap=True))
    except ValueError:
        return False


def _position(path: Path, state: Mapping[str, Any]) -> TrainState:
    """Where the run stands; of an official checkpoint only the epoch is known."""
    try:
        ours = state.get("dinofast")
        known = TrainState.__dataclass_fields__
        position = (
            TrainState(**{k: v for k, v in ours.items() if k in known})
            if ours
            else TrainState(epoch=state["epoch"])
        )
        if isinstance(position.sums, list):  # as they were saved before metrics had names
            position = replace(position, sums={})
        position.check()
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{path}' does not tell where the run stands ({error}): it was left as it is; move it "
            "away, or choose another `output_dir`."
        ) from error
    return position


def _check_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], args: Mapping[str, Any]
) -> None:
    """AdamW, SGD and LARS keep different things; torch itself would only notice at the first
    step."""
    try:
        ours, theirs = optimizer.param_groups, list(saved["param_groups"])
        shapes = {
            i: tuple(p.shape) for i, p in enumerate(p for group in ours for p in group["params"])
        }
        fits = all(
            value.ndim == 0 or (tuple(value.shape) == shapes[i] and finite(value))
            for i, state in saved["state"].items()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        lengths = [len(g["params"]) for g in theirs]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"'{path}' holds no optimizer state that can be understood: it was left as it is; move "
            "it away, or choose another `output_dir`."
        ) from error
    same_kind = all(
        ("betas" in a, "eta" in a) == ("betas" in b, "eta" in b)
        for a, b in zip(ours, theirs, strict=False)
    )
    if not same_kind or not fits or [len(g["params"]) for g in ours] != lengths:
        was = f" (`optimizer` {args['optimizer']})" if "optimizer" in args else ""
        raise ValueError(
            f"'{path}' was saved with another optimizer{was} or other trainable parameters: resume "
            "with the options it was saved with, or choose another `output_dir`."
        )


def _told(value: Any) -> Any:
    return "auto" if value is None else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
