"""The teacher's momentum as a group value, so that a plain `step()` works, for everybody who calls
it so: schedulers, torch.distributed.checkpoint, wrappers."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_optim import close
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler, swa_utils

from dinofast import LARSEMA, SGDEMA, AdamWEMA, param_groups

KINDS = [AdamWEMA, SGDEMA, LARSEMA]


def make(kind=AdamWEMA, dtype=torch.float32, teacher_momentum=0.9, **options):
    """A student of two layers, the second frozen and in no group; a teacher that differs."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    teacher = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(1)
    student[1].requires_grad_(False)
    optimizer = kind(
        param_groups(student),
        lr=0.1,
        student=student,
        teacher=teacher,
        teacher_momentum=teacher_momentum,
        **options,
    )
    return student, teacher, optimizer


def train(student, optimizer, steps=2, **arguments):
    for i in range(steps):
        optimizer.zero_grad()
        student(torch.full((2, 4), i + 1.0).to(student[0].weight)).square().sum().backward()
        optimizer.step(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_step_is_the_step_that_is_told(kind):
    plain, told = make(kind), make(kind, teacher_momentum=None)
    train(plain[0], plain[2])
    train(told[0], told[2], momentum=0.9)
    close(plain[1], told[1], rtol=0, atol=0)
    assert not torch.equal(plain[1][1].weight, make()[1][1].weight)  # frozen ones, too
    with pytest.raises(ValueError, match="give it teacher_momentum"):
        told[2].step()
    with pytest.raises(ValueError, match="teacher_momentum is 0.9 but there is no teacher"):
        kind(plain[0].parameters(), teacher_momentum=0.9)


def test_each_group_has_its_own_and_the_rest_follows_the_first():
    student, teacher, optimizer = make()
    before = copy.deepcopy(teacher)
    optimizer.param_groups[0]["teacher_momentum"] = torch.tensor([0.5])
    optimizer.param_groups[1]["teacher_momentum"] = 1.0
    student[0].weight.grad = torch.zeros(3, 4)
    optimizer.step()
    torch.testing.assert_close(teacher[0].weight, (before[0].weight + student[0].weight) / 2)
    torch.testing.assert_close(teacher[1].weight, (before[1].weight + student[1].weight) / 2)
    assert torch.equal(teacher[0].bias, before[0].bias)  # no gradient, but its group's momentum
    optimizer.step(momentum=0.0)  # told: for all
    for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(s, t)


def test_parameters_added_later_follow_their_group():
    student, teacher, optimizer = make()
    student[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(student[1].parameters()), "teacher_momentum": 0.5})
    start, before = student[1].weight.detach().clone(), teacher[1].weight.clone()
    train(student, optimizer, 1)
    assert not torch.equal(student[1].weight, start)
    torch.testing.assert_close(teacher[1].weight, (before + student[1].weight) / 2)


def test_it_is_saved_copied_and_kept_where_a_state_says_nothing():
    student, teacher, optimizer = make(teacher_momentum=torch.tensor(0.75))
    train(student, optimizer)
    assert optimizer.state_dict()["param_groups"][1]["teacher_momentum"] == 0.75
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        s, t, o = copied((student, teacher, optimizer))
        train(s, o)
        assert not torch.equal(t[0].weight, teacher[0].weight)
    torch_state = torch.optim.AdamW(param_groups(student)).state_dict()
    for state, expected in (
        (torch_state, 0.75),
        (make(teacher_momentum=None)[2].state_dict(), 0.75),
        (make(teacher_momentum=0.5)[2].state_dict(), 0.5),
    ):
        optimizer.load_state_dict(state)
        assert [group["teacher_momentum"] for group in optimizer.param_groups] == [expected] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoint_makes_the_state_and_goes_on(kind, tmp_path):
    student, teacher, optimizer = make(kind)
    before = copy.deepcopy((student.state_dict(), teacher.state_dict()))
    get_state_dict(student, optimizer)  # makes the state by a step of lr 0 on gradients of 0
    torch.testing.assert_close((student.state_dict(), teacher.state_dict()), before, rtol=0, atol=0)
    assert optimizer.state
    train(student, optimizer)
    model_state, state = get_state_dict(student, optimizer)
    everything = {"model": model_state, "optimizer": state, "teacher": teacher.state_dict()}
    dcp.save(everything, checkpoint_id=tmp_path, no_dist=True)

    other, other_teacher, resumed = make(kind, teacher_momentum=0.1)
    model_state, state = get_state_dict(other, resumed)
    loaded = {"model": model_state, "optimizer": state, "teacher": other_teacher.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other,
        resumed,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    other_teacher.load_state_dict(loaded["teacher"])
    for s, o in ((student, optimizer), (other, resumed)):
        train(s, o)
    close(other, student, rtol=0, atol=0)
    close(other_teacher, teacher, rtol=0, atol=0)


def test_a_first_step_of_lr_0_on_real_gradients_averages():
    student, teacher, optimizer = make()
    before = teacher[0].weight.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(student, optimizer, 1)
    torch.testing.assert_close(teacher[0].weight, 0.9 * before + 0.1 * student[0].weight)


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),  # momentum or betas
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
    "swa": lambda o: swa_utils.SWALR(o, 0.05),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_schedulers_of_torch_do_to_it_what_they_do_to_torch(kind, schedule):
    student, teacher, ours = make(kind)
    plain = copy.deepcopy(student)
    theirs = (
        torch.optim.AdamW(param_groups(plain), lr=0.1)
        if kind is AdamWEMA
        else torch.optim.SGD(param_groups(plain), lr=0.1, momentum=0.9)
    )
    schedulers = [schedule(optimizer) for optimizer in (ours, theirs)]
    for _ in range(5):
        train(student, ours, 1)
        train(plain, theirs, 1)
        for scheduler in schedulers:
            scheduler.step()
    close(student, plain, rtol=1e-5, atol=1e-6)
    assert {group["teacher_momentum"] for group in ours.param_groups} == {0.9}


def test_hooks_and_closures():
    student, _, optimizer = make()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure():
        called.append("closure")
        loss = student(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and called == ["before", "closure", "after"]


def test_scalars_follow_a_model_that_is_moved():
    with torch.device("meta"):
        p = nn.Parameter(torch.ones(2))
    optimizer = AdamWEMA([p])
    optimizer.skipped = torch.zeros((), dtype=torch.int64)  # of before the move
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.skipped.device.type == "meta"


def test_a_step_in_a_graph_is_refused(monkeypatch):
    student, _, optimizer = make()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="AdamWEMA.step cannot be captured in a CUDA graph"):
        train(student, optimizer, 1)
