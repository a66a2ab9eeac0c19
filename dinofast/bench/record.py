"""What a benchmark hands on: a table for the terminal, and one JSON file with everything a reader
needs to judge a number.

A case is one shape: {"case": its name, "rounds", ..., "rows": one for each candidate}. Units are in
the names. A row with "failed" has no times, but the reason; one with "differs" was timed, but its
results are not those of the others.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .timing import Timing, add_ratios, quartiles, reason_of, row_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MORE = 75  # exit code: some cases are left, for another process
MOST_BEGUN = 2  # a case that ended its process so often is not begun again
# what results must share to stand in one file
SAME_RUN = ("device", "threads", "cuda", "versions", "commit")


def rows_of(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One row for each candidate: times, bandwidth, memory, and ratios of medians to "official" and
    to the first and last copy.

    The first copy is of the same numbers; the last is the largest, and bandwidths are shares of
    its.
    """
    rows: list[dict[str, Any]] = []
    for timing in timings:
        if timing.failed:
            rows.append({"candidate": timing.candidate.name, "failed": timing.failed})
            continue
        median = quartiles(timing.elapsed_ms)[1]
        moved = timing.candidate.moved_bytes
        flops = timing.candidate.flops
        rows.append(
            row_of(
                timing.candidate.name,
                timing.elapsed_ms,
                moved_bytes=moved,
                gbps=moved / median / 1e6 if moved else None,
                extra_mib=timing.extra_mib,
                launch_ms=timing.launch_ms,
                **({"tflops": flops / median / 1e9} if flops else {}),
            )
        )
    add_ratios(rows)
    timed = [row for row in rows if "failed" not in row]
    copies = [row for row in timed if row["candidate"].startswith("copy")]
    for row in timed:
        row["times_the_copy"] = row["median_ms"] / copies[0]["median_ms"] if copies else None
        row["share_of_copy_bandwidth"] = (
            row["gbps"] / copies[-1]["gbps"] if row["gbps"] and copies else None
        )
    return rows


def flag(rows: Sequence[dict[str, Any]], differing: dict[str, str]) -> None:
    """Say of the candidates named in `differing` in what they differ from the others."""
    for row in rows:
        if row["candidate"] in differing and "failed" not in row:
            row["differs"] = differing[row["candidate"]]


def environment(benchmark: str, device: torch.device, command: str) -> dict[str, Any]:
    """What was measured, where, with which versions, and by which command."""
    on_gpu = device.type == "cuda"
    return {
        "benchmark": benchmark,
        "device_type": device.type,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
        "versions": {
            "dinofast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
        },
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"{'DINO_OFFICIAL=DIR ' if os.environ.get('DINO_OFFICIAL') else ''}{command}",
    }


