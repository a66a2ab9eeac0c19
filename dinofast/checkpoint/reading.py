"""Files of weights, read without running anything that is inside; what cannot be read is named."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import pathlib
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy._core import multiarray

from ..runtime.words import a_kind, plain
from .kinds import is_safetensors, reason, unknown_names

# What files hold besides tensors and plain containers, by the names it is pickled under: the parsed
# arguments, paths in them (made under Slurm), NumPy's numbers and arrays, dates. No dtype that
# could hold objects. A WindowsPath cannot be made elsewhere.
_SAFE = [
    (argparse.Namespace, "argparse.Namespace"),
    (frozenset, "builtins.frozenset"),
    *((getattr(datetime, n), f"datetime.{n}") for n in ("datetime", "date", "time", "timedelta")),
    (datetime.timezone, "datetime.timezone"),
    *(
        (path, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")  # the second in Python 3.13
        for name, path in {
            "PosixPath": pathlib.Path,
            "PurePosixPath": pathlib.PurePosixPath,
            "WindowsPath": pathlib.PureWindowsPath,
            "PureWindowsPath": pathlib.PureWindowsPath,
        }.items()
    ),
    *(
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    (np.dtype, "numpy.dtype"),
    (np.ndarray, "numpy.ndarray"),
    *(
        (kind, f"numpy.dtypes.{name}")
        for name, kind in vars(np.dtypes).items()
        if name.endswith("DType") and name not in ("ObjectDType", "VoidDType", "StringDType")
    ),
]
# where others keep what they trained with
_OPTIONS = ("args", "hyper_parameters", "config", "cfg", "opt", "options", "meta")
METADATA = "dinofast"  # under which our .safetensors files hold the options, in JSON
_SAFETENSORS = {
    "BOOL": torch.bool,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}


def read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint or .safetensors file, on the CPU. Only tensors, containers,
    numbers and options are admitted; `args` answers both `["arch"]` and `.arch`.

    mmap: tensors stay on the disk until they are used. Raises `ValueError` for a file that is
    missing, truncated, or no checkpoint; the file is left as it is.
    """
    try:
        found = path.is_file()
    except OSError as error:  # a name that is too long
        raise ValueError(f"'{path}' cannot be looked at: {error.strerror}.") from error
    if not found:
        raise ValueError(_absent(path))
    try:
        if is_safetensors(path):
            return _read_safetensors(path)
        state = _load_with_options(path, mmap)
    except MemoryError:
        raise
    except Exception as error:  # what does not belong there makes the unpickler raise all kinds
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint, {reason(path, error)}."
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(
            f"'{path}' holds {a_kind(state)}, not a checkpoint: save a dict of tensors with "
            "torch.save, or name another file."
        )
    state = dict(state)
    if isinstance(state.get("args"), argparse.Namespace | dict):
        state["args"] = with_attributes(_as_mapping(state["args"]))
    return state


def with_attributes(options: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Options that answer both `["arch"]` and `.arch`, of the one type with attributes that
    `torch.load` reads without a list of allowed types. Methods of a dict stay what they are."""
    return _answering(OrderedDict(options))


def _answering(options: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    known = {k: v for k, v in options.items() if not hasattr(OrderedDict, str(k))}
    options.__dict__.update(known)
    return options


def arguments_in(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The options that a checkpoint was trained with, as plain values; empty when it does not
    tell."""
    return _options(_as_mapping(state.get("args")), {})


def _options(options: Mapping[str, Any], seen: dict[int, Any]) -> OrderedDict[str, Any]:
    """seen: results by id. Options that hold themselves, or the same ones a million times, are
    looked at once."""
    if id(options) not in seen:
        both = seen[id(options)] = OrderedDict()
        both.update((name, _plain(value, seen)) for name, value in options.items())
        _answering(both)
    return seen[id(options)]


def _as_mapping(options: Any) -> Mapping[str, Any]:
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    return options if isinstance(options, Mapping) else {}


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """An option as a plain value; options within it answer as the whole does."""
    if isinstance(value, argparse.Namespace | Mapping):
        return _options(_as_mapping(value), seen)
    if isinstance(value, torch.dtype | torch.device | torch.layout):
        return str(value).removeprefix("torch.")
    return plain(value)


def _load_with_options(path: Path, mmap: bool) -> Any:
    """`load`; where options hold what is no plain value (an enum, a class, a function), an enum's
    value or the name stands there. Nothing of it is imported or run."""
    try:
        return load(path, mmap)
    except pickle.UnpicklingError as error:
        if not (names := unknown_names(path, error)):
            raise
        try:
            state = _load_with_stand_ins(path, mmap, names)
        except Exception:  # used as no stand-in can be: the first error tells
            state = None
        if not isinstance(state, Mapping):
            raise
        done: dict[int, Any] = {}
        state = {n: _without_stand_ins(v, done) if n in _OPTIONS else v for n, v in state.items()}
        if _holds_stand_in(state, set()):
            raise
        return state


def _load_with_stand_ins(path: Path, mmap: bool, names: list[str]) -> Any:
    """With a stand-in for each of these; a file of torch before 1.6 names one at a time."""
    stand_ins = [(_CONTAINERS.get(name) or _stand_in(name), name) for name in names]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return load(path, mmap)
    except pickle.UnpicklingError as error:
        more = [name for name in unknown_names(path, error) if name not in names]
        if not more:
            raise
        return _load_with_stand_ins(path, mmap, names + more)


# filled item by item, which torch allows of these alone
_CONTAINERS: dict[str, Any] = {
    "collections.defaultdict": lambda *_: {},
    "collections.deque": lambda items=(), *_: list(items),
}


class _StandIn:
    """Of a class or function that is not to be imported: what it was called with."""

    name = ""
    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any) -> _StandIn:
        new = super().__new__(cls)
        new.arguments = arguments
        return new

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str) -> type[_StandIn]:
    return type("_StandIn", (_StandIn,), {"name": name})


