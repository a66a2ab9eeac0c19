"""Runs beside each other: what they came to, and in which options they differ."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from ..config import option
from ..runtime.terminal import say


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: tuple[str, ...] = option(
        MISSING,
        "Folders of runs, as `output_dir` of pretrain named them.",
        metavar="RUN",
        positional=True,
        nargs="*",
    )


def run(options: Options) -> None:
    from ..report.compare import differences, results
    from ..run_folder import RunFolder

    runs = [RunFolder(path) for path in options.runs]
    say(results(runs).as_text())
    other = differences(runs)
    if len(runs) > 1:
        say(f"\noptions that differ:\n{other.as_text()}" if other.rows else "\nall options alike")