def commit() -> str:
    """$DINOFAST_COMMIT if it is set, for copies whose .git is not there or not theirs. Else of the
    checkout, "-dirty" if a tracked file other than results and rendered pages differs. Where git
    fails a hash of the code, so that results of other code are never gone on from."""
    if given := os.environ.get("DINOFAST_COMMIT"):
        return given
    try:
        git = ("git", "-C", str(ROOT))
        head = subprocess.run(
            (*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            (
                *git,
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ".",
                ":!benchmarks/results",
                ":!README.md",
                ":!docs/benchmarks.md",
            ),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"code-{_hash_of_code()}"
    return head + ("-dirty" if status.strip() else "")


def _hash_of_code() -> str:
    digest = hashlib.sha256()
    for folder in ("dinofast", "kernels", "csrc", "benchmarks", "tests"):
        for path in sorted(
            p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h")
        ):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(result: dict[str, Any], folder: Path) -> Path:
    """Written atomically, as BENCHMARK-DEVICE.json; the single times stay out."""
    result = result | {
        "cases": [
            case
            | {
                "rows": [
                    {k: v for k, v in row.items() if k != "elapsed_ms"} for row in case["rows"]
                ]
            }
            for case in result["cases"]
        ]
    }
    return write(result, folder / f"{result['benchmark']}-{result['device_type']}.json")


def write(content: dict[str, Any], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
    return path


class Ledger:
    """The result of a benchmark as it grows. With a folder each step is saved there, and what is
    found there is gone on from, if it is of this device, these versions and this commit.

    While a case is at work it holds "begun": how often; a process that ends in it leaves that
    behind.
    """

    def __init__(self, result: dict[str, Any], folder: Path | None, again: bool = False) -> None:
        self.result, self.folder = result | {"cases": []}, folder
        path = folder and folder / f"{result['benchmark']}-{result['device_type']}.json"
        if path and path.is_file() and not again:
            found = json.loads(path.read_text())
            if all(found.get(name) == result[name] for name in SAME_RUN):
                self.result["cases"] = found["cases"]
            elif found.get("device") != result["device"]:  # another's numbers: kept, under its name
                other = re.sub(r"[^A-Za-z0-9]+", "-", str(found.get("device")))
                path.replace(path.with_name(f"{path.stem}-{other}.json"))

    @property
    def cases(self) -> list[dict[str, Any]]:
        return self.result["cases"]

    def get(self, name: str) -> dict[str, Any] | None:
        return next((case for case in self.cases if case["case"] == name), None)

    def __getitem__(self, name: str) -> dict[str, Any]:
        """A case that is there."""
        return {case["case"]: case for case in self.cases}[name]

    def is_done(self, name: str, candidates: Iterable[str] = ()) -> bool:
        """Measured, with a row or a reason for each of these candidates."""
        case = self.get(name)
        if case is None or "begun" in case:
            return False
        said = [row["candidate"] for row in case["rows"]] + [
            reason.split(":")[0] for reason in case.get("left_out", ())
        ]
        return "failed" in case or set(candidates) <= set(said)

    def begin(self, name: str) -> int:
        """How often it has been begun, this time counted; the rows of an earlier time stay until
        there are new ones."""
        case = self.get(name) or {"case": name, "rows": [], "left_out": []}
        begun = case.get("begun", 0) + 1
        self.put(case | {"begun": begun})
        return begun

    def put(self, case: dict[str, Any]) -> None:
        """In the place of the one of the same name."""
        names = [each["case"] for each in self.cases]
        if case["case"] in names:
            self.cases[names.index(case["case"])] = case
        else:
            self.cases.append(case)
        if self.folder:
            save(self.result, self.folder)


def text(case: dict[str, Any]) -> str:
    """One case for the terminal, without the columns in which no candidate has anything."""
    head = (
        "candidate",
        "median ms",
        "[quartiles]",
        "official / it",
        "images/s",
        "CPU ms",
        "it / copy",
        "GB/s",
        "of copy",
        "extra MiB",
        "host ms",
        "device GiB",
        "TFLOP/s",
    )
    lines = [head]
    for row in case["rows"]:
        if "median_ms" not in row:
            continue
        low, high = row["quartiles_ms"]
        lines.append(
            (
                row["candidate"],
                f"{row['median_ms']:.3f}",
                f"[{low:.3f}, {high:.3f}]",
                _shown(row, "times_faster_than_official", ".2f"),
                _shown(row, "images_per_s", ",.0f"),
                _shown(row, "cpu_ms", ".3f"),
                _shown(row, "times_the_copy", ".2f"),
                _shown(row, "gbps", ".1f"),
                _shown(row, "share_of_copy_bandwidth", ".0%"),
                _shown(row, "extra_mib", ".1f"),
                _shown(row, "launch_ms", ".3f"),
                _shown(row, "device_gib", ".2f"),
                _shown(row, "tflops", ".0f"),
            )
        )
    kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
    lines = list(zip(*kept, strict=True))
    widths = [max(map(len, column)) for column in kept]
    body = "\n".join(
        "  ".join(["", line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )
    notes = "".join(f"\n  left out: {note}" for note in case.get("left_out", ()))
    notes += "".join(f"\n  FLAGGED: {note}" for note in flags(case))
    rounds = f", {case['rounds']} rounds" if "rounds" in case else ""
    return f"{case['case']}{rounds}\n{body if len(lines) > 1 else ''}{notes}"


def flags(case: dict[str, Any]) -> list[str]:
    """What went wrong in a case and in its rows."""
    found = [f"{case['case']}: {case['failed']}"] if "failed" in case else []
    for row in case["rows"]:
        found += [
            f"{row['candidate']}: {row[name]}" for name in ("failed", "differs") if name in row
        ]
    return found


def _shown(row: dict[str, Any], name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def choose_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def parse(description: str) -> argparse.Namespace:
    """The command line of a benchmark as a script."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: CUDA if there is a device"
    )
    parser.add_argument(
        "--save-results",
        nargs="?",
        const=RESULTS,
        type=Path,
        metavar="DIR",
        help="benchmarks/results if bare",
    )
    parser.add_argument(
        "--limit-s", type=float, default=float("inf"), help="no case is begun after so many seconds"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the file, if it is of this device and commit",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny cases, to see that all is in order"
    )
    return parser.parse_args()


def main(module: Any) -> int:
    """A benchmark as a script; the exit code. `module` has NAME, `cases(device)`, tiny ones in
    `rehearsal()`, `candidates_of(case)` and `measure_case(case, device)`, which gives a case, or
    `growing(case, device)`, which yields it as it grows; and `go_on_from(cases)` where a case
    depends on those before.

    Every case is measured and printed, and with --save-results each step is in the file at once.
    What fails is flagged, and the next is begun.
    """
    args = parse(module.__doc__)
    device, start = choose_device(args.device), time.perf_counter()
    command = f"python benchmarks/{Path(sys.argv[0]).name} --device {device.type} --save-results"
    ledger = Ledger(
        environment(module.NAME, device, command), args.save_results, again=not args.resume
    )
    print(
        ", ".join(f"{k} {v}" for k, v in ledger.result.items() if v is not None and k != "cases"),
        flush=True,
    )
    if args.rehearse and hasattr(module, "SECONDS"):
        module.SECONDS = dict.fromkeys(module.SECONDS, 0.1)
    left = 0
    for case in module.rehearsal() if args.rehearse else module.cases(device):
        if ledger.is_done(str(case), module.candidates_of(case)):
            print(f"{case}: measured before", flush=True)
        elif time.perf_counter() - start > args.limit_s:
            print(f"{case}: not measured, {args.limit_s:.0f} s are over", flush=True)
            left += 1
        else:
            measure_into(ledger, module, case, device)
            print(text(ledger[str(case)]), flush=True)
            if device.type == "cuda" and (lost := why_lost(device)):
                print(f"another process is needed: {lost}", flush=True)
                return MORE
    if args.save_results:
        print(f"saved in {args.save_results}", flush=True)
    return MORE if left else 0


def measure_into(ledger: Ledger, module: Any, case: Any, device: torch.device) -> None:
    """Measures a case; the ledger has it at every moment. Its failure is written there too."""
    if ledger.begin(str(case)) > MOST_BEGUN:
        failed = f"begun {MOST_BEGUN} times, and each time the process ended before it did"
    else:
        failed = ""
        try:
            if hasattr(module, "go_on_from"):
                module.go_on_from([each for each in ledger.cases if each["case"] != str(case)])
            growing = (
                module.growing(case, device)
                if hasattr(module, "growing")
                else [module.measure_case(case, device)]
            )
            for made in growing:
                ledger.put(made | {"begun": ledger[str(case)]["begun"]})
        except Exception as error:
            failed = reason_of(error)
    gc.collect()
    if device.type == "cuda" and not why_lost(device):
        torch.cuda.empty_cache()
    made = {name: value for name, value in ledger[str(case)].items() if name != "begun"}
    ledger.put(made | ({"failed": failed} if failed else {}))


def why_lost(device: torch.device) -> str:
    """Why nothing more can run on this GPU in this process; empty if it can. A bad access by one
    kernel fails all after it."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return reason_of(error)
    return ""


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    names = [
        line.split(":", 1)[1].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    return (
        f"CPU, {names[0] if names else platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""
