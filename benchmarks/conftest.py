"""`pytest benchmarks/`: a test a case, in which its candidates are measured in turns.
pytest-benchmark runs it, times it as a whole, and keeps every row in `extra_info`; the table of the
candidates stands at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before torch is imported, as dinofast.cli does
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from dinofast.bench import record

LEDGERS: dict[str, record.Ledger] = {}  # by benchmark


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--save-results",
        nargs="?",
        const=record.RESULTS,
        metavar="DIR",
        help="benchmarks/results if bare",
    )
    parser.addoption("--device", choices=("cpu", "cuda"), help="default: CUDA if there is a device")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_columns = ["median"]  # of the one round: how long the case took


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(record.choose_device(metafunc.config.option.device))
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Callable, case: Any
) -> Callable[[], dict[str, Any]]:
    """Measures the case and returns it; fails for a candidate that failed, or whose results are not
    those of the others."""
    module, device = request.module, record.choose_device(request.config.option.device)
    if module.NAME not in LEDGERS:
        result = record.environment(
            module.NAME, device, "python -m pytest benchmarks/ --save-results"
        )
        folder = request.config.option.save_results
        LEDGERS[module.NAME] = record.Ledger(result, folder and Path(folder), again=True)
    ledger = LEDGERS[module.NAME]

    def run() -> dict[str, Any]:
        benchmark.pedantic(record.measure_into, args=(ledger, module, case, device), rounds=1)
        measured = ledger.get(str(case))
        benchmark.extra_info["rows"] = [
            {k: v for k, v in row.items() if k != "elapsed_ms"} for row in measured["rows"]
        ]
        if flags := record.flags(measured):
            pytest.fail("\n".join(flags))
        return measured

    return run


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for name, ledger in LEDGERS.items():
        terminalreporter.section(
            f"{name} on {ledger.result['device']}, {ledger.result['threads']} threads, in turns"
        )
        terminalreporter.write_line("\n\n".join(map(record.text, ledger.cases)))
    if folder := config.option.save_results:
        terminalreporter.write_line(
            f"results saved in {folder}; python benchmarks/report.py puts them into "
            "docs/benchmarks.md"
        )
