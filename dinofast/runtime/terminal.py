"""Words to a person on the standard streams. Whatever has become of those, a run goes on: closed,
on a full disk, gone with their terminal, in an encoding that lacks a character."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def launched_rank() -> str:
    """Which of several processes a launcher says that this is; "0", which speaks, without one."""
    return os.environ.get("RANK") or "0"


def say(text: str, *, error: bool = False, end: str = "\n") -> None:
    """Print to standard output, or to standard error, if that can be."""
    stream: TextIO | None = getattr(sys, name := "stderr" if error else "stdout")
    if stream is None:  # closed before Python began
        return
    try:
        stream.write(_encodable(text, stream) + end)
        if hasattr(stream, "flush"):  # somebody's own may only write
            stream.flush()
    except (OSError, ValueError):  # ValueError: closed since
        _silence(name, stream)


def printable(text: str, kept: str = "") -> str:
    """The text, with what moves the cursor or cannot be seen as an escape: a file may be named so.
    kept: characters that stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text
    )


def _encodable(text: str, stream: TextIO) -> str:
    """The text, with what the stream cannot encode as an escape: \\xe9."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        pass
    return text


def _silence(name: str, stream: TextIO) -> None:
    """For the rest of the process: what waits in the buffer would fail again, at exit too."""
    sink = open(os.devnull, "w")  # noqa: SIM115
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(sink.fileno(), stream.fileno())
    setattr(sys, name, sink)


def prepare_streams() -> None:
    """For a program: what a stream cannot encode, such as a file name in another encoding, is
    printed as an escape; standard streams that were closed when it began lead nowhere. Otherwise
    the next file that is opened would take such a stream's number, and get what is printed to it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_terminal() -> bool:
    """Whether standard output is one."""
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # somebody's own, or none; closed
        return False


class StatusLine:
    """The last line on a terminal, drawn over itself, with other lines above it.

    The cursor waits at its beginning: so whatever has become of the width meanwhile, all of the
    line goes when the next is drawn.
    """

    def __init__(self) -> None:
        self._text = ""

    def columns(self) -> int:
        """That a line may take."""
        try:
            return max(os.get_terminal_size(sys.stdout.fileno()).columns - 1, 0) or 79
        except (OSError, ValueError, AttributeError):
            return 79

    def show(self, text: str) -> None:
        self._text = text
        say(f"\r\033[J{text[: self.columns()]}", end="\r")

    def log(self, text: str) -> None:
        """A line above it."""
        say(f"\r\033[J{text}")
        self.show(self._text)

    def end(self) -> None:
        """Leave it as it is, and go to the next line."""
        if self._text:
            say("")
        self._text = ""
