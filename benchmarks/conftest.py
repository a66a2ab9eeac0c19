"""`pytest benchmarks/`: every case is measured once, its rivals in turns, and pytest-benchmark is handed those times.

pytest-benchmark by itself times one rival after the other, minutes apart: on a shared machine the ratios would not hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # before torch is imported, as dinofast.cli does

import pytest  # noqa: E402
import record  # noqa: E402


class Replay:
    """A clock that moves only by what was measured before."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def of(self, elapsed_ms: list[float]) -> Callable[[], None]:
        """A function whose calls last, by this clock, as long as the rounds did."""
        rounds: Iterator[float] = iter(elapsed_ms)

        def once() -> None:
            self.seconds += next(rounds) / 1e3
        return once


CLOCK = Replay()
LEDGERS: dict[str, record.Ledger] = {}                       # by benchmark
MEASURED: list[Any] = []                                     # cases


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-results", nargs="?", const=record.RESULTS, metavar="DIR", help="benchmarks/results if bare")
    parser.addoption("--device", choices=("cpu", "cuda"), help="left alone, CUDA if there is a device")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_columns = ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module
    cases = module.cases(record.choose_device(metafunc.config.option.device))
    params = [pytest.param(case, rival, id=f"{case}: {rival}", marks=pytest.mark.benchmark(timer=CLOCK, group=f"{case}"))
              for case in cases for rival in module.rivals_of(case)]
    metafunc.parametrize(("case", "rival"), params)


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark: Callable, case: Any, rival: str) -> Callable[[], None]:
    """Measures the case unless that is done, and gives pytest-benchmark the rounds of this rival."""
    module, device = request.module, record.choose_device(request.config.option.device)
    if module.NAME not in LEDGERS:
        command = "python -m pytest benchmarks/ --save-results"
        folder = request.config.option.save_results
        result = record.environment(module.NAME, device, command)
        LEDGERS[module.NAME] = record.Ledger(result, folder and Path(folder), again=True)
    ledger = LEDGERS[module.NAME]
    if case not in MEASURED:
        MEASURED.append(case)
        record.measure_into(ledger, module, case, device)
    measured = ledger.get(str(case))
    row = next((row for row in measured["rows"] if row["rival"] == rival), None)

    def run() -> None:
        if reason := next((reason for reason in measured["left_out"] if reason.startswith(f"{rival}:")), ""):
            pytest.skip(reason)
        if row is None or "failed" in row:
            pytest.fail(row["failed"] if row else measured["failed"])
        benchmark.extra_info.update({k: v for k, v in row.items() if k != "elapsed_ms"})
        benchmark.pedantic(CLOCK.of(row["elapsed_ms"]), rounds=len(row["elapsed_ms"]))
    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, ledger in LEDGERS.items():
        terminalreporter.section(f"{name} on {ledger.result['device']}, {ledger.result['threads']} threads, in turns")
        terminalreporter.write_line("\n\n".join(map(record.text, ledger.cases)))
    if folder := config.option.save_results:
        terminalreporter.write_line(f"results saved in {folder}; python benchmarks/report.py puts them into docs/benchmarks.md")
