"""What a person sees of a run and what is written of it: progress, log.txt, warnings in words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .json_lines import JsonLines
from .memory import peak_memory
from .metrics import COUNTS, EpochSums, Trend
from .terminal import StatusLine, is_terminal, printable, say
from .words import counted, spelled

PLAIN_LINE_S = 10.0  # without a terminal, one line at most so often
MIN_BAR, MAX_BAR = 10, 26  # characters, with its brackets
GIVE_UP_AFTER = 20  # steps in a row without a finite loss or gradient


class Diverged(RuntimeError):
    """Training cannot go on: the loss or the gradient has not been finite for many steps in a
    row."""


class Run:
    """Speaks for the main process and stays silent on the others; all of them keep the sums and
    find trouble together."""

    def __init__(
        self,
        output_dir: Path,
        is_main: bool,
        *,
        steps_per_epoch: int,
        epochs: int,
        images_per_step: int,
        out_dim: int,
    ) -> None:
        self._epochs = JsonLines(output_dir / "log.txt", "epoch")
        self._steps = JsonLines(output_dir / "metrics.jsonl", "step")
        self.is_main = is_main
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs
        self.images_per_step = images_per_step
        self._trend = Trend(math.log(out_dim))
        self._last: dict[str, float] = {}
        self._clock = self._wait_s = self._spoken = 0.0
        self._first_step = self._last_step = 0
        self._bad_in_a_row = self._told_bad = self._told_unread = 0
        self._start = self._stepped = 0.0
        self._told_saved = False
        self._status: StatusLine | None = None  # on a terminal

    # ---- words
    def log(self, text: str) -> None:
        if not self.is_main:
            return
        text = printable(spelled(text))
        (self._status.log if self._status else say)(text)

    @contextmanager
    def live(self, step: int, sums: Mapping[str, float]) -> Iterator[None]:
        """Progress around the loop, which begins at `step` with the given sums of its epoch."""
        self._first_step = self._last_step = step
        self._last = dict(sums)
        self._start = self._clock = self._stepped = time.perf_counter()
        if not (self.is_main and is_terminal()):
            yield
            return
        self._status = StatusLine()
        try:
            yield
        finally:
            self._status.end()
            self._status = None

    def log_start(self, step: int, path: Path) -> None:
        """Say where the run goes on; nothing of a new one."""
        total = self.epochs * self.steps_per_epoch
        if step >= total:
            self.log(
                f"training already complete: {self._whole()}, in '{path}'; raise `epochs` to go on"
            )
        elif step:
            epoch = step // self.steps_per_epoch
            self.log(f"resumed from '{path}' after step {step}, in {self._named(epoch)}")

    def log_saved(self, path: Path) -> None:
        """Say where the first checkpoint of this run lies."""
        if not self._told_saved:
            self.log(f"saved in '{path}', as after every epoch")
        self._told_saved = True

    def log_done(self, path: Path, device: torch.device) -> None:
        self.log(f"done: {self._whole()}; peak memory {peak_memory(device)}")
        self.log(f"teacher and student are saved in '{path}'")

    def _named(self, epoch: int) -> str:
        """As log.txt counts them, from 0, so that the last is seen to be the last."""
        return f"epoch {epoch} of 0-{self.epochs - 1}" if self.epochs > 1 else "epoch 0"

    def _whole(self) -> str:
        last, steps = self.epochs - 1, counted(self.epochs * self.steps_per_epoch, "step")
        return f"{counted(self.epochs, 'epoch')} (0{f' to {last}' if last else ''}), {steps}"

    def log_left_out(self, bad_files: Sequence[tuple[str, str]], where: Path) -> None:
        """Say what listing the source has found bad, shards and folders, and where it will be
        listed."""
        self._told_bad = len(bad_files)
        if bad_files:
            path, reason = bad_files[-1]
            self.log(
                f"{counted(len(bad_files), 'bad file')} left out, listed in '{where}'; the last: "
                f"{path} ({reason})"
            )

    def log_replaced(
        self,
        bad_files: Sequence[tuple[str, str]],
        n_unread: int,
        unread_reason: str,
        where: Path,
        world: int,
    ) -> None:
        """Say how many bad images this process has met since this was last called, and how many it
        could not read at their turn; of each the last."""
        whose = " of this process" if world > 1 else ""
        new, self._told_bad = len(bad_files) - self._told_bad, len(bad_files)
        if new:
            path, reason = bad_files[-1]
            self.log(
                f"{counted(new, 'bad image')}{whose} replaced, listed in '{where}'; the last: "
                f"{path} ({reason})"
            )
        new, self._told_unread = n_unread - self._told_unread, n_unread
        if new:
            self.log(
                f"{counted(new, 'image')}{whose} could not be read this time ({unread_reason}), "
                "replaced"
            )

    def show(
        self, step: int, sums: Mapping[str, float], lr: float, wait_s: float
    ) -> dict[str, float | None]:
        """Called at logging points with what was just read from the device; `step` steps are done.
        Returns the metrics of the steps since the last time: their means, images/s, and the share
        of the time that was spent waiting for data. Raises `Diverged`."""
        new_steps = step - self._last_step
        new = {name: value - self._last.get(name, 0.0) for name, value in sums.items()}
        good = new["good_steps"]
        bad = round(new["steps"] - good)
        self._bad_in_a_row = self._bad_in_a_row + bad if bad == new_steps else 0
        if self._bad_in_a_row >= GIVE_UP_AFTER:
            raise Diverged(
                f"the loss or its gradient has not been finite for {self._bad_in_a_row} steps in a "
                "row; the weights are those of the last good step. Try `precision` fp32, a lower "
                "`lr`, or a smaller `clip_grad`."
            )
        now = time.perf_counter()
        elapsed = max(now - self._clock, 1e-9)
        rate = new_steps * self.images_per_step / elapsed
        waiting = min(max((wait_s - self._wait_s) / elapsed, 0.0), 1.0)
        numbers = {"loss": "not finite"}
        if good > 0:
            numbers = {
                "loss": f"{new['loss'] / good:.4f}",
                "entropy": self._share(new["teacher_entropy"] / good),
                "lr": f"{lr:.2e}",
                "": f"{rate:,.1f} images/s",
                "data wait": f"{waiting:.0%}",
            }
        if bad and self.is_main:
            self.log(
                f"step {step}: {counted(bad, 'step')} skipped: loss or gradient was not finite; "
                "weights, teacher and center kept"
            )
        self._tell(step, numbers, now)
        self._last, self._clock, self._wait_s, self._last_step = dict(sums), now, wait_s, step
        means = {n: new[n] / good if good > 0 else None for n in new if n not in COUNTS}
        return {**means, "skipped_steps": bad, "images_per_s": rate, "data_wait": waiting}

    def pause(self, seconds: float) -> None:
        """What was not training has taken so long: not to be counted in images/s."""
        self._clock += seconds

    def estimate(self, step: int, compiles: bool, sums: EpochSums) -> None:
        """After the first step, or the second where the first has to compile: how long all of it
        will take. Waits for the device then, and only then."""
        first = step - self._first_step
        if first > 1 + compiles or not self.is_main:
            return
        sums.read()
        now = time.perf_counter()
        took_s, self._stepped = now - self._stepped, now
        total = self.epochs * self.steps_per_epoch
        if first == 1 + compiles:
            left = f"up to {in_words(took_s * (total - step))} for the {total - step:,} to come"
            left = f": {left}" if step < total else ""
            self.log(f"step {step} took {in_words(took_s)}, with its start-up{left}")
            self.log(f"peak memory so far: {peak_memory(sums.device)}")

    def _tell(self, step: int, numbers: Mapping[str, str], now: float) -> None:
        total, epoch = self.epochs * self.steps_per_epoch, (step - 1) // self.steps_per_epoch
        left_s = (now - self._start) / max(step - self._first_step, 1) * (total - step)
        numbers = {**numbers, "ETA": duration(left_s)}
        if self._status:
            self._status.show(
                status_line(self._named(epoch), step, total, numbers, self._status.columns())
            )
        elif self.is_main and (now - self._spoken >= PLAIN_LINE_S or step == total):
            said = "  ".join(f"{name} {value}".strip() for name, value in numbers.items())
            self.log(f"{self._named(epoch)}  step {step}  {said}")
            self._spoken = now

    def _share(self, entropy: float) -> str:
        """Of log K, the entropy of a uniform output."""
        return f"{entropy / self._trend.log_k:.0%}" if self._trend.log_k else "0%"

    # ---- log.txt and metrics.jsonl
    def go_on(self, step: int) -> None:
        """The logs of a run that goes on after this step: see `JsonLines.drop_from`."""
        if self.is_main:
            epoch = step // self.steps_per_epoch
            self._epochs.drop_from(epoch)
            self._steps.drop_from(step + 1 if step else 0, epoch)
            self._trend.losses = self._epochs.values("train_loss")

    def best_before(self, name: str) -> tuple[float, int]:
        """The highest score of that name so far, and its epoch; -inf and -1 if there is none."""
        lines = [line for line in self._epochs.read() if isinstance(line.get(name), float)]
        found = max(lines, key=lambda line: (line[name], -line["epoch"]), default=None)
        return (found[name], found["epoch"]) if found else (-math.inf, -1)

    def record(self, line: Mapping[str, float | None]) -> None:
        """A line of metrics.jsonl, on the main process."""
        if self.is_main:
            self._steps.append({**line, "time": round(time.time(), 3)})

    def end_epoch(
        self,
        epoch: int,
        sums: Mapping[str, float],
        lr: float,
        weight_decay: float,
        scores: Mapping[str, float] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Append the epoch's line (means over its steps, and scores) and say in words when training
        looks collapsed; returns the line, nothing where this is not the main process."""
        self._last = {}
        if not self.is_main:
            return {}
        count, steps = (sums[name] for name in COUNTS)
        means = {
            name: value / count if count else None
            for name, value in sums.items()
            if name not in COUNTS
        }
        line = {
            "train_loss": means.pop("loss", None),
            "train_lr": lr,
            "train_wd": weight_decay,
            "epoch": epoch,
            **{f"train_{name}": value for name, value in means.items()},
            "skipped_steps": round(steps - count),
            **{f"eval_{name}": value for name, value in scores.items()},
        }
        if reason := self._epochs.append(line):
            self.log(f"'{self._epochs.path}' cannot be written ({reason}): kept for the next epoch")
        if count:
            entropy = self._share(sums["teacher_entropy"] / count)
            self.log(
                f"end of {self._named(epoch)}: mean loss {sums['loss'] / count:.4f}, teacher "
                f"entropy {entropy} of log K{_in_words(scores)}"
            )
        if count and (
            warning := self._trend.warning(sums["loss"] / count, sums["teacher_entropy"] / count)
        ):
            self.log(f"warning, epoch {epoch}: {warning}")
        return line


