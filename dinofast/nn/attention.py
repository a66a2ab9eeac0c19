"""Multi-head self-attention over sequences of several lengths that are packed one after the other.

Axes: T tokens of all sequences, S sequences, H heads, d width of a head. A run is (sequences,
tokens of each): the crops of one resolution. Queries are all T tokens, or the S first tokens of the
sequences (CLS) alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..runtime.backends import Selection, select
from ..runtime.tensor_cache import cached_tensors
from ..runtime.words import first_line
from .packing import Layout, Runs

ATTENTIONS = ("xformers", "varlen", "fa3", "cudnn", "sdpa", "eager")
# torch takes cuDNN's kernel on an H200. Forward and backward of a block's attention on the
# crops of 128 images, H200, 2026-11-27: sdpa 0.90 ms, varlen 1.30, eager 2.97 (probe-cuda.json).
DEFAULT = "sdpa"
# where each package has it
_FMHA = {"xformers": "xformers.ops.fmha", "mslk": "mslk.attention.fmha"}


def select_attention(
    requested: str | None, device: torch.device, dtype: torch.dtype, width: int
) -> Selection:
    """Which implementation serves heads of this width in `dtype` on this device.

    Raises ValueError if the one that was asked for cannot run here.
    """
    reasons = {
        name: unavailable_reason(name, device, dtype, width) if name == requested else None
        for name in ATTENTIONS
    }
    return select(
        "attention",
        requested,
        reasons,
        (DEFAULT,),
        way_out=f": leave `attention` out, or give {DEFAULT}",
    )


def unavailable_reason(
    name: str, device: torch.device, dtype: torch.dtype, width: int
) -> str | None:
    """Why heads of this width in `dtype` cannot have this one of `ATTENTIONS` on this device."""
    if name in ("sdpa", "eager"):
        return None
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return (
            f"it needs bf16 or fp16 on a GPU, not {str(dtype).removeprefix('torch.')} on "
            f"{device.type}"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"{torch.cuda.get_device_name(device)} is older than the A100, for which its "
            "kernels are made"
        )
    if width % 8 or width > 256:
        return f"its kernels take heads of up to 256 in steps of 8, not {width}"
    if name == "xformers":
        return xformers_unavailable_reason() or xformers_kernel_unavailable_reason(
            device, dtype, width
        )
    if name == "fa3":
        return fa3_unavailable_reason(device)
    return cudnn_unavailable_reason() if name == "cudnn" else None


@cache
def fmha() -> ModuleType:
    """xformers' module of `memory_efficient_attention`, or that of its successor mslk, which has it
    under the same names.

    Raises ImportError, with what is wrong with either, if neither can be used.
    """
    wrong = []
    for package, module in _FMHA.items():
        if importlib.util.find_spec(package):
            try:
                # again after a failure, unlike its submodules
                importlib.import_module(module.rpartition(".")[0])
                return importlib.import_module(module)
            except Exception as error:  # one that was built for another torch raises all kinds
                wrong.append(f"{package} does not import ({first_line(error)})")
    raise ImportError(", and ".join(wrong) or "neither xformers nor mslk is installed")


def xformers_unavailable_reason() -> str | None:
    """Why neither xformers nor mslk can be used, whatever the device."""
    try:
        fmha()
    except ImportError as error:
        return str(error)
    return None


@cache
def xformers_kernel_unavailable_reason(
    device: torch.device, dtype: torch.dtype, width: int
) -> str | None:
    """Why the xformers that imports has no kernel here, found by a call: a wheel for another CUDA
    warns and goes without its kernels."""
    x = torch.zeros(8, 1, width, device=device, dtype=dtype)
    try:
        torch.ops.dinofast.packed_attention(x, x, x, [1, 8], False)
    except NotImplementedError as error:  # a reason for each of its kernels, the last line one
        last = str(error).strip().splitlines()[-1].strip()
        return f"{fmha().__name__.split('.')[0]} has no kernel here ({last})"
    return None


def fa3_unavailable_reason(device: torch.device) -> str | None:
    """Why FlashAttention-3 cannot be used through torch."""
    if "FA3" not in getattr(torch.nn.attention, "list_flash_attention_impls", list)():
        return f"torch {torch.__version__} cannot take FlashAttention-3"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return (
            f"{torch.cuda.get_device_name(device)} is no H100 or H200, for which its kernels "
            "are made"
        )
    if not importlib.util.find_spec("flash_attn_interface"):
        return (
            "flash_attn_interface is not installed (it is built from the source of flash-attention)"
        )
    return None


def cudnn_unavailable_reason() -> str | None:
    return None if torch.backends.cudnn.is_available() else "this torch is without cuDNN"


def activate(impl: str) -> None:
    """To be called before steps with `impl`: torch has one flash attention at a time, in all of the
    process.

    What fa3 puts there is taken away again for all others; what somebody else has put there stays.
    """
    current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if impl == "fa3" and current != "FA3":
        torch.nn.attention.activate_flash_attention_impl("FA3")
    elif impl != "fa3" and current == "FA3":
        torch.nn.attention.restore_flash_attention_impl()


def attention(q: Tensor, k: Tensor, v: Tensor, where: Layout, impl: str = "sdpa") -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` within each sequence: q (T, H, d) or (S, H, d), k and v (T, H,
    d), result as q.

    xformers: `memory_efficient_attention` with a block-diagonal mask. varlen: torch's `varlen_attn`
    with FlashAttention-2; fa3: with FlashAttention-3 (see `activate`). cudnn: cuDNN's, run by run;
    these four take bf16 and fp16 on a GPU. sdpa: torch's `scaled_dot_product_attention`, run by
    run. eager: the formula, run by run. The last two take any float dtype and device.
    """
    assert q.shape[0] in (k.shape[0], len(where.cls)), (
        "queries are all tokens, or one for each sequence"
    )
    cls_only = q.shape[0] != k.shape[0]
    if impl == "xformers":
        return torch.ops.dinofast.packed_attention(
            q, k, v, [x for run in where.runs for x in run], cls_only
        )[0]
    if impl in ("varlen", "fa3"):
        from torch.nn.attention.varlen import varlen_attn

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torch 2.15 would take cuDNN's on an H100
            return varlen_attn(
                q,
                k,
                v,
                where.cls_cu_seqlens if cls_only else where.cu_seqlens,  # type: ignore[return-value]
                where.cu_seqlens,
                1 if cls_only else where.max_seqlen,
                where.max_seqlen,
            )
    by_run: dict[str, Callable[..., Tensor]] = {
        "sdpa": F.scaled_dot_product_attention,
        "cudnn": _cudnn,
        "eager": _eager,
    }
    one = by_run[impl]
    q_runs = tuple((n, 1) for n, _ in where.runs) if cls_only else where.runs
    parts = [
        one(*qkv)
        for qkv in zip(
            _by_run(q, q_runs), _by_run(k, where.runs), _by_run(v, where.runs), strict=True
        )
    ]
    parts = [part.transpose(1, 2).flatten(0, 1) for part in parts]  # (n N, H, d)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """The softmax itself, (..., N, N): what attention maps are made of. q, k (..., N, d)."""
    return torch.softmax((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5, dim=-1)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_weights(q, k) @ v


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[-2] == 1:  # next to no work, and it has no kernel for a lone key
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _by_run(x: Tensor, runs: Runs) -> list[Tensor]:
    """(T, H, d) -> a view (n, H, N, d) for each run."""
    parts = x.split([n * tokens for n, tokens in runs])
    return [part.unflatten(0, run).transpose(1, 2) for part, run in zip(parts, runs, strict=True)]


# ---- xformers as one opaque operator: its mask objects would break a compiled graph
@cached_tensors
def _block_diagonal(runs: tuple[int, ...], cls_only: bool, device: torch.device):
    lengths = [tokens for n, tokens in zip(runs[::2], runs[1::2], strict=True) for _ in range(n)]
    return fmha().attn_bias.BlockDiagonalMask.from_seqlens(
        [1] * len(lengths) if cls_only else lengths, lengths, device=device
    )


@torch.library.custom_op("dinofast::packed_attention", mutates_args=())
def _packed_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[int], cls_only: bool
) -> tuple[Tensor, Tensor]:
    out, lse = fmha().memory_efficient_attention_forward_requires_grad(
        q[None], k[None], v[None], _block_diagonal(tuple(runs), cls_only, q.device)
    )
    return out[0].contiguous(), lse  # (Tq, H, d), (1, H, Tq)


@_packed_attention.register_fake
def _(q, k, v, runs, cls_only):
    return q.new_empty(q.shape), q.new_empty((1, q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("dinofast::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Sequence[int],
    cls_only: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = fmha().memory_efficient_attention_backward(
        grad[None].contiguous(),
        out[None],
        lse,
        q[None],
        k[None],
        v[None],
        _block_diagonal(tuple(runs), cls_only, q.device),
    )
    return tuple(g[0].contiguous() for g in grads)


@_packed_attention_backward.register_fake
def _(grad, out, lse, q, k, v, runs, cls_only):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output):
    q, k, v, ctx.runs, ctx.cls_only = inputs
    ctx.save_for_backward(*output, q, k, v)


def _backward(ctx, grad, _):
    return (
        *torch.ops.dinofast.packed_attention_backward(
            grad, *ctx.saved_tensors, ctx.runs, ctx.cls_only
        ),
        None,
        None,
    )


_packed_attention.register_autograd(_backward, setup_context=_keep)
