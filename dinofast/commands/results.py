"""Files that commands write of what they found, in one piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..checkpoint.storage import write
from ..validation import check_output


def check_json(path: str) -> None:
    """Raise `ValueError` if this cannot be the file of the option `json`; "" is none."""
    if path:
        check_output("json", path)


def write_json(options: Any, **found: Any) -> None:
    """What was found, after the options that it depends on, into the file of the option `json` if
    there is one. What is no finite number is null."""
    if not options.json:
        return
    shown = [f.name for f in fields(options) if not f.metadata.get("hidden") and f.name != "json"]
    given = {name: getattr(options, name) for name in shown}
    settings = {name: value for name, value in given.items() if value not in (None, "", ())}
    write_text(options.json, json.dumps(_finite({**settings, **found}), indent=1))


def write_text(path: str, text: str) -> None:
    """A file, atomically; into what is no file, such as /dev/stdout, just so. Raises `OSError` that
    names it."""
    data = text.encode()
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_bytes(data)
        else:
            write(Path(os.path.realpath(path)), partial(_fill, data), lambda written: None)
    except OSError as error:
        raise OSError(f"'{path}' could not be written ({error.strerror or error}).") from error


def _fill(data: bytes, file: IO[bytes]) -> None:
    file.write(data)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
