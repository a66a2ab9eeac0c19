"""Files of weights, read without running anything that is inside; what cannot be read is named."""

from __future__ import annotations

import argparse
import datetime
import errno
import importlib
import json
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy._core import multiarray
from torch import Tensor

from ..runtime.words import plain

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
_KNOWN_BY_HEAD = {
    b"version https://git-lfs": "it is a pointer of git-lfs, `git lfs pull` gets the file itself",
    b"<!doctype": "it is a web page, not the file that was to be downloaded",
    b"<html": "it is a web page, not the file that was to be downloaded",
    b"<?xml": "it is a web page, not the file that was to be downloaded",
    b"\x1f\x8b": "it is compressed with gzip: unpack it first",
    b"bzh": "it is compressed with bzip2: unpack it first",
    b"\xfd7zxz": "it is compressed with xz: unpack it first",
    b"(\xb5/\xfd": "it is compressed with zstd: unpack it first",
    b"\x89hdf": "it is an HDF5 file, as Keras writes them",
    b"\x93numpy": "it is a NumPy array",
    b"\x89png": "it is an image",
    b"\xff\xd8\xff": "it is an image",
    b"%pdf": "it is a PDF",
    b"\x7felf": "it is a program",
}
_KNOWN_BY_MEMBER = {  # of a zip archive
    "/constants.pkl": "it is a TorchScript archive: save the `state_dict()` of "
    "`torch.jit.load(FILE)` instead",
    "archive_format": "it is a program of torch.export: save its `state_dict` instead",
    ".npy": "it is an archive of NumPy arrays",
}


def read(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The contents of a checkpoint or .safetensors file, on the CPU. Only tensors, containers,
    numbers and the official arguments are admitted; `args` answers both `["arch"]` and `.arch`.

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
        if path.suffix == ".safetensors" or _has_safetensors_header(path):
            return _read_safetensors(path)
        state = load(path, mmap)
    except MemoryError:
        raise
    except Exception as error:  # what does not belong there makes the unpickler raise all kinds
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint, {_reason(path, error)}: it was left as it "
            "is; move it away, or choose another file or `output_dir`."
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(
            f"'{path}' holds a {type(state).__name__}, not a checkpoint: it was left as it is."
        )
    state = dict(state)
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = with_attributes(vars(state["args"]))
    return state


def with_attributes(options: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Options that answer both `["arch"]` and `.arch`, of the one type with attributes that
    `torch.load` reads without a list of allowed types."""
    both = OrderedDict(options)
    both.__dict__.update(both)
    return both


def arguments_in(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The options that a checkpoint was trained with, as plain values; empty when it does not
    tell."""
    args = state.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    known = args.items() if isinstance(args, Mapping) else ()
    return with_attributes({name: plain(value) for name, value in known})


def _absent(path: Path) -> str:
    if path.is_dir():
        return (
            f"'{path}' is a folder, not a checkpoint: move it away, or choose another file or "
            "`output_dir`."
        )
    if path.is_symlink():
        return (
            f"'{path}' is a link to '{path.readlink()}', which is not there: bring that back, or "
            "remove the link."
        )
    return f"there is no checkpoint at '{path}'."


def load(file: Path | IO[bytes], mmap: bool = False) -> Any:
    """`torch.load` on the CPU, of safe types alone."""
    with torch.serialization.safe_globals(_SAFE):  # type: ignore[arg-type]
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


def _has_safetensors_header(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(10)
    length = int.from_bytes(head[:8], "little")
    return head[8:] == b'{"' and length < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The length of the header (8 bytes), the header (JSON: dtype, shape, place of each tensor),
    and the data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header does not end")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        size = max((about["data_offsets"][1] for about in header.values()), default=0)
        data = bytearray(size)
        if file.readinto(data) != size:
            raise ValueError("the data does not end")
    weights = {}
    for name, about in header.items():
        dtype, (begin, end) = _SAFETENSORS[about["dtype"]], about["data_offsets"]
        flat = torch.empty(0, dtype=dtype)
        if end > begin:
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
        weights[name] = flat.reshape(about["shape"])
    return weights


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, in words."""
    if not path.stat().st_size:
        return "it is empty"
    # EINVAL: what is written in the file leads outside of it
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:
        return error.strerror
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    for magic, words in _KNOWN_BY_HEAD.items():
        if start.startswith(magic):
            return words
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head[:64]):
        return "it is an ONNX model"
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it first"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        for end, words in _KNOWN_BY_MEMBER.items():
            if any(member.endswith(end) for member in members):
                return words
        if not any(member.endswith("data.pkl") for member in members):
            return "it is a zip archive without weights"
    if path.suffix != ".safetensors" and all(
        32 <= byte < 127 or byte in b"\t\n\f\r" for byte in head
    ):
        return "it is a text"
    if isinstance(error, pickle.UnpicklingError):
        return _refused(path, error)
    return "it is truncated, damaged, or something else"


def _refused(path: Path, error: pickle.UnpicklingError) -> str:
    """What reading would have to run, by name."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    if not found:
        return "it holds something other than tensors, numbers and text"
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of torch before 1.6
        names = [found[1]]
    if any(name.startswith("torch.nn.modules.") for name in names):
        return (
            f"it is a whole model ({found[1]}), not its weights; with the code that made it, save "
            "its `state_dict()` instead"
        )
    return (
        f"it holds something other than tensors, numbers and text ({found[1]}), which would run "
        "code; if you trust it, load it with the code that made it and save it again without that"
    )
