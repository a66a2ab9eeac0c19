"""The training loop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from . import checkpoint, ops
from .callbacks import check_callbacks
from .config import Config
from .data import Loader, make_loader
from .data.backend_own import Augment
from .data.backend_pil import explain_killed_workers
from .data.items import MapStyle
from .evaluate.while_training.monitor import Monitor
from .nn.backbones import name_of
from .nn.dino import Model
from .records import Records
from .resume import is_begun
from .run_folder import RunFolder
from .runtime import distributed
from .runtime.callable_module import make_callable
from .runtime.idle_threads import let_idle_threads_sleep
from .runtime.memory import retain_freed_memory
from .runtime.progress import counting
from .runtime.signals import Interrupted, StopSignal
from .runtime.terminal import say
from .runtime.torch_state import usual_state
from .schedule import Schedule
from .step import Step


def train(
    cfg: Config,
    backbone: Callable[[], nn.Module] | None = None,
    callbacks: Iterable[Any] = (),
    dataset: MapStyle | None = None,
    augmentation: Augment | None = None,
) -> RunFolder:
    """Pretrain as `cfg` says, resuming what `cfg.output_dir` holds; returns its folder, with the
    teacher, the metrics and the paths.

    backbone: makes any module that maps images (B, 3, h, w) to features (B, D), or to what
    `nn.features` pools to them. callbacks: see `dinofast.Callback`. dataset: images of your own
    instead of `cfg.data_path`, see `data.items`. augmentation: `augmentation(image, view, rng)`
    makes crop `view` of an image, see `data.backend_own`. Raises `ValueError` for options, data, a
    backbone or a checkpoint that cannot be right (before anything is written), `Interrupted` after
    SIGINT or SIGTERM with everything saved, `Diverged` when the loss stays non-finite, `OSError`
    when too many images turn out bad.
    """
    if not isinstance(cfg, Config):
        raise TypeError(f"cfg is a {type(cfg).__name__}: give train(Config(data_path=..., ...)).")
    if backbone is not None:
        cfg = replace(cfg, arch=name_of(backbone))  # its crops need not be whole patches
    cfg.check()
    callbacks = check_callbacks(cfg, callbacks)
    with (
        usual_state(),
        StopSignal() as stop,
        distributed.session(cfg.device, cfg.dist_url) as process,
    ):
        own = {"items": dataset, "augment": augmentation}
        _train(cfg, backbone, callbacks, own, process, stop)
        if backbone is not None and process.is_main:
            made = f"{cfg.arch.replace(' ', '_')}()"
            path = Path(cfg.output_dir) / "checkpoint.pth"
            say(f"use it: dinofast.load_backbone('{path}', backbone={made})")
    return RunFolder(cfg.output_dir, backbone)


def _train(
    cfg: Config,
    backbone: Callable[[], nn.Module] | None,
    callbacks: Iterable[Any],
    own: Mapping[str, Any],
    process: distributed.Process,
    stop: StopSignal,
) -> None:
    ops.check_required()
    let_idle_threads_sleep()
    # what cannot train is told before a million files are listed
    model = Model.from_config(cfg, backbone)
    if cfg.init and not is_begun(Path(cfg.output_dir) / "checkpoint.pth"):
        model.notes += checkpoint.initialize(model, cfg.init)
    loader = make_loader(
        cfg,
        rank=process.rank,
        world=process.world,
        device=process.device,
        on_progress=counting("scanning files", process.is_main),
        **own,
    )
    loader.all_are_here(process.all_equal)
    monitor = Monitor(cfg, loader, process)
    with (
        closing(loader),
        checkpoint.lock_output_dir(Path(cfg.output_dir)) if process.is_main else nullcontext(),
        retain_freed_memory(process.device),
        explain_killed_workers(cfg.output_dir),
    ):
        training = Training(cfg, model, process, loader)
        training.records.begin(monitor, callbacks, training)
        try:
            training.run(stop)
        finally:
            training.records.end()


class Training:
    """One run, as callbacks are given it. start: the step at which it begins or goes on."""

    def __init__(
        self, cfg: Config, model: Model, process: distributed.Process, loader: Loader
    ) -> None:
        self.cfg, self.process, self.loader = cfg, process, loader
        self.output_dir = Path(cfg.output_dir)
        self.schedule = Schedule(cfg, loader.steps_per_epoch, process.world, process.device)
        self.step = Step(cfg, model, process, self.schedule)
        self.model, self.optimizer = self.step.model, self.step.optimizer
        self.records = Records(cfg, process, loader, self.step, self.schedule)
        self.start = self.records.start

    def run(self, stop: StopSignal) -> None:
        """From `start` to the end. Raises `Interrupted` once `stop` asks for it, with all saved."""
        cfg, process, records = self.cfg, self.process, self.records
        saver = records.saver
        with records.run.live(self.start, records.sums.read()):
            stop.begin(self.loader.waited_s, process.world > 1)
            for step in range(self.start, self.schedule.total):
                try:
                    metrics = self.step(step, self.loader)
                except Interrupted as interrupted:  # while it waited for a batch
                    records.save(step)
                    saver.raise_failed()
                    raise self._stopped(step, interrupted.signum) from None
                records.add(step, metrics)

                done = step + 1
                ends_epoch = done % self.loader.steps_per_epoch == 0
                stopping = process.world == 1 and bool(stop.signum)
                if done % cfg.log_steps == 0 or ends_epoch:
                    records.read(step)
                    stopping = process.any(bool(stop.signum) or saver.must_end)
                due = cfg.saveckp_steps and done % cfg.saveckp_steps == 0 or saver.retry_due
                if not ends_epoch and (stopping or due):
                    records.save(done)
                if stopping:
                    process.barrier()  # nobody leaves before it is saved
                    saver.raise_failed()
                    raise self._stopped(done, stop.signum or signal.SIGTERM)
        saver.raise_failed()
        if self.start < self.schedule.total:
            records.run.log_done(records.path, process.device)

    def _stopped(self, done: int, signum: int) -> Interrupted:
        return Interrupted(
            signum,
            f"stopped after step {done} of {self.schedule.total}, saved in "
            f"'{self.records.path}'; the same command goes on from there.",
        )


make_callable(__name__, train)
