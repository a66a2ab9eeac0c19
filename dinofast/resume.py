"""Where a run goes on: a checkpoint loaded into freshly built parts, and the step after it."""

from __future__ import annotations

import operator
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
    is_linear,
    mapping_of,
    numbered,
    read,
    weights_under,
)
from .config import OLD_NAMES, VITS, Config
from .data import Loader
from .nn.dino import Model
from .runtime.words import one_line

# Options that change neither the weights nor, but for rounding, the trajectory, so that another
# value on resuming is nobody's concern.
RESUME_MUTABLE_OPTIONS = {
    "preset",
    "config",
    "init",
    "eval_data",
    "eval_every",
    "tensorboard",
    "wandb",
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
# Options that decide which tensors there are, and of which shapes.
_SHAPING_OPTIONS = (
    *("arch", "patch_size", "in_channels", "global_crops_size", "optimizer"),
    *("out_dim", "use_bn_in_head", "head_layers", "head_hidden_dim", "head_bottleneck_dim"),
    "norm_last_layer",
)


def is_begun(path: Path) -> bool:
    """Whether `go_on` finds something that a run which saves to `path` has left."""
    return path.exists() or path.is_symlink() or bool(numbered(path.parent))


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
    stays = "It was left as it is: move it away, or choose another `output_dir`."
    try:
        state = read(path)
    except ValueError as error:
        raise ValueError(f"{error} {stays}{_beside(path)}") from error
    saved_args = arguments_in(state)
    try:
        hint = _differing(saved_args, cfg)
        position, notes = _load(path, state, model, optimizer, scaler, hint)
    except ValueError as error:
        raise ValueError(f"{error} {stays}") from error
    now = cfg.to_dict()
    notes += [
        f"`{name}` was {_told(saved_args[name])} and is now {_told(now[name])}"
        for name in now
        if name in saved_args
        and name not in RESUME_MUTABLE_OPTIONS
        and not _equal(name, saved_args[name], now[name])
    ]
    notes += [
        f"'{other.name}' is of a later epoch than '{path}': it is replaced when this run gets there"
        for other in numbered(path.parent)
        if int(other.stem.removeprefix("checkpoint")) >= position.epoch
    ]
    return position, notes


def _load(
    path: Path,
    state: Mapping[str, Any],
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    hint: str,
) -> tuple[TrainState, list[str]]:
    """Where the run stands, and what there is to say of the weights. hint: the way out where they
    do not fit."""
    missing = [
        key for key in ("student", "teacher", "optimizer", "epoch", "dino_loss") if key not in state
    ]
    if missing:
        raise ValueError(
            f"'{path}' {_what_it_holds(state)}is no DINO training checkpoint (it lacks "
            f"{', '.join(missing)})."
        )
    parts = (
        (model.student, weights_under(path, state, "student", "module."), "student"),
        (model.teacher, weights_under(path, state, "teacher", "module."), "teacher"),
        (model.dino_loss, weights_under(path, state, "dino_loss"), "dino_loss"),
    )
    notes = []
    for module, weights, what in parts:
        for name in check_fit(path, module, weights, what, hint):
            notes.append(f"'{name}' of the {what} holds numbers that are not finite")
    position = _position(path, state)
    _check_optimizer(path, optimizer, state["optimizer"], hint)
    scale = state.get("fp16_scaler")
    if scaler is not None and scale:
        if not isinstance(scale, Mapping) or not scaler.state_dict().keys() <= scale.keys():
            raise ValueError(f"'{path}' holds no state of a loss scaler under 'fp16_scaler'.")
        scaler.load_state_dict(dict(scale))
    for module, weights, _ in parts:
        module.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    return position, notes


def _what_it_holds(state: Mapping[str, Any]) -> str:
    """Of a file that no run goes on from; nothing where that is not known."""
    networks = [key for key in ("teacher", "student") if key in state]
    if networks:
        return f"holds {' and '.join(networks)} alone, it "
    for held in (state, *(value for value in state.values() if isinstance(value, Mapping))):
        if is_linear(mapping_of(held, "module.")):
            return "holds a linear classifier alone, as eval_linear.py saves it, it "
        if any(isinstance(value, Tensor) for value in held.values()):
            return "holds the weights of a model alone, it "
    return ""


def _differing(saved: Mapping[str, Any], cfg: Config) -> str:
    """The options that shape what is saved and are not those of the save, as a way out; of none
    nothing is said."""
    now = cfg.to_dict()
    other = [
        f"`{name}` {saved[name]} (now {_told(now[name])})"
        for name in _SHAPING_OPTIONS
        if name in saved and not _equal(name, saved[name], now[name])
    ]
    own = saved.get("arch", cfg.arch) not in (*VITS, cfg.arch)
    way_out = "; a backbone of your own is given by train(cfg, backbone=...)" if own else ""
    return f": it was saved with {', '.join(other)}; resume with that{way_out}" if other else ""


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


def _beside(path: Path) -> str:
    """The newest numbered checkpoint beside one that cannot be read, if it can."""
    good = next((other for other in numbered(path.parent) if _can_be_read(other)), None)
    if good is None:
        return ""
    return (
        f" '{good.name}' beside it can be read: with '{path.name}' moved away the run goes on "
        "from there."
    )


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
            else TrainState(epoch=operator.index(state["epoch"]))  # NumPy's and torch's, too
        )
        if isinstance(position.sums, list):  # as they were saved before metrics had names
            position = replace(position, sums={})
        position.check()
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"'{path}' does not tell where the run stands ({one_line(error)})."
        ) from error
    return position


def _check_optimizer(
    path: Path, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], hint: str
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
        raise ValueError(f"'{path}' holds no optimizer state that can be understood.") from error
    same_kind = all(
        ("betas" in a, "eta" in a) == ("betas" in b, "eta" in b)
        for a, b in zip(ours, theirs, strict=False)
    )
    if not same_kind or not fits or [len(g["params"]) for g in ours] != lengths:
        raise ValueError(
            f"'{path}' was saved with another optimizer or other trainable parameters{hint}."
        )


def _equal(name: str, saved: Any, now: Any) -> bool:
    """Of two values of an option: a list is a tuple, "4" is 4, and old names of ViTs are theirs."""
    if name == "arch":
        return OLD_NAMES.get(saved, saved) == OLD_NAMES.get(now, now)
    return bool(_plain(saved) == _plain(now)) or str(saved) == str(now)


def _told(value: Any) -> Any:
    return "auto" if value is None else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
