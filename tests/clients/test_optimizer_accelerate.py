"""`AdamWEMA` prepared by a real accelerate, whose wrapper steps by `optimizer.step(closure)`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dinofast import AdamWEMA, param_groups

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def make():
    torch.manual_seed(0)
    student = nn.Linear(6, 8)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = AdamWEMA(
        param_groups(student),
        lr=0.01,
        student=student,
        teacher=teacher,
        clip_grad=1.0,
        teacher_momentum=0.9,
    )
    return student, teacher, optimizer


def loader():
    return DataLoader(torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), batch_size=4)


def train(accelerator, model, optimizer, batches):
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_prepared_optimizer_steps_as_one_by_hand(accumulate):
    student, teacher, optimizer = make()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, prepared, batches, _ = accelerator.prepare(student, optimizer, loader(), scheduler)
    train(accelerator, model, prepared, batches)
    by_hand, its_teacher, plain = make()
    for i, batch in enumerate(loader()):
        (by_hand(batch).square().mean() / accumulate).backward()
        if (i + 1) % accumulate == 0:
            plain.step()
            plain.zero_grad()
    torch.testing.assert_close(student.state_dict(), by_hand.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(teacher.state_dict(), its_teacher.state_dict(), rtol=0, atol=0)
    assert not torch.equal(teacher.weight, make()[1].weight)


def test_a_saved_state_goes_on(tmp_path):
    runs = []
    for resumed in (False, True):
        student, teacher, optimizer = make()
        accelerator = accelerate.Accelerator(cpu=True)
        model, prepared, batches = accelerator.prepare(student, optimizer, loader())
        accelerator.register_for_checkpointing(teacher)
        if resumed:
            accelerator.load_state(tmp_path / "state")
        else:
            train(accelerator, model, prepared, batches)
            accelerator.save_state(tmp_path / "state")
        train(accelerator, model, prepared, batches)
        runs.append((student.state_dict(), teacher.state_dict(), optimizer.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_parameters_replaced_by_a_wrapper_are_told():
    """As accelerate's FSDP2 does it with an optimizer made before."""
    student, _, optimizer = make()
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    with pytest.raises(ValueError, match="no longer the student's .* after wrapping"):
        optimizer.step()
