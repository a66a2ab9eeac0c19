"""Options: how they are spelled to whoever reads a message (`name` in Python, --name on the command
line), and what is made of the values given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from numbers import Integral, Real
from typing import Any

_spell: Callable[[str], str] = str


def spelled(text: str) -> str:
    """A message in which options stand in backticks, as its reader writes them."""
    return _spell(text)


@contextmanager
def spelling(spell: Callable[[str], str]) -> Iterator[None]:
    """While this lasts, `spelled` is this function."""
    global _spell
    before, _spell = _spell, spell
    try:
        yield
    finally:
        _spell = before


def counted(n: int, what: str, more: str = "") -> str:
    """`1 image`, `1,200 images`. more: the plural, where it is not made by an s."""
    return f"{n:,} {what if n == 1 else more or what + 's'}"


def plain(value: Any) -> Any:
    """An option as Python's own str, bool, int, float or tuple. Paths, enums and NumPy values would
    make a checkpoint that not everybody can read. Other things as they are."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if hasattr(value, "tolist"):  # NumPy or torch
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, most: int = 240) -> str:
    """The first line of an error, with its kind where that says more; all of it where that line is
    only a heading, and of a traceback that TorchScript repeats the last."""
    try:
        said = str(error).strip() or type(error).__name__
    except Exception:  # a class of somebody else's
        said = type(error).__name__
    lines = said.splitlines()
    if "Traceback of TorchScript" in said:
        lines = lines[-1:]
    said = " ".join(said.split()) if lines[0].endswith(":") else lines[0].rstrip(".")
    said = said if len(said) <= most else said[: most - 1].rstrip() + "…"
    tells = isinstance(error, ValueError) or said.startswith(type(error).__name__)
    return said if tells else f"{type(error).__name__}: {said}"


def a_kind(value: Any) -> str:
    """A value's type with its article: 'a list', 'an int'."""
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    name = {"NoneType": "None", "torch.Tensor": "tensor"}.get(name, name)
    if name == "None":
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
