import copy

import golden
import numpy as np
import pytest
import torch
from torch import nn

from dinofast import (
    LARSEMA,
    SGDEMA,
    AdamWEMA,
    DINOHead,
    MultiCropWrapper,
    param_groups,
    vit_small,
    vit_tiny,
)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False))


def backward(model, step, scale=1.0):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    (model(x).square().sum() * scale).backward()


def train(model, optimizer, steps, scale=1.0, **arguments):
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, scale)
        optimizer.step(**arguments)


def close(a, b, **tolerance):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


PAIRS = {
    "adamw": (
        lambda g, **k: AdamWEMA(g, lr=0.01, weight_decay=0.1, **k),
        lambda g: torch.optim.AdamW(g, lr=0.01, weight_decay=0.1),
    ),
    "sgd": (
        lambda g, **k: SGDEMA(g, lr=0.01, momentum=0.9, weight_decay=0.1, **k),
        lambda g: torch.optim.SGD(g, lr=0.01, momentum=0.9, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_same_as_torch(name):
    ours, theirs = small_model(), small_model()
    make, make_torch = PAIRS[name]
    train(ours, make(param_groups(ours)), 7)
    train(theirs, make_torch(param_groups(theirs)), 7)
    close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_lars_by_hand():
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARSEMA([w, b], lr=0.5, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        w.grad, b.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([2.0])
        optimizer.step()
    expected = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    mu = torch.zeros_like(expected)
    for _ in range(2):
        g = torch.tensor([[0.0, 1.0]], dtype=torch.float64) + 0.1 * expected
        mu = 0.9 * mu + g * 0.001 * expected.norm() / g.norm()
        expected = expected - 0.5 * mu
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-6, atol=0)
    # one dimension: no decay, no adaptation
    assert b.item() == pytest.approx(1 - 0.5 * 2 - 0.5 * (0.9 * 2 + 2))


@pytest.mark.parametrize("name", PAIRS)
def test_clip_is_per_tensor_and_teacher_follows(name):
    student, plain = small_model(), small_model()
    teacher, plain_teacher = copy.deepcopy(student), copy.deepcopy(student)
    student[2].weight.requires_grad_(False)  # frozen, still averaged
    plain[2].weight.requires_grad_(False)
    with torch.no_grad():
        for model in (student, plain):
            model[2].weight += 1.0
    make, make_torch = PAIRS[name]
    ours = make(param_groups(student), student=student, teacher=teacher, clip_grad=0.5)
    theirs = make_torch(param_groups(plain))
    for step in range(5):
        for model in (student, plain):
            model.zero_grad()
            backward(model, step)
        norms = [p.grad.norm() for p in student.parameters() if p.grad is not None]
        for p in plain.parameters():
            if p.grad is not None:
                p.grad.mul_((0.5 / (p.grad.norm() + 1e-6)).clamp(max=1))
        ours.step(momentum=0.9)
        theirs.step()
        with torch.no_grad():
            for s, t in zip(plain.parameters(), plain_teacher.parameters(), strict=True):
                t.mul_(0.9).add_(0.1 * s)
        torch.testing.assert_close(ours.grad_norm, torch.stack(norms).norm())
    close(student, plain, rtol=1e-5, atol=1e-6)
    close(teacher, plain_teacher, rtol=1e-5, atol=1e-6)
    assert not torch.equal(teacher[2].weight, small_model()[2].weight)


@pytest.mark.parametrize(
    "make",
    [
        PAIRS["adamw"][0],
        PAIRS["sgd"][0],
        lambda g, **k: LARSEMA(g, lr=0.01, weight_decay=0.1, **k),
    ],
)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(make, poison):
    model = small_model()
    teacher = copy.deepcopy(model)
    optimizer = make(param_groups(model), student=model, teacher=teacher, clip_grad=1.0)
    train(model, optimizer, 2, momentum=0.9)
    before = copy.deepcopy((model.state_dict(), teacher.state_dict(), optimizer.state_dict()))
    backward(model, 3)
    model[0].weight.grad[0, 0] = poison
    optimizer.step(momentum=0.9)
    after = (model.state_dict(), teacher.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.skipped == 1
    train(model, optimizer, 1, momentum=0.9)
    assert optimizer.skipped == 1 and not torch.equal(model[0].weight, before[0]["0.weight"])


def test_skip_is_obeyed():
    model = small_model()
    optimizer = AdamWEMA(model.parameters())
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, skip=torch.tensor(True))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_state_is_interchangeable_with_torch_adamw():
    a, b = small_model(), small_model()
    ours = AdamWEMA(param_groups(a), lr=torch.tensor(0.01))
    theirs = torch.optim.AdamW(param_groups(b), lr=0.01)
    train(a, ours, 3)
    train(b, theirs, 3)
    saved_ours, saved_theirs = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    assert isinstance(saved_ours["param_groups"][0]["lr"], float)
    ours.load_state_dict(saved_theirs)  # crosswise
    theirs.load_state_dict(saved_ours)
    train(a, ours, 3)
    train(b, theirs, 3)
    close(a, b, rtol=1e-5, atol=1e-7)
    assert ours.state_dict()["state"][0]["step"] == 6


def test_scalars_may_be_tensors():
    a, b = small_model(), small_model()
    train(
        a,
        AdamWEMA(
            a.parameters(),
            lr=torch.tensor(0.01, dtype=torch.float64),
            weight_decay=torch.tensor(0.1),
        ),
        3,
    )
    train(b, AdamWEMA(b.parameters(), lr=0.01, weight_decay=0.1), 3)
    close(a, b, rtol=1e-6, atol=1e-8)


def test_loss_scaler_is_obeyed_without_unscaling_first():
    a, b = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours = AdamWEMA(a.parameters(), lr=0.01, clip_grad=0.5)
    theirs = AdamWEMA(b.parameters(), lr=0.01, clip_grad=0.5)
    for step in range(3):
        a.zero_grad()
        b.zero_grad()
        backward(a, step, scale=scaler.get_scale())
        scaler.scale(torch.zeros(()))
        scaler.step(ours)
        scaler.update()
        backward(b, step)
        theirs.step()
    close(a, b, rtol=1e-5, atol=1e-6)
    a[0].weight.grad.fill_(float("inf"))
    scaler.step(ours)
    scaler.update()
    assert ours.skipped == 1 and scaler.get_scale() == 512.0


@pytest.mark.parametrize("arch, make", [("vit_tiny", vit_tiny), ("vit_small", vit_small)])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_official_groups(arch, make, norm_last_layer):
    import json

    official = json.loads((golden.DATA / "param_groups.json").read_text())[
        f"{arch}.norm_last_layer={norm_last_layer}"
    ]
    with torch.device("meta"):
        backbone = make()
        model = MultiCropWrapper(
            backbone, DINOHead(backbone.embed_dim, 64, norm_last_layer=norm_last_layer)
        )
    names = {p: name for name, p in model.named_parameters()}
    assert [[names[p] for p in group["params"]] for group in param_groups(model)] == official


@pytest.mark.parametrize(
    "make", [*(pair[0] for pair in PAIRS.values()), lambda g, **k: LARSEMA(g, lr=0.01, **k)]
)
def test_global_clip_is_that_of_torch(make):
    """As if torch had clipped the gradients and nothing were clipped here; with a limit above the
    norm nothing is."""
    for limit in (0.5, 1e6):
        ours, theirs = small_model(), small_model()
        optimizer = make(param_groups(ours), clip_grad=limit, clip_mode="global")
        plain = make(param_groups(theirs))
        for step in range(3):
            for model in (ours, theirs):
                model.zero_grad()
                backward(model, step)
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
            optimizer.step()
            plain.step()
            torch.testing.assert_close(optimizer.grad_norm, norm)
        close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_wrong_use_is_named():
    model = small_model()
    with pytest.raises(ValueError, match="student and teacher go together"):
        AdamWEMA(model.parameters(), student=model)
    with pytest.raises(ValueError, match="clip_grad is -1"):
        AdamWEMA(model.parameters(), clip_grad=-1)
    for make in (AdamWEMA, SGDEMA, LARSEMA):
        with pytest.raises(ValueError, match="clip_mode is 'norm': choose from tensor, global"):
            make(model.parameters(), clip_mode="norm")
    optimizer = AdamWEMA(model.parameters(), student=model, teacher=copy.deepcopy(model))
    backward(model, 0)
    with pytest.raises(ValueError, match="momentum"):
        optimizer.step()


def test_closure_and_scheduler_work_as_with_any_optimizer():
    model = small_model()
    optimizer = AdamWEMA(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert torch.is_tensor(first) and np.isclose(optimizer.param_groups[0]["lr"], 0.05)


def test_a_group_may_be_empty():
    """A model of biases alone leaves the first of the two groups without a parameter."""
    bias = nn.Parameter(torch.ones(3))
    holder = nn.Module()
    holder.bias = bias
    optimizer = AdamWEMA(param_groups(holder), lr=0.1)
    bias.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(bias.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train_too(dtype):
    model = small_model().to(dtype)
    teacher, start = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = AdamWEMA(param_groups(model), lr=0.1, student=model, teacher=teacher, clip_grad=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(momentum=0.5)
    for p, t, old in zip(model.parameters(), teacher.parameters(), start.parameters(), strict=True):
        # 0.1 down, weights also decay
        expected = old.double() * (1 - 0.1 * 0.01 if p.ndim > 1 else 1) - 0.1
        torch.testing.assert_close(p.double(), expected, rtol=1e-2, atol=2e-3)
        torch.testing.assert_close(t.double(), (expected + old.double()) / 2, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    "make", [lambda g, **k: AdamWEMA(g, **k), lambda g, **k: SGDEMA(g, lr=0.1, **k)]
)
def test_copies_and_pickles_go_on(make):
    import pickle

    model = small_model()
    teacher = copy.deepcopy(model)
    optimizer = make(param_groups(model), student=model, teacher=teacher, clip_grad=0.5)
    train(model, optimizer, 2, momentum=0.9)
    for clone in (
        copy.deepcopy((model, teacher, optimizer)),
        pickle.loads(pickle.dumps((model, teacher, optimizer))),
    ):
        train(clone[0], clone[2], 2, momentum=0.9)
        other = copy.deepcopy((model, teacher, optimizer))
        train(other[0], other[2], 2, momentum=0.9)
        close(clone[0], other[0], rtol=0, atol=0)
        close(clone[1], other[1], rtol=0, atol=0)
    assert not torch.equal(clone[1][0].weight, teacher[0].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"betas": (1.5, 0.9)}, r"betas are \(1.5, 0.9\)"),
    ],
)
def test_impossible_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdamWEMA(small_model().parameters(), **arguments)


def test_student_and_teacher_must_go_together():
    model = small_model()
    with pytest.raises(
        ValueError,
        match="4 parameters here and 6 there|4 parameters here and 2 there|5 parameters here",
    ):
        AdamWEMA(
            model.parameters(),
            student=model,
            teacher=nn.Sequential(*list(copy.deepcopy(model))[:1]),
        )
    with pytest.raises(ValueError, match="share a parameter"):
        AdamWEMA(model.parameters(), student=model, teacher=model)
    with pytest.raises(ValueError, match="none of the parameters given is one of student's"):
        AdamWEMA(small_model().parameters(), student=model, teacher=copy.deepcopy(model))
    optimizer = AdamWEMA(model.parameters(), student=model, teacher=copy.deepcopy(model))
    backward(model, 0)
    for momentum in (9.0, -0.1, float("nan"), torch.tensor(1.5)):
        with pytest.raises(ValueError, match="momentum is"):
            optimizer.step(momentum=momentum)


def test_foreign_states_that_mean_something_else_are_refused():
    model = small_model()
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    train(model, theirs, 1)
    ours = AdamWEMA(model.parameters())
    with pytest.raises(ValueError, match="amsgrad of param group 0 is True: AdamWEMA does not"):
        ours.load_state_dict(theirs.state_dict())
    plain = torch.optim.AdamW(model.parameters())
    train(model, plain, 1)
    state = plain.state_dict()
    for kept in state["state"].values():
        kept["step"] = kept["step"].item()  # as torch 1.11 saved it
    ours.load_state_dict(state)
    train(model, ours, 1)
    assert ours.state_dict()["state"][0]["step"] == 2
