"""The one way in which benchmarks measure: candidates in turns in one process, medians and
quartiles, the memory of a call."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

GIB, MIB = 2**30, 2**20
ROUNDS = {"cpu": (5, 31), "cuda": (20, 200)}  # fewest and most
LEAD_MS = 20.0  # longest head start of the host
T = TypeVar("T")


class Turns(Generic[T]):
    """The loop of every benchmark here: all candidates have a turn, then all have the next, so that
    what disturbs the machine disturbs them alike.

    turns: by name what does one turn of a candidate and returns what was measured in it. results:
    what each turn gave. failed: the reason, by name, of those that raised; they have no more turns.
    catch: () lets their exceptions through.
    """

    def __init__(
        self,
        turns: Mapping[str, Callable[[], T]],
        catch: type[BaseException] | tuple[type[BaseException], ...] = Exception,
    ) -> None:
        self.turns, self._catch = turns, catch
        self.results: dict[str, list[T]] = {name: [] for name in turns}
        self.failed: dict[str, str] = {}
        self.rounds = 0

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """`work` of this candidate; if it raises, the others go on."""
        try:
            work()
        except self._catch as error:
            self.failed[name] = reason_of(error)

    def round(self) -> None:
        for name in self.turns:
            if name not in self.failed:
                self.attempt(name, partial(self._turn, name))
        self.rounds += 1

    def _turn(self, name: str) -> None:
        self.results[name].append(self.turns[name]())

    def run(self, seconds: float, fewest: int, most: float = float("inf")) -> None:
        """Rounds until `seconds` are over, within these limits."""
        start = time.perf_counter()
        while self.rounds < fewest or (
            self.rounds < most and time.perf_counter() - start < seconds
        ):
            self.round()


def reason_of(error: BaseException) -> str:
    """One line: the type and the first line of what an exception says."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0][:200]}" if said else type(error).__name__


def row_of(name: str, elapsed_ms: Sequence[float], **more: Any) -> dict[str, Any]:
    """What a result file holds of a candidate: median and quartiles of its turns, and what else is
    known of it."""
    low, median, high = quartiles(elapsed_ms)
    return {
        "candidate": name,
        "median_ms": median,
        "quartiles_ms": [low, high],
        **more,
        "elapsed_ms": list(elapsed_ms),
    }


def add_ratios(
    rows: Sequence[dict[str, Any]], baseline: str = "official"
) -> Sequence[dict[str, Any]]:
    """How many times faster than the official row each of the others is; None if that was not
    timed."""
    official_ms = next(
        (row["median_ms"] for row in rows if row["candidate"] == baseline and "median_ms" in row),
        None,
    )
    for row in rows:
        if "median_ms" in row:
            row["times_faster_than_official"] = official_ms and official_ms / row["median_ms"]
    return rows


@dataclass(frozen=True)
class Candidate:
    """`call` does the work once and returns the tensors that it has made, if any.

    moved_bytes: what its scheme reads and writes in one call, counted; None where nobody has
    counted. flops: of one call, where they are the measure.
    """

    name: str
    call: Callable[[], Sequence[Tensor] | None]
    moved_bytes: int | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Timing:
    """Elapsed milliseconds of every round; MiB that a call needs beside what it was given and what
    it returns (None: not measured); on CUDA the milliseconds until the call returns to the host,
    which may be before the device has finished.

    failed: why there are no times, empty if there are.
    """

    candidate: Candidate
    elapsed_ms: list[float]
    extra_mib: float | None
    launch_ms: float | None
    failed: str = ""


