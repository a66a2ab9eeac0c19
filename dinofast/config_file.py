"""config.yaml: the options of a run beside its log, and what of them was changed on resuming."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from .config import Config
from .runtime.json_lines import set_aside
from .runtime.suggestions import did_you_mean
from .runtime.words import one_line

NAME = "config.yaml"
_HEAD = "# The options of this run. Once more: dinofast pretrain --config FILE; flags override.\n"
_CHANGES = "changes"  # of options on resuming, each with the steps that were done then
_ENVIRONMENT = "environment"  # of the last start


def read_options(path: str | Path) -> dict[str, Any]:
    """Options by name, as they are given to `Config`, from a YAML file: `name: value` a line.

    Raises `ValueError` for a file that cannot be read, and for a name that is no option.
    """
    known, options = {f.name: f for f in fields(Config) if f.name != "config"}, {}
    for key, value in _read_options(Path(path)).items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(
                f"`config` '{path}' has `{key}`, which is no option."
                f"{did_you_mean(name, list(known))}"
            )
        options[name] = _of_kind(known[name], value)
    return options


def options_in(folder: Path) -> dict[str, Any]:
    """The same of a run's folder, with the options of other versions as they stand there; nothing
    where there is no such file."""
    path, known = folder / NAME, {f.name: f for f in fields(Config)}
    found = _read_options(path) if path.exists() else {}
    return {n: _of_kind(known[n], v) if n in known else v for n, v in found.items()}


def record(
    folder: Path, cfg: Config, step: int, environment: Mapping[str, Any] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Write the options of a run into its folder, and what it runs on. Where it goes on after
    `step` steps, what has changed since is added to those changes that the file lists, and
    returned. Raises `OSError`."""
    path, changes, new = folder / NAME, [], []
    now = {name: _plain(value) for name, value in cfg.to_dict().items() if name != "config"}
    if step and path.exists():
        before = _known(path)
        changes = _changes_of(before)
        new = [
            {"step": step, "option": name, "from": before[name], "to": value}
            for name, value in now.items()
            if name in before and before[name] != value
        ]
        changes += new
    text = _HEAD + yaml.safe_dump(now, sort_keys=False, default_flow_style=None, width=1000)
    if environment:
        text += yaml.safe_dump({_ENVIRONMENT: dict(environment)}, sort_keys=False, width=1000)
    if changes:
        text += yaml.safe_dump({_CHANGES: changes}, sort_keys=False, width=1000)
    temporary = path.with_name(NAME + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return new


def _known(path: Path) -> dict[str, Any]:
    """What a run has recorded; nothing where the file was damaged, which is set aside."""
    try:
        return _read(path)
    except ValueError:
        set_aside(path)
        return {}


def _changes_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    changes = found.get(_CHANGES)
    return list(changes) if isinstance(changes, list) else []


def changes_in(folder: Path) -> list[dict[str, Any]]:
    """What `record` has listed, the oldest first; nothing where there is no such file."""
    path = folder / NAME
    return _changes_of(_read(path)) if path.exists() else []


def environment_in(folder: Path) -> dict[str, Any]:
    """What the run last ran on; nothing where there is no such file."""
    path = folder / NAME
    return dict(_read(path).get(_ENVIRONMENT) or {}) if path.exists() else {}


def _read_options(path: Path) -> dict[str, Any]:
    beside = (_CHANGES, _ENVIRONMENT)
    return {name: value for name, value in _read(path).items() if name not in beside}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or one_line(error)
        raise ValueError(
            f"`config` '{path}' cannot be read ({reason}): name a file with a line `name: value` "
            "for each option, such as config.yaml of a run."
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"`config` '{path}' is no list of options: write a line `name: value` for each."
        )
    return dict(found)


def _of_kind(field: Field, value: Any) -> Any:
    """A value as its option takes it: YAML reads 1e-6 as a word and has no tuples."""
    example = field.default
    if isinstance(value, list):
        return tuple(_number(v) if isinstance(example, tuple) else v for v in value)
    number = field.metadata.get("type") in (int, float) or (
        isinstance(example, int | float) and not isinstance(example, bool)
    )
    return _number(value) if number and example is not MISSING else value


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with suppress(ValueError):
            return kind(value)
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
