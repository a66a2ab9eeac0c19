"""What a run saves: the official layout, tried before training, read back once, tried again where
the disk was full."""

from __future__ import annotations

import io
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import __version__
from ..config import Config
from ..nn.dino import Model
from ..runtime.words import a_kind, one_line
from .reading import load, read, with_attributes
from .storage import FULL, SaveFailed, link, reason, write
from .weights import mapping_of

RETRY_S, MOST_RETRY_S = 60.0, 3600.0  # after a save that failed; doubled each time
_SMALL = 1024  # elements of a tensor that a trial saves as it is


@dataclass
class TrainState:
    """Where a run stands: `step` optimizer steps are done. The sums make the epoch's log line exact
    after a resume."""

    step: int = 0
    epoch: int = 0
    images_in_epoch: int = 0
    n_images: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""  # of the images, empty when unknown
    global_batch: int = 0

    def check(self) -> None:
        """Raise `ValueError` for what no save of ours holds."""
        for f in fields(self):
            value = getattr(self, f.name)
            if type(value) is not type(getattr(TrainState(), f.name)) or (
                isinstance(value, int) and value < 0
            ):
                raise ValueError(f"its position in the run says {f.name}={value!r}")


def contents(
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    cfg: Config,
    position: TrainState,
) -> dict[str, Any]:
    """The official keys (`student` named `module.*`, `teacher`, `optimizer`, `epoch` = the next
    one, `args`, `dino_loss`, `fp16_scaler` where used) and one more, `dinofast`."""
    state = {
        "student": _with_prefix(model.student.state_dict(), "module"),
        "teacher": model.teacher.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": position.epoch,
        "args": with_attributes(cfg.to_dict()),
        "dino_loss": model.dino_loss.state_dict(),
        "dinofast": {"version": __version__, **asdict(position)},
    }
    if scaler is not None:
        state["fp16_scaler"] = scaler.state_dict()
    return state


def _with_prefix(state: dict[str, Any], name: str) -> OrderedDict[str, Any]:
    """As the state_dict of a module that holds this one under a name."""
    inside = OrderedDict((f"{name}.{key}", value) for key, value in state.items())
    versions = getattr(state, "_metadata", {})
    inside._metadata = {  # type: ignore[attr-defined]
        f"{name}.{key}".rstrip("."): value for key, value in versions.items()
    }
    return inside


def save(
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    cfg: Config,
    position: TrainState,
    verify: bool = False,
) -> None:
    """Write a checkpoint in one piece. verify: read it back before it takes its name.

    Raises `SaveFailed`; an earlier file of that name is then as it was.
    """
    state: dict[str, Any] = {}
    try:
        state = contents(model, optimizer, scaler, cfg, position)
        write(path, partial(torch.save, state), partial(_compare, state) if verify else _trust)
    except Exception as error:
        raise _explained(path, state, error) from error


def try_saving(
    model: Model,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    cfg: Config,
) -> None:
    """Save, read and load what a run will save, in memory and with large tensors left empty. Raises
    `ValueError` that names what would not come back, and its type."""
    state = contents(model, optimizer, scaler, cfg, TrainState())
    try:
        small = _map_tensors(state, _emptied)
    except RecursionError as error:
        raise ValueError(
            "the backbone's state_dict holds a list or dict that holds itself, or one of more "
            "levels than can be saved."
        ) from error
    if lost := _lost(small):
        raise ValueError(
            f"{lost}: let the backbone's state_dict have tensors, numbers, texts, and lists and "
            "dicts of them."
        )
    back = _read_back(small)
    for module, name in ((model.student, "student"), (model.teacher, "teacher")):
        weights = mapping_of(back[name], "module." if name == "student" else "")
        for key, own in module.state_dict().items():
            if isinstance(own, Tensor) and _is_emptied(own):
                weights[key] = own  # with its own values: nothing changes
        try:
            module.load_state_dict(weights)
        except Exception as error:  # hooks of others raise what they like
            raise ValueError(
                "the backbone's state_dict, saved and read, cannot be loaded again "
                f"({one_line(error)})."
            ) from error


def _lost(state: Mapping[str, Any]) -> str:
    """What of a state does not come back from a file, in words; empty where all does."""
    if _comes_back(state):
        return ""
    where, value = _culprit(state, "")
    return f"'{where}' is {_kind(value)}, which a checkpoint cannot hold"


