"""The GPU tests, cheapest first, each kept as soon as it has ended: `python benchmarks/gpu_tests.py
--save-results DIR`.

Kernels, then attention, the step, the data. A failure is printed at once. With --resume those that
have ended are left out; one that ended the process so often as `record.MOST_BEGUN` says is not
begun again. Exit code 1 if a test has failed in any run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dinofast.bench.record import MORE, MOST_BEGUN, SAME_RUN, environment, write

ROOT = Path(__file__).parent.parent
LATER = {
    "attention": 1,
    "vit": 2,
    "step": 2,
    "train": 2,
    "fake": 2,
    "bench": 3,
    "side_stream": 4,
    "loader": 4,
    "dali": 4,
}


class Keeper:
    """A plugin of pytest: `path` holds each test's outcome, seconds, and the reason where it is not
    "passed"."""

    def __init__(self, path: Path, device: torch.device, resume: bool) -> None:
        self.path, self.reporter = path, None
        command = f"python benchmarks/gpu_tests.py --device {device.type} --save-results DIR"
        self.kept: dict[str, Any] = environment("tests", device, command) | {"tests": {}}
        if resume and path.is_file():
            found = json.loads(path.read_text())
            if all(found[name] == self.kept[name] for name in SAME_RUN):
                self.kept = found

    @property
    def tests(self) -> dict[str, dict[str, Any]]:
        return self.kept["tests"]

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        self.reporter = config.pluginmanager.getplugin("terminalreporter")
        known = [item for item in items if self.is_over(item.nodeid)]
        items[:] = sorted(
            (item for item in items if not self.is_over(item.nodeid)),
            key=lambda item: rank(item.path.stem),
        )
        if known:
            config.hook.pytest_deselected(items=known)

    def is_over(self, name: str) -> bool:
        test = self.tests.get(name, {})
        if "outcome" not in test and test.get("begun", 0) >= MOST_BEGUN:
            test |= {
                "outcome": "failed",
                "reason": f"begun {MOST_BEGUN} times, and each time the process ended before it "
                "did",
            }
            write(self.kept, self.path)
        return "outcome" in test

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tests.setdefault(nodeid, {"begun": 0})["begun"] += 1
        write(self.kept, self.path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] = round(test.get("seconds", 0.0) + report.duration, 3)
        if report.outcome != "passed":
            reason = str(report.longrepr).replace(f"{ROOT}/", "")
            test |= {"outcome": report.outcome, "reason": reason[-2000:]}
            if report.failed and self.reporter:
                self.reporter.write_line(
                    f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", red=True
                )
        elif report.when == "teardown":
            test.setdefault("outcome", "passed")
        write(self.kept, self.path)


def rank(stem: str) -> int:
    """Of a test file: unit tests first, then by LATER."""
    return max((at for part, at in LATER.items() if part in stem), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="what the file is of"
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        help="ignored: whoever calls interrupts, and what has ended is kept",
    )
    parser.add_argument("--rehearse", action="store_true", help="two small files of any tests")
    args = parser.parse_args()
    keeper = Keeper(
        args.save_results / f"tests-{args.device}.json", torch.device(args.device), args.resume
    )
    chosen = (
        ["tests/test_schedule.py", "tests/ops/test_ops.py"]
        if args.rehearse
        else ["tests/", "-m", "gpu"]
    )
    code = pytest.main(
        ["-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *chosen],
        plugins=[keeper],
    )
    counts = {
        outcome: sum(test.get("outcome") == outcome for test in keeper.tests.values())
        for outcome in ("passed", "failed", "skipped")
    }
    print(
        f"in all runs: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())}", flush=True
    )
    if code == pytest.ExitCode.INTERRUPTED:
        return MORE
    return int(
        counts["failed"] > 0
        or code
        not in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