def _in_words(scores: Mapping[str, float]) -> str:
    """; k-NN 61.2 %, RankMe 38.1, ... or nothing."""
    names = {
        "knn": "k-NN {:.1f} %",
        "rankme": "RankMe {:.1f}",
        "lidar": "LiDAR {:.1f}",
        "patch_matching": "patch matching {:.2f}",
    }
    said = [names[name].format(value) for name, value in scores.items()]
    return f"; {', '.join(said)}" if said else ""


def counting(what: str, is_main: bool) -> Callable[[int, int], None]:
    """A callback `(done, total)` that prints a line now and then while something long is counted
    through; total 0: unknown."""
    spoken = time.perf_counter()

    def tell(done: int, total: int) -> None:
        nonlocal spoken
        if is_main and time.perf_counter() - spoken > PLAIN_LINE_S / 2:
            say(f"{what}: {done:,}{f' of {total:,}' if total else ''}")
            spoken = time.perf_counter()

    return tell


def status_line(head: str, done: int, total: int, numbers: Mapping[str, str], columns: int) -> str:
    """Progress in one line of at most `columns` characters: the least important numbers go first,
    the bar and the ETA last."""
    count, names = f"{done}/{total}", list(numbers)

    def line(bar: str) -> str:
        said = [f"{name} {numbers[name]}".strip() for name in names]
        return " ".join(filter(None, (head, bar, count, *said)))

    for name in ("lr", "data wait", "entropy", "", "loss"):
        if len(line("")) + 1 + MIN_BAR > columns and name in names:
            names.remove(name)
    width = min(MAX_BAR, columns - len(line("")) - 1) - 2
    if width < 1:
        return line("")[:columns]
    filled = width * done // max(total, 1)
    return line("[" + "=" * filled + " " * (width - filled) + "]")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"


def in_words(seconds: float) -> str:
    """A length of time as a person would round it: 40 s, 25 min, 3.5 h, 12 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
