"""Tensors that depend on shapes alone, made once and kept, so that a step neither computes nor
sends them to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, Protocol, TypeVar, cast

import torch

KEPT = 512  # results of each function, the last that were asked for
_held: list[list[Any]] = []
R = TypeVar("R", covariant=True)


class Cached(Protocol[R]):
    """A function whose last results are kept; `forget` lets go of them."""

    forget: Callable[[], None]

    def __call__(self, *args: Any) -> R: ...


def cached_tensors(make: Callable[..., R]) -> Cached[R]:
    """`make`, its last results kept by their arguments.

    Made outside inference mode, or training could not use what evaluation has made. While a
    compiler or another mode watches the operations, nothing is kept: tensors that are made then are
    not real outside it.
    """

    def real(*args):
        with torch.inference_mode(False), torch.no_grad():
            return make(*args)

    kept = lru_cache(maxsize=KEPT)(real)

    @wraps(make)
    def call(*args):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return make(*args)
        result = kept(*args)
        for results in _held:
            results.append(result)
        return result

    cached = cast(Cached[R], call)
    cached.forget = kept.cache_clear
    return cached


@contextmanager
def keep_alive() -> Iterator[list[Any]]:
    """All results that are given out meanwhile, in a list: for a CUDA graph, which reads their
    memory as long as it lives."""
    results: list[Any] = []
    _held.append(results)
    try:
        yield results
    finally:
        _held[:] = [others for others in _held if others is not results]
