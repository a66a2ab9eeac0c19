"""What a file is that cannot be read as a checkpoint, and the way out, in words."""

from __future__ import annotations

import errno
import gzip
import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

_HEAD = 512  # bytes at the beginning that are looked at
_WEB_PAGE = "it is a web page, not the file that was to be downloaded: download it again"
_BY_HEAD = {  # in lower case
    b"version https://git-lfs": "it is a pointer of git-lfs: `git lfs pull` gets the file itself",
    b"<!doctype": _WEB_PAGE,
    b"<html": _WEB_PAGE,
    b"<head": _WEB_PAGE,
    b"<?xml": _WEB_PAGE,
    b"<!--": _WEB_PAGE,
    b"bzh": "it is compressed with bzip2: unpack it first",
    b"\xfd7zxz": "it is compressed with xz: unpack it first",
    b"(\xb5/\xfd": "it is compressed with zstd: unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it first",
    b"rar!": "it is a RAR archive: unpack it first",
    b"\x89hdf": "it is an HDF5 file, as Keras writes them: name a file of torch.save",
    b"\x93numpy": "it is a NumPy array: save a dict of tensors with torch.save instead",
    b"gguf": "it is a GGUF file: name a file of torch.save or a .safetensors file",
    b"\x89png": "it is an image: name a checkpoint",
    b"\xff\xd8\xff": "it is an image: name a checkpoint",
    b"%pdf": "it is a PDF: name a checkpoint",
    b"\x7felf": "it is a program: name a checkpoint",
}
_BY_MEMBER = {  # of a zip archive
    "/constants.pkl": "it is a TorchScript archive: save the `state_dict()` of "
    "`torch.jit.load(FILE)` instead",
    "archive_format": "it is a program of torch.export: save its `state_dict` instead",
    ".npy": "it is an archive of NumPy arrays: save a dict of tensors with torch.save instead",
}
_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar", ".onnx")
_NOT_PLAIN = "it holds something other than tensors, numbers and text, or is damaged"
_AGAIN = "copy or download it again"
_BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files then


def is_safetensors(path: Path) -> bool:
    """By its header, whatever its name is. One that is cut off within the header is none."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def reason(path: Path, error: Exception) -> str:
    """Why reading a file raised this: what it is, and what to do."""
    if not path.stat().st_size:
        return f"it is empty: {_AGAIN}"
    # EINVAL: what is written in the file leads outside of it
    if isinstance(error, OSError) and error.strerror and error.errno != errno.EINVAL:
        return error.strerror
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    names = unknown_names(path, error)
    return (
        _refused(names)
        or _by_head(path, head)
        or (_by_members(path) if zipfile.is_zipfile(path) else _cut_off(path, head))
        or (_NOT_PLAIN if isinstance(error, pickle.UnpicklingError) else "")
        or f"it is damaged: {_AGAIN}"
    )


def _by_head(path: Path, head: bytes) -> str:
    """Files of other kinds, by how they begin."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, words in _BY_HEAD.items():
        if start.startswith(magic):
            return words
    if head[:2] == b"\x1f\x8b":
        archive = _begins_as_tar(_unzipped(path))
        return f"it is {'a .tar.gz archive' if archive else 'compressed with gzip'}: " + (
            "unpack it first"
        )
    if _begins_as_tar(head):
        return "it is a tar archive: unpack it first"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head[:64]):
        return "it is an ONNX model: name a file of torch.save"
    if not any(head):
        return f"it begins with zeros, as after a crash or a copy that failed: {_AGAIN}"
    if len(head) > 2 and _is_text(head):
        return "it is a text: name a checkpoint"
    return ""


def _unzipped(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read(_HEAD)
    except (OSError, EOFError):
        return b""


def _begins_as_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _is_text(head: bytes) -> bool:
    """In UTF-8, of which the last letter may be cut."""
    text = head.decode(errors="replace").rstrip("\ufffd")
    return "\ufffd" not in text and all(c.isprintable() or c in "\t\n\f\r" for c in text)


def _by_members(path: Path) -> str:
    """Zip archives that hold something else than what torch.save writes."""
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    for end, words in _BY_MEMBER.items():
        if any(member.endswith(end) for member in members):
            return words
    inside = next((m for m in members if m.endswith(_WEIGHTS)), None)
    if inside is not None:
        return f"it is a zip archive around '{inside}': unpack it first"
    if not any(member.endswith("data.pkl") for member in members):
        return "it is a zip archive without weights: name a checkpoint"
    return ""


def _cut_off(path: Path, head: bytes) -> str:
    """Files of torch.save and .safetensors that are not whole, and what only begins like them."""
    size = path.stat().st_size
    if head[8:9] == b"{":
        cut = size < _safetensors_size(path)
        what = f"truncated at {size:,} bytes" if cut else "damaged"
        return f"it is a .safetensors file that is {what}: {_AGAIN}"
    if path.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\2"):
        return f"it is named .safetensors and is something else, or damaged: {_AGAIN}"
    if any(head.startswith(begin) or begin.startswith(head) for begin in (b"PK", _BEFORE_1_6)):
        return f"it is truncated at {size:,} bytes, its end is missing: {_AGAIN}"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return (
            "it is a pickle that torch.save has not made: load it with the code that made it, and "
            "save a dict of tensors with torch.save"
        )
    return f"it is no file of torch.save and no .safetensors file, or damaged: {_AGAIN}"


def _safetensors_size(path: Path) -> int:
    """Bytes of the whole file by its header; more than there are where that is cut off."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
            header.pop("__metadata__", None)
            return 8 + length + max(about["data_offsets"][1] for about in header.values())
        except Exception:  # no header of theirs
            return 8 + length


def unknown_names(path: Path, error: Exception) -> list[str]:
    """The classes and functions that reading was refused for, the first one first; of a file of
    torch before 1.6 only that. None where that was not why."""
    found = re.search(r"Unsupported global: GLOBAL (\S+) was|unsupported GLOBAL (\S+)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or found is None:
        return []
    first = found[1] or found[2]
    first = first if "." in first else f"builtins.{first}"
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of torch before 1.6
        others = []
    return [first, *(name for name in others if name != first)]


def _refused(names: list[str]) -> str:
    """What reading would have to run, by name; nothing where there is nothing."""
    if not names:
        return ""
    first = names[0].removeprefix("builtins.")
    if any(name.startswith("torch.nn.modules.") for name in names):
        return (
            f"it is a whole model ({first}), not its weights; with the code that made it, save "
            "its `state_dict()` instead"
        )
    return (
        f"it holds something other than tensors, numbers and text ({first}), which would run "
        "code; if you trust it, load it with the code that made it and save it again without that"
    )
