"""The headline: one whole training step, the official loop against ours, on random crops of 2 x 224
and 8 x 96 pixels.

    python -m pytest benchmarks/bench_step.py        prints the comparison; --save-results keeps it
    python benchmarks/bench_step.py --save-results   the same without pytest

"official" is the official loop rewritten (dinofast/bench/baseline.py), "official checkout" the same
of its own classes, from where $DINO_OFFICIAL points, "official + SDPA + compile" the official loop
with torch's attention kernel and torch.compile. On a GPU the official loop runs in fp16 as
published, the others in bf16; on a CPU all run in fp32 unless the row says otherwise.

Ours is built and timed first, then each other, and each is kept as soon as it is there; then all
take turns, whose times count. Three steps of each on one image, in fp32, from the same weights and
without stochastic depth, must give the same losses; and the losses of those that are timed, which
draw their own stochastic depth, must be near each other. A row of which that does not hold says so
("same_losses": false, and both losses).
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

from dinofast.bench import step as bench_step
from dinofast.bench.baseline import OfficialStep
from dinofast.bench.record import main
from dinofast.bench.step import StepRunner, Synthetic, Timed
from dinofast.bench.timing import add_ratios, extra_mib, quartiles, reason_of, row_of
from dinofast.config import Config
from dinofast.data import Loader
from dinofast.nn.flops import peak_flops
from dinofast.runtime.backends import cores
from dinofast.runtime.memory import retain_freed_memory

NAME = "step"
SAME = 1e-4  # relative, of losses that must agree: on a CPU to 5e-7, and a step moves them by 1e-2
NEAR = 0.05  # of those with stochastic depth, each with draws of its own
SAME_STEPS, SAME_LR = 3, 0.1
SECONDS = {"cpu": 25.0, "cuda": 2.0}  # a candidate


class Case(NamedTuple):
    arch: str
    patch_size: int
    images: int
    candidates: tuple[str, ...]
    size: int = 224
    local_size: int = 96
    out_dim: int = 65536

    def __str__(self) -> str:
        return (
            f"{self.arch}/{self.patch_size}, {self.images} images, 2 x {self.size} and 8 x "
            f"{self.local_size}, K = "
            f"{self.out_dim:,}{', ours alone' if self.candidates == OURS else ''}"
        )

    def config(self, device: torch.device, **changes: Any) -> Config:
        cfg = Config(
            arch=self.arch,
            patch_size=self.patch_size,
            batch_size_per_gpu=self.images,
            out_dim=self.out_dim,
            global_crops_size=self.size,
            local_crops_size=self.local_size,
            freeze_last_layer=0,
            device=device.type,
            compile="off",
            lr=1e-4,
        )
        return replace(cfg, **changes).check()


CAREFUL = "official + SDPA + compile"
OURS = ("dinofast",)
ON_CPU = (
    "official",
    "official checkout",
    CAREFUL,
    "dinofast",
    "dinofast, BLAS",
    "dinofast, compiled",
    "dinofast, compiled, bf16",
)
ON_GPU = ("official", "official checkout", CAREFUL, "dinofast", "dinofast, from files")


OTHER_PRECISION = ("dinofast, compiled, bf16",)  # than the one that the peak is of


def cases(device: torch.device) -> list[Case]:
    """In the order of measuring, by worth: compiling takes most of the time on a GPU. The page
    shows the first of those with most candidates in full."""
    if device.type == "cpu":
        few = ("official", "dinofast")
        return [
            Case("vit_small", 16, 8, ON_CPU),
            Case("vit_small", 16, 2, few),
            Case("vit_small", 8, 1, few),
            Case("vit_base", 16, 2, few),
        ]
    few = ("official", CAREFUL, "dinofast")
    return [
        Case("vit_small", 16, 128, ON_GPU),
        *(Case("vit_small", 16, images, OURS) for images in (1024, 256, 512, 64)),
        Case("vit_base", 16, 64, few),
        Case("vit_small", 8, 32, few),
    ]


def rehearsal() -> list[Case]:
    def tiny(images: int, *candidates: str) -> Case:
        return Case("vit_nano", 4, images, candidates, 16, 8, 50)

    return [
        tiny(2, *OURS),
        tiny(4, *OURS),
        tiny(2, "official", "official checkout", "dinofast", "dinofast, from files"),
    ]


def candidates_of(case: Case) -> tuple[str, ...]:
    return case.candidates


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """The candidates, compared, then timed in turns."""
    return list(growing(case, device, seconds))[-1]


def growing(
    case: Case, device: torch.device, seconds: float | None = None
) -> Iterator[dict[str, Any]]:
    """The case after each thing that was found: a turn of each candidate alone, ours first; whether
    losses agree; the turns."""
    torch.compiler.reset()
    cfg = case.config(device)
    peak, whose = peak_flops(
        device, torch.float32 if cfg.precision_on(device.type) == "fp32" else torch.bfloat16
    )
    flops = bench_step.flops_of(cfg, bench_step.new_model(cfg).student.backbone)
    made: dict[str, Any] = {
        "case": str(case),
        "images": case.images,
        "rounds": 1,
        "gflop_an_image": flops / 1e9,
        "peak_tflops": peak / 1e12,
        "peak": whose,
        "rows": [],
        "left_out": [],
    }
    rows: dict[str, dict[str, Any]] = {}

    def grown(**also: Any) -> dict[str, Any]:
        made.update(
            rows=add_ratios([rows[name] for name in case.candidates if name in rows]), **also
        )
        return made

    with retain_freed_memory(device), ExitStack() as stack:
        candidates: dict[str, StepRunner] = {}
        near: dict[str, float] = {}

        def start(name: str) -> None:
            candidate = make(case, name, device, stack)
            if isinstance(candidate, str):
                made["left_out"].append(candidate)
                return
            if name != "dinofast, from files":
                near[name] = losses(candidate, 2)[-1]
            bench_step.warm_up(candidate, device)
            (alone,) = bench_step.in_turns([candidate], device, 0.0, fewest=1)
            extra = None if alone.peak_gib is None else alone.peak_gib * 1024
            rows[name] = timed_row(alone, case.images, flops / peak, extra)
            candidates[name] = candidate

        for name in sorted(case.candidates, key=lambda name: name != "dinofast"):
            try:
                start(name)
            except Exception as error:  # of one candidate: the others go on
                rows[name] = {"candidate": name, "failed": reason_of(error)}
            if name not in candidates:
                free_memory(device)
            yield grown()
        timed_too = [name for name in case.candidates if name in near and name in candidates]
        alike = compare_all(case, {name: near[name] for name in timed_too}, device)
        for name in set(alike) & set(candidates):
            rows[name] |= alike[name]
        yield grown()
        if not candidates:
            return
        timed = bench_step.in_turns(
            list(candidates.values()), device, seconds or SECONDS[device.type] * len(candidates)
        )
        for t in timed:
            extra = memory_mib(candidates[t.name], t, device)
            rows[t.name] |= timed_row(t, case.images, flops / peak, extra)
        yield grown(rounds=len(timed[0].step_ms))
    candidates.clear()
    free_memory(device)


def timed_row(
    t: Timed, images: int, seconds_an_image: float, extra: float | None
) -> dict[str, Any]:
    """seconds_an_image: what its products take at the device's peak. extra: MiB."""
    rate = images / quartiles(t.step_ms)[1] * 1e3
    return row_of(
        t.name,
        t.step_ms,
        images_per_s=rate,
        mfu=None if t.name in OTHER_PRECISION else rate * seconds_an_image,
        parts_ms=t.parts_ms,
        extra_mib=extra,
    )


