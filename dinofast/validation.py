"""What options cannot be right: `ValueError` with the value and the way out."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

CHANNELS = range(1, 17)  # of an image
OTHER_CHANNELS = [n for n in CHANNELS if n != 3]
SOURCES = "give a folder of images or .tar shards, or a text file of their paths"
# what the files that an option writes are, and how they begin; all others are text
WRITTEN = {
    "json": ("JSON", (b"{", b"[")),
    "sheet": ("PNG", (b"\x89PNG\r\n\x1a\n",)),
    "page": ("HTML", (b"<!doctype html>",)),
    "features": ("of features", (b"PK\3\4", b"PAR1")),
}


def check_values(options: Any) -> None:
    """Each field of a dataclass is of its type, finite, and one of its choices."""
    for f in fields(options):
        value = getattr(options, f.name)
        default: Any = f.default
        if f.metadata.get("nargs") == "+" and isinstance(value, tuple) and value and default:
            default = default[:1] * len(value)
        check_type(f.name, value, default, f.metadata.get("type", str))
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(v, float) and not math.isfinite(v) for v in numbers):
            raise ValueError(f"`{f.name}` is {value}: give a finite number.")
        if f.metadata.get("choices") and value is not None and value not in f.metadata["choices"]:
            raise ValueError(
                f"`{f.name}` is '{value}': choose from {', '.join(f.metadata['choices'])}."
            )


def check_ranges(options: Any) -> None:
    """Each option of a pretraining run lies where it may."""
    for name in (
        *("patch_size", "batch_size_per_gpu", "accumulate", "epochs", "log_steps"),
        *("head_layers", "head_hidden_dim", "head_bottleneck_dim"),
        *("global_crops_size", "local_crops_size"),
    ):
        _need(options, name, getattr(options, name) >= 1, "must be at least 1")
    _need(options, "out_dim", options.out_dim >= 2, "must be at least 2, to tell images apart")
    for name in (
        *("warmup_teacher_temp_epochs", "freeze_last_layer", "warmup_epochs"),
        *("local_crops_number", "saveckp_freq", "saveckp_steps", "num_workers", "seed"),
        *("weight_decay", "weight_decay_end", "clip_grad", "lr", "min_lr"),
    ):
        _need(options, name, getattr(options, name) >= 0, "must not be negative")
    _need(options, "seed", options.seed < 2**63, "must be below 2^63")
    for name, most in (
        ("epochs", 10**6),
        ("out_dim", 2**24),
        ("batch_size_per_gpu", 2**20),
        ("head_hidden_dim", 2**20),
        ("global_crops_size", 2**14),
        ("local_crops_size", 2**14),
        ("local_crops_number", 1000),
    ):
        _need(options, name, getattr(options, name) <= most, f"must be at most {most}")
    for name in ("warmup_teacher_temp", "teacher_temp", "student_temp"):
        _need(options, name, getattr(options, name) > 0, "must be above 0")
    for name in ("momentum_teacher", "center_momentum", "max_bad_files", "hw_decoder_load"):
        _need(options, name, 0 <= getattr(options, name) <= 1, "must lie between 0 and 1")
    _need(
        options, "drop_path_rate", 0 <= options.drop_path_rate < 1, "must be at least 0 and below 1"
    )
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = getattr(options, name)
        _need(
            options,
            name,
            0 < low <= high <= 1,
            "must be two shares of the area, 0 < smallest <= largest <= 1",
        )
    if options.eval_every is not None:
        _need(options, "eval_every", options.eval_every >= 0, "must not be negative")
    low, high = options.value_range
    _need(options, "value_range", low < high or low == high == 0, "must be two values, low < high")
    low, high = options.blur_radius
    _need(
        options,
        "blur_radius",
        0 <= low <= high < 1000,
        "must be two radii, 0 <= smallest <= largest < 1000",
    )
    _need(options, "in_channels", options.in_channels in CHANNELS, "must be 1 to 16")
    for name in ("image_mean", "image_std"):
        rule = f"must be {options.in_channels} numbers, one a channel (`in_channels`)"
        _need(options, name, len(getattr(options, name)) == options.in_channels, rule)
    _need(options, "image_std", all(s > 0 for s in options.image_std), "must be numbers above 0")


def check_type(name: str, value: Any, default: Any, no_default: type = str) -> None:
    """The value is of the default's type; of `no_default`, or None, where there is no default."""
    if isinstance(default, tuple):
        if not isinstance(value, tuple) or len(value) != len(default):
            raise ValueError(f"`{name}` is {value!r}: give {len(default)} numbers.")
        for v in value:
            check_type(name, v, 0.0)
    elif default is None or default is MISSING:
        wanted = (int, float) if no_default is float else no_default
        if value is not default and not isinstance(value, wanted):
            raise ValueError(
                f"`{name}` is {value!r}: give a {'word' if no_default is str else 'number'}."
            )
    else:
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or (
            isinstance(value, bool) and not isinstance(default, bool)
        ):
            kind = {
                bool: "True or False",
                int: "a whole number",
                float: "a number",
                str: "a word",
            }[type(default)]
            raise ValueError(f"`{name}` is {value!r}: give {kind}.")


