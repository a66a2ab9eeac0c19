"""Group options of torch's optimizers: honored or refused, wherever they are given."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from dinofast import LARSEMA, SGDEMA, AdamWEMA

KINDS = [AdamWEMA, SGDEMA, LARSEMA]
GRADS = (1.0, -3.0, 0.1)


def parameter():
    return nn.Parameter(torch.ones(2))


def steps(p, optimizer, grads=GRADS):
    for grad in grads:
        p.grad = torch.full_like(p, grad)
        optimizer.step()
    return p.detach()


def given(make, place, name, value):
    """A parameter, and its optimizer with an option given in one of four places."""
    p = parameter()
    if place == "constructor":
        return p, make([p], lr=0.1, **{name: value})
    if place == "group":
        return p, make([{"params": [p], name: value}], lr=0.1)
    if place == "add_param_group":
        optimizer = make([parameter()], lr=0.1)
        optimizer.add_param_group({"params": [p], name: value})
        return p, optimizer
    optimizer = make([p], lr=0.1)
    if place == "later":
        optimizer.param_groups[0][name] = value
    else:
        state = optimizer.state_dict()
        state["param_groups"][0][name] = value
        optimizer.load_state_dict(state)
    return p, optimizer


PLACES = ["constructor", "group", "add_param_group", "later", "load"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("make", "make_torch"), [(AdamWEMA, torch.optim.AdamW), (SGDEMA, torch.optim.SGD)]
)
def test_maximize_is_that_of_torch(make, make_torch, place):
    momentum = {} if make is AdamWEMA else {"momentum": 0.9, "weight_decay": 0.1}

    def run(cls):
        return steps(*given(lambda g, **k: cls(g, **momentum, **k), place, "maximize", True))

    torch.testing.assert_close(run(make), run(make_torch), rtol=1e-6, atol=1e-7)
    assert not torch.equal(run(make), steps(*given(make, "later", "foreach", None)))


def test_maximize_turns_lars_round():
    ours, theirs = parameter(), parameter()
    steps(ours, LARSEMA([ours], lr=0.1, maximize=True))
    steps(theirs, LARSEMA([theirs], lr=0.1), [-g for g in GRADS])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["foreach", "fused", "capturable"])
def test_a_choice_of_implementation_changes_nothing(place, name):
    plain = parameter()
    steps(plain, AdamWEMA([plain], lr=0.1))
    assert torch.equal(steps(*given(AdamWEMA, place, name, True)), plain)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (AdamWEMA, "amsgrad", True),
        (AdamWEMA, "differentiable", True),
        (AdamWEMA, "decoupled_weight_decay", False),
        (SGDEMA, "nesterov", True),
        (SGDEMA, "dampening", 0.5),
        (SGDEMA, "differentiable", True),
        (LARSEMA, "weight_decay_filter", len),
    ],
)
def test_an_option_that_would_change_the_result_is_refused(make, place, name, value):
    if place == "constructor" and name in ("decoupled_weight_decay", "weight_decay_filter"):
        with pytest.raises(TypeError, match=name):
            given(make, place, name, value)
        return
    with pytest.raises(ValueError, match=f"{name}.* is .*: {make.__name__} does not have it; lea"):
        p, optimizer = given(make, place, name, value)
        assert place == "later"  # elsewhere at once
        before = p.detach().clone()
        try:
            steps(p, optimizer)
        finally:
            assert torch.equal(p, before)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -1.0, "is -1.0: it must not be negative"),
        ("lr", math.nan, "is nan"),
        ("lr", math.inf, "is inf: .* finite"),
        ("lr", "1e-3", "is '1e-3': give a number"),
        ("lr", None, "is None: give a number"),
        ("lr", torch.tensor([1e-3, 2e-3]), "is a tensor of 2 numbers: give one"),
        ("lr", torch.tensor(math.nan), "is nan"),
        ("weight_decay", -0.1, "is -0.1"),
        ("eps", -1e-8, "is -1e-08"),
        ("betas", (0.9, 1.0), r"are \(0.9, 1.0\)"),
        ("betas", (0.9, math.nan), "nan"),
        ("betas", (0.9,), "give two numbers"),
        ("betas", 0.9, "give two numbers"),
        ("teacher_momentum", 1.5, "is 1.5: it must lie between 0 and 1|there is no teacher"),
    ],
)
def test_a_number_out_of_range_is_named(place, name, value, words):
    def make(groups, **options):
        return AdamWEMA(groups, **({"lr": 0.1} | options))

    if place == "constructor" and name == "lr":
        with pytest.raises(ValueError, match=f"^lr.* {words}"):
            AdamWEMA([parameter()], lr=value)
        return
    with pytest.raises(ValueError, match=f"^{name}.*{words}"):
        steps(*given(make, place, name, value))


def test_a_refused_group_is_not_kept():
    optimizer = AdamWEMA([parameter()])
    with pytest.raises(ValueError, match="amsgrad of param group 1"):
        optimizer.add_param_group({"params": [parameter()], "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    p = parameter()
    with pytest.raises(ValueError, match="param group 0 holds a parameter twice"), pytest.warns():
        AdamWEMA([p, p])


def test_keys_of_others_are_kept():
    p = parameter()
    optimizer = AdamWEMA([{"params": [p], "lr_scale": 0.5}])
    optimizer.param_groups[0]["initial_lr"] = 1.0
    steps(p, optimizer)
    assert optimizer.state_dict()["param_groups"][0]["lr_scale"] == 0.5


def test_clipping_is_one_for_all_groups():
    with pytest.raises(ValueError, match="clip_grad of param group 0 is 1.0: there is one for all"):
        AdamWEMA([{"params": [parameter()], "clip_grad": 1.0}])


def test_a_scalar_of_any_shape_is_a_number():
    for lr in (torch.tensor([0.1]), torch.tensor([[0.1]])):
        p = nn.Parameter(torch.tensor(1.0))
        steps(p, AdamWEMA([p], lr=lr, weight_decay=0), [1.0])
        assert p.item() == pytest.approx(0.9)


def test_a_number_given_for_the_closure():
    optimizer = AdamWEMA([parameter()])
    with pytest.raises(ValueError, match=r"closure, not 0.996: .* step\(momentum=...\)"):
        optimizer.step(0.996)
    for momentum, words in (("0.9", "is '0.9': give"), (torch.ones(2), "tensor of 2 numbers")):
        with pytest.raises(ValueError, match=words):
            optimizer.step(momentum=momentum)


@pytest.mark.parametrize(
    ("saved", "loads", "words"),
    [
        (torch.optim.Adam, AdamWEMA, "decoupled_weight_decay of param group 0 is False"),
        (torch.optim.SGD, AdamWEMA, "that of SGD, another kind of optimizer than AdamWEMA"),
        (torch.optim.Adamax, AdamWEMA, "that of Adamax or RAdam"),
        (
            partial(torch.optim.RAdam, decoupled_weight_decay=True),
            AdamWEMA,
            "that of Adamax or RAdam",
        ),
        (partial(torch.optim.NAdam, decoupled_weight_decay=True), AdamWEMA, "that of NAdam"),
        (torch.optim.AdamW, SGDEMA, "that of AdamW, another kind of optimizer than SGDEMA"),
        (torch.optim.AdamW, LARSEMA, "that of AdamW, .* LARSEMA, which takes its own"),
        (LARSEMA, SGDEMA, "that of LARS"),
        (SGDEMA, LARSEMA, "that of SGD"),
        (torch.optim.SGD, LARSEMA, "that of SGD"),
        (torch.optim.RMSprop, SGDEMA, "that of RMSprop"),
        (partial(torch.optim.RMSprop, momentum=0.9), SGDEMA, "that of RMSprop"),
        (torch.optim.Adagrad, SGDEMA, "that of Adagrad"),
        (torch.optim.Adadelta, SGDEMA, "that of Adadelta"),
        (torch.optim.ASGD, SGDEMA, "that of ASGD"),
        (torch.optim.Rprop, SGDEMA, "that of Rprop"),
        (torch.optim.Adafactor, SGDEMA, "that of Adafactor"),
    ],
)
@pytest.mark.parametrize("stepped", [True, False])
def test_a_state_of_another_kind_is_refused_whole(saved, loads, words, stepped):
    p, q = parameter(), parameter()
    other, optimizer = saved([p], lr=0.1), loads([q], lr=0.2)
    if stepped:
        steps(p, other)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["lr_decay", "alpha", "rho", "etas"])
def test_an_option_of_ones_own_that_another_optimizer_has_tells_nothing(make, name):
    optimizer, fresh = (make([{"params": [parameter()], name: 0.9}], lr=0.1) for _ in range(2))
    steps(optimizer.param_groups[0]["params"][0], optimizer)
    fresh.load_state_dict(optimizer.state_dict())
    for one in (fresh, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert one.param_groups[0][name] == 0.9


def test_amsgrad_that_has_been_turned_off():
    """As torch's own AdamW takes it; the groups tell, the state keeps what is not used."""
    p, q = parameter(), parameter()
    saved = torch.optim.AdamW([p], amsgrad=True)
    steps(p, saved)
    state = saved.state_dict()
    state["param_groups"][0]["amsgrad"] = False
    optimizer = AdamWEMA([q])
    optimizer.load_state_dict(state)
    steps(q, optimizer)
    assert torch.equal(optimizer.state[q]["max_exp_avg_sq"], state["state"][0]["max_exp_avg_sq"])


