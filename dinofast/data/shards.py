"""WebDataset shards: the images in a tar archive, and the patterns that name many archives.

Their headers are read when a run starts, for the offsets of the members; an image is then read from
its place in the archive, by one `os.pread`. That wants a file system with random access, local or
over the network. In return there is no shuffle buffer and no sharing out of shards: the order of an
epoch, resuming and replacing are those of single files.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from dinofast.data.decode import UnreadableImage, is_text
from dinofast.data.names import Ignored, kind_of_member

# all but the first to be refused
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = 512
PAST_END = "truncated: reaches past the end of its shard"
MOST = 10**6  # files that a pattern may name
_ENDINGS = tuple(ending.encode() for ending in ENDINGS)


class Header(NamedTuple):
    """What a header says of a member: its name, where its bytes lie, and why it cannot be used (""
    if it can)."""

    name: bytes
    start: int
    length: int
    reason: str


class _Tar(tarfile.TarFile):
    """With the two attributes that its stubs leave out."""

    firstmember: tarfile.TarInfo | None
    members: list[tarfile.TarInfo]


def images(file: io.RawIOBase, ignored: Ignored | None = None) -> Iterator[Header]:
    """Each image in an open tar archive, in its order. What else looks like an image, or is of an
    unknown kind, is counted in `ignored`.

    An image is a member with the ending of one: `000.jpg`, `photo.v1.jpg`, `000.left.jpg` and
    `000.right.jpg`, whatever stands before the last dot, but not a mask such as `000.seg.png`
    (names.MASKS). Links are refused, as nothing says that what they point to is in the archive, and
    it would be seen twice if it is; sparse members, whose bytes do not lie in one piece, are
    refused too. Raises `UnreadableImage` where the archive is damaged, after what comes before.
    """
    ignored = Ignored() if ignored is None else ignored
    fd, at, any_image = file.fileno(), 0, False
    size, head = os.fstat(fd).st_size, os.pread(fd, 256, 0)
    if not head:
        raise UnreadableImage("empty file")
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            raise UnreadableImage(f"compressed with {name}: unpack it to a plain .tar first")
    try:
        tar = _Tar(fileobj=file, encoding="utf-8", errors="surrogateescape")
        while True:
            header, after = _plain_header(fd, at) or _any_header(tar, at)
            if not after:
                break
            at = after
            kind = kind_of_member(header.name) if header else ""
            if header and kind == "image":
                any_image = True
                yield (
                    header._replace(reason=PAST_END)
                    if not header.reason and header.start + header.length > size
                    else header
                )
            elif kind:
                ignored.files[kind] += 1
    except OSError:
        raise
    except Exception as error:  # whatever tarfile meets in damaged headers
        if not at:
            raise UnreadableImage(
                "text, not a tar archive" if is_text(head) else "not a tar archive"
            ) from error
        raise UnreadableImage(f"damaged tar archive: {error} after byte {at:,}") from error
    _check_end(fd, at, size)
    if not any_image:
        raise UnreadableImage("a tar archive without images")


def _plain_header(fd: int, at: int) -> tuple[Header | None, int] | None:
    """The file, if it is one, that begins at this byte, and where what follows begins; None if
    tarfile has to say.

    Regular files with short names, and extended headers without a name or a size before them, as
    WebDataset writes them: 6 and 16 us a member instead of tarfile's 22 and 67 (page cache, one
    core, 2026-11-27).
    """
    block = os.pread(fd, BLOCK, at)
    kind = block[156:157]
    if kind not in (b"0", b"\0", b"x"):
        return None
    try:
        length, checksum = (
            int(block[a:b].strip(b" \0") or b"0", 8) for a, b in ((124, 136), (148, 156))
        )
    except ValueError:
        return None
    if len(block) < BLOCK or checksum != sum(block) - sum(block[148:156]) + 8 * 32 or length < 0:
        return None
    start = at + BLOCK
    after = start + -(-length // BLOCK) * BLOCK
    if kind == b"x":
        records = os.pread(fd, length, start)
        named = any(key in records for key in (b"path=", b"size=", b"GNU.", b"charset="))
        return None if named or len(records) < length else (None, after)
    name, prefix = (block[a:b].partition(b"\0")[0] for a, b in ((0, 100), (345, 500)))
    name = prefix + b"/" + name if prefix else name
    return Header(name, start, length, ""), after


def _any_header(tar: _Tar, at: int) -> tuple[Header | None, int]:
    """The same by tarfile, whatever is there; 0 at the end."""
    if at:
        tar.firstmember, tar.offset = None, at
    member = tar.next()  # the first was read when `tar` was made
    tar.members.clear()  # it would keep an object for each
    if member is None:
        return None, 0
    if member.size < 0 or tar.offset <= at:
        raise tarfile.ReadError("a size that cannot be")
    name = os.fsencode(member.name)
    reason = (
        "a link inside a shard"
        if member.islnk() or member.issym()
        else "a sparse member of a shard"
        if member.issparse()
        else "not a regular file"
        if not member.isreg()
        else ""
    )
    header = Header(name, member.offset_data, member.size, reason)
    return None if member.isdir() else header, tar.offset


def _check_end(fd: int, at: int, size: int) -> None:
    """Raise `UnreadableImage` if an archive does not end at byte `at`, where tarfile has stopped
    without a word."""
    end = os.pread(fd, BLOCK, at)
    if len(end) < BLOCK:
        raise UnreadableImage(f"truncated tar archive: no end mark at byte {at:,}")
    if any(end):
        raise UnreadableImage(f"damaged tar archive: no header at byte {at:,}")
    for start in range(at, size, 1 << 16):
        if any(block := os.pread(fd, 1 << 16, start)):
            where = start + len(block) - len(block.lstrip(b"\0"))
            raise UnreadableImage(
                f"damaged tar archive: it ends at byte {at:,}, but there is more at byte {where:,}"
            )


def is_shard(path: bytes) -> bool:
    return path.lower().endswith(_ENDINGS)


def expand(pattern: str) -> list[str]:
    """What a pattern with braces stands for, in its order: `{000000..000146}` counts, with as many
    digits, `{a,b}` lists.

    Raises `ValueError` for other braces, or more than MOST names.
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices, n = [], 1
    for i, piece in enumerate(pieces):
        choices.append(_alternatives(piece, pattern) if i % 2 else [piece])
        if not i % 2 and ("{" in piece or "}" in piece):
            raise ValueError(
                f"`data_path` {pattern} has braces that are nested or not closed: write each "
                "pattern by itself, as in shards-{000000..000146}.tar."
            )
        n *= len(choices[-1])
        if n > MOST:
            raise ValueError(
                f"`data_path` {pattern} stands for more than {MOST:,} files: write fewer."
            )
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    if "," in inside:
        return inside.split(",")
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside, re.ASCII)
    if not numbers or int(numbers[1]) > int(numbers[2]):
        raise ValueError(
            f"`data_path` {pattern} holds {{{inside}}}, neither a range such as {{000000..000146}} "
            "nor a list such as {a,b}: write one of them."
        )
    first, last = int(numbers[1]), int(numbers[2])
    last = min(last, first + MOST)  # one more than is allowed is enough to know
    width = (
        len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
    )
    return [f"{i:0{width}}" for i in range(first, last + 1)]
