"""The headline: one whole training step, the official loop against ours, on random crops of 2 x 224 and 8 x 96 pixels.

    python -m pytest benchmarks/bench_step.py        prints the comparison; --save-results keeps it
    python benchmarks/bench_step.py --save-results   the same without pytest

"official" is the official loop rewritten (`dinofast.official`), "official checkout" the same of its own classes from where
$DINO_OFFICIAL points, "afternoon" the official loop with torch's attention kernel and torch.compile, as a careful user has it
after an afternoon. On a GPU the official loop runs in fp16 as published, the others in bf16; on a CPU all run in fp32 unless
the row says otherwise. Before anything counts the losses of the first steps are compared.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import official_checkout
import photographs
import torch
from record import main
from timing import extra_mib, quartiles
from torch import Tensor

from dinofast import bench_step
from dinofast.bench_step import Rival, Synthetic
from dinofast.config import Config, cores
from dinofast.data import make_loader
from dinofast.flops import peak_flops
from dinofast.official import OfficialStep

NAME = "step"
TOLERANCE = 0.05                     # of the losses of the first steps: stochastic depth draws differ
SECONDS = {"cpu": 90.0, "cuda": 6.0}


class Case(NamedTuple):
    arch: str
    patch_size: int
    images: int
    rivals: tuple[str, ...]
    size: int = 224
    local_size: int = 96
    out_dim: int = 65536

    def __str__(self) -> str:
        return (f"{self.arch}/{self.patch_size}, {self.images} images, 2 x {self.size} and 8 x {self.local_size}, "
                f"K = {self.out_dim:,}")

    def config(self, device: torch.device, **changes: Any) -> Config:
        cfg = Config(arch=self.arch, patch_size=self.patch_size, batch_size_per_gpu=self.images, out_dim=self.out_dim,
                     global_crops_size=self.size, local_crops_size=self.local_size, freeze_last_layer=0, device=device.type,
                     compile="off", lr=1e-4)
        return replace(cfg, **changes).check()


ON_CPU = ("official", "official checkout", "afternoon", "dinofast", "dinofast, compiled", "dinofast, compiled, bf16")
ON_GPU = ("official", "official checkout", "afternoon", "dinofast, eager", "dinofast", "dinofast, CUDA graph",
          "dinofast, skipped depth", "dinofast, from files")


def cases(device: torch.device) -> list[Case]:
    """The first is the one that README shows in full."""
    if device.type == "cpu":
        few = ("official", "dinofast")
        return [Case("vit_small", 16, 8, ON_CPU), Case("vit_small", 16, 2, few), Case("vit_small", 8, 1, few),
                Case("vit_base", 16, 2, few)]
    few = ("official", "afternoon", "dinofast")
    return [Case("vit_small", 16, 128, ON_GPU), Case("vit_small", 16, 64, few), Case("vit_small", 16, 256, few[2:]),
            Case("vit_small", 8, 32, few), Case("vit_base", 16, 64, few)]


def rivals_of(case: Case) -> tuple[str, ...]:
    return case.rivals


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """The rivals, their first losses compared, then timed in turns."""
    torch.compiler.reset()
    with ExitStack() as stack:
        rivals, left_out = make(case, device, stack)
        check(rivals)
        timed = bench_step.in_turns(rivals, device, seconds or SECONDS[device.type])
        memory = {rival.name: extra_mib(partial(one_step, rival, device), device) for rival in rivals}
    cfg = case.config(device)
    peak, whose = peak_flops(device, torch.float32 if cfg.precision_on(device.type) == "fp32" else torch.bfloat16)
    flops = bench_step.flops_of(cfg, rivals[0].step.model.student.backbone)
    rows = []
    for t in timed:
        low, median, high = quartiles(t.step_ms)
        rate = case.images / median * 1e3
        rows.append({"rival": t.name, "median_ms": median, "quartiles_ms": [low, high], "images_per_s": rate,
                     "mfu": rate * flops / peak, "parts_ms": t.parts_ms, "extra_mib": memory[t.name], "elapsed_ms": t.step_ms,
                     "times_faster_than_official": quartiles(timed[0].step_ms)[1] / median if "official" in case.rivals else
                     None})
    del rivals
    gc.collect()
    return {"case": str(case), "images": case.images, "rounds": len(timed[0].step_ms), "gflop_an_image": flops / 1e9,
            "peak_tflops": peak / 1e12, "peak": whose, "rows": rows, "left_out": left_out}


def make(case: Case, device: torch.device, stack: ExitStack) -> tuple[list[Rival], list[str]]:
    """Every rival with networks of its own and the same random crops, and why others are absent."""
    rivals, left_out = [], []
    cfg = case.config(device)
    schedule, precision = bench_step.schedule_of(cfg, device), cfg.precision_on(device.type)
    dtypes = {"bf16": torch.bfloat16}
    changes = {"dinofast": {"compile": "on" if device.type == "cuda" else "off"}, "dinofast, eager": {},
               "dinofast, compiled": {"compile": "on"}, "dinofast, compiled, bf16": {"compile": "on", "precision": "bf16"},
               "dinofast, CUDA graph": {"compile": "on", "cuda_graph": True},
               "dinofast, skipped depth": {"compile": "on", "drop_path_mode": "skip"},
               "dinofast, from files": {"compile": "on"}}
    official_precision = bench_step.official_precision(cfg, device)

    def add(name: str, step: Callable[[int, Iterator[list[Tensor]]], Tensor], clock: bench_step.Clock | None,
            batches: Any = None) -> None:
        rivals.append(Rival(name, step, batches or Synthetic(cfg, device, torch.float32), clock))

    for name in case.rivals:
        if name == "official checkout":
            if official_checkout.is_there():
                add(name, official_checkout.Step(cfg, device, schedule, official_precision), None)
            else:
                left_out.append(f"official checkout: {official_checkout.NOT_SET}")
        elif name in ("official", "afternoon"):
            clock, plain = bench_step.Clock(device), name == "official"
            ours = replace(cfg, precision=official_precision if plain else precision)
            add(name, OfficialStep(ours, bench_step.new_model(cfg), device, schedule, sdpa=not plain, compiled=not plain,
                                   mark=clock.mark), clock)
        else:
            ours, batches = replace(cfg, **changes[name]), None
            step, clock = bench_step.ours(ours, device, schedule)
            if name == "dinofast, from files":
                batches = files(ours, device, stack)
            add(name, step, clock, batches or Synthetic(cfg, device, dtypes.get(step.precision, torch.float32)))
    return rivals, left_out


def files(cfg: Config, device: torch.device, stack: ExitStack) -> Iterator[list[Tensor]]:
    """Crops of photographs on disk, as a run has them."""
    folder = stack.enter_context(TemporaryDirectory(prefix="dinofast-"))
    photographs.write(Path(folder) / "images", max(512, 2 * cfg.batch_size_per_gpu))
    cfg = replace(cfg, data_path=f"{folder}/images", output_dir=folder, num_workers=cores())
    return stack.enter_context(closing(make_loader(cfg, device=device)))


def one_step(rival: Rival, device: torch.device) -> None:
    rival.turn(device, 1)


def check(rivals: list[Rival]) -> None:
    """Losses of two steps from weights of the same distribution: near log K, and near each other."""
    losses = {}
    for rival in rivals:
        if rival.name != "dinofast, from files":
            for _ in range(2):
                out = rival.step(rival.done, rival.batches)
                rival.done += 1
            losses[rival.name] = out.flatten()[0].item()
    first = losses[rivals[0].name]
    for name, loss in losses.items():
        if not abs(loss - first) < TOLERANCE * first:
            raise AssertionError(f"{name} has a loss of {loss} after two steps, {rivals[0].name} one of {first}")


def test_step(timed: Callable[[], None]) -> None:
    timed()


if __name__ == "__main__":
    main(sys.modules[__name__])
