"""`dinofast bench-step`: images a second of the whole training step, where its time goes, and the
official loop beside it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median, quantiles
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data import Loader, backend_dali, backend_native, make_loader
from ..nn.dino import Model
from ..nn.flops import flops_of, peak_flops
from ..nn.vit import VisionTransformer
from ..runtime.distributed import Process, pick_device
from ..runtime.memory import retain_freed_memory
from ..runtime.progress import counting
from ..runtime.words import counted
from ..schedule import Schedule
from ..step import Step
from .baseline import OfficialStep
from .timing import Turns

PARTS = {  # of a step, in its order, and what is in them
    "data": "the wait for crops; random ones are there from the start",
    "teacher": "its forward pass; before it dinofast cuts the crops into patches, for the student "
    "too",
    "student": "its forward pass",
    "loss": "forward; the official one with the center and the host's reading of it",
    "backward": "through loss and student",
    "optimizer": "clipping, AdamW and the teacher's average; of dinofast the center, too",
}
WARM_UP = 5  # steps before anything counts: compiling, recording a graph, first allocations
TURN = {"cpu": 1, "cuda": 10}  # steps in a row before the other has its turn
FEWEST = 3  # turns of each that are to be compared
TABLE_STEPS = 10_000  # of the schedule that all follow
LEGEND_WIDTH = 110  # characters


class Synthetic:
    """Endless micro-batches of the same random crops, as a loader gives them, on the device from
    the start."""

    def __init__(self, cfg: Config, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self._crops = [
            torch.randn(n * cfg.batch_size_per_gpu, 3, side, side, generator=generator).to(
                device, dtype
            )
            for n, side in crops_of(cfg)
        ]

    def __iter__(self) -> Synthetic:
        return self

    def __next__(self) -> list[Tensor]:
        return self._crops


class Clock:
    """Adds up the time between marks by the name of the later one: on a GPU the device's, read only
    when asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []  # with an event on a GPU, else seconds

    def mark(self, part: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Milliseconds of each part since the last time; the device must have finished."""
        spent: dict[str, float] = {}
        for (_, start), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed_ms = start.elapsed_time(end) if self._on_gpu else (end - start) * 1e3
            spent[part] = spent.get(part, 0.0) + elapsed_ms
        self._marks = []
        return spent


@dataclass
class StepRunner:
    """One way to do a step: `step(i, batches)`, timed by `clock` where its parts can be told apart.

    ready: batches that may have been made while others had their turns. So many steps go before the
    clock starts.
    """

    name: str
    step: Step | OfficialStep
    batches: Iterator[list[Tensor]]
    clock: Clock | None
    done: int = 0
    ready: int = 0

    def turn(self, device: torch.device, n: int) -> tuple[float, dict[str, float]]:
        """Milliseconds a step over n steps in a row, and of each part; gradients are let go of at
        the end."""
        # what others' steps may have changed for all of the process
        getattr(self.step, "activate", lambda: None)()
        if self.ready:
            self._steps(device, self.ready)
            if self.clock:
                self.clock.take()  # of steps that do not count
        if self.clock:
            self.clock.mark("start")
        start = time.perf_counter()
        self._steps(device, n)
        step_ms = (time.perf_counter() - start) * 1e3 / n
        # or they would count as memory that was there before the next turn
        self.step.optimizer.zero_grad()
        return step_ms, {
            part: ms / n for part, ms in self.clock.take().items()
        } if self.clock else {}

    def _steps(self, device: torch.device, n: int) -> None:
        for _ in range(n):
            self.step(self.done % TABLE_STEPS, self.batches)
            self.done += 1
        wait(device)


@dataclass(frozen=True)
class Timed:
    """Milliseconds a step of every turn, medians of its parts, and the GPU memory that steps took
    at most beside what stays between them: None on a CPU, and under a CUDA graph, all of whose
    memory stays."""

    name: str
    step_ms: list[float]
    parts_ms: dict[str, float]
    peak_gib: float | None
    of_peak: bool = True  # whether it computes in the dtype that the peak is of


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_model(cfg: Config) -> Model:
    if cfg.vit is None:
        raise ValueError(
            f"`arch` {cfg.arch}: the operations of our ViTs alone are counted; take vit_tiny, "
            "vit_small, vit_base or vit_nano."
        )
    return Model.from_config(cfg)


def ours(cfg: Config, device: torch.device, schedule: Schedule) -> tuple[Step, Clock | None]:
    step, clock = Step(cfg, new_model(cfg), Process(0, 1, device), schedule), Clock(device)
    if step.graph:
        return step, None  # is launched as one
    step.model.mark = clock.mark
    return step, clock


def warm_up(candidate: StepRunner, device: torch.device) -> None:
    """Steps before anything counts."""
    candidate.turn(device, WARM_UP if device.type == "cuda" else 2)


def in_turns(
    candidates: Sequence[StepRunner], device: torch.device, seconds: float, fewest: int = FEWEST
) -> list[Timed]:
    """Let candidates that are warm take turns until `seconds` are over; at least `fewest` turns
    each."""
    peaks: dict[str, float | None] = {}

    def turn(candidate: StepRunner) -> tuple[float, dict[str, float]]:
        if has_peak := device.type == "cuda" and not getattr(candidate.step, "graph", None):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        measured = candidate.turn(device, TURN[device.type])
        peaks[candidate.name] = (
            (torch.cuda.max_memory_allocated(device) - before) / 2**30 if has_peak else None
        )
        return measured

    together = Turns(
        {candidate.name: partial(turn, candidate) for candidate in candidates}, catch=()
    )
    together.run(seconds, fewest)
    turns = together.results
    return [
        Timed(
            candidate.name,
            [ms for ms, _ in turns[candidate.name]],
            {
                part: median(parts.get(part, 0.0) for _, parts in turns[candidate.name])
                for part in PARTS
                if any(part in parts for _, parts in turns[candidate.name])
            },
            peaks[candidate.name],
        )
        for candidate in candidates
    ]


def measure(
    cfg: Config, folder: str | None, seconds: float, log: Callable[[str], None] = print
) -> str:
    """Time ours on random crops, on those of `folder` if one is given, and the official loop, in
    turns; returns the report.

    log: called with a line now and then, the first ones on what is timed. The official loop runs as
    published: fp16 on a GPU unless `precision` is fp32, fp32 on a CPU. Raises ValueError for what
    that loop has not got, for a backbone that is not one of our ViTs, and for a folder that will
    not do.
    """
    for name, value, only in (
        ("accumulate", cfg.accumulate, 1),
        ("optimizer", cfg.optimizer, "adamw"),
    ):
        if value != only:
            raise ValueError(
                f"`{name}` is {value}: the official loop that is timed beside has {only} alone; "
                "leave it out."
            )
    device, cfg = pick_device(cfg.device), replace(cfg, freeze_last_layer=0)
    schedule = schedule_of(cfg, device)
    official_cfg = replace(cfg, precision=official_precision(cfg, device))
    theirs, their_model = Clock(device), new_model(cfg)
    # as in training; the official loop gains by it too
    with retain_freed_memory(device), ExitStack() as stack:
        loader = stack.enter_context(files(cfg, folder, device)) if folder else None
        step, clock = ours(cfg, device, schedule)
        for line in (
            setting(cfg, device),
            f"dinofast: {step.precision}, {step.how}",
            *(f"note: {note}" for note in step.notes),
            f"official loop: {official_cfg.precision}, eager, as published",
            f"warming up, then {seconds:g} s in turns",
        ):
            log(line)
        dtype = torch.bfloat16 if step.precision == "bf16" else torch.float32
        candidates = [StepRunner("dinofast", step, Synthetic(cfg, device, dtype), clock)]
        if loader:
            candidates.append(
                StepRunner("dinofast, from files", step, loader, clock, ready=ready(loader))
            )
        official = OfficialStep(official_cfg, their_model, device, schedule, mark=theirs.mark)
        candidates.append(
            StepRunner("official loop", official, Synthetic(cfg, device, torch.float32), theirs)
        )
        dtypes = [
            torch.float32 if way.precision == "fp32" else torch.bfloat16
            for way in (step, candidates[-1].step)
        ]
        before = peak_flops(device, dtypes[0])
        for candidate in candidates:
            warm_up(candidate, device)
        timed = in_turns(candidates, device, seconds)
    # one was perhaps disturbed
    peak, whose = max(before, peak_flops(device, dtypes[0]), key=lambda found: found[0])
    if dtypes[0] != dtypes[1]:
        timed[-1] = replace(timed[-1], of_peak=False)
    vit = their_model.student.backbone
    assert isinstance(vit, VisionTransformer)
    return report(timed, cfg.batch_size_per_gpu, flops_of(cfg, vit), peak, whose, TURN[device.type])


@contextmanager
def files(cfg: Config, folder: str, device: torch.device) -> Iterator[Loader]:
    """The crops of a run on `folder`; what a loader writes goes with it."""
    with tempfile.TemporaryDirectory(prefix="dinofast-") as output_dir:
        cfg = replace(cfg, data_path=folder, output_dir=output_dir)
        with closing(
            make_loader(cfg, device=device, on_progress=counting("scanning files", True))
        ) as loader:
            yield loader


def ready(loader: Loader) -> int:
    """Batches that a loader may have made before they are asked for: those of its queue, or of
    torch's."""
    if not loader.n_workers:
        return 0
    return {"native": backend_native.AHEAD, "dali": backend_dali.AHEAD}.get(
        loader.backend, 2 * loader.n_workers
    )


def setting(cfg: Config, device: torch.device) -> str:
    """What a step works on, and where."""
    crops = " and ".join(f"{n} x {side}" for n, side in crops_of(cfg))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    )
    return (
        f"{cfg.arch}/{cfg.patch_size}, {cfg.batch_size_per_gpu} images a step, {crops} crops, "
        f"K = {cfg.out_dim:,}; {name}"
    )


