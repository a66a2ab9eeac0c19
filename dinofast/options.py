"""Options of a command: fields of a dataclass, from which `dinofast.cli` makes flags."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from .presets import options_of
from .runtime.suggestions import did_you_mean

_Class = TypeVar("_Class", bound=type[Any])


def option(default: Any, advice: str = "", **metadata: Any) -> Any:
    """A field of a command's options, from which `dinofast.cli` makes a flag.

    metadata: `choices`; `aliases`, other words for a choice; `metavar`; `flags`, other names of the
    flag; `positional`, also without a flag; `type`, where the default does not tell; `shown`, the
    default in words; `auto`, what None means on cuda and cpu; `hidden`, not in the help; `topic`,
    heading of this one and those after it; `nargs`, "+" for any number of values, "*" for any
    number without a flag, "?" where the flag alone means true.
    """
    return field(default=default, metadata={"help": advice, **metadata})


def name_unknown(cls: _Class) -> _Class:
    """A dataclass whose error for an option that it lacks names the one that was meant."""
    init: Any = cls.__init__  # type: ignore[misc]
    names = [f.name for f in fields(cls)]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                hint = did_you_mean(name, names)
                raise TypeError(f"{cls.__name__} has no option `{name}`.{hint}")
        given = dict(zip(names, args, strict=False)) | options
        if len(given) < len(names):  # else all are given
            options = {**_together(given), **given}
            args = ()
        init(self, *args, **options)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


def _together(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `preset` and `config` of these options say of others. Raises `ValueError`."""
    from .config_file import read_options

    preset, path = options.get("preset"), options.get("config")
    if preset and path:
        raise ValueError(
            f"`preset` {preset} and `config` {path} both choose options: write `preset: "
            f"{preset}` into the file, or leave one out."
        )
    found = read_options(path) if path else {}
    return {**options_of(found.get("preset", preset)), **found}


def meant(aliases: dict[str, str], value: str | bool) -> str | bool:
    """The choice that `value` is another word for; itself where it is none."""
    lower = str(value).lower()
    return aliases.get(lower, lower if lower in aliases.values() else value)
