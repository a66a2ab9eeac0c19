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
from .nn.dino import Model, backbone_maker
from .resume import first_step, restore
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
    """Pretrain as `cfg` says, resuming what `cfg.output_dir` holds; returns the path of the last
    checkpoint.

    backbone: makes any module that maps images (B, 3, h, w) to features (B, D); `cfg.arch` is then
    only a word in the log. Raises `ValueError` for options, data or a checkpoint that cannot be
    right (before anything is written), `Interrupted` after SIGINT or SIGTERM with everything saved,
    `Diverged` when the loss stays non-finite.
    """
    if isinstance(backbone, nn.Module):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}: give what makes one, a class or a function; "
            "it is called once for the student, and the teacher gets a copy."
        )
    if backbone is not None:
        name = getattr(backbone, "__name__", "<lambda>")
        # its crops need not be whole patches
        cfg = replace(cfg, arch="own backbone" if name == "<lambda>" else name)
    cfg.check()
    with StopSignal() as stop, distributed.session(cfg.device, cfg.dist_url) as process:
        return _train(cfg, backbone, process, stop)


def _train(
    cfg: Config,
    backbone: Callable[[], nn.Module] | None,
    process: distributed.Process,
    stop: StopSignal,
) -> Path:
    ops.check_required()
    if backbone is None:
        backbone_maker(cfg)  # an unknown name is told before a million files are listed
    loader = make_loader(
        cfg,
        rank=process.rank,
        world=process.world,
        device=process.device,
        on_progress=counting("scanning files", process.is_main),
    )
    same_files = process.all_equal(int(loader.fingerprint, 16) >> 66)
    loader.all_are_here()
    if not same_files:
        raise ValueError(
            f"process {process.rank} finds {loader.n_images} images in `data_path` "
            f"{cfg.data_path}, others find different ones: all processes must see the same files."
        )
    with (
        closing(loader),
        checkpoint.lock_output_dir(Path(cfg.output_dir)) if process.is_main else nullcontext(),
    ):
        try:
            with retain_freed_memory(process.device):
                return _run(cfg, backbone, process, stop, loader)
        except RuntimeError as error:
            # torch raises it wherever the main thread happens to be
            if "DataLoader worker" in str(error):
                raise WorkerDied(
                    "a data worker was killed, often for lack of memory: lower `num_workers` or "
                    "the batch; the same command goes on from what was last saved in "
                    f"'{cfg.output_dir}'."
                ) from error
            raise


def _run(
    cfg: Config,
    backbone: Callable[[], nn.Module] | None,
    process: distributed.Process,
    stop: StopSignal,
    loader: Loader,
) -> Path:
    output_dir = Path(cfg.output_dir)
    path = output_dir / "checkpoint.pth"

    # ---- model, optimizer, where to go on
    per_epoch = loader.steps_per_epoch
    batch = cfg.batch_size_per_gpu * cfg.accumulate * process.world
    schedule = Schedule(cfg, per_epoch, process.world, process.device)
    one_step = Step(cfg, Model.from_config(cfg, backbone), process, schedule)
    state = one_step.model, one_step.optimizer, one_step.scaler
    position, changed = checkpoint.TrainState(), list[str]()
    if path.exists():
        position, changed = restore(path, *state, cfg)
    elif process.is_main:
        loader.begin_run()
    process.barrier()  # nobody writes here before everybody has read
    start, inexact = first_step(position, loader, batch)
    loader.seek(start)
    sums = EpochSums(process.device, position.sums if start % per_epoch and not inexact else None)
    run = Run(
        output_dir,
        process.is_main,
        steps_per_epoch=per_epoch,
        epochs=cfg.epochs,
        images_per_step=batch,
        out_dim=cfg.out_dim,
    )
    run.drop_after(start // per_epoch)
    _introduce(run, cfg.arch, process, one_step, loader)
    run.log_left_out(loader.bad_files, output_dir / "bad_files.txt")
    run.log_start(start, path)
    for note in [*one_step.notes, *changed, *inexact]:
        run.log(f"note: {note}")

    def save(step: int, keep: bool = False) -> None:
        if process.is_main:
            epoch, inside = divmod(step, per_epoch)
            of_epoch = sums.read() if inside else {}
            data = loader.n_images, of_epoch, loader.fingerprint, batch
            where = checkpoint.TrainState(step, epoch, inside * batch, *data)
            numbered = output_dir / f"checkpoint{epoch - 1:04}.pth"
            checkpoint.save(numbered if keep else path, *state, cfg, where)
            if keep:
                # in this order: a run killed in between makes both again
                checkpoint.link(numbered, path)

    # ---- the loop
    with run.live(start, sums.read()):
        stop.training, told_peak = True, False
        for step in range(start, schedule.total):
            sums.add(one_step(step, loader))

            done = step + 1
            epoch, ends_epoch = step // per_epoch, done % per_epoch == 0
            stopping = process.world == 1 and bool(stop.signum)
            if done % cfg.log_steps == 0 or ends_epoch:
                now = sums.read()  # the only wait for the device
                stopping = process.any(bool(stop.signum))
                if not told_peak:
                    told_peak = True
                    run.log(f"peak memory so far: {peak_memory(process.device)}")
                run.show(done, now, schedule.lr[step], loader.wait_s)
                met = loader.bad_files, loader.n_unread, loader.unread_reason
                run.log_replaced(*met, output_dir / "bad_files.txt", process.world)
                if ends_epoch:
                    this = slice(epoch * per_epoch, done)
                    run.end_epoch(
                        epoch, now, schedule.lr[this].mean(), schedule.weight_decay[this].mean()
                    )
                    sums.clear()
                    save(done, keep=bool(cfg.saveckp_freq) and epoch % cfg.saveckp_freq == 0)
            due = cfg.saveckp_steps and done % cfg.saveckp_steps == 0
            if not ends_epoch and (stopping or due):
                save(done)
            if stopping:
                process.barrier()  # nobody leaves before it is saved
                raise Interrupted(
                    stop.signum or signal.SIGTERM,
                    f"stopped after step {done} of {schedule.total}, saved in "
                    f"'{path}'; the same command goes on from there.",
                )
    run.log(
        f"done: {schedule.total} steps, teacher and student in '{path}'; peak memory "
        f"{peak_memory(process.device)}"
    )
    return path


def _introduce(
    run: Run, arch: str, process: distributed.Process, step: Step, loader: Loader
) -> None:
    parameters = sum(p.numel() for p in step.model.student.parameters())
    run.log(
        f"{loader.n_images} images, {loader.steps_per_epoch} steps an epoch, {run.images_per_step} "
        f"images a step; {arch}: {parameters / 1e6:.2f} M parameters; {process.device_name}, "
        f"{step.precision}, {process.world} process(es)"
    )
    loss, note = ops.paths()["dino_loss"][process.device.type], loader.backend_note
    crops = f"{loader.backend} ({note})" if note else loader.backend
    run.log(f"loss: {loss}; step: {step.how}; crops: {crops}")
