"""Several runs beside each other: what they came to, and in which options they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..run_folder import RunFolder

# of no concern: where a run lies and what is said of it
_LEFT_OUT = {"output_dir", "config", "tensorboard", "wandb", "local_rank", "dist_url"}
_SCORES = {
    "eval_knn": ("k-NN, %", "{:.1f}"),
    "eval_rankme": ("RankMe", "{:.1f}"),
    "eval_lidar": ("LiDAR", "{:.1f}"),
    "eval_patch_matching": ("patch matching", "{:.3f}"),
}


@dataclass(frozen=True)
class Table:
    """columns: names of the runs. rows: what they are about, and a cell a run."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def as_text(self) -> str:
        """In columns, for a terminal."""
        lines = [("", self.columns), *self.rows]
        widths = [max(len(name) for name, _ in lines)]
        widths += [max(len(cells[i]) for _, cells in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                [
                    name.ljust(widths[0]),
                    *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)),
                ]
            ).rstrip()
            for name, cells in lines
        )


def names_of(runs: Sequence[RunFolder]) -> tuple[str, ...]:
    """As short as tells them apart: the folder, with those above it where two are alike."""
    for depth in range(1, 20):
        names = tuple("/".join(run.path.resolve().parts[-depth:]) for run in runs)
        if len(set(names)) == len(names):
            return names
    return tuple(str(run.path) for run in runs)


def results(runs: Sequence[RunFolder]) -> Table:
    """What each run came to: at its last epoch, with the best score and its epoch."""
    rows = [("epochs", tuple(str(len(run.metrics)) for run in runs))]
    rows += [("steps", tuple(f"{_last(run.steps, 'step') or 0:,}" for run in runs))]
    for key, name in (
        ("train_loss", "loss"),
        ("train_teacher_entropy", "teacher's entropy"),
        ("train_kl", "KL divergence"),
    ):
        rows.append((name, tuple(_told(_last(run.metrics, key), "{:.3f}") for run in runs)))
    for key, (name, form) in _SCORES.items():
        cells = tuple(_score(run, key, form) for run in runs)
        if any(cells):
            rows.append((name, cells))
    rates = tuple(_told(_middle(run.steps, "images_per_s"), "{:,.0f}") for run in runs)
    waits = tuple(_told(_middle(run.steps, "data_wait"), "{:.0%}") for run in runs)
    rows += [("images/s, median", rates), ("data wait, median", waits)]
    return Table(names_of(runs), tuple(rows))


def differences(runs: Sequence[RunFolder]) -> Table:
    """The options that are not the same in all runs, of those whose options are known."""
    known = [run for run in runs if run.options]
    names = dict.fromkeys(name for run in known for name in run.options if name not in _LEFT_OUT)
    rows = []
    for name in names:
        values = [in_words(run.options.get(name)) for run in known]
        if len(set(values)) > 1:
            cells = (in_words(run.options.get(name)) if run.options else "?" for run in runs)
            rows.append((name, tuple(cells)))
    return Table(names_of(runs), tuple(rows))


def in_words(value: Any) -> str:
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _score(run: RunFolder, key: str, form: str) -> str:
    """The last one, and the best where that is another."""
    found = [(line[key], line["epoch"]) for line in run.metrics if line.get(key) is not None]
    if not found:
        return ""
    best, epoch = max(found, key=lambda pair: (pair[0], -pair[1]))
    last = form.format(found[-1][0])
    shown = form.format(best)
    return last if shown == last else f"{last} (best {shown}, epoch {epoch})"


def _last(lines: Sequence[dict[str, Any]], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _middle(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return sorted(values)[len(values) // 2] if values else None


def _told(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
