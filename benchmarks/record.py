"""What a benchmark hands on: a table for the terminal, and one JSON file with everything a reader needs to judge a number.

A case is one shape: {"case": its name, "rounds", ..., "rows": one for each rival}. Units are in the names.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timing import Timing, quartiles

import dinofast

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def rows_of(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """One row for each rival: times, bandwidth, memory, and ratios of medians to "official" and to the first and last copy.

    The first copy is of the same numbers; the last is the largest, and bandwidths are shares of its.
    """
    rows = []
    for timing in timings:
        low, median, high = quartiles(timing.elapsed_ms)
        moved = timing.rival.moved_bytes
        rows.append({"rival": timing.rival.name, "median_ms": median, "quartiles_ms": [low, high], "moved_bytes": moved,
                     "gbps": moved / median / 1e6 if moved else None, "extra_mib": timing.extra_mib,
                     "launch_ms": timing.launch_ms, "elapsed_ms": timing.elapsed_ms})
    official = next(row for row in rows if row["rival"] == "official")
    copies = [row for row in rows if row["rival"].startswith("copy")]
    for row in rows:
        row["times_faster_than_official"] = official["median_ms"] / row["median_ms"]
        row["times_the_copy"] = row["median_ms"] / copies[0]["median_ms"]
        row["share_of_copy_bandwidth"] = row["gbps"] / copies[-1]["gbps"] if row["gbps"] else None
    return rows


def environment(benchmark: str, device: torch.device, command: str) -> dict[str, Any]:
    """What was measured, where, with which versions, and by which command."""
    on_gpu = device.type == "cuda"
    return {
        "benchmark": benchmark, "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda if on_gpu else None,
        "versions": {"dinofast": dinofast.__version__, "python": platform.python_version(), "torch": torch.__version__,
                     "triton": version("triton")},
        "commit": commit(), "date": time.strftime("%Y-%m-%d"),
        "command": f"{'DINO_OFFICIAL=DIR ' if os.environ.get('DINO_OFFICIAL') else ''}{command}"}


def commit() -> str:
    """Of the checkout, "-dirty" if a tracked file other than results and README differs; $DINOFAST_COMMIT where git fails."""
    try:
        git = ("git", "-C", str(ROOT))
        head = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run((*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results",
                                 ":!README.md"), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DINOFAST_COMMIT", "unknown")
    return head + ("-dirty" if status.strip() else "")


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def save(result: dict[str, Any], folder: Path) -> Path:
    """Written whole or not at all, as BENCHMARK-DEVICE.json; the single times stay out."""
    result = result | {"cases": [case | {"rows": [{k: v for k, v in row.items() if k != "elapsed_ms"} for row in case["rows"]]}
                                 for case in result["cases"]]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{result['device_type']}.json"
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
    return path


def text(case: dict[str, Any]) -> str:
    """One case for the terminal, without the columns in which no rival has anything."""
    head = ("rival", "median ms", "[quartiles]", "official / it", "images/s", "CPU ms", "it / copy", "GB/s", "of copy",
            "extra MiB", "host ms", "device GiB")
    lines = [head]
    for row in case["rows"]:
        low, high = row["quartiles_ms"]
        lines.append((row["rival"], f"{row['median_ms']:.3f}", f"[{low:.3f}, {high:.3f}]",
                      _shown(row, "times_faster_than_official", ".2f"), _shown(row, "images_per_s", ",.0f"),
                      _shown(row, "cpu_ms", ".3f"), _shown(row, "times_the_copy", ".2f"), _shown(row, "gbps", ".1f"),
                      _shown(row, "share_of_copy_bandwidth", ".0%"), _shown(row, "extra_mib", ".1f"),
                      _shown(row, "launch_ms", ".3f"), _shown(row, "device_gib", ".2f")))
    kept = [column for column in zip(*lines, strict=True) if any(column[1:])]
    lines = list(zip(*kept, strict=True))
    widths = [max(map(len, column)) for column in kept]
    body = "\n".join("  ".join(["", line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
                     for line in lines)
    notes = "".join(f"\n  left out: {note}" for note in case["left_out"])
    return f"{case['case']}, {case['rounds']} rounds\n{body}{notes}"


def _shown(row: dict[str, Any], name: str, form: str) -> str:
    return "" if row.get(name) is None else format(row[name], form)


def choose_device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def main(module: ModuleType) -> None:
    """A benchmark as a script: measures every case, prints it, and with --save-results writes the file after each."""
    parser = argparse.ArgumentParser(description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left alone, CUDA if there is a device")
    parser.add_argument("--save-results", nargs="?", const=RESULTS, type=Path, metavar="DIR", help="benchmarks/results if bare")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="no case is begun after so many seconds")
    args = parser.parse_args()
    device, start = choose_device(args.device), time.perf_counter()
    result = environment(module.NAME, device, f"python benchmarks/bench_{module.NAME}.py --device {device.type} --save-results")
    print(", ".join(f"{k} {v}" for k, v in result.items() if v is not None), flush=True)
    result["cases"] = []
    for case in module.cases(device):
        if time.perf_counter() - start > args.limit_s:
            print(f"{case}: not measured, {args.limit_s:.0f} s are over")
            continue
        result["cases"].append(module.measure_case(case, device))
        print(text(result["cases"][-1]), flush=True)
        if args.save_results:
            print(f"  saved in {save(result, args.save_results)}", flush=True)


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""
