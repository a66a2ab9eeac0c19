import copy
import math
import pickle
import types

import golden
import numpy as np
import pytest
import torch

from dinofast import DINOLoss

ARGS = (
    "out_dim",
    "ncrops",
    "warmup_teacher_temp",
    "teacher_temp",
    "warmup_teacher_temp_epochs",
    "nepochs",
)


@pytest.mark.parametrize("name", ["loss_multicrop", "loss_two_crops", "loss_wide"])
def test_official_calls_in_a_row(name):
    case = golden.load(f"{name}.npz")
    loss_fn = DINOLoss(*(case[a].item() for a in ARGS))
    for i in range(3):
        if f"student{i}" not in case:
            assert i == 2
            break
        torch.testing.assert_close(loss_fn.center, case[f"center_before{i}"], rtol=1e-5, atol=1e-7)
        student = case[f"student{i}"].requires_grad_()
        loss = loss_fn(student, case[f"teacher{i}"], int(case[f"epoch{i}"]))
        loss.backward()
        assert loss.item() == pytest.approx(case[f"loss{i}"].item(), rel=1e-5)
        torch.testing.assert_close(student.grad, case[f"grad{i}"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(loss_fn.center, case[f"center_after{i}"], rtol=1e-5, atol=1e-7)


def make(**changes):
    return DINOLoss(
        **{
            "out_dim": 11,
            "ncrops": 4,
            "warmup_teacher_temp": 0.04,
            "teacher_temp": 0.07,
            "warmup_teacher_temp_epochs": 2,
            "nepochs": 5,
            **changes,
        }
    )


def test_state_is_the_center_alone_and_loads_official_state():
    loss_fn = make()
    assert (
        list(loss_fn.state_dict()) == ["center"]
        and loss_fn.center.shape == (1, 11)
        and not loss_fn.center.any()
    )
    loss_fn.load_state_dict({"center": torch.ones(1, 11)})
    assert (loss_fn.center == 1).all()


def test_constructor_as_the_official_one():
    assert make().teacher_temp_schedule == pytest.approx([0.04, 0.07, 0.07, 0.07, 0.07])
    assert (make().student_temp, make().center_momentum) == (0.1, 0.9)


def test_micro_batches_give_the_center_of_the_whole_batch():
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 11)
    student = torch.randn(4, 6, 11)
    whole, parts = make(), make()
    loss = whole(student.flatten(0, 1), teacher.flatten(0, 1), 0)
    halves = [
        parts.accumulate(student[:, half].flatten(0, 1), teacher[:, half].flatten(0, 1), 0.04)
        for half in (slice(0, 3), slice(3, 6))
    ]
    stats = parts.step()
    torch.testing.assert_close(torch.stack(halves).mean(), loss)
    torch.testing.assert_close(stats.loss, loss)
    torch.testing.assert_close(parts.center, whole.center)
    torch.testing.assert_close(stats.kl + stats.teacher_entropy, stats.loss)
    with pytest.raises(RuntimeError, match="nothing to average"):
        parts.step()


def test_a_teacher_logit_of_minus_infinity_leaves_the_loss_finite_but_never_reaches_the_center():
    loss_fn = make()
    teacher = torch.randn(4, 11)
    teacher[0, 0] = -math.inf
    assert torch.isfinite(loss_fn(torch.randn(8, 11), teacher, 0)) and not loss_fn.center.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_never_reaches_the_center(bad):
    loss_fn = make()
    student, teacher = torch.randn(8, 11), torch.randn(4, 11)
    loss_fn(student, teacher, 0)
    before = loss_fn.center.clone()
    teacher[1, 3] = bad
    assert not torch.isfinite(loss_fn(student, teacher, 0))
    assert torch.equal(loss_fn.center, before) and before.any()


def test_teacher_gets_no_gradient_and_the_loss_scales_with_upstream():
    loss_fn = make()
    student = torch.randn(8, 11, requires_grad=True)
    teacher = torch.randn(4, 11, requires_grad=True)
    (3 * loss_fn(student, teacher, 0)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "student, teacher, epoch, words",
    [
        ((8, 11), (4, 11), 5, "epoch is 5 .* nepochs=5"),
        ((8, 11), (4, 11), -1, "epoch is -1"),
        ((7, 11), (4, 11), 0, r"\(7, 11\) and teacher_output \(4, 11\) do not fit"),
        ((8, 10), (4, 10), 0, r"expected \(4 B, 11\) and \(2 B, 11\)"),
        ((8, 11), (3, 11), 0, r"\(3, 11\)"),
        ((0, 11), (0, 11), 0, r"\(0, 11\)"),
    ],
)
def test_what_does_not_fit_is_named(student, teacher, epoch, words):
    with pytest.raises(ValueError, match=words):
        make()(torch.zeros(student), torch.zeros(teacher), epoch)


def test_lists_of_crops_and_numbers_of_any_kind_are_those_of_the_tensor():
    student, teacher = torch.randn(8, 11), torch.randn(4, 11)
    wanted = make()(student, teacher, 3)
    for epoch in (3.0, np.int64(3), np.float64(3), torch.tensor(3), torch.tensor([3.0])):
        assert make()(list(student.split(2)), tuple(teacher.split(2)), epoch) == wanted
    one, two = make(nepochs=5.0, ncrops=4.0), make()
    one.update_center(teacher)
    two.update_center(list(teacher.split(2)))
    assert torch.equal(one.center, two.center)


@pytest.mark.parametrize("epoch", [2.5, "3", None, torch.ones(2), float("nan"), float("inf")])
def test_an_epoch_that_is_no_whole_number_is_named(epoch):
    with pytest.raises(ValueError, match="epoch is .*: give a whole number"):
        make()(torch.zeros(8, 11), torch.zeros(4, 11), epoch)


OUTPUTS = {
    "student_output is a ndarray: give": (np.zeros((8, 11)), torch.zeros(4, 11)),
    "teacher_output is a NoneType: give": (torch.zeros(8, 11), None),
    "student_output is of torch.sparse_coo": (torch.zeros(8, 11).to_sparse(), torch.zeros(4, 11)),
    "student_output is a list: give": ([[0.0] * 11] * 8, torch.zeros(4, 11)),
    r"list of \[\(2, 11\), \(2, 10\)\]": (
        [torch.zeros(2, 11), torch.zeros(2, 10)],
        torch.zeros(4, 11),
    ),
    r"\(6, 11\) and teacher_output \(4, 11\) do not": (
        [torch.zeros(2, 11)] * 3,
        torch.zeros(4, 11),
    ),
    "student is torch.int64": (torch.zeros(8, 11).long(), torch.zeros(4, 11)),
    r"\(4, 12\) do not fit": (torch.zeros(8, 11), torch.zeros(4, 12)),
}


@pytest.mark.parametrize("words", OUTPUTS)
def test_outputs_of_another_kind_are_named(words):
    with pytest.raises(ValueError, match=words):
        make()(*OUTPUTS[words], 0)


@pytest.mark.parametrize("shape", [(4, 12), (4, 1), (11,), (2, 2, 11)])
def test_update_center_takes_rows_of_its_width_alone(shape):
    with pytest.raises(ValueError, match=r"expected \(n, 11\)"):
        make().update_center(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ncrops", 1, "at least 2"),
        ("ncrops", 2.5, "a whole number"),
        ("out_dim", 0, "at least 1"),
        ("nepochs", "5", "a whole number"),
        ("warmup_teacher_temp_epochs", -1, "at least 0"),
        ("teacher_temp", -1.0, "above 0"),
        ("warmup_teacher_temp", "0.04", "a number"),
        ("student_temp", float("nan"), "above 0"),
        ("center_momentum", 1.5, "between 0 and 1"),
    ],
)
def test_impossible_arguments_are_named(name, value, words):
    with pytest.raises(ValueError, match=f"{name} is .*{words}"):
        make(**{name: value})


