"""Pickles of somebody else's, such as ground truths: plain containers, texts, numbers and arrays of
NumPy are read, and nothing that is named in them is imported or run."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LARGEST = 2**28  # bytes of a file
_PLAIN_DTYPE = re.compile(r"[<>|=]?[biufSU]\d+")


class PickledArray:
    """An array as a pickle holds it: see `array`. What it is made from is checked then."""

    def __init__(self) -> None:
        self.shape: Any = ()
        self.dtype: Any = None
        self.fortran: Any = False
        self.raw: Any = b""

    def array(self) -> np.ndarray:
        """Raises `ValueError` for what is no plain array."""
        if isinstance(self.raw, list):  # of objects, each of which was read like all others
            return np.array(self.raw)
        raw = self.raw.encode("latin-1") if isinstance(self.raw, str) else self.raw
        if not isinstance(self.dtype, np.dtype) or not isinstance(raw, bytes | bytearray):
            raise ValueError("an array without numbers")
        flat = np.frombuffer(raw, self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def load_plain(path: Path) -> Any:
    """What a pickle holds, in which a `PickledArray` stands for each array. Raises `ValueError` for
    a file that holds anything else, or is no pickle."""
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{size:,} bytes, more than {LARGEST:,}")
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # whatever a damaged pickle, or one made to do harm, ends in
        raise ValueError(f"'{path}' cannot be read as plain values ({error}).") from error


class _Unpickler(pickle.Unpickler):
    """Whatever a pickle names is looked up among stand-ins that are made anew for each file."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin-1")  # texts of Python 2
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        known = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if known not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not looked up")
        return self._known[known]


def _stand_ins() -> dict[str, Callable]:
    """By name: what makes the same values and runs nothing."""

    class Dtype:
        def __init__(self, name: str, *flags: object) -> None:
            if not (name == "O8" or _PLAIN_DTYPE.fullmatch(name)):
                raise pickle.UnpicklingError(f"an array of {name!r}")
            self.name, self.order = name, ""

        def __setstate__(self, state: tuple) -> None:
            if state[1] not in ("<", ">", "|", "=") or any(part is not None for part in state[2:5]):
                raise pickle.UnpicklingError("an array with fields")
            self.order = state[1]

        def plain(self) -> np.dtype | None:
            bare = self.name.lstrip("<>|=")
            return None if self.name == "O8" else np.dtype(self.order + bare)

    class Array(PickledArray):
        def __setstate__(self, state: tuple) -> None:
            _, self.shape, dtype, self.fortran, self.raw = state
            self.dtype = dtype.plain()

    def reconstruct(kind: type, shape: tuple, typecode: object) -> Array:
        return Array()

    def from_buffer(raw: bytes, dtype: Dtype, shape: tuple, order: str) -> Array:
        made = Array()
        made.__setstate__((1, shape, dtype, order == "F", raw))
        return made

    def scalar(dtype: Dtype, raw: bytes | str) -> Any:
        made = from_buffer(raw, dtype, (1,), "C")  # type: ignore[arg-type]  # str of Python 2
        return made.array()[0].item()

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"bytes in {encoding!r}")
        return text.encode("latin-1")

    def no_bytes() -> bytes:
        return b""

    return {
        "__builtin__.bytes": no_bytes,
        "builtins.bytes": no_bytes,
        "numpy.ndarray": Array,
        "numpy.dtype": Dtype,
        "numpy.core.multiarray._reconstruct": reconstruct,
        "numpy.core.multiarray.scalar": scalar,
        "numpy.core.numeric._frombuffer": from_buffer,
        "_codecs.encode": encode,
    }
