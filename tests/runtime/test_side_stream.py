"""Crops beside the step, and the data wait: on a simulated device anywhere, and on a GPU the real
thing."""

from __future__ import annotations

import time
from contextlib import closing, contextmanager, nullcontext

import pytest
import torch

from dinofast.config import Config
from dinofast.data import backend_dali, backend_native, make_loader
from dinofast.runtime.side_stream import UNREAD, SideStream


# ---- a device that keeps its own time
class Device:
    """Stands in for torch.cuda: a stream is the moment at which what is enqueued on it ends, an
    event one such moment."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.n_events, self.n_read = 0.0, 0, 0  # seconds on the host's clock
        device = self

        class Stream:
            def __init__(self, _=None) -> None:
                self.end = 0.0

            def busy(self, seconds) -> float:
                """Enqueues a kernel; when it begins."""
                begin = max(self.end, device.now)
                self.end = begin + seconds
                return begin

            def wait_stream(self, other) -> None:
                self.end = max(self.end, other.end)

        class Event:
            def __init__(self, enable_timing=False) -> None:
                assert enable_timing
                device.n_events += 1

            def record(self, stream) -> None:
                self.at = max(stream.end, device.now)

            def query(self) -> bool:
                return self.at <= device.now

            def elapsed_time(self, end) -> float:
                assert self.query() and end.query(), "read before the device has come to it"
                device.n_read += 1
                return (end.at - self.at) * 1e3

        self.current = self.training = Stream()
        ours = {
            "Stream": Stream,
            "Event": Event,
            "stream": self.on,
            "current_stream": lambda _: self.current,
        }
        for name, value in ours.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, *streams) -> None:
        self.now = max(self.now, *(stream.end for stream in streams))


class Made:
    """A tensor of a simulated device."""

    def __init__(self, stream) -> None:
        self.there, self.used_on = stream.end, []

    def record_stream(self, stream) -> None:
        self.used_on.append(stream)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def work(device, host_s=0.0, copy_s=0.0):
    """What a loader does for a batch: the host is held up, then the device copies."""

    def make():
        device.now += host_s
        device.current.busy(copy_s)
        return [Made(device.current)]

    return make


def test_copies_run_beside_the_step_and_are_there_before_they_are_used(device):
    side = SideStream(torch.device("cuda"))
    device.training.busy(10)
    (crops,) = side.run(work(device, copy_s=1))
    # nobody waited, and the step has nine seconds to go
    assert device.now == 0 and crops.there == 1
    assert (
        device.training.busy(10) == 10
        and crops.used_on == [device.training]
        and device.current is device.training
    )
    (crops,) = side.run(work(device, copy_s=30))
    assert device.training.busy(10) == crops.there == 31  # what comes late is waited for


@pytest.mark.parametrize(
    "host_s, copy_s, step_s, wait_s",
    [
        # ahead
        (0.0, 0.5, 2.0, 0.0),
        # the host is held up, and the device is still at the step
        (1.5, 0.4, 2.0, 0.0),
        # the copy is slower than the step: what is left of it counts
        (0.0, 3.0, 2.0, 1.0),
        # the crops are made more slowly: the device stands idle, and then copies
        (3.0, 0.5, 2.0, 1.5),
    ],
)
def test_the_wait_is_what_the_device_had_nothing_to_do_for(device, host_s, copy_s, step_s, wait_s):
    side = SideStream(torch.device("cuda"))
    side.run(work(device))
    for _ in range(10):
        device.training.busy(step_s)
        side.run(work(device, host_s, copy_s))
        device.synchronize(device.training)
    assert side.wait_s() == pytest.approx(10 * wait_s)


def test_nothing_is_read_before_it_is_asked_for_nor_before_the_device_has_come_to_it(device):
    side = SideStream(torch.device("cuda"))
    for _ in range(UNREAD):
        side.run(work(device, copy_s=1))
    # the device has yet to do all of it
    assert device.n_read == 0 and side.wait_s() == 0 and device.now == 0
    device.now = 10.5
    assert side.wait_s() == 10 == device.n_read
    device.synchronize(device.training)
    assert side.wait_s() == side.wait_s() == UNREAD == device.n_read


def test_events_are_used_again_and_stay_few_if_nobody_asks(device):
    side = SideStream(torch.device("cuda"))
    for _ in range(10 * UNREAD):
        side.run(work(device, copy_s=1))
        device.synchronize(device.training)
    assert device.n_events == 2 * UNREAD and side.wait_s() == 10 * UNREAD


def test_a_batch_that_fails_leaves_the_current_stream_as_it_was(device):
    side = SideStream(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        side.run(lambda: 1 / 0)
    assert device.current is device.training and side.wait_s() == 0
    side.run(work(device, copy_s=2))
    device.synchronize(device.training)
    assert side.wait_s() == 2


# ---- a GPU
N_FIRST = 8  # batches until all memory is there
LONG = 2 * 10**9  # cycles: about a second


@pytest.fixture(params=["pil", "native", "dali"])
def config(request, gpu, photographs, tmp_path):
    reasons = {
        "native": backend_native.unavailable_reason(),
        "dali": backend_dali.unavailable_reason("cuda"),
    }
    if reason := reasons.get(request.param):
        pytest.skip(reason)
    options = dict(
        data_path=str(photographs),
        output_dir=str(tmp_path / "run"),
        data_backend=request.param,
        precision="fp32",
        batch_size_per_gpu=8,
        num_workers=2,
        global_crops_size=64,
        local_crops_size=32,
        local_crops_number=2,
        patch_size=8,
    )
    return Config(**options)


def begun(cfg):
    """A loader that has come to its stride, on a device with nothing to do."""
    loader = make_loader(cfg, device="cuda")
    for _ in range(N_FIRST):
        next(loader)
        torch.cuda.synchronize()
    return loader


def taken(cfg, steps, device, busy=nullcontext):
    """Copies of the crops of so many batches, made by the current stream after whatever `busy` has
    given it to do."""
    loader, batches = make_loader(cfg, device=device), []
    for _ in range(steps):
        with busy(loader):
            crops = next(loader)
        batches.append([c.clone() for c in crops])
    loader.close()
    return batches


@contextmanager
def busy_step(loader):
    """The step takes so long that all that comes later is sent while the crops have not been
    read."""
    yield
    torch.cuda._sleep(LONG // 8)


@contextmanager
def busy_copies(loader):
    """The crops come so late that who does not wait reads something else."""
    with torch.cuda.stream(loader._side._stream):
        torch.cuda._sleep(LONG // 8)
    yield


@pytest.mark.parametrize("busy", [busy_step, busy_copies])
def test_crops_are_whole_however_late_either_stream_is(config, busy):
    batches = taken(config, 8, "cuda", busy), taken(config, 8, "cuda"), taken(config, 8, "cpu")
    for got, want, near in zip(*batches, strict=True):
        for a, b, c in zip(got, want, near, strict=True):
            assert a.is_cuda and torch.equal(a, b)
            # a GPU divides otherwise
            assert (a.cpu() - c).abs().mean() < (0.05 if config.data_backend == "dali" else 1e-6)


def test_copies_end_before_the_step_that_was_sent_before_them(config):
    """By order alone: the side stream is done, and the current one is still at its kernel."""
    ended = torch.cuda.Event()

    def overlaps(loader):
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        ended.record()
        next(loader)
        returned_first = not ended.query()
        loader._side._stream.synchronize()
        return returned_first and not ended.query()

    with closing(begun(config)) as loader:
        # memory that is still asked for now and then waits
        assert any(overlaps(loader) for _ in range(3))


def test_no_batch_waits_for_the_device(config):
    with closing(begun(config)) as loader:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                next(loader)
                assert loader.wait_s > 0  # of the first batch; asking does not wait either
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("delay, least, most", [(0.0, 0.0, 0.3), (3.0, 1.7, 2.5)])
def test_the_wait_by_the_device_s_clock(config, delay, least, most):
    """In steps: none when data is ahead, two for a batch that takes three."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with closing(begun(config)) as loader:
        begin.record(), torch.cuda._sleep(LONG // 8), end.record(), torch.cuda.synchronize()
        step_s, make, before = begin.elapsed_time(end) / 1e3, loader._next, loader.wait_s
        loader._next = lambda: time.sleep(delay * step_s) or make()
        for _ in range(6):
            torch.cuda._sleep(LONG // 8)
            next(loader)
        torch.cuda.synchronize()
        assert least <= (loader.wait_s - before) / step_s / 6 <= most


def test_a_step_is_captured_while_crops_are_being_made(config):
    """The loader's threads ask for pinned memory then: the capture must be of its own thread
    alone."""
    graph = torch.cuda.CUDAGraph()
    with closing(make_loader(config, device="cuda")) as loader:
        still = [c.clone() for c in next(loader)]  # where the graph reads
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            doubled = [2 * c for c in still]
        for _ in range(6):
            crops = next(loader)
            for place, c in zip(still, crops, strict=True):
                place.copy_(c)
            graph.replay()
            assert all(torch.equal(d, 2 * c) for d, c in zip(doubled, crops, strict=True))
