"""Loss and gradient of the student's logits: official semantics, the reference, the reference
compiled, dinofast, and a copy.

    python -m pytest benchmarks/bench_dino_loss.py    prints it; --save-results keeps it
    python benchmarks/bench_dino_loss.py --save-results   the same without pytest

"official" is a rewrite of the official semantics, eager; "official checkout" the official
`DINOLoss` itself, its center update included, where $DINO_OFFICIAL names a checkout. Axes: B
images, V student crops, K prototypes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import official_checkout
import torch
from torch import Tensor

from dinofast import ops, reference
from dinofast.bench import baseline as official
from dinofast.bench.inputs import loss_inputs
from dinofast.bench.record import flag, main, rows_of
from dinofast.bench.timing import MIB, Candidate, copies, measure

NAME = "dino_loss"
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
SECONDS = {"cpu": 8.0, "cuda": 3.0}  # a case
# ||difference|| / ||official||; bf16: of the gradient itself
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    crops: int
    images: int
    prototypes: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return (
            f"V = {self.crops}, B = {self.images}, K = {self.prototypes:,}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


def cases(device: torch.device) -> list[Case]:
    """The first is the one that docs/benchmarks.md shows in full."""
    if device.type == "cuda":
        return [
            Case(10, images, 65536, dtype)
            for dtype in (torch.bfloat16, torch.float32)
            for images in (64, 32, 128)
        ]
    return [
        Case(10, images, prototypes, dtype)
        for images, prototypes in ((32, 65536), (8, 65536), (32, 4096))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def candidates_of(case: Case) -> tuple[str, ...]:
    return "official", "official checkout", "reference", "reference, compiled", "dinofast"


def measure_case(case: Case, device: torch.device, seconds: float | None = None) -> dict[str, Any]:
    """The candidates, checked against each other and then measured in turns."""
    student, teacher, center = (
        x.to(device) for x in loss_inputs("peaked", *case[:3], dtype=case.dtype)
    )
    candidates, left_out = make_candidates(student.requires_grad_(), teacher, center)
    differs = differing(candidates, TOLERANCE[case.dtype])
    timings = measure(
        [*candidates, *copies(student, "the student's logits")],
        device,
        seconds or SECONDS[device.type],
    )
    flag(rows := rows_of(timings), differs)
    return {
        "case": str(case),
        "crops": case.crops,
        "images": case.images,
        "prototypes": case.prototypes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "implementation": ops.paths()["dino_loss"][device.type],
        "rounds": max(len(t.elapsed_ms) for t in timings),
        "student_mib": student.nbytes / MIB,
        "rows": rows,
        "left_out": left_out,
    }


def make_candidates(
    student: Tensor, teacher: Tensor, center: Tensor
) -> tuple[list[Candidate], list[str]]:
    """Each returns (loss, gradient of the logits (V, B, K), sum of the teacher's rows); and why
    others are left out.

    student (V, B, K), teacher (2, B, K), center (K,).
    """
    crops, _, prototypes = student.shape
    # crop-major, as the official code
    flat = (student.flatten(0, 1), teacher.flatten(0, 1), center[None])
    temps = (STUDENT_TEMP, TEACHER_TEMP)

    def with_gradient(
        loss_of: Callable[[], tuple[Tensor, ...]],
    ) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        def call() -> tuple[Tensor, Tensor, Tensor]:
            loss, *_, teacher_sum = loss_of()
            return loss.detach(), torch.autograd.grad(loss, student)[0], teacher_sum

        return call

    candidates = [Candidate("official", with_gradient(lambda: official.dino_loss(*flat, *temps)))]
    left_out = []
    if official_checkout.is_there():
        module = official_checkout.dino_loss(crops, prototypes, *temps, student.device)
        narrow = student.dtype != torch.float32

        def checkout() -> tuple[Tensor, Tensor]:
            module.center = center[None]
            # as in the official loop
            with torch.autocast(student.device.type, student.dtype, enabled=narrow):
                return module(flat[0], flat[1], 0), module.center

        candidates.append(Candidate("official checkout", with_gradient(checkout)))
    else:
        left_out.append(f"official checkout: {official_checkout.NOT_SET}")
    candidates.append(
        Candidate(
            "reference",
            with_gradient(lambda: reference.dino_loss(student, teacher, center, *temps)),
        )
    )
    torch.compiler.reset()
    compiled = torch.compile(reference.dino_loss, dynamic=False)
    candidates.append(
        Candidate(
            "reference, compiled", with_gradient(lambda: compiled(student, teacher, center, *temps))
        )
    )
    if reason := why_not(candidates[-1].call):
        candidates.pop()
        left_out.append(f"reference, compiled: {reason}")
    candidates.append(
        Candidate(
            "dinofast",
            with_gradient(lambda: ops.dino_loss(student, teacher, center, *temps)),
            moved_bytes(student),
        )
    )
    return candidates, left_out


def moved_bytes(student: Tensor) -> int | None:
    """By the scheme of the implementation, in slabs of B K numbers: V + 2 read and V written; the
    Triton kernels read twice."""
    passes = {"cpp": 1, "triton": 2}.get(ops.paths()["dino_loss"][student.device.type])
    crops = student.shape[0]
    return passes and (passes * (crops + 2) + crops) * student[0].numel() * student.itemsize


def why_not(compiled: Callable[[], object]) -> str:
    """Compiles by calling; one sentence if torch.compile cannot work on this machine, mostly for
    want of a compiler."""
    try:
        compiled()
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        return (
            f"torch.compile fails here ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0][:100]})"
        )
    return ""


def differing(candidates: Sequence[Candidate], tolerance: float) -> dict[str, str]:
    """By name, in what a candidate differs from the first: in loss or gradient by more than
    tolerance, ||difference|| / ||first||. One that raises is not among them: it will do so again
    when it is timed."""
    found: dict[str, str] = {}
    made = {}
    for candidate in candidates:
        with suppress(Exception):
            made[candidate.name] = candidate.call()
        if candidate.name not in made or candidates[0].name not in made:
            continue
        for what, other, first in zip(
            ("loss", "gradient"), made[candidate.name], made[candidates[0].name], strict=False
        ):
            off = ((other.double() - first.double()).norm() / first.double().norm()).item()
            if not off <= tolerance:
                found.setdefault(
                    candidate.name,
                    f"{what} is off by {off:.2g} from that of '{candidates[0].name}', above "
                    f"{tolerance}",
                )
        if candidate is not candidates[0]:
            del made[candidate.name]
    return found


def rehearsal() -> list[Case]:
    return [Case(4, 3, 50, torch.float32), Case(4, 3, 50, torch.bfloat16)]


def test_dino_loss(measure: Callable[[], dict[str, Any]]) -> None:
    assert measure()["rows"]


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__]))