def crops_of(cfg: Config) -> list[tuple[int, int]]:
    """(number, size in pixels) of an image's crops, the global ones first."""
    sizes = [(2, cfg.global_crops_size), (cfg.local_crops_number, cfg.local_crops_size)]
    return [(n, side) for n, side in sizes if n]


def official_precision(cfg: Config, device: torch.device) -> str:
    """What the official loop runs in: fp16 on a GPU unless fp32 is asked for; it has no bf16."""
    return "fp16" if device.type == "cuda" and cfg.precision_on("cuda") != "fp32" else "fp32"


def schedule_of(cfg: Config, device: torch.device) -> Schedule:
    """Tables of TABLE_STEPS steps, of which the last layer is frozen in none, as in nearly all of a
    run."""
    return Schedule(
        replace(cfg, epochs=1, warmup_epochs=0, warmup_teacher_temp_epochs=0),
        TABLE_STEPS,
        1,
        device,
    )


def report(
    timed: Sequence[Timed], images: int, flops: int, peak: float, whose: str, steps_a_turn: int
) -> str:
    """Plain text: a table, what its columns mean, and the ratio of ours (the first) to the official
    loop (the last).

    images: of a step; flops: of an image; peak: FLOP/s of the device by the word of `whose`.
    """
    rates = [images / median(t.step_ms) * 1e3 for t in timed]
    shown = [part for part in PARTS if any(part in t.parts_ms for t in timed)]
    rows = [("", "images/s", "MFU", "ms/step", "[quartiles]", *shown, "GiB")]
    for t, rate in zip(timed, rates, strict=True):
        low, middle, high = quantiles(t.step_ms, n=4, method="inclusive")
        mfu = f"{rate * flops / peak:.1%}" if t.of_peak else ""
        rows.append(
            (
                t.name,
                digits(rate),
                mfu,
                digits(middle),
                f"[{digits(low)}, {digits(high)}]",
                *(f"{t.parts_ms[part]:,.1f}" if part in t.parts_ms else "" for part in shown),
                "" if t.peak_gib is None else f"{t.peak_gib:.2f}",
            )
        )
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "",
        *(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in zip(*columns, strict=True)
        ),
        "",
    ]
    graph = any(not t.parts_ms for t in timed)
    meanings = {
        "MFU": f"share of {whose}; an image takes {flops / 1e9:,.4g} GFLOP, the matrix products of "
        "the official network, an addition and a multiplication counted as two",
        "ms/step": f"median of {len(timed[0].step_ms)} turns of {steps_a_turn} "
        f"step{'s' if steps_a_turn > 1 else ''}; then its parts, in ms as "
        f"well{', which a CUDA graph does not tell apart' if graph else ''}",
        **PARTS,
    }
    if any(t.peak_gib is not None for t in timed):
        meanings["GiB"] = (
            "the most device memory for activations, gradients and the like, beside weights, "
            "moments and the teacher"
            f"{'; a CUDA graph keeps its own from step to step, not counted' if graph else ''}"
        )
    for name, meaning in meanings.items():
        lines += wrap(
            meaning, LEGEND_WIDTH, initial_indent=f"{name:11}", subsequent_indent=" " * 11
        )
    from_files = "".join(f", {rate / rates[-1]:.2f} times from files" for rate in rates[1:-1])
    return "\n".join(
        [
            *lines,
            "",
            f"{rates[0] / rates[-1]:.2f} times as many images a second as the official "
            f"loop{from_files}",
        ]
    )


def digits(value: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