def measure(candidates: Sequence[Candidate], device: torch.device, seconds: float) -> list[Timing]:
    """Times of all candidates, one round after the other until `seconds` are over, within the
    limits of ROUNDS.

    Results are dropped outside the timed region: allocating them counts, freeing them does not. A
    candidate that raises has no more rounds, and the reason in `failed`.
    """
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    extra_mib: dict[str, float | None] = {}
    launch_ms: dict[str, float | None] = {}

    def once(candidate: Candidate) -> float:
        return clock.once(candidate.call, launch_ms[candidate.name])

    def prepare(candidate: Candidate) -> None:
        candidate.call()  # compiles, allocates, starts threads
        extra_mib[candidate.name] = clock.extra_mib(candidate.call)
        launch_ms[candidate.name] = clock.prepare(candidate.call)

    turns = Turns({candidate.name: partial(once, candidate) for candidate in candidates})
    for candidate in candidates:
        turns.attempt(candidate.name, partial(prepare, candidate))
    turns.run(seconds, *ROUNDS[device.type])
    return [
        Timing(
            candidate,
            turns.results[candidate.name],
            extra_mib.get(candidate.name),
            launch_ms.get(candidate.name),
            turns.failed.get(candidate.name, ""),
        )
        for candidate in candidates
    ]


def extra_mib(call: Callable[[], Sequence[Tensor] | None], device: torch.device) -> float | None:
    """MiB that a call needs at most, beside what is there before and what it returns; None where
    that cannot be told."""
    return (_CudaClock(device) if device.type == "cuda" else _CpuClock()).extra_mib(call)


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = (
        statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else list(times) * 3
    )
    return low, median, high


def copies(source: Tensor, what: str) -> list[Candidate]:
    """Yardsticks, into memory already there: a copy of `source` (which may fit a cache), and on
    CUDA one of 1 GiB."""

    def copy(name: str, source: Tensor) -> Candidate:
        target = source.clone()

        def call() -> None:
            target.copy_(source)

        return Candidate(f"copy of {name}", call, 2 * source.nbytes)

    large = [torch.randn(GIB // 4, device=source.device)] if source.is_cuda else []
    return [copy(what, source.detach()), *(copy("1 GiB", x) for x in large)]


class _CpuClock:
    def prepare(self, call: Callable[[], object]) -> None:
        """Nothing to learn about a call that has finished when it returns."""

    def once(self, call: Callable[[], object], launch_ms: float | None) -> float:
        call()  # pays for the state of memory that the candidate before has left
        start = time.perf_counter()
        result = call()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        del result
        return elapsed_ms

    def extra_mib(self, call: Callable[[], Sequence[Tensor] | None]) -> float | None:
        """Growth of the peak resident set, exact to about 1 MiB; Linux only."""
        held = call()  # or the next call might use its memory again, and the growth would be hidden
        try:
            ctypes.CDLL(None).malloc_trim(0)  # or memory that malloc has kept would not count
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            return None
        before = _peak_resident_mib()
        result = call()
        grown_mib = _peak_resident_mib() - before
        del held
        return max(0.0, grown_mib - _mib(result))


class _CudaClock:
    """Device time by events, inputs not in L2, the host far enough ahead that its launches do not
    show, as in training."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        # 4 times L2: reading it evicts all else
        self.other = torch.randn(max(l2_bytes, 64 * MIB), device=device)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._wait(10**6)
        self.cycles_per_ms = 10**7 / self._wait(10**7)

    def prepare(self, call: Callable[[], object]) -> float:
        """Warms up; the milliseconds until the call returns, from an idle device."""
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
        return statistics.median(times)

    def once(self, call: Callable[[], object], launch_ms: float | None) -> float:
        self.other.sum()  # reads only: written lines would be flushed at the expense of the call
        torch.cuda._sleep(int(min(2 * (launch_ms or 0.0) + 0.1, LEAD_MS) * self.cycles_per_ms))
        self.start.record()
        result = call()
        self.stop.record()
        self.stop.synchronize()
        del result
        return self.start.elapsed_time(self.stop)

    def extra_mib(self, call: Callable[[], Sequence[Tensor] | None]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB - _mib(result)

    def _wait(self, cycles: int) -> float:
        self.start.record()
        torch.cuda._sleep(cycles)
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop)


def _mib(result: Sequence[Tensor] | None) -> float:
    return sum(x.nbytes for x in result or ()) / MIB


def _peak_resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
