"""Tensors that are made once: the same until others have taken their place, and held for whoever
needs them longer."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dinofast.runtime import tensor_cache as module
from dinofast.runtime.tensor_cache import cached_tensors, keep_alive


@pytest.fixture
def ones(monkeypatch):
    """Makes (n,) of ones; four results are kept."""
    monkeypatch.setattr(module, "KEPT", 4)
    return cached_tensors(lambda n: torch.ones(n))


def test_the_last_results_are_kept(ones):
    first = ones(1)
    assert ones(1) is first
    for n in range(2, 6):
        ones(n)
    assert ones(1) is not first and torch.equal(ones(1), first)


def test_what_evaluation_makes_serves_training(ones):
    with torch.inference_mode():
        made = ones(3)
    assert not made.is_inference() and not made.requires_grad
    (torch.zeros(3, requires_grad=True) * ones(3)).sum().backward()


def test_nothing_is_kept_while_a_compiler_looks_on(ones):
    torch.compile(lambda x: x + ones(3), backend="eager", fullgraph=True)(torch.zeros(3))
    made = ones(3)
    assert type(made) is torch.Tensor and torch.equal(made, torch.ones(3))


def test_held_results_outlive_the_others(ones):
    made_before = weakref.ref(ones(1))
    with keep_alive() as held:
        ones(1)
        made_within = weakref.ref(ones(2))
        with keep_alive() as also_held:
            ones(2)
    made_after = weakref.ref(ones(3))
    for n in range(4, 10):
        ones(n)
    gc.collect()
    assert (
        made_before() is held[0]
        and made_within() is held[1] is also_held[0]
        and made_after() is None
    )
    assert len(held) == 3 and len(also_held) == 1
    del held, also_held
    gc.collect()
    assert made_before() is made_within() is None


def test_holding_ends_with_an_error(ones):
    with pytest.raises(ZeroDivisionError), keep_alive() as held:
        raise ZeroDivisionError
    ones(1)
    assert held == []
