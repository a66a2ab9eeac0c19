"""The headline: one whole training step, the official loop against ours, on random crops of 2 x 224 and 8 x 96 pixels.

    python -m pytest benchmarks/bench_step.py        prints the comparison; --save-results keeps it
    python benchmarks/bench_step.py --save-results   the same without pytest

"official" is the official loop rewritten (`dinofast.official`), "official checkout" the same of its own classes from where
$DINO_OFFICIAL points, "afternoon" the official loop with torch's attention kernel and torch.compile, as a careful user has it
after an afternoon. On a GPU the official loop runs in fp16 as published, the others in bf16; on a CPU all run in fp32 unless
the row says otherwise.

Before anything counts, three steps of each on one image, in fp32, from the same weights and without stochastic depth, must give
the same losses; and the losses of those that are timed, which draw their own stochastic depth, must be near each other.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
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
from dinofast.bench_step import Rival, Synthetic, Timed
from dinofast.config import Config, cores
from dinofast.flops import peak_flops
from dinofast.memory import kept_memory
from dinofast.official import OfficialStep

NAME = "step"
SAME = 1e-4                          # relative, of losses that must agree: on a CPU to 5e-7, and a step moves them by 1e-2
NEAR = 0.05                          # of those with stochastic depth, each with draws of its own
SAME_STEPS, SAME_LR = 3, 0.1
SECONDS = {"cpu": 25.0, "cuda": 2.0}  # a rival


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


ON_CPU = ("official", "official checkout", "afternoon", "dinofast", "dinofast, BLAS", "dinofast, compiled",
          "dinofast, compiled, bf16")
ON_GPU = ("official", "official checkout", "afternoon", "dinofast", "dinofast, from files")
WAYS = ("official", "dinofast", "dinofast, eager", "dinofast, CUDA graph", "dinofast, skipped depth")


OTHER_PRECISION = ("dinofast, compiled, bf16",)      # than the one that the peak is of


def cases(device: torch.device) -> list[Case]:
    """The first is the one that README shows in full: on a GPU, where compiling takes most of the time, the one that counts."""
    if device.type == "cpu":
        few = ("official", "dinofast")
        return [Case("vit_small", 16, 8, ON_CPU), Case("vit_small", 16, 2, few), Case("vit_small", 8, 1, few),
                Case("vit_base", 16, 2, few)]
    few = ("official", "afternoon", "dinofast")
    return [Case("vit_small", 16, 128, ON_GPU), Case("vit_small", 16, 64, WAYS), Case("vit_base", 16, 64, few),
            Case("vit_small", 8, 32, few), Case("vit_small", 16, 256, few[2:])]


def rivals_of(case: Case) -> tuple[str, ...]:
    return case.rivals


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """The rivals, compared, then timed in turns."""
    torch.compiler.reset()
    check_same(case, device)
    with kept_memory(device), ExitStack() as stack:
        rivals, left_out = make(case, device, stack)
        check_near({rival.name: losses(rival, 2)[-1] for rival in rivals if rival.name != "dinofast, from files"})
        timed = bench_step.in_turns(rivals, device, seconds or SECONDS[device.type] * len(rivals))
        memory = {t.name: memory_mib(rival, t, device) for rival, t in zip(rivals, timed, strict=True)}
    cfg = case.config(device)
    peak, whose = peak_flops(device, torch.float32 if cfg.precision_on(device.type) == "fp32" else torch.bfloat16)
    flops = bench_step.flops_of(cfg, rivals[0].step.model.student.backbone)
    rows = []
    for t in timed:
        low, median, high = quartiles(t.step_ms)
        rate = case.images / median * 1e3
        rows.append({"rival": t.name, "median_ms": median, "quartiles_ms": [low, high], "images_per_s": rate,
                     "mfu": None if t.name in OTHER_PRECISION else rate * flops / peak, "parts_ms": t.parts_ms,
                     "extra_mib": memory[t.name], "elapsed_ms": t.step_ms,
                     "times_faster_than_official": quartiles(timed[0].step_ms)[1] / median if "official" in case.rivals else
                     None})
    del rivals
    gc.collect()
    return {"case": str(case), "images": case.images, "rounds": len(timed[0].step_ms), "gflop_an_image": flops / 1e9,
            "peak_tflops": peak / 1e12, "peak": whose, "rows": rows, "left_out": left_out}


def make(case: Case, device: torch.device, stack: ExitStack, **exact: Any) -> tuple[list[Rival], list[str]]:
    """Every rival with networks of its own but the same weights and the same random crops, and why others are absent.

    exact: options that go before those of the case and of a rival.
    """
    rivals, left_out = [], []
    cfg = case.config(device, **exact)
    schedule, precision = bench_step.schedule_of(cfg, device), cfg.precision_on(device.type)
    dtypes = {"bf16": torch.bfloat16}
    changes = {"dinofast": {"compile": "on" if device.type == "cuda" else "off"}, "dinofast, eager": {},
               "dinofast, BLAS": {"linear": "blas"},
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
                add(name, official_checkout.Step(cfg, bench_step.new_model(cfg), device, schedule, official_precision), None)
            else:
                left_out.append(f"official checkout: {official_checkout.NOT_SET}")
        elif name in ("official", "afternoon"):
            clock, plain = bench_step.Clock(device), name == "official"
            ours = replace(cfg, precision=official_precision if plain else precision)
            add(name, OfficialStep(ours, bench_step.new_model(cfg), device, schedule, sdpa=not plain,
                                   compiled=not plain and "compile" not in exact, mark=clock.mark), clock)
        else:
            ours = replace(cfg, **changes[name] | exact)
            step, clock = bench_step.ours(ours, device, schedule)
            add(name, step, clock, photographs_of(ours, device, stack) if name == "dinofast, from files" else
                Synthetic(cfg, device, dtypes.get(step.precision, torch.float32)))
    return rivals, left_out


def photographs_of(cfg: Config, device: torch.device, stack: ExitStack) -> Iterator[list[Tensor]]:
    """Crops of photographs on disk, as a run has them."""
    folder = stack.enter_context(TemporaryDirectory(prefix="dinofast-"))
    photographs.write(Path(folder), 2 * cfg.batch_size_per_gpu)
    return stack.enter_context(bench_step.files(replace(cfg, num_workers=cores()), folder, device))


def memory_mib(rival: Rival, timed: Timed, device: torch.device) -> float | None:
    """What steps take at most beside what stays between them; on a CPU of two, as official gradients live on into the next."""
    if device.type == "cuda":
        return None if timed.peak_gib is None else timed.peak_gib * 1024

    def two_steps() -> None:
        rival.turn(device, 2)
    return extra_mib(two_steps, device)


def losses(rival: Rival, n: int) -> list[float]:
    """Of the next n steps."""
    found = []
    for _ in range(n):
        found.append(rival.step(rival.done, rival.batches).flatten()[0].item())
        rival.done += 1
    return found


def check_same(case: Case, device: torch.device) -> None:
    """Of one image, by all that differ in more than how they are compiled: the same losses while the weights change."""
    exact = {"precision": "fp32", "compile": "off", "drop_path_rate": 0.0, "lr": SAME_LR}
    found = {}
    for name in [name for name in case.rivals if not name.startswith("dinofast, ")]:
        with ExitStack() as stack, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            rivals, _ = make(case._replace(images=1, rivals=(name,)), device, stack, **exact)
            found |= {rival.name: losses(rival, SAME_STEPS) for rival in rivals}
        del rivals
        gc.collect()
    for step in range(SAME_STEPS):
        check_near({name: values[step] for name, values in found.items()}, SAME)


def check_near(found: dict[str, float], tolerance: float = NEAR) -> None:
    """Losses by name: all as the first."""
    first, right = next(iter(found.items()))
    for name, loss in found.items():
        if not abs(loss - right) <= tolerance * right:
            raise AssertionError(f"'{name}' has a loss of {loss:.6f}, '{first}' one of {right:.6f}: not the same training step")


def test_step(timed: Callable[[], None]) -> None:
    timed()


if __name__ == "__main__":
    main(sys.modules[__name__])
