"""What is kept of a run while it trains: its log, metrics, scores and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint, config_file
from .callbacks import Callbacks
from .config import Config
from .data import Loader
from .evaluate.while_training.monitor import Monitor
from .introduce import advice, environment, introduce
from .resume import first_step, go_on
from .runtime.distributed import Process
from .runtime.json_lines import set_aside
from .runtime.metrics import EpochSums
from .runtime.progress import Run
from .schedule import Schedule
from .step import Step


class Records:
    """Of one run, which goes on where `cfg.output_dir` says: at step `start`.

    `add` takes the metrics of a step, `read` logs them and ends epochs, `save` saves; callbacks
    are told of all that.
    """

    def __init__(
        self, cfg: Config, process: Process, loader: Loader, step: Step, schedule: Schedule
    ) -> None:
        self.cfg, self.process, self.loader, self.step = cfg, process, loader, step
        self.schedule, self.path = schedule, Path(cfg.output_dir) / "checkpoint.pth"
        self.batch = cfg.batch_size_per_gpu * cfg.accumulate * process.world
        state = step.model, step.optimizer, step.scaler
        self.saver = checkpoint.Saver(self.path, *state, cfg, lambda text: self.run.log(text))
        found, position, notes = go_on(self.path, *state, cfg)
        if found is None and process.is_main:
            loader.begin_run()
            set_aside(self.path.with_name("best.pth"))
        process.barrier()  # nobody writes here before everybody has read
        if process.is_main:
            self.saver.adopt(found)
        self.start, inexact = first_step(position, loader, self.batch)
        loader.seek(self.start)
        goes_on = self.start % loader.steps_per_epoch and not inexact
        self.sums = EpochSums(process.device, position.sums if goes_on else None)
        self.run = Run(
            self.path.parent,
            process.is_main,
            steps_per_epoch=loader.steps_per_epoch,
            epochs=cfg.epochs,
            images_per_step=self.batch,
            out_dim=cfg.out_dim,
        )
        self.run.go_on(self.start)
        self._found, self._notes = found, [*notes, *inexact]
        # at whose end what was found was saved
        self._last_epoch = None if position.images_in_epoch else position.epoch - 1

    def begin(self, monitor: Monitor, callbacks: Iterable[Any], training: object) -> None:
        """Say what the run does and where it goes on. callbacks: whom to tell of `training`."""
        cfg, run, loader = self.cfg, self.run, self.loader
        self.monitor = monitor
        self._tell = Callbacks(callbacks, training)
        introduce(run, cfg, self.process, self.step, loader, self.start)
        if told := monitor.told():
            run.log(told)
        run.log_left_out(loader.bad_files, self.path.with_name("bad_files.txt"))
        run.log_start(self.start, self._found or self.path)
        for note in [*self.step.notes, *advice(cfg, loader.n_images), *self._notes]:
            run.log(f"note: {note}")
        self.best = run.best_before(f"eval_{monitor.best_by}")
        if self.process.is_main:
            try:
                config_file.record(self.path.parent, cfg, self.start, environment(self.process))
            except OSError as error:
                run.log(f"'{config_file.NAME}' cannot be written ({error.strerror or error})")
            if self._last_epoch == self.best[1]:
                self.saver.keep_best()  # a run killed before it was
        self._tell("on_start")

    def add(self, step: int, metrics: dict[str, Tensor]) -> None:
        """What a step came to, on the device: nothing waits for it."""
        self.sums.add(metrics)
        self._tell("on_step", step, metrics)
        self.run.estimate(step + 1, self.step.compiles, self.sums)

    def read(self, step: int) -> None:
        """What a step and those before it came to, logged; at the end of an epoch also scored and
        saved."""
        loader, schedule, done = self.loader, self.schedule, step + 1
        epoch, per_epoch = step // loader.steps_per_epoch, loader.steps_per_epoch
        now = self.sums.read()  # the only wait for the device
        means = self.run.show(done, now, schedule.lr[step], loader.wait_s)
        where = {"step": done, "epoch": epoch}
        line = where | means | schedule.read(step)
        self.run.record(line)
        self._tell("on_log", done, line)
        met = loader.bad_files, loader.n_unread, loader.unread_reason
        self.run.log_replaced(*met, self.path.with_name("bad_files.txt"), self.process.world)
        if done % per_epoch:
            return
        scores = self._score(where) if self.monitor.is_due(epoch) else {}
        this = slice(epoch * per_epoch, done)
        decays = schedule.lr[this].mean(), schedule.weight_decay[this].mean()
        ended = self.run.end_epoch(epoch, now, *decays, scores)
        self.sums.clear()
        freq = self.cfg.saveckp_freq
        self.save(done, keep=bool(freq) and epoch % freq == 0)
        if scores.get(self.monitor.best_by, self.best[0]) > self.best[0]:
            self.best = scores[self.monitor.best_by], epoch
            self.saver.keep_best()
        self._tell("on_epoch", epoch, ended)

    def _score(self, where: dict[str, int]) -> dict[str, float]:
        scores = self.monitor(self.step.model.teacher.backbone)
        elapsed_s = self.monitor.elapsed_s
        self.run.pause(elapsed_s)
        line = {f"eval_{name}": value for name, value in scores.items()}
        self.run.record(where | line | {"eval_s": round(elapsed_s, 3)})
        return scores

    def save(self, step: int, keep: bool = False) -> None:
        """The state after so many steps; keep: also under the name of the epoch."""
        if not self.process.is_main:
            return
        epoch, inside = divmod(step, self.loader.steps_per_epoch)
        of_epoch = self.sums.read() if inside else {}
        data = self.loader.n_images, of_epoch, self.loader.fingerprint, self.batch
        where = checkpoint.TrainState(step, epoch, inside * self.batch, *data)
        self.saver(where, keep)
        if not self.saver.failed:
            self.run.log_saved(self.path)

    def end(self) -> None:
        self._tell("on_end")
