"""`dinofast bench-step`: images a second of the whole training step, where its time goes, and the official loop beside it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from statistics import median, quantiles

import torch
from torch import Tensor

from .config import Config
from .data import make_loader
from .dist import Process, pick_device
from .flops import image_flops, peak_flops
from .log import counting
from .model import Model
from .official import OfficialStep
from .schedule import Schedule
from .step import Step
from .vit import VisionTransformer

PARTS = ("data", "teacher", "student", "loss", "backward", "optimiser")
WARM_UP = 5                                    # steps before anything counts: compiling, recording a graph, first allocations
TURN = {"cpu": 1, "cuda": 10}                  # steps in a row before the other has its turn
FEWEST = 3                                     # turns of each
TABLE_STEPS = 10_000                           # of the schedule that all follow


class Synthetic:
    """Endless micro-batches of the same random crops, as a loader gives them, on the device from the start."""

    def __init__(self, cfg: Config, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [(2, cfg.global_crops_size), (cfg.local_crops_number, cfg.local_crops_size)]
        self._crops = [torch.randn(n * cfg.batch_size_per_gpu, 3, side, side, generator=generator).to(device, dtype)
                       for n, side in sizes if n]

    def __next__(self) -> list[Tensor]:
        return self._crops


class Clock:
    """Adds up the time between marks by the name of the later one: on a GPU the device's, read only when asked for."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._marks = device.type == "cuda", []

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
class Rival:
    """One way to do a step: `step(i, batches)`, timed by `clock` where its parts can be told apart."""

    name: str
    step: Callable[[int, Iterator[list[Tensor]]], Tensor]
    batches: Iterator[list[Tensor]]
    clock: Clock | None
    done: int = 0

    def turn(self, device: torch.device, n: int) -> tuple[float, dict[str, float]]:
        """Milliseconds a step over n steps in a row, and of each part."""
        if self.clock:
            self.clock.mark("start")
        start = time.perf_counter()
        for _ in range(n):
            self.step(self.done % TABLE_STEPS, self.batches)
            self.done += 1
        wait(device)
        step_ms = (time.perf_counter() - start) * 1e3 / n
        return step_ms, {part: ms / n for part, ms in self.clock.take().items()} if self.clock else {}


@dataclass(frozen=True)
class Timed:
    """Milliseconds a step of every turn, medians of its parts, and the memory of a GPU that a step took at most."""

    name: str
    step_ms: list[float]
    parts_ms: dict[str, float]
    peak_gib: float | None


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_model(cfg: Config) -> Model:
    if cfg.vit is None:
        raise ValueError(f"--arch {cfg.arch}: the operations of our ViTs alone are counted; take vit_tiny, vit_small, vit_base "
                         "or vit_nano.")
    return Model.from_config(cfg)


def ours(cfg: Config, device: torch.device, schedule: Schedule) -> tuple[Step, Clock | None]:
    step, clock = Step(cfg, new_model(cfg), Process(0, 1, device), schedule), Clock(device)
    if step.graph:
        return step, None                                              # is launched as one
    step.model.mark = clock.mark
    return step, clock


def in_turns(rivals: Sequence[Rival], device: torch.device, seconds: float) -> list[Timed]:
    """Warm all up, then let them take turns until `seconds` are over; at least FEWEST turns each."""
    for rival in rivals:
        rival.turn(device, WARM_UP if device.type == "cuda" else 2)
    peaks: dict[str, float | None] = {}
    turns: dict[str, list[tuple[float, dict[str, float]]]] = {rival.name: [] for rival in rivals}
    start = time.perf_counter()
    while len(turns[rivals[0].name]) < FEWEST or time.perf_counter() - start < seconds:
        for rival in rivals:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            turns[rival.name].append(rival.turn(device, TURN[device.type]))
            peaks[rival.name] = ((torch.cuda.max_memory_allocated(device) - before) / 2**30 if device.type == "cuda" else None)
    return [Timed(rival.name, [ms for ms, _ in turns[rival.name]],
                  {part: median(parts.get(part, 0.0) for _, parts in turns[rival.name])
                   for part in PARTS if any(part in parts for _, parts in turns[rival.name])}, peaks[rival.name])
            for rival in rivals]


