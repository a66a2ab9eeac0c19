"""Linear layers by oneDNN against the formula in float64, and which library is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accuracy import assert_no_worse
from torch.utils.flop_counter import FlopCounterMode

from dinofast.nn import onednn_linear as linear_module
from dinofast.nn.onednn_linear import Linear, linear, select_library
from dinofast.nn.vit import vit_nano

CPU = torch.device("cpu")


@pytest.fixture
def nothing_is_too_little(monkeypatch):
    monkeypatch.setattr(linear_module, "WORTHWHILE", 0)


def tensors(rows, inputs, outputs, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), *([(outputs,)] if bias else []))
    made = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return made, torch.randn(rows, outputs, generator=generator).to(dtype)


def results(library, rows, inputs, outputs, bias=True, dtype=torch.float32):
    """Output and all gradients."""
    leaves, upstream = tensors(rows, inputs, outputs, bias, dtype)
    out = linear(*leaves, *([] if bias else [None]), library)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    "rows, inputs, outputs", [(500, 64, 192), (1, 7, 5), (37, 1, 9), (20, 33, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_is_as_exact_as_blas(nothing_is_too_little, rows, inputs, outputs, bias):
    exact = results("blas", rows, inputs, outputs, bias, torch.float64)
    blas, onednn = (results(library, rows, inputs, outputs, bias) for library in ("blas", "onednn"))
    for found, usual, right in zip(onednn, blas, exact, strict=True):
        assert found.is_contiguous()
        assert_no_worse(found, usual, right, factor=4)  # its order of summing is another


def test_rows_and_gradients_that_are_not_contiguous(nothing_is_too_little):
    (x, w, b), upstream = tensors(12, 8, 6, dtype=torch.float32)
    found = []
    for library in ("blas", "onednn"):
        wide = torch.stack((x, x), dim=1).detach().requires_grad_()  # (12, 2, 8)
        y = linear(wide[:, 1], w[1:5], b[1:5], library)  # as `forward_cls` takes queries
        y.backward(upstream.t().contiguous().t()[:, :4])
        found.append([y.detach(), wide.grad, w.grad, b.grad])
        w.grad = b.grad = None
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_only_wanted_gradients(nothing_is_too_little):
    (x, w, b), upstream = tensors(9, 4, 3, dtype=torch.float32)
    for frozen in ((x,), (w,), (b,), (x, w), (w, b), (x, b)):
        for leaf in (x, w, b):
            leaf.requires_grad_(not any(leaf is f for f in frozen)).grad = None
        linear(x, w, b, "onednn").backward(upstream)
        assert [leaf.grad is None for leaf in (x, w, b)] == [
            any(leaf is f for f in frozen) for leaf in (x, w, b)
        ]


def test_operator_is_well_behaved(nothing_is_too_little):
    leaves, _ = tensors(5, 4, 3, dtype=torch.float32)
    torch.library.opcheck(torch.ops.dinofast.linear.default, tuple(leaves))
    torch.library.opcheck(torch.ops.dinofast.linear.default, (*leaves[:2], None))
    compiled = torch.compile(lambda *t: linear(*t, "onednn"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), linear(*leaves, "blas"))


def test_what_onednn_is_not_for_goes_to_blas(monkeypatch):
    asked = []
    monkeypatch.setattr(linear_module.F, "linear", lambda *args: asked.append(args))
    (x, w, b), _ = tensors(8, 4, 3, dtype=torch.float32)
    linear(x, w, b, "onednn")  # too little
    monkeypatch.setattr(linear_module, "WORTHWHILE", x.shape[0] * w.numel())
    assert linear(x, w, b, "onednn").shape == (8, 3)
    assert len(asked) == 1
    linear(x, w, b, "blas")
    linear(x.double(), w.double(), b.double(), "onednn")
    linear(x.to("meta"), w.to("meta"), b.to("meta"), "onednn")
    with torch.autocast("cpu", torch.bfloat16):
        linear(x, w, b, "onednn")
    assert len(asked) == 5


def test_what_is_too_little():
    """The queries, keys and values of ViT-S/16 with 8 images are enough for oneDNN, those of ViT-Ti
    with one are not."""
    assert 5520 * 384 * 1152 > 5520 * 384 * 384 > linear_module.WORTHWHILE > 690 * 192 * 576


@pytest.mark.parametrize(
    "name", ["jvp", "func.grad", "double backward", "trace", "mode", "1-D", "3-D", "in place"]
)
def test_whoever_asks_for_more_than_gradients_gets_it(nothing_is_too_little, name):
    """As from `F.linear`, whose operator knows all of that."""
    (x, w, b), upstream = tensors(6, 4, 3, dtype=torch.float32)
    found = []
    for library in ("blas", "onednn"):

        def call(x, library=library):
            return linear(x, w, b, library)

        if name == "jvp":
            found.append(torch.func.jvp(call, (x.detach(),), (torch.ones_like(x),))[1])
        elif name == "func.grad":
            found.append(torch.func.grad(lambda x, call=call: call(x).square().sum())(x))
        elif name == "double backward":
            (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), w)[0])
        elif name == "trace":
            frozen = (x.detach(), w.detach(), b.detach())
            trace = torch.jit.trace(
                lambda *t, library=library: linear(*t, library), frozen, check_trace=False
            )
            assert "dinofast::" not in str(trace.graph)
            found.append(trace(2 * frozen[0], *frozen[1:]))
        elif name == "mode":
            with FlopCounterMode(display=False) as counter:
                call(x)
            found.append(torch.tensor(counter.get_total_flops()))
        elif name == "in place":
            y = call(x)
            found.append(torch.autograd.grad(y.mul_(2).square().sum(), x)[0])
        else:
            found.append(call(x[0] if name == "1-D" else x.view(2, 3, 4)))
    torch.testing.assert_close(*found)
    assert found[0].abs().sum() > 0


def test_a_vit_gives_all_its_linear_layers_to_the_library(nothing_is_too_little, monkeypatch):
    torch.manual_seed(0)
    vit = vit_nano().train()
    images = torch.randn(4, 3, 32, 32)
    usual = vit(images)
    vit.set_execution("sdpa", library="onednn")
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # is not called any more
    torch.testing.assert_close(vit(images), usual, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(m, Linear) for m in vit.modules()) == 4 * len(vit.blocks)


@pytest.mark.parametrize(
    "cpu, vectors, chosen",
    [
        ("AuthenticAMD", "AVX512", "onednn"),
        ("AuthenticAMD", "AVX2", "blas"),
        ("GenuineIntel", "AVX512", "blas"),
        ("", "AVX512", "blas"),
    ],
)
def test_choice(monkeypatch, cpu, vectors, chosen):
    monkeypatch.setattr(linear_module, "_cpuinfo", lambda: cpu)
    monkeypatch.setattr(linear_module.platform, "processor", lambda: "")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    linear_module._mkl_is_slow.cache_clear()
    try:
        assert select_library(None, CPU, torch.float32) == chosen
        assert (
            select_library(None, CPU, torch.bfloat16)
            == select_library(None, torch.device("cuda"), torch.float32)
            == "blas"
        )
        assert select_library("onednn", CPU, torch.float32) == "onednn"
        assert select_library("blas", CPU, torch.float32) == "blas"
        with torch.backends.mkldnn.flags(enabled=False):
            assert select_library(None, CPU, torch.float32) == "blas"
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        linear_module._mkl_is_slow.cache_clear()
        assert select_library(None, CPU, torch.float32) == "blas"  # its BLAS is not MKL
    finally:
        linear_module._mkl_is_slow.cache_clear()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo here: not Linux")
def test_linux_tells_whose_the_cpu_is():
    text = Path("/proc/cpuinfo").read_text()
    assert ("AuthenticAMD" in linear_module._cpuinfo()) == (
        "AuthenticAMD" in text
    ) and linear_module._cpuinfo() in text


def test_what_cannot_be_is_said(monkeypatch):
    with pytest.raises(
        ValueError,
        match="`linear` onednn was asked for, but it is for fp32 on a CPU, not bfloat16 on cpu",
    ):
        select_library("onednn", CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="not float32 on cuda"):
        select_library("onednn", torch.device("cuda"), torch.float32)
    with pytest.raises(ValueError, match="`linear` is 'mkl': choose from blas, onednn"):
        select_library("mkl", CPU, torch.float32)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this torch is without it"):
        select_library("onednn", CPU, torch.float32)
