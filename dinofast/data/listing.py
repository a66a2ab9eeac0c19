"""Text files that list images: one path a line, or beside labels as other tools write them."""

from __future__ import annotations

import csv
import os
import re
import urllib.parse
from collections.abc import Callable

from dinofast.data.names import has_ending
from dinofast.data.shards import is_shard

UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how some editors of Windows begin a text
LOOKED_AT = 100  # lines of which one must name a file
# how JSON, or Python, begins a list or an object; a folder may be named [a] or {a}
_DATA = re.compile(rb"[\[{]+\s*($|[\"'])")


def paths(text: bytes, root: bytes, source: str) -> tuple[list[bytes], str]:
    """The paths that a text lists, and how they were found in its lines if those hold more.

    A line is a path, relative to `root` unless absolute, if the first line is one. Else the first
    of READINGS is taken for all lines that makes a file's name of the first. Where that is missing
    it may be a header, and the next line decides. Blank lines are left out, and lines that begin
    with # unless they name a file. Raises `ValueError` if there are no lines, if they
    look like JSON, or if none of the first LOOKED_AT names a file.
    """
    if text.startswith(UTF_16):
        text = text.decode("utf-16", "replace").encode()
    text = text.removeprefix(b"\xef\xbb\xbf")
    # the first of Windows and all others, the second of old Macs
    lines = list(map(bytes.strip, text.split(b"\n" if b"\n" in text else b"\r")))
    lines = [
        line
        for line in lines
        if line and (line[:1] != b"#" or os.path.lexists(os.path.join(root, line)))
    ]
    if not lines:
        raise ValueError(f"`data_path` {source} lists no images: write one path a line into it.")
    if _is_data(lines[0]) and not os.path.lexists(os.path.join(root, lines[0])):
        raise ValueError(
            f"`data_path` {source} is JSON or the like, which is not read: write its paths into a "
            "text file, one a line."
        )
    for line in lines[:LOOKED_AT]:
        if os.path.lexists(os.path.join(root, line)):
            return [*map(_unquoted, lines[_is_header(lines[0], line) :])], ""
        for what, read in READINGS:
            if (path := read(line)) and os.path.isfile(os.path.join(root, path)):
                note = f"of each line of {source} {what} is read, as in {os.fsdecode(path)}"
                return [read(line) for line in lines[_is_header(read(lines[0]), path) :]], note
    raise ValueError(
        f"`data_path` {source} lists no images: none of its first lines names a file, such as "
        f"'{os.fsdecode(lines[0])}'. Write one path a line into it, alone or before a label; "
        f"relative paths start at the folder of the list, '{os.fsdecode(root) or '.'}'."
    )


def _is_header(first: bytes, path: bytes) -> bool:
    """Whether this is no path but the header; path: of a line that names a file."""
    return first != path and b"/" not in first and not (has_ending(first) or is_shard(first))


def _is_data(line: bytes) -> bool:
    return bool(_DATA.match(line)) and not (has_ending(line) or is_shard(line))


def _unquoted(path: bytes) -> bytes:
    return path[1:-1] if path[:1] == path[-1:] and path[:1] in (b'"', b"'") else path


def _plain(path: bytes) -> bytes:
    """Without quotes and file://, with slashes."""
    path = _unquoted(path.strip())
    if path.lower().startswith(b"file://"):
        path = urllib.parse.unquote_to_bytes(path[len(b"file://") :])
        path = path.removeprefix(b"localhost")
    return path.replace(b"\\", b"/") if b"/" not in path else path


def _column(separator: str | None, i: int) -> Callable[[bytes], bytes]:
    def read(line: bytes) -> bytes:
        text = os.fsdecode(line)
        try:
            fields = next(csv.reader([text], delimiter=separator)) if separator else text.split()
        except csv.Error:  # no text of fields
            return b""
        return _plain(os.fsencode(fields[i])) if -len(fields) <= i < len(fields) else b""

    return read


# what is read of a line, and how
READINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("the path", _plain),
    *((f"column {i + 1}", _column("\t", i)) for i in range(4)),
    *((f"column {i + 1}", _column(",", i)) for i in range(4)),
    *((f"column {i + 1}", _column(";", i)) for i in range(4)),
    ("all but the last word", lambda line: _plain(b"".join(line.rsplit(None, 1)[:1]))),
    ("all but the first word", lambda line: _plain(b"".join(line.split(None, 1)[1:]))),
    *((f"word {i + 1}", _column(None, i)) for i in range(4)),
]
