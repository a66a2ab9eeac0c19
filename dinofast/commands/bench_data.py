"""Measure the data path alone: images/s, their CPU time by stage, and whether that keeps up with a
training speed. Takes the flags of pretrain and writes nothing.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from ..config import Config, name_unknown, option
from ..runtime.terminal import say


@name_unknown
@dataclass(frozen=True, kw_only=True)
class Options(Config):
    data_path: str = option(MISSING, "images, as for pretrain", metavar="DIR", positional=True)
    seconds: float = option(10.0, "of the measurement, at least")
    images_per_second: float | None = option(
        None,
        "speed of training to keep up with",
        type=float,
        shown="says up to which speed the data would be enough",
    )

    def check(self) -> Options:
        for name in ("seconds", "images_per_second"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}` is {value:g}: give a number above 0.")
        super().check()
        return self


def run(options: Options) -> None:
    from ..bench.data import measure, report

    say(report(measure(options, options.seconds), options.images_per_second))
