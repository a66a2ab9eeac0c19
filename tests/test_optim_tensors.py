"""Parameters and gradients of every kind, side by side with torch.optim.AdamW."""

import copy

import pytest
import torch
from torch import nn

from dinofast import LARSEMA, SGDEMA, AdamWEMA, ema_

P = nn.Parameter
CASES = {
    "no dimension": (lambda: P(torch.tensor(2.0)), torch.randn_like),
    "no elements": (lambda: P(torch.zeros(0, 3)), torch.randn_like),
    "transposed": (lambda: P(torch.randn(3, 4).t()), torch.randn_like),
    "transposed gradient": (lambda: P(torch.randn(3, 4)), lambda p: torch.randn(4, 3).t()),
    "expanded gradient": (lambda: P(torch.randn(3, 4)), lambda p: torch.randn(1, 4).expand(3, 4)),
    "channels last": (
        lambda: P(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)),
        lambda p: torch.randn(p.shape),
    ),
    "float64": (lambda: P(torch.randn(3, 4).double()), torch.randn_like),
    "complex64": (lambda: P(torch.randn(3, 4, dtype=torch.complex64)), torch.randn_like),
    "complex128": (lambda: P(torch.randn(5, dtype=torch.complex128)), torch.randn_like),
}


@pytest.mark.parametrize("case", CASES)
def test_a_parameter_of_every_kind_is_that_of_torch(case):
    make, draw = CASES[case]
    results = []
    for kind in (torch.optim.AdamW, AdamWEMA):
        torch.manual_seed(0)
        params = [make(), P(torch.ones(2))]  # with a plain one beside it
        optimizer = kind(params, lr=0.05, weight_decay=0.1)
        for seed in range(5):
            torch.manual_seed(seed)
            for p in params:
                p.grad = draw(p) if p is params[0] else torch.randn_like(p)
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [AdamWEMA, SGDEMA, LARSEMA])
def test_complex_parameters_are_clipped_and_averaged(kind):
    holder = nn.Module()
    holder.p = P(torch.tensor([3 + 4j]))
    teacher = copy.deepcopy(holder)
    options = {"lr": 0.5, "student": holder, "teacher": teacher, "teacher_momentum": 0.5}
    optimizer = kind(holder.parameters(), clip_grad=1.0, **options)
    holder.p.grad = torch.tensor([6 + 8j])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(10)
    if kind is not AdamWEMA:  # one dimension: plain SGD, too
        torch.testing.assert_close(holder.p.detach(), torch.tensor([2.7 + 3.6j]))
    torch.testing.assert_close(teacher.p.detach(), (holder.p.detach() + (3 + 4j)) / 2)


class Quantized(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.w = P(torch.randn(3))
        self.q = P(numbers, requires_grad=False)


FROZEN = ["uint8", "int64", "bool", "float8_e4m3fn", "complex32", "sparse"]


def frozen(name, value):
    if name == "sparse":
        return (value * torch.eye(3)).to_sparse()
    return torch.full((3,), value).to(getattr(torch, name))


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_numbers_without_an_average_stay_if_they_are_equal(name):
    student, teacher = Quantized(frozen(name, 1.0)), Quantized(frozen(name, 1.0))
    start, numbers = teacher.w.detach().clone(), str(teacher.q)
    student.w.grad = torch.ones(3)
    options = {"student": student, "teacher": teacher, "teacher_momentum": 0.5}
    AdamWEMA(student.parameters(), lr=0.1, **options).step()
    torch.testing.assert_close(teacher.w, (start + student.w) / 2)
    assert str(teacher.q) == numbers
    teacher.q = P(frozen(name, 0.0), requires_grad=False)
    with pytest.raises(ValueError, match="differ in 'q' .* no average: copy the student's"):
        AdamWEMA(student.parameters(), **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_the_average_alone_names_what_has_none(dtype):
    tensors = [torch.ones(3).to(dtype)]
    with pytest.raises(ValueError, match=f"ema_ got a tensor of {dtype}: such numbers have no av"):
        ema_([torch.ones(3).to(dtype)], tensors, 0.9)


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("kind", [AdamWEMA, SGDEMA, LARSEMA])
@pytest.mark.parametrize("named", ["student", "names", "place"])
def test_a_sparse_gradient_is_told_before_anything_moves(kind, named):
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "table": nn.Embedding(4, 2, sparse=True)})
    teachers = {"student": model, "teacher": copy.deepcopy(model)} if named == "student" else {}
    params = model.named_parameters() if named == "names" else list(model.parameters())
    optimizer = kind(params, lr=0.1, **teachers)
    model["plain"](model["table"](torch.tensor([1]))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    name = "parameter 2 of param group 0" if named == "place" else "parameter 'table.weight'"
    with pytest.raises(ValueError, match=f"{name} has a gradient of torch.sparse_coo: .*=False"):
        optimizer.step(**({"momentum": 0.9} if teachers else {}))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_tensors_on_two_devices_are_told():
    student = nn.Linear(2, 2)
    teacher = copy.deepcopy(student).to("meta")
    optimizer = AdamWEMA(student.parameters(), student=student, teacher=teacher)
    student(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="tensors on cpu and meta: move student, teacher"):
        optimizer.step(momentum=0.9)


def test_inference_tensors_named_parameters_and_an_empty_group():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        optimizer = AdamWEMA(model.named_parameters(), lr=0.1)
        before = model.weight.clone()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert not torch.equal(model.weight, before)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert AdamWEMA([{"params": []}]).step() is None


def test_a_master_is_taken_over_by_a_parameter_that_is_float32_again():
    half = nn.Linear(3, 2).to(torch.bfloat16)
    optimizer = AdamWEMA(half.parameters(), lr=1e-4)
    half(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    master = optimizer.state[half.weight]["master"].clone()
    full = nn.Linear(3, 2)
    full.load_state_dict(half.state_dict())
    resumed = AdamWEMA(full.parameters(), lr=1e-4)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(full.weight, master) and "master" not in resumed.state[full.weight]
