"""`make gpu`: builds, tests and measures on a machine with a CUDA torch and no network, within nine minutes; safe to repeat.

Nothing is downloaded: dinofast is installed without its dependencies, or, where pip may not install, built in place; either way
what runs is this checkout. Results go to $OUT if that is set, else to benchmarks/results and into README.md. Every part has a
time limit and runs whatever became of those before it; the last lines say how each ended. Exit code 1 if a part failed or ran
over, except that what could not be installed and what racecheck had no time for are only named.
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
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
LIMIT_S = {"install": 60, "tests": 130, "dino_loss": 110, "adamw_ema": 45, "data": 60, "memcheck": 65, "racecheck": 50}  # 520
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


def run(name: str, arguments: tuple[str, ...], deadline: float, environment: dict[str, str]) -> str:
    """How one part ended: "ok, 12 s", or what went wrong. A part that runs over is ended with all its children."""
    limit_s = min(LIMIT_S[name], deadline - time.monotonic())
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


def install(deadline: float, environment: dict[str, str]) -> str:
    """The C++ core is wanted for the CPU only: without it the rest goes on."""
    wanted = {"setuptools": 77, "pybind11": 2}
    absent = [f"{name} {least} or newer" for name, least in wanted.items() if major_version(name) < least]
    if absent:
        return f"left out: {PYTHON} has no {' and no '.join(absent)} to build the C++ core with; the GPU kernels do without"
    ended = "left out: pip is not installed"
    if importlib.util.find_spec("pip"):
        ended = run("install", (PYTHON, *INSTALL), deadline, environment)
    if not ended.startswith("ok"):
        ended = f"{run('install', (PYTHON, *BUILD), deadline, environment)} (built in place: pip may not install here)"
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


def main() -> int:
    start = time.monotonic()
    if reason := why_no_gpu():
        print(reason)
        return 1
    deadline = start + sum(LIMIT_S.values())
    results = os.environ.get("OUT") or str(ROOT / "benchmarks" / "results")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                    "PYTHONUNBUFFERED": "1", "DINOFAST_REQUIRE": "triton"}
    ended = {"install": install(deadline, environment)}
    if importlib.util.find_spec("pytest"):
        ended["tests"] = run("tests", (PYTHON, "-m", "pytest", "-m", "gpu", "-q", "tests/"), deadline, environment)
    else:
        ended["tests"] = f"FAILED: not run, pytest is not installed in {PYTHON}"
    for name in ("dino_loss", "adamw_ema", "data"):
        ended[name] = run(name, (PYTHON, f"benchmarks/bench_{name}.py", "--device", "cuda", "--save-results", results,
                                 "--limit-s", str(0.6 * LIMIT_S[name])), deadline, environment)
    for name in ("memcheck", "racecheck"):
        if tool := sanitizer():                 # every allocation on its own, so that running over its end is seen
            ended[name] = run(name, (tool, "--tool", name, "--report-api-errors", "no", "--error-exitcode", "9", PYTHON,
                                     "benchmarks/launch_kernels.py", "--device", "cuda"), deadline,
                              environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        else:
            ended[name] = "left out: compute-sanitizer is not on this machine"
    if not os.environ.get("OUT"):
        subprocess.run((PYTHON, "benchmarks/report.py"), cwd=ROOT, check=True)
    print(f"\n==== make gpu, {time.monotonic() - start:.0f} s, results in {results}")
    for name, how in ended.items():
        print(f"{name:10} {how}")
    return int(any(how.startswith("FAILED") for how in ended.values()))


if __name__ == "__main__":
    sys.exit(main())
