"""The probe: the clock of kernels, what it measures, the table of kernels."""

from dataclasses import dataclass
from types import SimpleNamespace

import probe
import pytest
import torch
from test_step_options import CPU, CUDA

from dinofast.bench import record, timing
from dinofast.nn.attention import ATTENTIONS


# ---- the clock of kernels
class FakeCuda:
    """A device on which `_sleep` takes its cycles at 1 GHz and a call 2 ms; what `timing` asks of
    torch.cuda."""

    def __init__(self):
        self.now_ms, self.allocated, self.peak = 0.0, 2**20, 2**20

    def Event(self, enable_timing):
        event = SimpleNamespace(at_ms=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at_ms", self.now_ms)
        event.elapsed_time = lambda end: end.at_ms - event.at_ms
        return event

    def call(self):
        self.now_ms += 2.0
        self.peak = self.allocated + 3 * 2**20

    def _sleep(self, cycles):
        self.now_ms += cycles / 1e6

    def synchronize(self, device=None):
        pass

    def reset_peak_memory_stats(self, device):
        self.peak = self.allocated

    def memory_allocated(self, device):
        return self.allocated

    def max_memory_allocated(self, device):
        return self.peak

    def get_device_properties(self, device):
        return SimpleNamespace(
            L2_cache_size=50 * 2**20, name="a GPU", major=9, minor=0, total_memory=80 * 2**30
        )

    def mem_get_info(self, device):
        return 79 * 2**30, 80 * 2**30


def test_the_clock_of_kernels_on_a_gpu(monkeypatch):
    """Device time by events: the head start of the host and the flush of the cache are not in
    it."""
    cuda, flushed = FakeCuda(), []
    monkeypatch.setattr(
        timing,
        "torch",
        SimpleNamespace(
            cuda=cuda, randn=lambda n, device: SimpleNamespace(sum=lambda: flushed.append(n))
        ),
    )
    candidates = [timing.Candidate("good", cuda.call), timing.Candidate("fails", lambda: 1 / 0)]
    measured, failed = timing.measure(candidates, CUDA, 0.0)
    assert (
        measured.elapsed_ms == pytest.approx([2.0] * timing.ROUNDS["cuda"][0])
        and measured.extra_mib == 3.0
    )
    assert len(flushed) == 20 and set(flushed) == {64 * 2**20} and measured.launch_ms >= 0
    assert failed.failed == "ZeroDivisionError: division by zero" and failed.elapsed_ms == []


# ---- the probe
def test_the_probe_has_what_the_design_asks_for():
    case = probe.Case("products")
    assert (
        case.runs() == {224: (256, 197), 96: (1024, 37)}
        and sum(n * each for n, each in case.runs().values()) == 88_320
    )
    assert list(probe.WORK) == [
        "device",
        "ceilings",
        "products",
        "attention of large crops",
        "attention of small crops",
        "attention of the mix",
        probe.EAGER,
        probe.COMPILED,
    ]
    assert len({str(case) for case in probe.cases(CUDA)}) == len(probe.WORK)


@pytest.mark.parametrize("what", list(probe.WORK)[1:7])
def test_the_probe_at_tiny_sizes(what):
    (case,) = (case for case in probe.rehearsal() if case.what == what)
    made = probe.measure_case(case, CPU, 0.001)
    rows = {row["candidate"]: row for row in made["rows"]}
    timed = {name: row for name, row in rows.items() if "failed" not in row}
    assert (
        made["case"] == str(case)
        and all(row["median_ms"] > 0 for row in timed.values())
        and record.text(made)
    )
    if what == "ceilings":
        assert timed["copy of 1 MiB"]["gbps"] == pytest.approx(
            2 * 2**20 / timed["copy of 1 MiB"]["median_ms"] / 1e6
        )
        assert timed["product, 256 squared, bf16"]["tflops"] > 0
    if what == "products":
        assert made["tokens"] == 4 * 17 + 16 * 5 and len(timed) == 12
        row = timed["fc1, of the weight"]
        assert row["tflops"] == pytest.approx(
            2 * made["tokens"] * 48 * 192 / row["median_ms"] / 1e9
        )
    if what.startswith("attention"):
        assert {name.split(",")[0] for name in rows} == set(ATTENTIONS) and {
            "sdpa, forward",
            "eager, backward",
        } <= set(timed)
        assert all(
            row["failed"].startswith("ValueError: `attention`")
            for row in rows.values()
            if "failed" in row
        )
        sequences = {
            "large crops": [(4, 17)],
            "small crops": [(16, 5)],
            "the mix": [(4, 17), (16, 5)],
        }[what[13:]]
        scores = sum(n * tokens**2 for n, tokens in sequences)
        assert timed["sdpa, forward"]["tflops"] == pytest.approx(
            4 * 48 * scores / timed["sdpa, forward"]["median_ms"] / 1e9
        )
    if what == probe.EAGER:
        assert made["kernels"][0]["total_us"] > 0 and made["n_kernels"] > 10 and made["stand_in"]
        assert (
            made["kernels_us"] + made["gaps_us"]
            <= 1.5e3 * timed["without the profiler"]["quartiles_ms"][1] * 10
        )


def test_facts_of_a_gpu(monkeypatch):
    for name in ("get_device_properties", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda(), name))
    found = probe.measure_case(probe.Case("device"), CUDA)["facts"]
    assert (
        found["name"] == "a GPU"
        and found["L2_cache_size"] == 50 * 2**20
        and found["free_memory"] == 79 * 2**30
    )
    assert found["clock_rate"] is None and found["numpy"]


@dataclass
class Event:
    name: str
    start: float
    end: float
    device_type: object = torch.autograd.DeviceType.CUDA
    is_user_annotation: bool = False
    cpu_parent: object = None

    @property
    def time_range(self):
        return SimpleNamespace(start=self.start, end=self.end)


def test_the_table_of_kernels():
    """Of two steps: kernels that overlap or lie within others leave no gap, annotations and the
    host are no kernels."""
    host = torch.autograd.DeviceType.CPU
    events = [
        Event("b", 40.0, 50.0),
        Event("a", 0.0, 10.0),
        Event("a", 5.0, 20.0),
        Event("c", 52.0, 53.0),
        Event("c", 41.0, 42.0),
        Event("a", 53.0, 60.0),
        Event("launch", 0.0, 90.0, host),
        Event("Optimizer.step", 0.0, 100.0, is_user_annotation=True),
    ]
    found = probe.spans(events, CUDA)
    assert len(found) == 6
    table = probe.kernel_table(found, 2)
    assert [(row["kernel"], row["calls"], row["total_us"]) for row in table["kernels"]] == [
        ("a", 1.5, 16.0),
        ("b", 0.5, 5.0),
        ("c", 1.0, 1.0),
    ]
    assert sum(row["share"] for row in table["kernels"]) == pytest.approx(1.0)
    assert (table["kernels_us"], table["gaps_us"], table["n_gaps"], table["n_kernels"]) == (
        22.0,
        11.0,
        1.0,
        3.0,
    )
    many = probe.kernel_table([(str(i), i, i + 0.5) for i in range(100)], 1)
    assert (
        len(many["kernels"]) == probe.SHOWN
        and many["n_names"] == 100
        and probe.kernel_table([], 1)["kernels_us"] == 0
    )