def compare_all(
    case: Case, near: dict[str, float], device: torch.device
) -> dict[str, dict[str, Any]]:
    """By candidate, whether it does the same step: one image in fp32 to SAME, and, of those in
    `near`, the loss of the steps that are timed to NEAR."""
    compared = compare({name: [loss] for name, loss in near.items()}, NEAR)
    exact, failed = losses_of_one_image(case, device)
    for name, found in (compare(exact, SAME) | failed).items():
        if name not in compared or compared[name]["same_losses"]:
            compared[name] = found
    return compared


def free_memory(device: torch.device) -> None:
    """What failed has left, or what is done with: the next needs the room."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def make(
    case: Case, name: str, device: torch.device, stack: ExitStack, **exact: Any
) -> StepRunner | str:
    """One candidate with networks of its own but the same weights and the same random crops, or why
    it is left out.

    exact: options that go before those of the case and of the candidate.
    """
    cfg = case.config(device, **exact)
    schedule, precision = bench_step.schedule_of(cfg, device), cfg.precision_on(device.type)
    changes = {
        "dinofast": {"compile": "on" if device.type == "cuda" else "off"},
        "dinofast, BLAS": {"linear": "blas"},
        "dinofast, compiled": {"compile": "on"},
        "dinofast, compiled, bf16": {"compile": "on", "precision": "bf16"},
        "dinofast, from files": {"compile": "on" if device.type == "cuda" else "off"},
    }
    official_precision = bench_step.official_precision(cfg, device)
    random = Synthetic(cfg, device, torch.float32)
    if name == "official checkout":
        if not official_checkout.is_there():
            return f"official checkout: {official_checkout.NOT_SET}"
        step = official_checkout.Step(
            cfg, bench_step.new_model(cfg), device, schedule, official_precision
        )
        return StepRunner(name, step, random, None)
    if name in ("official", CAREFUL):
        clock, plain = bench_step.Clock(device), name == "official"
        ours = replace(cfg, precision=official_precision if plain else precision)
        return StepRunner(
            name,
            OfficialStep(
                ours,
                bench_step.new_model(cfg),
                device,
                schedule,
                sdpa=not plain,
                compiled=not plain and "compile" not in exact,
                mark=clock.mark,
            ),
            random,
            clock,
        )
    ours = replace(cfg, **changes[name] | exact)
    step, clock = bench_step.ours(ours, device, schedule)
    if name == "dinofast, from files":
        loader = photographs_of(ours, device, stack)
        return StepRunner(name, step, loader, clock, ready=bench_step.ready(loader))
    return StepRunner(
        name,
        step,
        Synthetic(cfg, device, torch.bfloat16 if step.precision == "bf16" else torch.float32),
        clock,
    )


def photographs_of(cfg: Config, device: torch.device, stack: ExitStack) -> Loader:
    """Crops of photographs on disk, as a run has them."""
    folder = stack.enter_context(TemporaryDirectory(prefix="dinofast-"))
    photographs.write(Path(folder), 2 * cfg.batch_size_per_gpu)
    return stack.enter_context(bench_step.files(replace(cfg, num_workers=cores()), folder, device))


def memory_mib(candidate: StepRunner, timed: Timed, device: torch.device) -> float | None:
    """What steps take at most beside what stays between them; on a CPU of two, as official
    gradients live on into the next."""
    if device.type == "cuda":
        return None if timed.peak_gib is None else timed.peak_gib * 1024

    def two_steps() -> None:
        candidate.turn(device, 2)

    return extra_mib(two_steps, device)


def losses(candidate: StepRunner, n: int) -> list[float]:
    """Of the next n steps."""
    found = []
    for _ in range(n):
        found.append(candidate.step(candidate.done, candidate.batches)["loss"].item())
        candidate.done += 1
    return found


def losses_of_one_image(
    case: Case, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Losses of SAME_STEPS steps in fp32, by all that differ in more than how they are compiled,
    while the weights change; and, of those that fail at it, that."""
    exact = {"precision": "fp32", "compile": "off", "drop_path_rate": 0.0, "lr": SAME_LR}
    found, failed = {}, {}
    names = [name for name in case.candidates if not name.startswith("dinofast, ")]
    for name in names if len(names) > 1 else ():
        try:
            with ExitStack() as stack, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                candidate = make(case._replace(images=1), name, device, stack, **exact)
                if not isinstance(candidate, str):
                    found[name] = losses(candidate, SAME_STEPS)
            del candidate
        except Exception as error:
            failed[name] = {
                "same_losses": False,
                "differs": f"one image in fp32 fails: {reason_of(error)}",
            }
        gc.collect()
    return found, failed


def compare(found: dict[str, list[float]], tolerance: float) -> dict[str, dict[str, Any]]:
    """Of losses step by step: whether each candidate has those of the first; where it has not, what
    it and the first have."""
    said: dict[str, dict[str, Any]] = {}
    first = next(iter(found), "")
    for name, values in found.items() if len(found) > 1 else ():
        pairs = list(zip(values, found[first], strict=True))
        off = [
            (ours, theirs) for ours, theirs in pairs if not abs(ours - theirs) <= tolerance * theirs
        ]
        said[name] = {"same_losses": not off}
        if off:
            ours, theirs = off[0]
            said[name] |= {
                "losses": [ours, theirs],
                "differs": f"it has a loss of {ours:.6f}, '{first}' one of {theirs:.6f}: not the "
                "same training step",
            }
    return said


def test_step(measure: Callable[[], dict[str, Any]]) -> None:
    assert measure()["rows"]


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
