"""The training loop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from . import checkpoint, ops
from .config import Config
from .data import Loader, make_loader
from .data.backend_pil import explain_killed_workers
from .introduce import advice, introduce
from .nn.backbones import name_of
from .nn.dino import Model
from .resume import first_step, go_on
from .runtime import distributed
from .runtime.callable_module import make_callable
from .runtime.idle_threads import let_idle_threads_sleep
from .runtime.memory import retain_freed_memory
from .runtime.metrics import EpochSums
from .runtime.progress import Run, counting
from .runtime.signals import Interrupted, StopSignal
from .runtime.terminal import say
from .runtime.torch_state import usual_state
from .schedule import Schedule
from .step import Step


def train(cfg: Config, backbone: Callable[[], nn.Module] | None = None) -> Path:
    """Pretrain as `cfg` says, resuming what `cfg.output_dir` holds; returns the path of the last
    checkpoint.

    backbone: makes any module that maps images (B, 3, h, w) to features (B, D), or to what
    `nn.features` pools to them. Raises `ValueError` for options, data, a backbone or a checkpoint
    that cannot be right (before anything is written), `Interrupted` after SIGINT or SIGTERM with
    everything saved, `Diverged` when the loss stays non-finite, `OSError` when too many images turn
    out bad.
    """
    if not isinstance(cfg, Config):
        raise TypeError(f"cfg is a {type(cfg).__name__}: give train(Config(data_path=..., ...)).")
    if backbone is not None:
        cfg = replace(cfg, arch=name_of(backbone))  # its crops need not be whole patches
    cfg.check()
    with (
        usual_state(),
        StopSignal() as stop,
        distributed.session(cfg.device, cfg.dist_url) as process,
    ):
        path = _train(cfg, backbone, process, stop)
        if backbone is not None and process.is_main:
            own = f"{cfg.arch.replace(' ', '_')}()"
            say(f"use it: dinofast.load_backbone('{path}', backbone={own})")
        return path


def _train(
    cfg: Config,
    backbone: Callable[[], nn.Module] | None,
    process: distributed.Process,
    stop: StopSignal,
) -> Path:
    ops.check_required()
    let_idle_threads_sleep()
    # what cannot train is told before a million files are listed
    model = Model.from_config(cfg, backbone)
    loader = make_loader(
        cfg,
        rank=process.rank,
        world=process.world,
        device=process.device,
        on_progress=counting("scanning files", process.is_main),
    )
    loader.all_are_here(process.all_equal)
    with (
        closing(loader),
        checkpoint.lock_output_dir(Path(cfg.output_dir)) if process.is_main else nullcontext(),
        retain_freed_memory(process.device),
        explain_killed_workers(cfg.output_dir),
    ):
        return _Training(cfg, model, process, loader)(stop)


class _Training:
    """One run: the step, where it stands, what is logged and saved of it."""

    def __init__(
        self,
        cfg: Config,
        model: Model,
        process: distributed.Process,
        loader: Loader,
    ) -> None:
        self.cfg, self.process, self.loader = cfg, process, loader
        self.path = Path(cfg.output_dir) / "checkpoint.pth"
        self.batch = cfg.batch_size_per_gpu * cfg.accumulate * process.world
        per_epoch = loader.steps_per_epoch
        self.schedule = Schedule(cfg, per_epoch, process.world, process.device)
        self.step = Step(cfg, model, process, self.schedule)
        self.state = self.step.model, self.step.optimizer, self.step.scaler
        self.saver = checkpoint.Saver(self.path, *self.state, cfg, lambda text: self.run.log(text))
        found, position, notes = go_on(self.path, *self.state, cfg)
        if found is None and process.is_main:
            loader.begin_run()
        process.barrier()  # nobody writes here before everybody has read
        if process.is_main:
            self.saver.adopt(found)
        self.start, inexact = first_step(position, loader, self.batch)
        loader.seek(self.start)
        goes_on = self.start % per_epoch and not inexact
        self.sums = EpochSums(process.device, position.sums if goes_on else None)
        self.run = Run(
            self.path.parent,
            process.is_main,
            steps_per_epoch=per_epoch,
            epochs=cfg.epochs,
            images_per_step=self.batch,
            out_dim=cfg.out_dim,
        )
        self.run.drop_after(self.start // per_epoch)
        introduce(self.run, cfg, process, self.step, loader, self.start)
        self.run.log_left_out(loader.bad_files, self.path.with_name("bad_files.txt"))
        self.run.log_start(self.start, found or self.path)
        for note in [*self.step.notes, *advice(cfg, loader.n_images), *notes, *inexact]:
            self.run.log(f"note: {note}")

    def __call__(self, stop: StopSignal) -> Path:
        cfg, process, per_epoch = self.cfg, self.process, self.loader.steps_per_epoch
        with self.run.live(self.start, self.sums.read()):
            stop.begin(self.loader.waited_s, process.world > 1)
            for step in range(self.start, self.schedule.total):
                try:
                    self.sums.add(self.step(step, self.loader))
                except Interrupted as interrupted:  # while it waited for a batch
                    self.save(step)
                    self.saver.raise_failed()
                    raise self.stopped(step, interrupted.signum) from None

                done = step + 1
                self.run.estimate(done, self.step.compiles, self.sums)
                ends_epoch = done % per_epoch == 0
                stopping = process.world == 1 and bool(stop.signum)
                if done % cfg.log_steps == 0 or ends_epoch:
                    self.read(step)
                    stopping = process.any(bool(stop.signum) or self.saver.must_end)
                due = cfg.saveckp_steps and done % cfg.saveckp_steps == 0 or self.saver.retry_due
                if not ends_epoch and (stopping or due):
                    self.save(done)
                if stopping:
                    process.barrier()  # nobody leaves before it is saved
                    self.saver.raise_failed()
                    raise self.stopped(done, stop.signum or signal.SIGTERM)
        self.saver.raise_failed()
        if self.start < self.schedule.total:
            self.run.log_done(self.path, process.device)
        return self.path

    def stopped(self, done: int, signum: int) -> Interrupted:
        return Interrupted(
            signum,
            f"stopped after step {done} of {self.schedule.total}, saved in '{self.path}'; the same "
            "command goes on from there.",
        )

    def read(self, step: int) -> None:
        """What a step and those before it came to, logged; at the end of an epoch also saved."""
        cfg, loader, per_epoch = self.cfg, self.loader, self.loader.steps_per_epoch
        done, epoch = step + 1, step // per_epoch
        now = self.sums.read()  # the only wait for the device
        self.run.show(done, now, self.schedule.lr[step], loader.wait_s)
        met = loader.bad_files, loader.n_unread, loader.unread_reason
        self.run.log_replaced(*met, self.path.with_name("bad_files.txt"), self.process.world)
        if done % per_epoch == 0:
            this = slice(epoch * per_epoch, done)
            lr, weight_decay = self.schedule.lr[this], self.schedule.weight_decay[this]
            self.run.end_epoch(epoch, now, lr.mean(), weight_decay.mean())
            self.sums.clear()
            self.save(done, keep=bool(cfg.saveckp_freq) and epoch % cfg.saveckp_freq == 0)

    def save(self, step: int, keep: bool = False) -> None:
        if not self.process.is_main:
            return
        epoch, inside = divmod(step, self.loader.steps_per_epoch)
        of_epoch = self.sums.read() if inside else {}
        data = self.loader.n_images, of_epoch, self.loader.fingerprint, self.batch
        where = checkpoint.TrainState(step, epoch, inside * self.batch, *data)
        self.saver(where, keep)
        if not self.saver.failed:
            self.run.log_saved(self.path)


make_callable(__name__, train)