def _need(options: Any, name: str, good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"`{name}` is {in_words(getattr(options, name))}: it {rule}.")


def check_patches(options: Any, name: str, needed: bool) -> None:
    """Crops of this side are whole patches."""
    size, patch = getattr(options, name), options.patch_size
    if needed and size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"`{name}` {size} is not a multiple of `patch_size` {patch}: take {near}, or "
            "another patch size."
        )


def check_source(source: str) -> None:
    """Raise ValueError if no file or folder has that path, with what was probably meant. A pattern
    in braces is looked at by who expands it."""
    if os.path.exists(source) or "{" in source:
        return
    folder, name = os.path.split(source.rstrip("/"))
    hint = SOURCES
    if source.startswith("file://"):
        hint = f"write {source.removeprefix('file://')}"
    elif "://" in source:
        hint = "only files of this machine are read; copy or mount those there"
    elif source.startswith("~"):
        hint = f"the shell left its ~ alone; write {os.path.expanduser(source)}"
    elif set("*?") & set(source):
        hint = "give the folder itself; all images below it are found"
    elif os.path.lexists(source):
        hint = "it is a link, and what it leads to is not there"
    elif os.path.exists(source.strip(" \"'")):
        hint = "there is such a path without what stands around it"
    elif near := difflib.get_close_matches(name, _some_names(folder or "."), 1, 0.75):
        hint = f"did you mean '{os.path.join(folder, near[0])}'?"
    end = "" if hint.endswith("?") else "."
    raise ValueError(f"`data_path` '{source}' does not exist: {hint}{end}")


def _some_names(folder: str) -> list[str]:
    """Of what lies in a folder, without listing a million."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in itertools.islice(entries, 1000)]
    except OSError:
        return []


def check_output(
    name: str,
    path: str,
    is_folder: bool = False,
    is_replaced: bool = False,
    kind: tuple[str, Callable[[], bool]] | None = None,
) -> None:
    """Raise ValueError if the file of that path could not be written, or the folder not be made,
    so that hours of work do not end with that; or if the file holds something of another kind than
    this option writes, which would be lost. Leaves nothing behind.

    A file's folder must be there, a folder is made together with those above it. is_replaced: a
    file that is there is not written into, another one takes its name. kind: what the option
    writes, and whether what is there is that, where its first bytes do not tell.
    """
    given = f"`{name}` is '{path}'"
    folder = path if is_folder else os.path.dirname(path)
    folder = folder or "."
    while is_folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder.rstrip("/")) or "."
    if is_folder and not os.path.isdir(folder):
        what = "a file" if os.path.exists(folder) else "a link to what is not there"
        raise ValueError(f"{given}, and '{folder}' is {what}: give a folder.")
    if not is_folder and (os.path.isdir(path) or path.endswith("/")):
        raise ValueError(f"{given}, a folder: name a file in it.")
    if not os.path.isdir(folder):
        raise ValueError(f"{given}, but there is no folder '{folder}': make it, or name another.")
    head = b""
    try:
        if is_folder or is_replaced or not os.path.exists(path):
            tempfile.TemporaryFile(dir=folder).close()
        if not is_folder and os.path.isfile(path):  # no pipe, which would be waited for
            if not is_replaced:
                os.close(os.open(path, os.O_WRONLY | os.O_APPEND))
            with open(path, "rb") as file:
                head = file.read(4096)
    except OSError as error:
        raise ValueError(
            f"{given}, which cannot be written ({error.strerror or error}): name another place."
        ) from error
    what, starts = WRITTEN.get(name, ("text", ()))
    lost = not head.lstrip().startswith(starts) if starts else b"\0" in head
    if kind is not None:
        what, lost = kind[0], os.path.exists(path) and not kind[1]()
        head = b"there"
    if head.strip() and lost:
        a_file = "a folder" if os.path.isdir(path) else "a file"
        raise ValueError(f"{given}, {a_file} that is not {what} and would be lost: name another.")


def check_outside(name: str, path: str, folder: str) -> None:
    """Raise ValueError if this is a file that lies in a folder of images, or below it."""
    if os.path.isfile(path) and os.path.isdir(folder):
        inner, outer = os.path.realpath(path), os.path.realpath(folder)
        if os.path.commonpath((inner, outer)) == outer:
            raise ValueError(
                f"`{name}` is '{path}', a file among the images, which would be lost: name another."
            )


def in_words(value: Any) -> str:
    return " ".join(str(v) for v in value) if isinstance(value, tuple) else str(value)
