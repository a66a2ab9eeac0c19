"""How options are spelled to whoever reads a message: `name` in Python, --name on the command
line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