def _kind(value: Any) -> str:
    """A value's type as a message names it."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return "a tensor on the meta device"
        if type(value) is Tensor and value.layout != torch.strided:
            return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
        return "a tensor of class " + type(value).__qualname__
    return a_kind(value) + (f" of {value.dtype}" if isinstance(value, np.ndarray) else "")


class Saver:
    """The checkpoints of one run: `try_saving` now, so that `ValueError` comes before training. A
    save that fails is told and tried again; what was saved before stays.

    failed: the last error, None when the last save went well.
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        cfg: Config,
        log: Callable[[str], None],
    ) -> None:
        self.path, self.log = path, log
        self.parts = model, optimizer, scaler, cfg
        try_saving(*self.parts)
        self.failed: SaveFailed | None = None
        self._verified, self._tried, self._wait_s = False, 0.0, RETRY_S

    @property
    def must_end(self) -> bool:
        """Whether no later save can go better."""
        return self.failed is not None and not self.failed.may_pass

    @property
    def retry_due(self) -> bool:
        return self.failed is not None and time.monotonic() - self._tried > self._wait_s

    def raise_failed(self) -> None:
        """At the end: a run whose last save failed has failed."""
        if self.failed is not None:
            raise self.failed

    def __call__(self, position: TrainState, keep: bool = False) -> None:
        """keep: also under the name of the epoch that has just ended."""
        numbered = self.path.with_name(f"checkpoint{position.epoch - 1:04}.pth")
        self._tried = time.monotonic()
        try:
            # in this order: a run killed in between makes both again
            path = numbered if keep else self.path
            save(path, *self.parts, position, not self._verified)
            self._verified = True
            if keep:
                self._link(numbered)
            self.failed, self._wait_s = None, RETRY_S
        except SaveFailed as error:  # not raised here: the other processes wait at the next step
            self.failed, self._wait_s = error, min(2 * self._wait_s, MOST_RETRY_S)
            if error.may_pass:
                self.log(f"warning: {error} Training goes on, and saving is tried again.")

    def keep_best(self) -> None:
        """What was just saved, under the name best.pth too."""
        if self.failed is None and self.path.exists():
            try:
                link(self.path, self.path.with_name("best.pth"))
            except OSError as error:
                self.log(f"warning: 'best.pth' could not be kept ({error.strerror or error})")

    def adopt(self, found: Path | None) -> None:
        """Give a numbered checkpoint that a run goes on from the name that others look for, where
        there is room."""
        if found not in (None, self.path):
            with suppress(OSError):
                link(found, self.path)

    def _link(self, numbered: Path) -> None:
        try:
            link(numbered, self.path)
        except OSError as error:  # no room for a copy: both names cannot be, and the newest counts
            try:
                numbered.replace(self.path)
            except OSError as worse:
                raise _explained(self.path, {}, worse) from worse
            self.log(
                f"warning: '{numbered.name}' could not be kept beside '{self.path}' "
                f"({error.strerror or error})"
            )


def _explained(path: Path, state: Mapping[str, Any], error: Exception) -> SaveFailed:
    system = reason(error)
    if system is None:
        may_pass = isinstance(error, MemoryError)
        lost = "" if may_pass else _lost(_map_tensors(state, _emptied))
        said = f"since training began {lost}." if lost else error or "no memory"
        return SaveFailed(f"'{path}' could not be saved: {said}", may_pass)
    bytes_ = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal bytes_
        bytes_ += tensor.nbytes if tensor.layout == torch.strided else 0
        return tensor

    _map_tensors(state, add)
    room = ""
    if system.errno in FULL and bytes_:
        room = f", it takes about {max(bytes_ / 1e6, 1):,.0f} MB beside the one before"
    before = path.with_name("checkpoint.pth").exists()
    stays = "'checkpoint.pth' is still that of an earlier save" if before else "none is saved yet"
    return SaveFailed(
        f"'{path}' could not be saved ({system.strerror or system}{room}); {stays}.", may_pass=True
    )


def _trust(file: Path) -> None:
    """A later checkpoint is like the first."""


def _compare(state: Mapping[str, Any], file: Path) -> None:
    where = _difference(state, read(file, mmap=True), "")
    if where is not None:
        raise ValueError(f"'{where}' reads back as something else.")


def _comes_back(value: Any) -> bool:
    try:
        return _difference(value, _read_back(value), "") is None
    except Exception:  # classes of others raise what they like
        return False


def _read_back(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return load(file)


def _culprit(value: Any, where: str) -> tuple[str, Any]:
    """The innermost part that does not come back, and the way to it."""
    for name, part in _parts(value):
        if not _comes_back(part):
            return _culprit(part, f"{where}.{name}" if where else str(name))
    return where, value


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return [*value.items(), *((f"key {k!r}", k) for k in value)]
    return list(enumerate(value)) if isinstance(value, list | tuple | set) else []


def _difference(saved: Any, back: Any, where: str) -> str | None:
    """The first place where what was read is of another kind, shape or dtype."""
    if type(saved) is not type(back):
        return where
    if isinstance(saved, Tensor):
        same = not saved.is_meta and (saved.dtype, saved.layout) == (back.dtype, back.layout)
        if same and not saved.is_nested:
            same = saved.shape == back.shape
        return None if same else where
    if isinstance(saved, Mapping):
        if list(saved) != list(back):
            return where
        pairs = [(name, saved[name], back[name]) for name in saved]
    elif isinstance(saved, list | tuple):
        if len(saved) != len(back):
            return where
        pairs = [(i, *both) for i, both in enumerate(zip(saved, back, strict=True))]
    else:
        return None
    found = (_difference(a, b, f"{where}.{name}".lstrip(".")) for name, a, b in pairs)
    return next((place for place in found if place is not None), None)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same containers with each tensor changed; of other classes nothing is touched."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (dict, OrderedDict):
        both = type(value)((k, _map_tensors(v, change)) for k, v in value.items())
        if hasattr(value, "__dict__"):
            vars(both).update(vars(value))
        return both
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(v, change) for v in value)
    return value


def _emptied(tensor: Tensor) -> Tensor:
    if _is_emptied(tensor):
        return tensor.detach().new_empty(0)
    return tensor.detach().clone() if _is_plain(tensor) else tensor


def _is_emptied(tensor: Tensor) -> bool:
    return _is_plain(tensor) and tensor.numel() > _SMALL


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not is_lazy(tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)
    )
