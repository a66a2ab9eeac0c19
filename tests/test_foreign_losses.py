"""The blocks of docs/migrating.md that put our loss into other projects, run on stand-ins that
compute as those do, eagerly."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
B, K = 3, 1030


class Centerd(nn.Module):
    """What the three have in common: a temperature and a center."""

    def __init__(self, center_shape: tuple[int, ...] = (1, K)) -> None:
        super().__init__()
        self.student_temp = 0.1
        self.register_buffer("center", torch.linspace(-0.1, 0.1, K).view(center_shape))


class ListsOfCrops(Centerd):
    """DINOv2: sum over all pairs of a student crop and a row of teacher probabilities of the mean
    over images."""

    def forward(self, student_output_list, teacher_out_softmaxed_centered_list) -> Tensor:
        return -sum(
            (q * F.log_softmax(s / self.student_temp, -1)).sum(-1).mean()
            for s in student_output_list
            for q in teacher_out_softmaxed_centered_list
        )


class StackedCrops(Centerd):
    """DINOv3: mean over pairs and images, without the pairs of equal index if the diagonal is
    ignored."""

    def forward(
        self, student_logits: Tensor, teacher_probs: Tensor, ignore_diagonal: bool = False
    ) -> Tensor:
        log_p = F.log_softmax(student_logits.float() / self.student_temp, -1)
        each = [
            -(teacher_probs[t] * log_p[s]).sum(-1).mean()
            for s in range(len(log_p))
            for t in range(len(teacher_probs))
            if s != t or not ignore_diagonal
        ]
        return sum(each) / len(each)


class ViewsTeacherFirst(Centerd):
    """LightlySSL: lists of teacher and student views, pairs of different index, temperature given
    or by epoch, a center."""

    def __init__(self) -> None:
        super().__init__((1, 1, K))
        self.teacher_temp, self.warmup_teacher_temp_epochs = 0.07, 3
        self.teacher_temp_schedule = torch.linspace(0.04, 0.07, 3)

    def forward(self, teacher_out, student_out, teacher_temp=None, epoch=None) -> Tensor:
        if teacher_temp is None:
            warm = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = self.teacher_temp_schedule[epoch] if warm else self.teacher_temp
        q = F.softmax((torch.stack(teacher_out) - self.center) / teacher_temp, -1)
        log_p = F.log_softmax(torch.stack(student_out) / self.student_temp, -1)
        each = [
            -(q[t] * log_p[s]).sum(-1).mean()
            for t in range(len(q))
            for s in range(len(log_p))
            if s != t
        ]
        self.update_center(torch.stack(teacher_out))
        return sum(each) / len(each)

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        self.center = self.center * 0.9 + teacher_out.mean((0, 1), keepdim=True) * 0.1


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch):
    """A function: the stand-in's class after the block of the page for the project has been run."""

    def run(project: str, standin: type) -> type:
        block = next(
            b
            for b in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
            if f"from {project}.loss import" in b
        )
        ours = type("DINOLoss", (standin,), {})
        for name, module in (
            (project, types.ModuleType(project)),
            (f"{project}.loss", types.SimpleNamespace(DINOLoss=ours)),
        ):
            monkeypatch.setitem(sys.modules, name, module)
        exec(block, {})  # noqa: S102 - our own page
        assert ours.forward is not standin.forward
        return ours

    return run


def compare(theirs: nn.Module, ours: nn.Module, student: Tensor, call) -> None:
    """Loss, gradient of the student's head output and state, for `call(loss_fn, head_output)`."""
    results = []
    for loss_fn in (theirs, ours):
        head_output = student.clone().requires_grad_()
        loss = call(loss_fn, head_output * 1)
        (2.5 * loss).backward()
        results.append((loss.detach(), head_output.grad, loss_fn.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_dinov2(patched) -> None:
    torch.manual_seed(0)
    theirs, ours = ListsOfCrops(), patched("dinov2", ListsOfCrops)()
    local, both = torch.randn(8 * B, K), torch.randn(2 * B, K)
    q = F.softmax(torch.randn(2, B, K) / 0.07, -1)
    compare(theirs, ours, local, lambda f, x: f(x.chunk(8), q))  # local crops against both global
    # global crops, rows swapped before
    compare(theirs, ours, both, lambda f, x: f([x], [q.flatten(0, 1)]))
    compare(
        theirs,
        ours,
        local,
        lambda f, x: f(student_output_list=x.chunk(8), teacher_out_softmaxed_centered_list=list(q)),
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_dinov3(patched, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs, ours = StackedCrops(), patched("dinov3", StackedCrops)()
    q = F.softmax(torch.randn(2, B, K) / 0.07, -1)
    for crops, ignore_diagonal in ((8, False), (2, True), (5, True)):
        student = torch.randn(crops * B, K).to(dtype).float()  # rounded alike on both sides
        compare(
            theirs,
            ours,
            student,
            lambda f, x, crops=crops, ignore=ignore_diagonal: f(
                student_logits=x.view(crops, B, K), teacher_probs=q, ignore_diagonal=ignore
            ),
        )


@pytest.mark.parametrize(
    "temperature", [{}, {"epoch": 1}, {"epoch": 7}, {"teacher_temp": 0.05}], ids=str
)
def test_lightly(patched, temperature: dict) -> None:
    torch.manual_seed(0)
    theirs, ours = ViewsTeacherFirst(), patched("lightly", ViewsTeacherFirst)()
    for _ in range(2):  # the center of the first call counts in the second
        teacher = list(torch.randn(2, B, K))
        compare(
            theirs,
            ours,
            torch.randn(6 * B, K),
            lambda f, x, teacher=teacher: f(teacher, x.chunk(6), **temperature),
        )
    before = torch.linspace(-0.1, 0.1, K)
    assert not torch.equal(ours.center.flatten(), before)