def test_impossible_constructors():
    with pytest.raises(ValueError, match="warmup_teacher_temp_epochs is 6 but nepochs is only 5"):
        make(warmup_teacher_temp_epochs=6)


def test_runs_under_autocast_with_fp32_statistics():
    loss_fn = make(out_dim=300)
    student, teacher = torch.randn(8, 300), torch.randn(4, 300)
    exact = loss_fn(student, teacher, 0)
    loss_fn.center.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss_fn(student.bfloat16(), teacher.bfloat16(), 0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-2)


# ---- as the official class, for subclasses and scripts
class Official(torch.nn.Module):
    """What of the official class (main_dino.py, commit 7c446df) a subclass may touch, one
    process."""

    def __init__(self, out_dim, ncrops, temp):
        super().__init__()
        self.student_temp, self.center_momentum, self.ncrops = 0.1, 0.9, ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.teacher_temp_schedule = np.array([temp])

    def forward(self, student_output, teacher_output, epoch):
        student_out = (student_output / self.student_temp).chunk(self.ncrops)
        temp = self.teacher_temp_schedule[epoch]
        q = ((teacher_output - self.center) / temp).softmax(-1).detach().chunk(2)
        each = [
            (-q[t] * student_out[v].log_softmax(-1)).sum(-1).mean()
            for t in range(2)
            for v in range(self.ncrops)
            if v != t
        ]
        self.update_center(teacher_output)
        return sum(each) / len(each)

    @torch.no_grad()
    def update_center(self, teacher_output):
        batch_center = torch.sum(teacher_output, dim=0, keepdim=True) / len(teacher_output)
        self.center = self.center * self.center_momentum + batch_center * (1 - self.center_momentum)


