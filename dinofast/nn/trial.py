"""A backbone of somebody else's, tried on two images of each size of crops before anything long
begins."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import Config
from ..runtime.words import a_kind, one_line
from .features import pooled

_TRAINABLE = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.complex64, torch.complex128),
)


class Crops(NamedTuple):
    """One size of crops: the option that sets it, pixels of a side, how many a trial takes, and
    their channels."""

    option: str
    side: int
    number: int
    channels: int = 3


def crops_of(cfg: Config) -> list[Crops]:
    """What a run gives to a backbone, two images of each size where a batch has as many."""
    channels = cfg.in_channels
    sizes = [Crops("global_crops_size", cfg.global_crops_size, 2, channels)]
    if cfg.local_crops_number:
        n_local = cfg.batch_size_per_gpu * cfg.local_crops_number
        number = min(2, n_local)
        sizes.append(Crops("local_crops_size", cfg.local_crops_size, number, channels))
    return sizes


@dataclass(frozen=True)
class Trial:
    """width: D of the features. unused: names of trainable parameters that no gradient reached.
    draws: whether its forward draws random numbers, so that the next may use others."""

    width: int
    unused: tuple[str, ...]
    draws: bool


def try_out(backbone: nn.Module, what: str, sizes: Sequence[Crops]) -> Trial:
    """Forward and backward in training mode, once for each size. Buffers, gradients and the state
    of random numbers are afterwards as they were.

    what: how messages call it. Raises `ValueError` for a size that does not fit, features that are
    not finite or differ in width between sizes, parameters that cannot be trained.
    """
    parameters = dict(backbone.named_parameters())
    _check_parameters(parameters, what)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    device = next((p.device for p in parameters.values()), torch.device("cpu"))
    widths: list[int] = []
    with _traceless(backbone, device), torch.enable_grad():
        backbone.train()
        saved = _shapes(backbone)
        before = _random_state()
        for crops in sizes:
            x = _forward(backbone, what, crops, sizes, device, widths)
            if trained and not x.requires_grad:
                raise ValueError(
                    f"{what}: no gradient reaches its parameters; its forward must neither run "
                    "under torch.no_grad nor detach. Freeze parameters with requires_grad_(False)."
                )
            if trained:
                _backward(x, what)
                _check_gradients(trained, what)
            widths.append(x.shape[1])
        made = [name for name, _ in backbone.named_parameters() if name not in parameters]
        if made:
            raise ValueError(
                f"{what}: its forward makes parameters ({_some(made)}), which nothing would train: "
                "make them in __init__, or use torch's lazy modules."
            )
        _check_kept(saved, backbone, what)
        draws = before != _random_state()
        unused = tuple(name for name, p in trained.items() if p.grad is None)
    return Trial(widths[0], unused, draws)


def _forward(
    backbone: nn.Module,
    what: str,
    crops: Crops,
    sizes: Sequence[Crops],
    device: torch.device,
    widths: Sequence[int],
) -> Tensor:
    """Features (n, D) of crops that are noise, the same each time. widths: of sizes before."""
    _, side, n, channels = crops
    generator = torch.Generator().manual_seed(0)
    # from -2 to 2 as normalized ones: one without negative numbers a ReLU would leave as it is
    images = (4 * torch.rand(n, channels, side, side, generator=generator) - 2).to(device)
    given = images.clone()
    try:
        output = backbone(images)
    except Exception as error:  # whatever a module of somebody else's may raise
        raise ValueError(_why(error, what, crops, sizes)) from error
    if not torch.equal(images, given):
        raise ValueError(
            f"{what} changes the images it is given, which student and teacher share: let its "
            "forward work on a copy (no x.sub_, no nn.ReLU(inplace=True) as its first layer)."
        )
    x = pooled(output, backbone, what)
    if x.shape[0] != n:
        raise ValueError(
            f"{what} returns {x.shape[0]} rows for {n} images of {side} x {side}: expected one row "
            "an image."
        )
    if not x.shape[1]:
        raise ValueError(f"{what} returns features of width 0: expected (B, D), D at least 1.")
    if widths and x.shape[1] != widths[0]:
        raise ValueError(
            f"{what} returns {widths[0]} features for global crops and {x.shape[1]} for crops of "
            f"{side} x {side}: expected (B, D) with one D for all sizes, or maps (B, C, h, w) with "
            "channels second."
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{what} returns features that are not finite for {side} x {side} pixels.")
    return x


# what errors say that have nothing to do with how large a crop is
_OTHER_KINDS = (TypeError, AttributeError, NameError, KeyError, NotImplementedError, ImportError)
_OTHER_WORDS = re.compile(
    r"channels, but got|Input type|scalar type|same dtype|same device|CUDA enabled"
)


def _why(error: Exception, what: str, crops: Crops, sizes: Sequence[Crops]) -> str:
    """Why a forward pass raised, and the way out."""
    side, said = crops.side, one_line(error)
    if isinstance(error, _OTHER_KINDS) or _OTHER_WORDS.search(said):
        return (
            f"{what}: its forward fails on images, float32 of shape "
            f"{(crops.number, crops.channels, side, side)} ({said}): it must take these and "
            "nothing else."
        )
    way_out = (
        f"set `local_crops_size` to {sizes[0].side} or another that fits, or `local_crops_number` 0"
        if crops is not sizes[0]
        else f"set `{crops.option}` to one that fits"
    )
    return (
        f"{what} does not take crops of {side} x {side} ({said}): {way_out}; or take another "
        "backbone."
    )


def _shapes(backbone: nn.Module) -> dict[str, object]:
    """Of what a checkpoint holds: shapes of tensors, types of what else may not be saved."""
    return {name: _shape(value) for name, value in backbone.state_dict().items()}


def _shape(value: object) -> object:
    if isinstance(value, Tensor):
        return "nested" if value.is_nested else tuple(value.shape)
    plain = value is None or type(value) in (bool, int, float, str, bytes, list, tuple, dict)
    return "a plain value" if plain else a_kind(value)


def _check_kept(before: dict[str, object], backbone: nn.Module, what: str) -> None:
    """Names and shapes are those of a fresh one, or nothing that is saved could be loaded."""
    now = _shapes(backbone)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{what}: its forward changes what it would save: '{name}' is "
                f"{before.get(name, 'absent')} before and {now.get(name, 'absent')} after. Give it "
                "one shape and type from the start, or register it with persistent=False."
            )


def _check_parameters(parameters: dict[str, nn.Parameter], what: str) -> None:
    for name, p in parameters.items():
        if p.is_meta:
            raise ValueError(f"{what}: parameter {name} is on the meta device, without values.")
        kind = p.dtype if p.layout == torch.strided else p.layout
        if p.requires_grad and kind not in _TRAINABLE:
            raise ValueError(
                f"{what}: parameter {name} is {str(kind).removeprefix('torch.')}, which the "
                "optimizers do not train: freeze it with requires_grad_(False)."
            )


def _backward(x: Tensor, what: str) -> None:
    try:
        x.float().square().sum().backward()
    except Exception as error:  # a hook or a function of somebody else's may raise anything
        raise ValueError(f"{what}: its backward pass fails ({one_line(error)}).") from error


def _check_gradients(trained: dict[str, nn.Parameter], what: str) -> None:
    for name, p in trained.items():
        if p.grad is not None and p.grad.layout != torch.strided:
            raise ValueError(
                f"{what}: parameter {name} gets a sparse gradient, which the optimizers do not "
                "take: make it dense, for nn.Embedding by sparse=False."
            )


@contextmanager
def _traceless(backbone: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards buffers, modes, gradients and the state of random numbers are as before."""
    modes = {module: module.training for module in backbone.modules()}
    buffers = [
        (module, name, buffer, None if buffer is None else _clone(buffer))
        for module in backbone.modules()
        for name, buffer in module._buffers.items()
    ]
    python = random.getstate()
    gpu = [device.index or 0] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpu):
            yield
    finally:
        random.setstate(python)
        for module in backbone.modules():
            module.training = modes.get(module, module.training)
            if not isinstance(module, torch.jit.ScriptModule):  # nothing can be added to those
                module._buffers = type(module._buffers)()
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if buffer is not None and value is not None:
                    # as observers of quantization do
                    if not buffer.is_nested and buffer.shape != value.shape:
                        buffer.resize_(value.shape)
                    buffer.copy_(value)
                if not isinstance(module, torch.jit.ScriptModule):
                    module._buffers[name] = buffer
        for p in backbone.parameters():
            p.grad = None


def _clone(buffer: Tensor) -> Tensor | None:
    """None of a kind that torch cannot clone, such as some quantized ones: no forward pass writes
    into those."""
    try:
        return buffer.detach().clone()
    except RuntimeError:
        return None


def _random_state() -> tuple[bytes, object]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
