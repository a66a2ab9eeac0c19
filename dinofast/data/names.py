"""Which files are images, by their names: one rule for folders, shards, k-NN and whatever else
lists files. What it leaves out is counted by kind and told in a sentence."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".webp", ".tif", ".tiff", ".gif", ".tga", ".jp2", ".j2k"),
)
# read where this module imports: Pillow's own from 11.3 on, or a package of that name
PLUGINS = {
    ".avif": ("PIL._avif", "pillow_avif"),
    **dict.fromkeys((".heic", ".heif", ".hif"), ("pillow_heif",)),
    ".jxl": ("pillow_jxl",),
}
PACKAGES = {
    "pillow_avif": "pillow-avif-plugin",
    "pillow_heif": "pillow-heif",
    "pillow_jxl": "pillow-jxl-plugin",
}
# what macOS, Windows and network storage leave between the images, beside names with a dot in front
SYSTEM = frozenset(
    name.encode()
    for name in (
        *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "$RECYCLE.BIN", "RECYCLER"),
        *("System Volume Information", "lost+found", "@eaDir", "#recycle", "@Recycle"),
    )
)
# of a sample of a shard, what says where its objects are: not to be trained on as if it were one
MASKS = "seg semseg mask masks label labels depth instance panoptic"
# members that stand beside each image of a shard and are no images: not told
BESIDE = (
    "json cls cls2 txt text caption transcript id index inx pickle pkl pyd npy npz ten pth pt msg "
    "mp cbor xml csv html"
)
KINDS = 8  # told by name; the others are counted together
_EXTENSIONS = tuple(extension.encode() for extension in EXTENSIONS)
_MASKS, _BESIDE = (frozenset(words.encode().split()) for words in (MASKS, BESIDE))


@cache
def has_plugin(extension: str) -> bool:
    """Whether Pillow reads files with this ending by a plug-in, which is registered for this
    process."""
    for name in PLUGINS[extension]:
        try:
            module = importlib.import_module(name)
        except Exception:  # not installed, or its library does not load
            continue
        if hasattr(module, "register_heif_opener"):  # the others do so when they are imported
            module.register_heif_opener()
        return True
    return False


def has_ending(name: bytes) -> bool:
    """Whether the ending is that of an image that can be read here."""
    name = name.lower()
    if name.endswith(_EXTENSIONS):
        return True
    extension = "." + name.rpartition(b".")[2].decode("latin-1")
    return extension in PLUGINS and has_plugin(extension)


def is_hidden(name: bytes) -> bool:
    """Whether a file or folder of this name (no path) is left out: hidden, or left there by a
    system."""
    return name.startswith(b".") or name in SYSTEM


def kind_of_member(name: bytes) -> str:
    """Of a member of a shard: "image", "" for what stands beside images, else why it is ignored, as
    `Ignored` counts it."""
    above, _, base = name.rpartition(b"/")
    if not base:
        return ""
    if is_hidden(base) or (above and _under_hidden(above)):
        return "hidden"
    stem, _, ending = base.lower().rpartition(b".")
    if stem and ending in _BESIDE:
        return ""
    if not has_ending(base):
        return kind_of(base)
    key = stem.rpartition(b".")[2]
    return f".{key.decode()}.{ending.decode()}" if key in _MASKS and key != stem else "image"


def _under_hidden(folders: bytes) -> bool:
    """Whether a path inside an archive, which may begin with ./, leads into a hidden folder."""
    return any(
        is_hidden(folder) or folder.startswith(b"PaxHeader")
        for folder in folders.split(b"/")
        if folder not in (b"", b".", b"..")
    )


def kind_of(name: bytes) -> str:
    """Of a file that is no image: its ending, or what else it is."""
    if is_hidden(name):
        return "hidden"
    stem, _, ending = name.lower().rpartition(b".")
    plain = stem and re.fullmatch(rb"[a-z0-9_~+-]{1,10}", ending) and not ending.isdigit()
    return "." + ending.decode() if plain else "without a known ending"


@dataclass
class Ignored:
    """What was left out: files by kind, folders by name."""

    files: Counter[str] = field(default_factory=Counter)
    folders: Counter[str] = field(default_factory=Counter)

    def add(self, other: Ignored) -> None:
        self.files.update(other.files)
        self.folders.update(other.folders)

    def __str__(self) -> str:
        """'5 files ignored: 3 .heic (pip install pillow-heif), 2 .txt'; empty if nothing was."""
        told = []
        for what, counts in (("file", self.files), ("folder", self.folders)):
            if n := sum(counts.values()):
                kinds = [f"{m:,} {kind}{_way_out(kind)}" for kind, m in counts.most_common(KINDS)]
                if rest := n - sum(m for _, m in counts.most_common(KINDS)):
                    kinds.append(f"{rest:,} others")
                told.append(f"{n:,} {what}{'s' * (n > 1)} ignored: {', '.join(kinds)}")
        return "; ".join(told)


def package(extension: str) -> str:
    """What to install in order to read these files."""
    return PACKAGES[PLUGINS[extension][-1]]


def _way_out(kind: str) -> str:
    return f" (pip install {package(kind)})" if kind in PLUGINS else ""
