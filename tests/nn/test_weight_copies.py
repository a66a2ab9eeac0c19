"""16-bit copies beside float32 parameters: the bits that autocast would make, and never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinofast.nn.onednn_linear import Linear
from dinofast.nn.vit import vit_nano
from dinofast.nn.weight_copies import Copies, operand, reading
from dinofast.optim import OPTIMIZERS, param_groups

BF16 = torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts conversions to bfloat16 of parameters and parts of them."""

    def __init__(self, parameters):
        super().__init__()
        self.n, self.storages = 0, {p.untyped_storage().data_ptr() for p in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is BF16:
            self.n += args[0].untyped_storage().data_ptr() in self.storages
        return func(*args, **(kwargs or {}))


def networks():
    torch.manual_seed(0)
    student = vit_nano(drop_path_rate=0.0)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return student, teacher


def features(network, images):
    """As in a step."""
    with reading(), torch.autocast("cpu", BF16):
        return network(images)


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_fresh(copies):
    assert copies.of
    for parameter, rounded in copies.of.items():
        assert rounded.dtype == BF16 and torch.equal(rounded, parameter.to(BF16))


def test_the_same_bits_and_gradients_as_autocast_without_a_cast_of_a_weight():
    plain, _ = networks()
    student, _ = networks()
    copies = Copies([student], BF16)
    assert len(copies.of) == 2 * (4 * len(student.blocks) + 1)  # weight and bias of each product
    found = []
    for network in (plain, student):
        with Casts(network.parameters()) as casts:
            out = features(network, IMAGES)
        out.square().sum().backward()
        found.append((casts.n, out, {name: p.grad for name, p in network.named_parameters()}))
    (cast, out, grads), (left, out_of_copies, grads_of_copies) = found
    assert cast == len(copies.of) + 2 and left == 0  # the last block's qkv is cast in two parts
    assert torch.equal(out, out_of_copies)
    for name, grad in grads.items():
        assert grads_of_copies[name].dtype == torch.float32 and torch.equal(
            grad, grads_of_copies[name]
        ), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_writes_them_and_a_skipped_step_does_not(name):
    student, teacher = networks()
    frozen = student.blocks[0].mlp.fc1.weight.requires_grad_(False)
    copies = Copies([student, teacher], BF16)
    optimizer = OPTIMIZERS[name](param_groups(student), student=student, teacher=teacher, lr=0.1)
    optimizer.copies = copies.of
    assert frozen in copies.of and len(copies.of) == 4 * (4 * len(student.blocks) + 1)
    for skip in (False, True):
        before = [p.clone() for p in copies.of]
        features(student, IMAGES).square().sum().backward()
        optimizer.step(momentum=0.9, skip=torch.tensor(skip))
        optimizer.zero_grad()
        assert_fresh(copies)
        moved = sum(not torch.equal(p, old) for p, old in zip(copies.of, before, strict=True))
        # not the frozen one, nor the average of it
        assert moved == (0 if skip else len(copies.of) - 2)


def test_a_parameter_written_by_somebody_else_is_rounded_anew():
    student, _ = networks()
    other, _ = networks()
    copies = Copies([student], BF16)
    kept = list(copies.of.values())
    for write in (
        lambda: student.load_state_dict({k: v + 1 for k, v in other.state_dict().items()}),
        lambda: nn.init.ones_(student.blocks[1].attn.proj.bias),
    ):
        write()
        copies.refresh()
        assert_fresh(copies)
        # a CUDA graph reads them there
        assert all(now is then for now, then in zip(copies.of.values(), kept, strict=True))
    student.double().float()  # which makes other tensors of the buffers
    assert student.blocks[0].attn.qkv.weight_copy.dtype == torch.float32
    copies.refresh()
    assert_fresh(copies)
    assert all(
        copies.of[p] is student.blocks[0].attn.qkv._buffers[f"{name}_copy"]
        for name, p in student.blocks[0].attn.qkv.named_parameters()
    )


def test_read_in_a_step_and_under_autocast_to_their_dtype_alone():
    layer = Linear(4, 4)
    assert operand(layer, "weight") is layer.weight
    rounded = Copies([layer], BF16).of[layer.weight]
    rounded.zero_()  # to tell them apart
    x = torch.randn(2, 4)
    for dtype, enabled, is_read in (
        (BF16, True, True),
        (BF16, False, False),
        (torch.float16, True, False),
    ):
        with reading(), torch.autocast("cpu", dtype, enabled=enabled):
            assert torch.equal(operand(layer, "weight"), rounded) == is_read
            assert (layer(x).dtype == torch.float32) == (not enabled)
    layer.requires_grad_(False)
    with torch.autocast("cpu", BF16):
        # whoever is no step computes with the parameters
        assert operand(layer, "weight") is layer.weight
        with reading(), reading():
            pass
        with reading():
            assert operand(layer, "weight") is rounded
        assert operand(layer, "weight") is layer.weight
    assert set(layer.state_dict()) == {"weight", "bias"} and Linear(4, 4, bias=False)(x).shape == (
        2,
        4,
    )


def test_copies_of_a_copied_optimizer_are_those_of_its_own_parameters():
    student, teacher = networks()
    copies = Copies([student, teacher], BF16)
    optimizer = OPTIMIZERS["adamw"](param_groups(student), student=student, teacher=teacher)
    optimizer.copies = copies.of
    twin = copy.deepcopy(optimizer)
    assert len(twin.copies) == len(copies.of) and not set(twin.copies) & set(copies.of)
    parameters = {p for group in twin.param_groups for p in group["params"]}
    assert len(parameters & set(twin.copies)) == len(copies.of) // 2