def test_a_state_with_more_for_a_parameter_is_refused():
    """As of an optimizer of others that has torch's options."""
    p = parameter()
    optimizer = SGDEMA([p], lr=0.1)
    steps(p, optimizer)
    state = optimizer.state_dict()
    state["state"][0]["square_avg"] = torch.ones_like(p)
    with pytest.raises(ValueError, match="holds momentum_buffer, square_avg for a parameter"):
        SGDEMA([parameter()], lr=0.1).load_state_dict(state)


@pytest.mark.parametrize("make", KINDS)
def test_a_state_of_another_model_is_refused(make):
    p = nn.Parameter(torch.ones(4, 5))
    optimizer = make([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    fresh = make([nn.Parameter(torch.ones(4, 4))], lr=0.1)
    with pytest.raises(ValueError, match=r"is \(4, 5\) and the parameter it is for \(4, 4\)"):
        fresh.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    state["state"][0][make._moments[-1]] = "x"
    with pytest.raises(ValueError, match="is str and the parameter"):
        make([p], lr=0.1).load_state_dict(state)


@pytest.mark.parametrize("state", [None, {}, {"weight": torch.ones(2)}])
def test_what_is_no_state_is_named(state):
    with pytest.raises(ValueError, match="no optimizer's state_dict"):
        AdamWEMA([parameter()]).load_state_dict(state)


@pytest.mark.parametrize("make", KINDS)
def test_a_group_s_momentum_without_a_teacher_is_refused(make):
    with pytest.raises(ValueError, match="teacher_momentum is 0.9 but there is no teacher"):
        make([{"params": [parameter()], "teacher_momentum": 0.9}], lr=0.1)
    optimizer = make([parameter()], lr=0.1)
    with pytest.raises(ValueError, match="teacher_momentum is 0.9 but there is no teacher"):
        optimizer.add_param_group({"params": [parameter()], "teacher_momentum": 0.9})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", KINDS)
def test_a_skip_of_several_is_named(make):
    p = parameter()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="skip is .*: give one number"):
        make([p], lr=0.1).step(skip=torch.tensor([True, False]))


def test_a_derived_class_takes_the_states_of_its_kind():
    class Mine(AdamWEMA):
        pass

    p, q = parameter(), parameter()
    other = torch.optim.AdamW([p], lr=0.1)
    steps(p, other)
    mine = Mine([q], lr=0.2)
    mine.load_state_dict(other.state_dict())
    assert mine.param_groups[0]["lr"] == 0.1


def test_states_of_torch_load_old_and_new():
    for old in (False, True):
        ours, theirs = parameter(), parameter()
        other, optimizer = torch.optim.AdamW([theirs], lr=0.1), AdamWEMA([ours], lr=0.5)
        steps(theirs, other)
        state = copy.deepcopy(other.state_dict())
        if old:  # torch 1.11 knew only amsgrad of them
            for name in ("maximize", "foreach", "fused", "capturable", "differentiable"):
                del state["param_groups"][0][name]
            del state["param_groups"][0]["decoupled_weight_decay"]
        optimizer.load_state_dict(state)
        ours.data.copy_(theirs)
        torch.testing.assert_close(steps(ours, optimizer), steps(theirs, other))


def test_hooks_of_a_state_come_before_the_checks():
    p = parameter()
    optimizer = AdamWEMA([p])
    steps(p, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["amsgrad"] = True

    def without(_, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["amsgrad"] = False
        return state

    optimizer.register_load_state_dict_pre_hook(without)
    optimizer.load_state_dict(state)
    seen = []
    optimizer.register_state_dict_post_hook(
        lambda _, state: seen.append(state["state"][0]["step"].device.type)
    )
    assert optimizer.state_dict() and seen == ["cpu"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_may_make_a_state_of_another_layout(kind):
    p = parameter()
    optimizer = kind([p], lr=0.1)
    steps(p, optimizer)
    saved = {"of": optimizer.state_dict()}
    with pytest.raises(ValueError, match="this is no optimizer's state_dict"):
        optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["of"])
    optimizer.load_state_dict(saved)


def test_a_kind_derived_from_the_base_loads_its_own_state():
    class Own(SGDEMA):
        _kind = ""

    optimizer = Own([parameter()], lr=0.1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
