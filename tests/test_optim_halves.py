"""16-bit parameters and teachers: float32 masters, and their rounded copies."""

import copy

import pytest
import torch
from test_optim import close
from torch import nn

from dinofast import (
    AdamWEMA,
    param_groups,
)


def half_model(dtype):
    """Two layers, the second one frozen, and a teacher that differs; every number is one of both
    16-bit formats."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate([*model.parameters(), *teacher.parameters()]):
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
                .clamp(-2, 2)
                .mul(32)
                .round()
                / 32
            )
    model[1].requires_grad_(False)
    return model.to(dtype), teacher.to(dtype)


def half_steps(model, optimizer, steps):
    for step in steps:
        for i, p in enumerate(model[0].parameters()):
            generator = torch.Generator().manual_seed(100 * step + i)
            p.grad = (torch.randn(p.shape, generator=generator).mul(32).round() / 32).to(p.dtype)
        optimizer.step(momentum=0.999)


def half_optimizer(model, teacher, **options):
    return AdamWEMA(
        param_groups(model),
        lr=1e-5,
        weight_decay=0.1,
        student=model,
        teacher=teacher,
        clip_grad=1.0,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_follow_the_float32_run(dtype):
    """A step of 1e-5 and an average of 0.999 are below the resolution of either format: without
    masters nothing would move."""
    (half, half_teacher), (full, full_teacher) = half_model(dtype), half_model(torch.float32)
    start = copy.deepcopy((half, half_teacher))
    for model, teacher in ((half, half_teacher), (full, full_teacher)):
        optimizer = half_optimizer(model, teacher)
        half_steps(model, optimizer, range(300))
        if model is half:
            masters = [optimizer.state[p] for p in half[0].parameters()]
    for pairs in (
        zip(half.parameters(), full.parameters(), strict=True),
        zip(half_teacher.parameters(), full_teacher.parameters(), strict=True),
    ):
        for a, b in pairs:
            assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    for state, p, t in zip(
        masters, full[0].parameters(), full_teacher[0].parameters(), strict=True
    ):
        assert torch.equal(state["master"], p) and torch.equal(state["teacher_master"], t)
        assert {x.dtype for x in state.values()} == {torch.float32}
    for now, old in zip((half[0], *half_teacher), (start[0][0], *start[1]), strict=True):
        assert not torch.equal(now.weight, old.weight)
    naive = start[1][1].weight.detach()
    for _ in range(300):
        naive = naive * 0.999 + 0.001 * start[0][1].weight.detach()
    assert not torch.equal(naive, half_teacher[1].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_saved_and_restored_exactly(dtype, tmp_path):
    once, once_teacher = half_model(dtype)
    optimizer = half_optimizer(once, once_teacher)
    half_steps(once, optimizer, range(40))
    torch.save(
        (once.state_dict(), once_teacher.state_dict(), optimizer.state_dict()), tmp_path / "all.pth"
    )
    half_steps(once, optimizer, range(40, 90))
    again, again_teacher = half_model(dtype)
    resumed = half_optimizer(again, again_teacher)
    for part, state in zip(
        (again, again_teacher, resumed), torch.load(tmp_path / "all.pth"), strict=True
    ):
        part.load_state_dict(state)
    half_steps(again, resumed, range(40, 90))
    close(again, once, rtol=0, atol=0)
    close(again_teacher, once_teacher, rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_a_skipped_step_touches_no_master():
    model, teacher = half_model(torch.bfloat16)
    optimizer = half_optimizer(model, teacher)
    half_steps(model, optimizer, range(3))
    before = copy.deepcopy((model.state_dict(), teacher.state_dict(), optimizer.state_dict()))
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step(momentum=0.5)
    after = (model.state_dict(), teacher.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.skipped == 1


def test_masters_are_made_when_needed():
    """From what the parameters are at the first step, and from the teacher's when only the teacher
    moves."""
    model, teacher = half_model(torch.bfloat16)
    optimizer = half_optimizer(model, teacher)
    assert not optimizer.state_dict()["state"]
    with torch.no_grad():
        model[0].weight.fill_(3)
    optimizer.step(momentum=0.5)  # no gradient yet, as in the first epochs
    assert set(optimizer.state[model[0].weight]) == {"teacher_master"}
    half_steps(model, optimizer, range(1))
    torch.testing.assert_close(
        optimizer.state[model[0].weight]["master"], torch.full((5, 6), 3.0), rtol=0, atol=2e-5
    )
    theirs = torch.optim.AdamW(param_groups(model), lr=1e-5)  # moments in 16 bits become float32
    half_steps(model, type("", (), {"step": lambda self, momentum: theirs.step()})(), range(1))
    optimizer.load_state_dict(theirs.state_dict())
    half_steps(model, optimizer, range(1))
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
