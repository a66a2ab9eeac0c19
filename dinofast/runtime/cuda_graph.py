"""Forward and backward of a step as one CUDA graph: recorded once, then replayed by a single
launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensor_cache import keep_alive

WARM_UP = 3  # steps done eagerly first: they compile, allocate and start libraries


class CUDAGraphStep:
    """`graph(crops, teacher_temp)` does what `whole` does, leaving the gradients of `parameters`
    where they always were.

    The first steps run as they are, on a stream of their own as capturing asks; then one is
    recorded, and from there on each is replayed on inputs copied into the recorded ones. All steps
    must have inputs of the same shapes, and `whole` must not wait for the device. What it returns
    is overwritten by the next call.
    """

    def __init__(
        self, whole: Callable[[list[Tensor], Tensor], Any], parameters: Sequence[Tensor]
    ) -> None:
        self._whole, self._parameters, self._done = whole, parameters, 0
        self._stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, crops: list[Tensor], teacher_temp: Tensor) -> Any:
        if self._graph is None and self._done < WARM_UP:
            self._done += 1
            return self._eagerly(crops, teacher_temp)
        if self._graph is None:
            self._record(crops, teacher_temp)
        assert self._graph is not None
        for kept, new in zip(self._inputs, (*crops, teacher_temp), strict=True):
            kept.copy_(new)
        self._graph.replay()
        for p, grad in zip(self._parameters, self._grads, strict=True):
            p.grad = grad  # the optimizer lets go of them after each step
        return self._stats

    def _eagerly(self, crops: list[Tensor], teacher_temp: Tensor) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            stats = self._whole(crops, teacher_temp)
        torch.cuda.current_stream().wait_stream(self._stream)
        return stats

    def _record(self, crops: list[Tensor], teacher_temp: Tensor) -> None:
        self._inputs = [x.clone() for x in (*crops, teacher_temp)]
        for p in self._parameters:
            p.grad = None  # so that backward makes them in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with (
            keep_alive() as self._held,
            torch.cuda.graph(
                graph,
                stream=self._stream,
                # the loader's threads go on
                capture_error_mode="thread_local",
            ),
        ):
            self._stats = self._whole(self._inputs[:-1], self._inputs[-1])
        self._grads = [p.grad for p in self._parameters]
        self._graph = graph
