"""Attention over packed sequences: every implementation against the formula in float64, and how one
is chosen."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from accuracy import assert_no_worse
from torch._subclasses.fake_tensor import FakeTensorMode

from dinofast.nn import attention as attention_module
from dinofast.nn.attention import activate, attention, fmha, select_attention
from dinofast.nn.packing import layout

CPU, HEADS = torch.device("cpu"), 3
# Each element of the gradient of a lone token's query is the difference of two terms of this size:
# a product of 64 normal numbers, times a normal number, over the root of 64. Eager finds 0, kernels
# do not.
TERM = 10.0
RUNS = {
    "one": ((3, 8),),
    "one sequence": ((1, 13),),
    "two": ((2, 17), (5, 5)),  # global and local crops, odd lengths
    "lone tokens": ((2, 9), (3, 1)),
    "only lone tokens": ((4, 1),),  # all queries and CLS queries are as many
    "three": ((1, 3), (2, 50), (1, 3)),  # the same length again, but not beside
}


def lengths(runs):
    return [tokens for n, tokens in runs for _ in range(n)]


def mask(q_lengths, kv_lengths):
    """(Tq, T): may this query look at this key?"""
    return torch.block_diag(
        *[torch.ones(q, kv) for q, kv in zip(q_lengths, kv_lengths, strict=True)]
    ).bool()


def dense(q, k, v, where):
    """The formula over all pairs of tokens, those of different sequences masked."""
    kv_lengths = lengths(where.runs)
    allowed = mask([1] * len(kv_lengths) if len(q) != len(k) else kv_lengths, kv_lengths).to(
        q.device
    )
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def run(function, runs, cls_only, dtype, device=CPU, width=16):
    """Values and gradients, with q, k and v taken out of one product as the ViT takes them."""
    generator = torch.Generator().manual_seed(0)
    total, where = sum(lengths(runs)), layout(runs, device)

    def leaf(*shape):
        # the same numbers in every dtype
        drawn = torch.randn(*shape, generator=generator).bfloat16()
        return drawn.to(device, dtype).requires_grad_()

    if cls_only:
        leaves = leaf(len(where.cls), HEADS, width), leaf(total, 2, HEADS, width)
        q, (k, v) = leaves[0], leaves[1].unbind(1)
    else:
        leaves = (leaf(total, 3, HEADS, width),)
        q, k, v = leaves[0].unbind(1)
    assert not k.is_contiguous()
    out = function(q, k, v, where)
    assert out.shape == q.shape and out.dtype == dtype
    upstream = torch.randn(out.shape, generator=generator).bfloat16().to(device, dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def need(name):
    """Skips a GPU test of what is not installed, with the reason; activates what is."""
    try:
        select_attention(name, torch.device("cuda", 0), torch.bfloat16, 64)
    except ValueError as error:
        pytest.skip(str(error))
    activate(name)


def using(name):
    return lambda q, k, v, where: attention(q, k, v, where, name)


@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_float64_is_the_formula(name, runs, cls_only):
    for ours, exact in zip(
        run(using(name), runs, cls_only, torch.float64),
        run(dense, runs, cls_only, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_sdpa_no_worse_than_eager(runs, cls_only, dtype):
    exact = run(dense, runs, cls_only, torch.float64)
    eager = run(using("eager"), runs, cls_only, dtype)
    for tensors in zip(run(using("sdpa"), runs, cls_only, dtype), eager, exact, strict=True):
        assert_no_worse(*tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("runs", [*RUNS.values(), ((4, 197), (12, 37))], ids=[*RUNS, "DINO's"])
@pytest.mark.parametrize("name", ["xformers", "varlen", "fa3", "cudnn", "sdpa"])
def test_gpu_no_worse_than_eager(gpu, name, runs, cls_only, dtype):
    need(name)
    exact = run(dense, runs, cls_only, torch.float64, "cuda", 64)
    eager = run(using("eager"), runs, cls_only, dtype, "cuda", 64)
    for tensors in zip(
        run(using(name), runs, cls_only, dtype, "cuda", 64), eager, exact, strict=True
    ):
        assert_no_worse(*tensors, terms=TERM * tensors[0].numel() ** 0.5)


@pytest.mark.parametrize("name", ["xformers", "varlen", "fa3", "cudnn"])
def test_gpu_compiled_is_the_same(gpu, name):
    need(name)
    for cls_only in (False, True):
        results = [
            run(f, RUNS["two"], cls_only, torch.bfloat16, "cuda", 64)
            for f in (torch.compile(using(name), fullgraph=True), using(name))
        ]
        for compiled, eager in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager)


def test_queries_that_fit_nothing_are_refused():
    q, k, v = torch.randn(9, 3, 1, 4).unbind(1)
    with pytest.raises(AssertionError, match="queries are all tokens, or one for each sequence"):
        attention(q[:3], k, v, layout(((2, 3), (1, 3)), CPU)._replace(cls=torch.arange(2)))


# ---- where the sequences lie
def test_layout():
    where = layout(((2, 3), (1, 2)), CPU)
    assert where.cu_seqlens.tolist() == [0, 3, 6, 8] and where.cls_cu_seqlens.tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert (
        where.cls.tolist() == [0, 3, 6]
        and where.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
        and where.max_seqlen == 3
    )
    assert where.cu_seqlens.dtype == where.cls_cu_seqlens.dtype == torch.int32
    assert where.cls.dtype == where.sequence.dtype == torch.int64
    assert layout(((2, 3), (1, 2)), CPU) is where


def test_layout_is_not_kept_from_a_mode_that_watches():
    with FakeTensorMode():
        fake = layout(((2, 31), (1, 2)), CPU)
    real = layout(((2, 31), (1, 2)), CPU)
    assert type(fake.cls) is not type(real.cls) and real.cls.tolist() == [0, 31, 62]


def test_layout_of_inference_serves_training():
    with torch.inference_mode():
        made = layout(((2, 29), (3, 2)), CPU)
    assert made is layout(((2, 29), (3, 2)), CPU)
    assert not any(x.is_inference() for x in made if isinstance(x, torch.Tensor))


# ---- our operator around xformers, which has no kernel for a CPU: its interface in plain torch
class BlockDiagonalMask:
    def __init__(self, q_lengths, kv_lengths, device):
        self.q_lengths, self.kv_lengths = q_lengths, kv_lengths
        self.starts = torch.tensor([0, *q_lengths], device=device).cumsum(0)

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        return cls(q_seqlen, kv_seqlen or q_seqlen, device)


@pytest.fixture(params=["xformers", "mslk"])
def xformers(request, monkeypatch):
    """A stand-in with the interface of xformers 0.0.35 or mslk 1.1, where it has moved; gives the
    masks it has seen."""

    def scores(q, k, attn_bias):
        assert q.ndim == k.ndim == 4 and len(q) == len(k) == 1 and q.dtype == k.dtype
        seen.append(attn_bias)
        allowed = mask(attn_bias.q_lengths, attn_bias.kv_lengths)
        return (torch.einsum("qhd,khd->hqk", q[0], k[0]) / q.shape[-1] ** 0.5).masked_fill(
            ~allowed, -torch.inf
        )

    def forward(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        s = scores(query, key, attn_bias)
        return torch.einsum("hqk,khd->qhd", s.softmax(-1), value[0])[None], s.logsumexp(-1)[
            None
        ].float()

    def backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        assert grad.shape == output.shape == query.shape and lse.shape == (
            1,
            query.shape[2],
            query.shape[1],
        )
        assert grad.is_contiguous() and lse.dtype == torch.float32
        # (H, Tq, T)
        weights = (scores(query, key, attn_bias) - lse[0].to(query.dtype)[:, :, None]).exp()
        inner = (
            torch.einsum("qhd,khd->hqk", grad[0], value[0])
            - (grad[0] * output[0]).sum(-1).t()[:, :, None]
        )
        d_scores = weights * inner / query.shape[-1] ** 0.5
        dq = torch.einsum("hqk,khd->qhd", d_scores, key[0])
        dk = torch.einsum("hqk,qhd->khd", d_scores, query[0])
        return dq[None], dk[None], torch.einsum("hqk,qhd->khd", weights, grad[0])[None]

    seen = []
    path = {"xformers": "xformers.ops.fmha", "mslk": "mslk.attention.fmha"}[request.param].split(
        "."
    )
    for i in range(1, len(path) + 1):
        module = types.ModuleType(".".join(path[:i]))
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.memory_efficient_attention_forward_requires_grad = forward
    module.memory_efficient_attention_backward = backward
    module.attn_bias = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    if request.param == "mslk":
        there = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "xformers" else there(name)
        )
    attention_module._block_diagonal.forget()
    fmha.cache_clear()
    yield seen
    fmha.cache_clear()


@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_xformers_operator(xformers, runs, cls_only):
    """1e-6: the log-sum-exp travels in float32."""
    for ours, exact in zip(
        run(using("xformers"), runs, cls_only, torch.float64),
        run(dense, runs, cls_only, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    one = cls_only and len(lengths(runs)) != sum(lengths(runs))
    for bias in xformers:
        assert bias.kv_lengths == lengths(runs) and bias.q_lengths == (
            [1] * len(lengths(runs)) if one else lengths(runs)
        )
    assert len(xformers) == 2 and xformers[0] is xformers[1]  # forward and backward, made once


def test_xformers_mask_of_inference_serves_training(xformers):
    runs = ((2, 23), (1, 2))
    with torch.inference_mode():
        attention(*torch.randn(48, 3, 1, 8).unbind(1), layout(runs, CPU), "xformers")
    run(using("xformers"), runs, False, torch.float32)
    assert xformers[0] is xformers[1] and not xformers[0].starts.is_inference()


@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_xformers_operator_keeps_its_promises(xformers, cls_only):
    q, k, v = (x.requires_grad_() for x in torch.randn(12, 3, 2, 8).unbind(1))
    q, where = (q[:3] if cls_only else q), ([2, 5, 1, 2], cls_only)
    torch.library.opcheck(torch.ops.dinofast.packed_attention.default, (q, k, v, *where))
    out, lse = torch.ops.dinofast.packed_attention(q, k, v, *where)
    torch.library.opcheck(
        torch.ops.dinofast.packed_attention_backward.default,
        [
            x.detach() if isinstance(x, torch.Tensor) else x
            for x in (out.cos(), out, lse, q, k, v, *where)
        ],
    )


@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_xformers_compiles_into_one_graph(xformers, cls_only):
    compiled = torch.compile(using("xformers"), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        run(compiled, RUNS["two"], cls_only, torch.float32),
        run(using("xformers"), RUNS["two"], cls_only, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
