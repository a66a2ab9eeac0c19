"""What a person sees of a run and what is written of it: progress, log.txt, warnings in words."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .metrics import COUNTS, collapse_warning
from .words import spelled

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_LINE_S = 10.0  # without a terminal, one line at most so often
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
        self.path = output_dir / "log.txt"
        self.is_main = is_main
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs
        self.images_per_step = images_per_step
        self.log_k = math.log(out_dim)
        self._last: dict[str, float] = {}
        self._clock = self._wait_s = self._spoken = 0.0
        self._first_step = self._last_step = 0
        self._bad_in_a_row = self._told_bad = self._told_unread = 0
        self._start = 0.0
        self._progress: Progress | None = None

    # ---- words
    def log(self, text: str) -> None:
        if not self.is_main:
            return
        text = spelled(text)
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            _print(text)

    @contextmanager
    def live(self, step: int, sums: Mapping[str, float]) -> Iterator[None]:
        """The progress bar around the loop, which begins at `step` with the given sums of its
        epoch."""
        self._first_step = self._last_step = step
        self._last = dict(sums)
        self._start = self._clock = time.perf_counter()
        if self.is_main and sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("epoch {task.fields[epoch]}/" + str(self.epochs)),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            with Progress(*columns, refresh_per_second=4) as bar:
                self._progress = bar
                self._task = bar.add_task(
                    "train",
                    total=self.epochs * self.steps_per_epoch,
                    completed=step,
                    epoch=step // self.steps_per_epoch + 1,
                    numbers="",
                )
                try:
                    yield
                finally:
                    self._progress = None
                    bar.refresh()
        else:
            yield

    def log_start(self, step: int, path: Path) -> None:
        """Say where the run goes on; nothing of a new one."""
        total = self.epochs * self.steps_per_epoch
        if step >= total:
            self.log(
                f"training already complete ({step} steps), in '{path}': raise `epochs` to go on"
            )
        elif step:
            epoch = step // self.steps_per_epoch + 1
            self.log(f"resumed from '{path}' after step {step} (epoch {epoch} of {self.epochs})")

    def log_left_out(self, bad_files: Sequence[tuple[str, str]], where: Path) -> None:
        """Say what listing the source has found bad, shards and folders, and where it will be
        listed."""
        self._told_bad = len(bad_files)
        if bad_files:
            path, reason = bad_files[-1]
            self.log(
                f"{len(bad_files):,} bad file(s) left out, listed in '{where}'; the last: {path} "
                f"({reason})"
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
                f"{new:,} bad image(s){whose} replaced, listed in '{where}'; the last: {path} "
                f"({reason})"
            )
        new, self._told_unread = n_unread - self._told_unread, n_unread
        if new:
            self.log(
                f"{new:,} image(s){whose} could not be read this time ({unread_reason}), replaced"
            )

    def show(self, step: int, sums: Mapping[str, float], lr: float, wait_s: float) -> None:
        """Called at logging points with what was just read from the device; `step` steps are done.
        Raises `Diverged`."""
        new_steps = step - self._last_step
        new = {name: value - self._last.get(name, 0.0) for name, value in sums.items()}
        counted = new["good_steps"]
        bad = round(new["steps"] - counted)
        self._bad_in_a_row = self._bad_in_a_row + bad if bad == new_steps else 0
        if self._bad_in_a_row >= GIVE_UP_AFTER:
            raise Diverged(
                f"the loss or its gradient has not been finite for {self._bad_in_a_row} steps in a "
                "row; the weights are those of the last good step. Try `precision` fp32, a lower "
                "`lr`, or a smaller `clip_grad`."
            )
        now = time.perf_counter()
        elapsed = max(now - self._clock, 1e-9)
        if counted > 0:
            loss = new["loss"] / counted
            rate = new_steps * self.images_per_step / elapsed
            waiting = min(max((wait_s - self._wait_s) / elapsed, 0.0), 1.0)
            numbers = f"loss {loss:.4f}  lr {lr:.2e}  {rate:,.1f} images/s  data wait {waiting:.0%}"
        else:
            numbers = "loss not finite"
        epoch = (step - 1) // self.steps_per_epoch
        if bad and self.is_main:
            self.log(
                f"step {step}: {bad} step(s) skipped, their loss or gradient was not finite; "
                "weights, teacher and center kept"
            )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, epoch=epoch + 1, numbers=numbers)
        elif self.is_main and (
            now - self._spoken >= PLAIN_LINE_S or step == self.epochs * self.steps_per_epoch
        ):
            left_s = (
                (now - self._start)
                / max(step - self._first_step, 1)
                * (self.epochs * self.steps_per_epoch - step)
            )
            _print(
                f"epoch {epoch + 1}/{self.epochs}  step {step}  {numbers}  ETA {duration(left_s)}"
            )
            self._spoken = now
        self._last, self._clock, self._wait_s, self._last_step = dict(sums), now, wait_s, step

    # ---- log.txt
    def drop_after(self, epoch: int) -> None:
        """On a resume at `epoch`: lines of it and of later epochs are written again, so they must
        go; also a torn last line."""
        if not self.is_main or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _epoch_of(line) < epoch]
        if not kept and epoch == 0 and self.path.stat().st_size:
            names = (self.path.with_name(f"log.old{n or ''}.txt") for n in itertools.count())
            # without its checkpoint: set aside, kept
            self.path.replace(next(name for name in names if not name.exists()))
            return
        temporary = self.path.with_name("log.txt.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)

    def end_epoch(
        self, epoch: int, sums: Mapping[str, float], lr: float, weight_decay: float
    ) -> None:
        """Append the epoch's line (means over its steps) and say in words when training looks
        collapsed."""
        self._last = {}
        if not self.is_main:
            return
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
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk must not end a run of days
            self.log(f"warning: epoch {epoch + 1} is not in '{self.path}' ({error.strerror})")
        if count and (
            warning := collapse_warning(
                sums["loss"] / count, sums["teacher_entropy"] / count, self.log_k
            )
        ):
            self.log(f"warning, epoch {epoch + 1}: {warning}")


def counting(what: str, is_main: bool) -> Callable[[int, int], None]:
    """A callback `(done, total)` that prints a line now and then while something long is counted
    through; total 0: unknown."""
    spoken = time.perf_counter()

    def tell(done: int, total: int) -> None:
        nonlocal spoken
        if is_main and time.perf_counter() - spoken > PLAIN_LINE_S / 2:
            print(f"{what}: {done:,}{f' of {total:,}' if total else ''}", flush=True)
            spoken = time.perf_counter()

    return tell


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _print(text: str) -> None:
    """A reader that has gone away must not end a run of days."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"
