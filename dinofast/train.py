"""The training loop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import checkpoint, ops
from .config import Config
from .data import Loader, make_loader
from .nn.dino import Model, backbone_maker
from .runtime import distributed
from .runtime.memory import peak_memory, retain_freed_memory
from .runtime.metrics import EpochSums
from .runtime.progress import Run, counting
from .runtime.signals import Interrupted, StopSignal
from .schedule import Schedule
from .step import Step


class WorkerDied(RuntimeError):
    """A process that loads data was killed from outside."""


def train(cfg: Config, backbone: Callable[[], nn.Module] | None = None) -> Path:
    """Pretrain as `cfg` says, resuming what `cfg.output_dir` holds; returns the path of the last checkpoint.

    backbone: makes any module that maps images (B, 3, h, w) to features (B, D); `cfg.arch` is then only a word in the log.
    Raises `ValueError` for options, data or a checkpoint that cannot be right (before anything is written),
    `Interrupted` after SIGINT or SIGTERM with everything saved, `Diverged` when the loss stays non-finite.
    """
    if isinstance(backbone, nn.Module):
        raise ValueError(f"backbone is a {type(backbone).__name__}: give what makes one, a class or a function; it is called "
                         "once for the student, and the teacher gets a copy.")
    if backbone is not None:
        name = getattr(backbone, "__name__", "<lambda>")
        cfg = replace(cfg, arch="own backbone" if name == "<lambda>" else name)         # its crops need not be whole patches
    cfg.check()
    with StopSignal() as stop, distributed.session(cfg.device, cfg.dist_url) as process:
        return _train(cfg, backbone, process, stop)


def _train(cfg: Config, backbone: Callable[[], nn.Module] | None, process: distributed.Process, stop: StopSignal) -> Path:
    ops.check_required()
    if backbone is None:
        backbone_maker(cfg)                               # an unknown name is told before a million files are listed
    loader = make_loader(cfg, rank=process.rank, world=process.world, device=process.device,
                         on_progress=counting("scanning files", process.is_main))
    same_files = process.all_equal(int(loader.fingerprint, 16) >> 66)
    loader.all_are_here()
    if not same_files:
        raise ValueError(f"process {process.rank} finds {loader.n_images} images in `data_path` {cfg.data_path}, others "
                         "find different ones: all processes must see the same files.")
    with closing(loader), checkpoint.lock_output_dir(Path(cfg.output_dir)) if process.is_main else nullcontext():
        try:
            with retain_freed_memory(process.device):
                return _run(cfg, backbone, process, stop, loader)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):         # torch raises it wherever the main thread happens to be
                raise WorkerDied("a data worker was killed, often for lack of memory: lower `num_workers` or the batch; the "
                                 f"same command goes on from what was last saved in '{cfg.output_dir}'.") from error
            raise


def _run(cfg: Config, backbone: Callable[[], nn.Module] | None, process: distributed.Process, stop: StopSignal,
         loader: Loader) -> Path:
    output_dir = Path(cfg.output_dir)
    path = output_dir / "checkpoint.pth"

    # ---- model, optimizer, where to go on
    per_epoch, batch = loader.steps_per_epoch, cfg.batch_size_per_gpu * cfg.accumulate * process.world
    schedule = Schedule(cfg, per_epoch, process.world, process.device)
    one_step = Step(cfg, Model.from_config(cfg, backbone), process, schedule)
    state = one_step.model, one_step.optimizer, one_step.scaler
    position, changed = checkpoint.TrainState(), list[str]()
    if path.exists():
        position, changed = checkpoint.restore(path, *state, cfg)
    elif process.is_main:
        loader.begin_run()
    process.barrier()                                     # nobody writes here before everybody has read
    start, inexact = _first_step(position, loader, batch)
    loader.seek(start)
    sums = EpochSums(process.device, position.sums if start % per_epoch and not inexact else None)
    run = Run(output_dir, process.is_main, steps_per_epoch=per_epoch, epochs=cfg.epochs, images_per_step=batch,
              out_dim=cfg.out_dim)
    run.drop_after(start // per_epoch)
    _introduce(run, cfg, process, one_step, loader, start, path, changed + inexact)

    def save(step: int, keep: bool = False) -> None:
        if process.is_main:
            epoch, inside = divmod(step, per_epoch)
            where = checkpoint.TrainState(step, epoch, inside * batch, loader.n_images, sums.read() if inside else {},
                                        loader.fingerprint, batch)
            numbered = output_dir / f"checkpoint{epoch - 1:04}.pth"
            checkpoint.save(numbered if keep else path, *state, cfg, where)
            if keep:
                checkpoint.link(numbered, path)           # in this order: a run killed in between makes both again

    # ---- the loop
    with run.live(start, sums.read()):
        stop.training, told_peak = True, False
        for step in range(start, schedule.total):
            sums.add(one_step(step, loader))

            done = step + 1
            epoch, ends_epoch = step // per_epoch, done % per_epoch == 0
            stopping = process.world == 1 and bool(stop.signum)
            if done % cfg.log_steps == 0 or ends_epoch:
                now = sums.read()                                         # the only wait for the device
                stopping = process.any(bool(stop.signum))
                if not told_peak:
                    told_peak = True
                    run.log(f"peak memory so far: {peak_memory(process.device)}")
                run.show(done, now, schedule.lr[step], loader.wait_s)
                run.log_replaced(loader.bad_files, loader.n_unread, loader.unread_reason, output_dir / "bad_files.txt",
                                 process.world)
                if ends_epoch:
                    this = slice(epoch * per_epoch, done)
                    run.end_epoch(epoch, now, schedule.lr[this].mean(), schedule.weight_decay[this].mean())
                    sums.clear()
                    save(done, keep=bool(cfg.saveckp_freq) and epoch % cfg.saveckp_freq == 0)
            if not ends_epoch and (stopping or (cfg.saveckp_steps and done % cfg.saveckp_steps == 0)):
                save(done)
            if stopping:
                process.barrier()                                         # nobody leaves before it is saved
                raise Interrupted(stop.signum or signal.SIGTERM, f"stopped after step {done} of {schedule.total}, saved in "
                                  f"'{path}'; the same command goes on from there.")
    run.log(f"done: {schedule.total} steps, teacher and student in '{path}'; peak memory {peak_memory(process.device)}")
    return path


def _first_step(position: checkpoint.TrainState, loader: Loader, batch: int) -> tuple[int, list[str]]:
    """Where to go on, and why not exactly there: the very step if images and batch are as they were, else near it."""
    start = position.epoch * loader.steps_per_epoch
    if not position.fingerprint:                                              # an official checkpoint, or a new run
        return start, []
    if position.fingerprint != loader.fingerprint:
        return start, [f"the images are not those of the save ({position.n_images} then, {loader.n_images} now): "
                       f"epoch {position.epoch + 1} starts anew from the saved weights"]
    inside, rest = divmod(position.images_in_epoch, batch)
    notes = []
    if position.global_batch != batch:
        notes = [f"the global batch was {position.global_batch} and is now {batch}, and the learning rate is scaled with it"]
        if rest:
            notes.append(f"the last {rest} images before the save are seen again")
    return start + min(inside, loader.steps_per_epoch), notes


def _introduce(run: Run, cfg: Config, process: distributed.Process, one_step: Step, loader: Loader, start: int, path: Path,
               notes: list[str]) -> None:
    parameters = sum(p.numel() for p in one_step.model.student.parameters())
    on_gpu = process.device.type == "cuda"
    name = torch.cuda.get_device_name(process.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    run.log(f"{loader.n_images} images, {loader.steps_per_epoch} steps an epoch, {run.images_per_step} images a step; "
            f"{cfg.arch}: {parameters / 1e6:.2f} M parameters; {name}, {one_step.precision}, {process.world} "
            "process(es)")
    note = f" ({loader.backend_note})" if loader.backend_note else ""
    run.log(f"loss: {ops.paths()['dino_loss'][process.device.type]}; step: {one_step.how}; crops: {loader.backend}{note}")
    run.log_left_out(loader.bad_files, Path(cfg.output_dir) / "bad_files.txt")
    if start >= cfg.epochs * loader.steps_per_epoch:
        run.log(f"training already complete ({start} steps), in '{path}': raise `epochs` to go on")
    elif start:
        run.log(f"resumed from '{path}' after step {start} (epoch {start // loader.steps_per_epoch + 1} of {cfg.epochs})")
    for note in [*one_step.notes, *notes]:
        run.log(f"note: {note}")
