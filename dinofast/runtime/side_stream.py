"""How crops reach a GPU while it is still at the step before, and how long it has nothing to do for
want of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

# pairs of events that wait to be read; then the finished ones are, so that they stay few if nobody
# asks
UNREAD = 64


class SideStream:
    """A stream for the copies and kernels of the data path, beside the current stream, on which the
    steps run.

    Neither stream holds up the other until the crops are used, and the host waits for neither.
    `device`: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._wait_s = 0.0

    def run(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors that `work` makes on this stream, to be used on the current stream, which
        waits for them.

        `work` must not use what the current stream is still at. The memory of a tensor that is
        dropped is used again once the current stream has gone past all that it had to do then: a
        host that is k batches ahead keeps k of them. Not to be called while a graph is captured;
        where threads make the next crops meanwhile, and ask for pinned memory, a capture needs
        `capture_error_mode="thread_local"`.
        """
        current = torch.cuda.current_stream(self._device)
        if len(self._unread) >= UNREAD:
            self._read()
        free, ready = (
            self._spare.pop()
            if self._spare
            else [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        )
        free.record(current)
        with torch.cuda.stream(self._stream):
            made = work()
        current.wait_stream(self._stream)
        ready.record(current)
        self._unread.append((free, ready))
        for tensor in made:
            tensor.record_stream(current)
        return made

    def wait_s(self) -> float:
        """Seconds for which the current stream has waited in all calls of `run` that the device has
        gone past.

        That is, for each, from the end of what had been enqueued before the call to the moment at
        which the tensors were there, by the device's clock: it stood idle, or the rest of the
        copying went on. However long the host is held up, nothing counts while the device is still
        at earlier work. Asking does not wait for the device: calls that it has yet to go past count
        next time.
        """
        self._read()
        return self._wait_s

    def _read(self) -> None:
        while self._unread and self._unread[0][1].query():
            free, ready = self._unread.popleft()
            self._wait_s += free.elapsed_time(ready) / 1e3
            self._spare.append((free, ready))
