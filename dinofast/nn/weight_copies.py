"""16-bit copies of float32 parameters, for autocast: the optimizer writes them, so that a step
casts no linear layer's weight.

Autocast rounds each weight and bias anew in every forward pass, 212 casts in a step of ViT-S
(student and teacher). A copy that is rounded where the parameter is updated holds the same bits.
Only a step reads them (`reading`): whoever else has the networks, or copies of them, computes with
the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, overload

import torch
from torch import Tensor, nn


class _ReadCopy(torch.autograd.Function):
    """(parameter, copy) -> copy; the gradient goes to the parameter, in its dtype."""

    @staticmethod
    def forward(ctx, parameter: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


_is_reading = False


@contextmanager
def reading() -> Iterator[None]:
    """In which forward passes, and what backward computes anew of them, read copies; they must be
    fresh (`Copies.refresh`)."""
    global _is_reading
    before, _is_reading = _is_reading, True
    try:
        yield
    finally:
        _is_reading = before


@overload
def operand(module: nn.Module, name: Literal["weight"]) -> Tensor: ...
@overload
def operand(module: nn.Module, name: Literal["bias"]) -> Tensor | None: ...
def operand(module: nn.Module, name: str) -> Tensor | None:
    """Parameter `name` as a product reads it: while `reading`, its copy if there is one in
    autocast's dtype; else itself."""
    parameter, copy = getattr(module, name), module._buffers.get(f"{name}_copy")
    if not _is_reading or copy is None or not _autocasts_to(copy):
        return parameter
    return (
        _ReadCopy.apply(parameter, copy)
        if parameter.requires_grad and torch.is_grad_enabled()
        else copy
    )


def _autocasts_to(copy: Tensor) -> bool:
    device = copy.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == copy.dtype


class Copies:
    """The copies of all float32 parameters of modules with `reads_copies`, in buffers NAME_copy
    that are not saved.

    of: parameter -> copy.
    """

    def __init__(self, networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self.of: dict[Tensor, Tensor] = {}
        self._dtype = dtype
        self._versions: list[int] = []
        modules = [
            module
            for network in networks
            for module in network.modules()
            if getattr(module, "reads_copies", False)
        ]
        self._places = [
            (module, name)
            for module in modules
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dtype == torch.float32
        ]
        self.refresh()

    def written(self) -> None:
        """To be called when the copies are what the parameters are."""
        self._versions = [parameter._version for parameter in self.of]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round anew if somebody else has written or moved a parameter: a checkpoint that was
        loaded, `.to`, a user's code.

        Not seen, as torch does not count it: what is done through `parameter.data`.
        """
        parameters = [getattr(module, name) for module, name in self._places]
        if [parameter._version for parameter in parameters] == self._versions and all(
            module._buffers[f"{name}_copy"] is self.of.get(parameter)
            for (module, name), parameter in zip(self._places, parameters, strict=True)
        ):
            return
        self.of.clear()
        for (module, name), parameter in zip(self._places, parameters, strict=True):
            copy = module._buffers.get(f"{name}_copy")
            if copy is None or (copy.dtype, copy.device) != (self._dtype, parameter.device):
                copy = torch.empty_like(parameter, dtype=self._dtype, requires_grad=False)
                module.register_buffer(f"{name}_copy", copy, persistent=False)
            self.of[parameter] = copy.copy_(parameter)
        self.written()