def _without_stand_ins(value: Any, done: dict[int, Any]) -> Any:
    """done: results by id; what is held twice is looked at once."""
    if id(value) not in done:
        done[id(value)] = _replaced(value, done)
    return done[id(value)]


def _replaced(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_without_stand_ins(vars(value), done))
    if isinstance(value, dict):
        named = {k: v for k, v in value.items() if not _holds_stand_in(k, set())}
        pairs = {k: _without_stand_ins(v, done) for k, v in named.items()}
        return with_attributes(pairs) if type(value) is OrderedDict else pairs
    if type(value) in (list, tuple, set):
        return type(value)(_without_stand_ins(v, done) for v in value)
    if isinstance(value, _StandIn):
        if isinstance(value.state, dict) and not value.arguments:  # types.SimpleNamespace, ...
            return _without_stand_ins(value.state, done)
        # as enums are pickled: their class, called with the value, or `getattr` with its name
        called = 2 if value.name == "builtins.getattr" else 1
        enum = len(value.arguments) == called and value.state is None
        return _without_stand_ins(value.arguments[-1], done) if enum else f"<{value.name}>"
    return f"<{value.name}>" if _is_stand_in(value) else value


def _is_stand_in(value: Any) -> bool:
    return isinstance(value, _StandIn) or (isinstance(value, type) and issubclass(value, _StandIn))


def _holds_stand_in(value: Any, seen: set[int]) -> bool:
    """seen: ids of what has been looked at."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if _is_stand_in(value):
        return True
    if not isinstance(value, Mapping | list | tuple | set | frozenset) or id(value) in seen:
        return False
    seen.add(id(value))
    inside = value
    if isinstance(value, Mapping):
        inside = [*value, *value.values(), *getattr(value, "__dict__", {}).values()]
    return any(_holds_stand_in(v, seen) for v in inside)


def _absent(path: Path) -> str:
    if path.is_dir():
        return f"'{path}' is a folder, not a checkpoint: name a file."
    if path.is_symlink():
        return (
            f"'{path}' is a link to '{path.readlink()}', which is not there: bring that back, or "
            "remove the link."
        )
    if ":/" in str(path):  # a Path has one of the two slashes
        return f"'{path}' is an address: download the file first, and give its path."
    return f"there is no checkpoint at '{path}'."


def load(file: Path | IO[bytes], mmap: bool = False) -> Any:
    """`torch.load` on the CPU, of safe types alone."""
    if isinstance(file, Path) and file.suffix == ".safetensors":
        with open(file, "rb") as opened:  # torch would go by the name
            return load(opened)
    with (
        torch.serialization.safe_globals(_SAFE),  # type: ignore[arg-type]
        warnings.catch_warnings(),
    ):
        # the error behind it says the same
        warnings.filterwarnings("ignore", "'torch.load' received a zip file that looks like")
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            if "must be imported" not in str(error):
                raise
            # tensors of a kind that torch knows only then: jagged, distributed
            for module in ("torch._dynamo", "torch.distributed.tensor"):
                importlib.import_module(module)
        except (OSError, RuntimeError):
            if not mmap:  # a file system that cannot map files, or a file of torch before 1.6
                raise
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The length of the header (8 bytes), the header (JSON: dtype, shape, place of each tensor),
    and the data; `args` of a file of ours."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header does not end")
        header = json.loads(file.read(length))
        about_file = header.pop("__metadata__", None)
        size = max((about["data_offsets"][1] for about in header.values()), default=0)
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError("the data does not end")
    weights: dict[str, Any] = {}
    if isinstance(about_file, dict) and METADATA in about_file:
        weights["args"] = with_attributes(_as_mapping(json.loads(about_file[METADATA])))
    for name, about in header.items():
        dtype, (begin, end) = _SAFETENSORS[about["dtype"]], about["data_offsets"]
        flat = torch.empty(0, dtype=dtype)
        if end > begin:
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
        weights[name] = flat.reshape(about["shape"])
    return weights
