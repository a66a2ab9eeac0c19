"""What is installed, which path each part takes, and why not a faster one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from .. import __version__, ops
from ..data import select_backend
from ..nn.attention import (
    ATTENTIONS,
    DEFAULT,
    fmha,
    unavailable_reason,
    xformers_unavailable_reason,
)
from ..nn.onednn_linear import select_library
from ..runtime.backends import CPU_TORCH, cores
from ..runtime.terminal import say
from ..runtime.words import counted

_PACKAGES = (
    "numpy",
    "pillow",
    "triton",
    "xformers",
    "mslk",
    "flash_attn_3",
    "nvidia-dali-cuda130",
    "torchvision",
    "timm",
    "safetensors",
    "pillow-heif",
)


@dataclass(frozen=True)
class Options:
    """None."""


def run(options: Options) -> None:
    say(report())


def report() -> str:
    """Plain text, one fact a line."""
    lines = [
        f"dinofast {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.platform()}",
        "packages: " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        f"CPU: {counted(cores(), 'core')} for this process, torch uses "
        f"{counted(torch.get_num_threads(), 'thread')}, "
        f"vector instructions {torch.backends.cpu.get_cpu_capability()}",
        f"GPU: {_gpus()}",
        "",
    ]
    for device in ("cpu", "cuda"):
        lines.append(
            f"on {device}:"
            if device == "cpu" or torch.cuda.is_available()
            else "on cuda (none here):"
        )
        lines += [f"  {name:22} {paths[device]}" for name, paths in ops.paths().items()]
        torch_s = {
            "attention": _attention(device),
            "linear layers": _linear(device),
            "SGD, LARS": "torch, tensor by tensor",
        }
        lines += [f"  {name:22} {what}" for name, what in torch_s.items()]
        crops, why = select_backend(None, device)
        lines.append(
            f"  {'crops':22} {crops}{f' ({why})' if why else ''}; "
            f"{'nvJPEG' if crops == 'dali' else 'PIL'} decodes"
        )
    unset = "not set; name paths there (for example cpp) to make their absence an error"
    lines += ["", f"DINOFAST_REQUIRE: {os.environ.get('DINOFAST_REQUIRE') or unset}"]
    return "\n".join(lines)


def _attention(device: str) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return f"{DEFAULT}, torch's, per crop size"
    how = torch.device(device), torch.bfloat16, 64
    reasons = {name: unavailable_reason(name, *how) for name in ATTENTIONS}
    operators = "" if reasons["xformers"] else _xformers_operators()
    return f"{DEFAULT}, torch's, per crop size{_others(reasons)}{operators}"


def _others(reasons: dict[str, str | None]) -> str:
    """What else can run, and what cannot, each reason once."""
    names: dict[str | None, list[str]] = {}
    for name, reason in reasons.items():
        if name != DEFAULT:
            names.setdefault(reason, []).append(name)
    can = f"; others: {', '.join(names.pop(None, []))}"
    return can + "".join(f"; not {', '.join(those)}: {reason}" for reason, those in names.items())


def _xformers_operators() -> str:
    """Which of its flash operators there are, and what its warnings mean."""
    if xformers_unavailable_reason():
        return ""
    operators = [
        module.FwOp for module in (fmha().flash3, fmha().flash) if module.FwOp.is_available()
    ]
    names = ", ".join(
        f"{op.NAME}{' (torch has it)' if op.NAME.endswith('-pt') else ''}" for op in operators
    )
    return (
        f"; xformers' flash operators: {names or 'none'}; what it warns of at import: its C++ "
        "library is needed here, Triton is not"
    )


def _linear(device: str) -> str:
    onednn = select_library(None, torch.device(device), torch.float32) == "onednn"
    return (
        "the ViTs' large ones in fp32 by oneDNN, others by torch's BLAS"
        if onednn
        else "torch's BLAS"
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = "without CUDA"
        if torch.version.cuda:
            built = f"for CUDA {torch.version.cuda}; if there is none, the CPU build is smaller: "
            built += CPU_TORCH
        return f"none that torch sees (torch is built {built})"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