def measure(cfg: Config, folder: str | None, seconds: float, say: Callable[[str], None] = print) -> str:
    """Time ours on synthetic crops, on those of `folder` if one is given, and the official loop, in turns; returns the report.

    The official loop runs as published: fp16 on a GPU (ours in --precision), fp32 on a CPU. Raises ValueError for a backbone
    that is not one of our ViTs, and for a folder that will not do.
    """
    device = pick_device(cfg.device)
    cfg = replace(cfg, freeze_last_layer=0)
    model = new_model(cfg)
    if cfg.accumulate > 1:
        raise ValueError(f"--accumulate is {cfg.accumulate}: the official loop has nothing like it; leave it out.")
    official_cfg = replace(cfg, precision=official_precision(cfg, device))
    schedule = schedule_of(cfg, device)
    with ExitStack() as stack:
        step, clock = ours(cfg, device, schedule)
        say(f"{step.how}; warming up")
        for note in step.notes:
            say(f"note: {note}")
        dtype = torch.bfloat16 if step.precision == "bf16" else torch.float32
        rivals = [Rival("dinofast", step, Synthetic(cfg, device, dtype), clock)]
        if folder:
            output_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="dinofast-"))
            loader = make_loader(replace(cfg, data_path=folder, output_dir=output_dir), device=device,
                                 on_progress=counting("files looked at", True))
            stack.enter_context(closing(loader))
            rivals.append(Rival("dinofast, from files", step, loader, clock))
        theirs = Clock(device)
        rivals.append(Rival("official loop", OfficialStep(official_cfg, new_model(cfg), device, schedule, mark=theirs.mark),
                            Synthetic(cfg, device, torch.float32), theirs))
        timed = in_turns(rivals, device, seconds)
    peak, whose = peak_flops(device, torch.float32 if step.precision == "fp32" else torch.bfloat16)
    return report(cfg, model.student.backbone, device, step.precision, timed, peak, whose)


def official_precision(cfg: Config, device: torch.device) -> str:
    """What the official loop runs in: fp16 on a GPU unless fp32 is asked for; it has no bf16."""
    return "fp16" if device.type == "cuda" and cfg.precision_on("cuda") != "fp32" else "fp32"


def schedule_of(cfg: Config, device: torch.device) -> Schedule:
    """Tables of TABLE_STEPS steps, of which the last layer is frozen in none, as in nearly all of a run."""
    return Schedule(replace(cfg, epochs=1, warmup_epochs=0, warmup_teacher_temp_epochs=0), TABLE_STEPS, 1, device)


def head_widths(cfg: Config, vit: VisionTransformer) -> list[int]:
    hidden = [cfg.head_hidden_dim] * (cfg.head_layers - 1)
    return [vit.embed_dim, *hidden, cfg.head_bottleneck_dim, cfg.out_dim]


def flops_of(cfg: Config, vit: VisionTransformer) -> int:
    """Of one image of a run with these options."""
    return image_flops(vit, head_widths(cfg, vit), [(2, cfg.global_crops_size), (cfg.local_crops_number, cfg.local_crops_size)])


def report(cfg: Config, vit: VisionTransformer, device: torch.device, precision: str, timed: Sequence[Timed], peak: float,
           whose: str) -> str:
    """Plain text: what was timed, a table, and the ratio to the official loop."""
    images, flops = cfg.batch_size_per_gpu * cfg.accumulate, flops_of(cfg, vit)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [f"{cfg.arch}/{cfg.patch_size}, {images} images a step, 2 x {cfg.global_crops_size} and {cfg.local_crops_number} x "
             f"{cfg.local_crops_size} crops, {precision}; {name}",
             f"{flops / 1e9:,.1f} GFLOP an image: the matrix products of the official network, additions and multiplications "
             "each counted", f"MFU: of {whose}", ""]
    shown = [part for part in PARTS if any(part in t.parts_ms for t in timed)]
    rows = [("", "images/s", "ms a step", "[quartiles]", "MFU", *(f"{part}, ms" for part in shown), "GiB")]
    for t in timed:
        low, middle, high = quantiles(t.step_ms, n=4, method="inclusive")
        rate = images / middle * 1e3
        rows.append((t.name, f"{rate:,.4g}", f"{middle:,.1f}", f"[{low:,.1f}, {high:,.1f}]", f"{rate * flops / peak:.0%}",
                     *(f"{t.parts_ms[part]:,.1f}" if part in t.parts_ms else "" for part in shown),
                     "" if t.peak_gib is None else f"{t.peak_gib:.2f}"))
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
              for row in zip(*columns, strict=True)]
    ratio = median(timed[-1].step_ms) / median(timed[0].step_ms)
    return "\n".join([*lines, "", f"{ratio:.2f} times as many images a second as the official loop, medians of "
                                  f"{len(timed[0].step_ms)} turns"])
