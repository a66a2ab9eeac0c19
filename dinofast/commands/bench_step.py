"""Time the whole training step on random crops, and on images if a folder is given: images/s, MFU,
where the time goes, and the official loop, in turns. Takes the flags of pretrain and writes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config, name_unknown, option
from ..runtime.terminal import say


@name_unknown
@dataclass(frozen=True, kw_only=True)
class Options(Config):
    data_path: str = option(
        "", "images, as for pretrain", metavar="DIR", positional=True, shown="random crops alone"
    )
    seconds: float = option(30.0, "of the measurement, at least")

    def check(self) -> Options:
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"`seconds` is {self.seconds:g}: give a number above 0.")
        super().check()
        return self


def run(options: Options) -> None:
    from ..bench.step import measure
    from ..runtime.words import spelled

    say(
        measure(
            options,
            options.data_path,
            options.seconds,
            lambda text: say(spelled(text)),
        )
    )