def sides():
    return Official(11, 4, 0.05), make(warmup_teacher_temp=0.05, warmup_teacher_temp_epochs=1)


def test_update_center_by_hand_is_the_official_one():
    theirs, ours = sides()
    for seed in range(3):
        teacher = torch.randn(6, 11, generator=torch.Generator().manual_seed(seed))
        theirs.update_center(teacher)
        ours.update_center(teacher)
        torch.testing.assert_close(ours.center, theirs.center)
    before = ours.center
    ours.update_center(torch.full((2, 11), math.nan))
    assert torch.equal(ours.center, before) and before.any()


def frozen_center(self, teacher_output):
    """Another rule, which sees the center before, records gradients unless told not to."""
    self.seen = (teacher_output, self.center.clone(), torch.is_grad_enabled())
    self.center = 0.5 * self.center + teacher_output.amax(0, keepdim=True)


@pytest.mark.parametrize("how", ["subclass", "super", "instance", "class"])
def test_an_update_center_of_ones_own_is_called(how, monkeypatch):
    theirs, ours = sides()
    monkeypatch.setattr(Official, "update_center", torch.no_grad()(frozen_center))
    if how == "class":
        monkeypatch.setattr(DINOLoss, "update_center", frozen_center)
    elif how == "instance":
        ours.update_center = types.MethodType(frozen_center, ours)
    elif how == "subclass":
        ours.__class__ = type("Mine", (DINOLoss,), {"update_center": frozen_center})
    else:

        class Mine(DINOLoss):
            def update_center(self, teacher_output):
                super().update_center(2 * teacher_output)

        ours.__class__ = Mine
        monkeypatch.undo()
        official = Official.update_center
        monkeypatch.setattr(Official, "update_center", lambda self, x: official(self, 2 * x))
    for _ in range(3):
        student, teacher = torch.randn(8, 11), torch.randn(4, 11, requires_grad=True)
        losses = [loss_fn(student, teacher, 0) for loss_fn in (theirs, ours)]
        torch.testing.assert_close(losses[1], losses[0].detach())
        torch.testing.assert_close(ours.center, theirs.center)
        assert ours.center.any() and not ours.center.requires_grad and ours.center.grad_fn is None
        if how != "super":
            assert ours.seen[0] is teacher and not ours.seen[2]
            assert torch.equal(ours.seen[1], theirs.seen[1])


def test_an_update_center_of_ones_own_is_called_by_step_too():
    class Mine(DINOLoss):
        def update_center(self, teacher_output):
            self.rows = teacher_output

    loss_fn = Mine(11, 4, 0.04, 0.04, 0, 1)
    halves = torch.randn(2, 4, 11)
    for half in halves:
        loss_fn.accumulate(torch.randn(8, 11), half, 0.04)
    assert torch.isfinite(loss_fn.step().loss)
    assert torch.equal(loss_fn.rows, halves.flatten(0, 1)) and not loss_fn.center.any()


def test_attributes_may_be_changed_as_in_the_official_class():
    theirs, ours = sides()
    assert isinstance(ours.teacher_temp_schedule, np.ndarray)
    for loss_fn in (theirs, ours):
        loss_fn.teacher_temp_schedule[0] = 0.2
        loss_fn.student_temp, loss_fn.center_momentum, loss_fn.ncrops = 0.3, 0.5, 3
        loss_fn.center = torch.linspace(-1, 1, 11)  # broadcasts there
    student, teacher = torch.randn(6, 11), torch.randn(4, 11)
    before = ours.center
    torch.testing.assert_close(ours(student, teacher, 0), theirs(student, teacher, 0))
    torch.testing.assert_close(ours.center.flatten(), theirs.center.flatten())
    assert torch.equal(before, torch.linspace(-1, 1, 11))  # who holds the old center keeps it
    for schedule in ([0.05], np.float32([0.05]), torch.tensor([0.05])):
        ours.teacher_temp_schedule = schedule
        assert torch.isfinite(ours(student, teacher, 0))


def test_copies_pickles_and_other_dtypes_go_on():
    ours = make()
    student, teacher = torch.randn(8, 11), torch.randn(4, 11)
    ours(student, teacher, 0)
    expected = copy.deepcopy(ours)(student, teacher, 1)
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(student, teacher, 1), expected)
    double = copy.deepcopy(ours).double()
    torch.testing.assert_close(double(student, teacher, 1), expected)
    assert double.center.dtype == torch.float64
