"""`make gpu`: builds, tests and measures on a machine with a CUDA torch and no network, within nine minutes; safe to repeat.

    python benchmarks/gpu.py               everything
    python benchmarks/gpu.py step data     these parts alone, with all of the time (make gpu PARTS="step data")

Nothing is downloaded: dinofast is installed without its dependencies, or, where pip may not install, built in place; either way
what runs is this checkout. Results go to $OUT if that is set, else to benchmarks/results and into README.md. Every part has a
time limit and runs whatever became of those before it; the last lines say how each ended. Exit code 1 if a part failed or ran
over, except that what could not be installed and what racecheck had no time for are only named. What torch.compile and Triton
keep of their work is left where they put it, so that a second run measures more.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
TOTAL_S = 520
SHARES = {"install": 40, "tests": 125, "dino_loss": 60, "adamw_ema": 30, "data": 45, "step": 150, "memcheck": 50,
          "racecheck": 20}                       # seconds, in a run of everything; what one leaves over, those after it share
STEP_S = 120                                     # kept for the last case of the step that is begun; of others 0.4 of the limit
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check",
           "--editable", ".")
BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
SANITIZER_PLACES = (os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda")


def why_no_gpu() -> str:
    """Why this machine or this Python will not do, in a sentence; empty if it will."""
    if not importlib.util.find_spec("torch"):
        return f"torch is not installed in {PYTHON}: make gpu PYTHON=... names one that has a CUDA torch."
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} in {PYTHON} sees no CUDA device: make gpu needs a machine that has one."
    if not importlib.util.find_spec("triton"):
        return f"Triton is not installed in {PYTHON}: the GPU kernels are written in it."
    return ""


def limit_s(name: str, parts: Sequence[str], left_s: float) -> float:
    """Of the seconds left, those for `name`: by its share among those to come."""
    return left_s * SHARES[name] / sum(SHARES[part] for part in parts[parts.index(name):])


def run(name: str, arguments: tuple[str, ...], limit_s: float, environment: dict[str, str]) -> str:
    """How one part ended: "ok, 12 s", or what went wrong. A part that runs over is ended with all its children."""
    if limit_s < 1:
        return "FAILED: not begun, no time was left"
    print(f"\n==== {name} (at most {limit_s:.0f} s): {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit_s)
        ended = f"FAILED: exit code {code}"
    except subprocess.TimeoutExpired:
        code, ended = None, f"{'left out' if name == 'racecheck' else 'FAILED'}: not finished after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{'ok' if code == 0 else ended}, {time.monotonic() - start:.0f} s"


def install(limit_s: float, environment: dict[str, str]) -> str:
    """The C++ core is wanted for the CPU only: without it the rest goes on."""
    wanted = {"setuptools": 77, "pybind11": 2}
    absent = [f"{name} {least} or newer" for name, least in wanted.items() if major_version(name) < least]
    if absent:
        return f"left out: {PYTHON} has no {' and no '.join(absent)} to build the C++ core with; the GPU kernels do without"
    ended = "left out: pip is not installed"
    if importlib.util.find_spec("pip"):
        ended = run("install", (PYTHON, *INSTALL), limit_s, environment)
    if not ended.startswith("ok"):
        ended = f"{run('install', (PYTHON, *BUILD), limit_s, environment)} (built in place: pip may not install here)"
    has_core = subprocess.run((PYTHON, "-c", "from dinofast import _C"), cwd=ROOT, env=environment, capture_output=True)
    return ended if has_core.returncode == 0 else f"left out: the C++ core was not built ({ended}); the GPU kernels do without"


def major_version(package: str) -> int:
    """0 if it is not installed."""
    try:
        return int(importlib.metadata.version(package).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (found for place in SANITIZER_PLACES if (found := shutil.which("compute-sanitizer", path=f"{place}/bin"))), None)


def command(name: str, results: str, limit_s: float) -> tuple[tuple[str, ...], dict[str, str]] | str:
    """What a part runs, and in what environment beside the usual; or why it cannot."""
    if name == "tests":
        if not importlib.util.find_spec("pytest"):
            return f"FAILED: not run, pytest is not installed in {PYTHON}"
        return (PYTHON, "-m", "pytest", "-m", "gpu", "-q", "tests/"), {}
    if name in ("memcheck", "racecheck"):
        if not (tool := sanitizer()):
            return "left out: compute-sanitizer is not on this machine"
        return ((tool, "--tool", name, "--report-api-errors", "no", "--error-exitcode", "9", PYTHON,
                 "benchmarks/launch_kernels.py", "--device", "cuda"),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})         # each allocation by itself: running over its end is seen
    begin_s = max(1.0, limit_s - STEP_S) if name == "step" else 0.6 * limit_s
    return (PYTHON, f"benchmarks/bench_{name}.py", "--device", "cuda", "--save-results", results,
            "--limit-s", f"{begin_s:.0f}"), {}


def main(wanted: Sequence[str] = ()) -> int:
    """wanted: names of parts; none means all. It is always installed."""
    start = time.monotonic()
    if unknown := [name for name in wanted if name not in SHARES]:
        print(f"there is no part '{unknown[0]}': choose from {', '.join(SHARES)}.")
        return 1
    if reason := why_no_gpu():
        print(reason)
        return 1
    parts = [name for name in SHARES if not wanted or name in wanted or name == "install"]
    results = os.environ.get("OUT") or str(ROOT / "benchmarks" / "results")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                    "PYTHONUNBUFFERED": "1", "DINOFAST_REQUIRE": "triton"}
    ended = {}
    for name in parts:
        limit = limit_s(name, parts, TOTAL_S - (time.monotonic() - start))
        if name == "install":
            ended[name] = install(limit, environment)
        else:
            made = command(name, results, limit)
            ended[name] = made if isinstance(made, str) else run(name, made[0], limit, environment | made[1])
    if not os.environ.get("OUT"):
        subprocess.run((PYTHON, "benchmarks/report.py"), cwd=ROOT, check=True)
    print(f"\n==== make gpu, {time.monotonic() - start:.0f} s, results in {results}")
    for name, how in ended.items():
        print(f"{name:10} {how}")
    return int(any(how.startswith("FAILED") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
