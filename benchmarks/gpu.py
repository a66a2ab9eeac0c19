"""`make gpu`: a ladder for a machine with a CUDA torch and no network that is there for minutes:
builds, measures, tests.

    python benchmarks/gpu.py              the whole ladder, as far as one call gets; call again
    python benchmarks/gpu.py step data    these parts alone (make gpu PARTS="step data")
    python benchmarks/gpu.py --rehearse   every part, tiny, on the CPU; nothing saved into results

The parts stand in order of worth, and each begins whatever became of those before. A call ends
within nine minutes. Every step of a part is saved at once, in --results (else $OUT, else
benchmarks/results and docs), and the next call goes on from there if commit and device are the
same: what is done is not repeated, unless --again is given. Where $OUT is emptied between calls,
--results names a folder that is kept. A part that runs over is interrupted, so that its traceback
is in its log, and ended if that does not help. --cache DIR keeps what torch.compile and Triton
make, to be carried to the next call.

Nothing is downloaded: dinofast is installed without its dependencies, or, where pip may not
install, built in place; either way what runs is this checkout. Exit code: 0 if all is done, 1 if a
part failed, 75 if something is left for another call. What could not be installed and what
racecheck had no time for are only named.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from limited_run import MORE, Ended, run

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable
TOTAL_S = 510  # of a call, ending what runs over not counted
# seconds of a call at most, in a run of everything
LIMITS = {
    "install": 60,
    "probe": 150,
    "step": 420,
    "options": 420,
    "dino_loss": 75,
    "adamw_ema": 45,
    "tests": 240,
    "data": 120,
    "memcheck": 90,
    "racecheck": 60,
}
# kept for the case begun last; of others 0.4 of the limit
LAST_CASE_S = {"probe": 60, "step": 75, "options": 75}
# parts; in one call
RESUMED, RESTARTS = ("probe", "step", "options", "dino_loss", "adamw_ema", "tests", "data"), 6
SANITIZED = ("memcheck", "racecheck")
# of others bench_NAME.py
SCRIPTS = {"probe": "probe.py", "options": "step_options.py", "tests": "gpu_tests.py"}
# a part of the rehearsal that runs over; the others have all the time
PLANTED, PLANTED_S = "planted", 12
INSTALL = (
    "-m",
    "pip",
    "install",
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--disable-pip-version-check",
    "--editable",
    ".",
)
BUILD = ("setup.py", "--quiet", "build_ext", "--inplace")
SANITIZER_PLACES = (os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda")


def gpu_unavailable_reason() -> str:
    """Why this machine or this Python will not do, in a sentence; empty if it will."""
    if not importlib.util.find_spec("torch"):
        return (
            f"torch is not installed in {PYTHON}: make gpu PYTHON=... names one that has a "
            "CUDA torch."
        )
    import torch

    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} in {PYTHON} sees no CUDA device: make gpu needs a "
            "machine that has one."
        )
    if not importlib.util.find_spec("triton"):
        return f"Triton is not installed in {PYTHON}: the GPU kernels are written in it."
    return ""


class Call(NamedTuple):
    """What the parts of one call share. device: "cpu" in a rehearsal."""

    results: Path
    logs: Path
    device: str
    again: bool
    environment: dict[str, str]

    def part(self, name: str, limit_s: float) -> Ended:
        """Runs it, and again in a fresh process while one leaves something and there is time: an
        error of the device or a crash ends a process, and what it was at is not begun for ever."""
        if name == "install":
            return self.install(limit_s)
        start, resume = time.monotonic(), not self.again
        if name == SANITIZED[0] and self.device != "cpu" and sanitizer():
            # first without the sanitizer, which compiles them
            run(name, kernels(self.device), limit_s, self.environment, self.logs / f"{name}.log")
        for restart in range(RESTARTS + 1):
            left_s = limit_s - (time.monotonic() - start)
            made = command(name, self, left_s, resume)
            if isinstance(made, str):
                return Ended(1 if made.startswith("FAILED") else 0, made)
            ended = run(
                name, made[0], left_s, self.environment | made[1], self.logs / f"{name}.log"
            )
            begin_s = left_s - LAST_CASE_S.get(name, 0.4 * left_s)
            is_slow = time.monotonic() - start > begin_s
            if (
                ended.is_finished
                or ended.code is None
                or is_slow
                or restart == RESTARTS
                or name not in RESUMED
            ):
                return ended
            resume = True

    def install(self, limit_s: float) -> Ended:
        """The C++ core is wanted for the CPU only: without it the rest goes on."""
        if self.device == "cpu":
            return Ended(0, "left out: a rehearsal takes what is installed")
        if self.has_core():
            return Ended(0, "ok, there already")
        wanted = {"setuptools": 77, "pybind11": 2}
        absent = [
            f"{name} {least} or newer"
            for name, least in wanted.items()
            if major_version(name) < least
        ]
        if absent:
            return Ended(
                0,
                f"left out: {PYTHON} has no {' and no '.join(absent)} to build the C++ core with; "
                "the GPU kernels do without",
            )
        log, ended = self.logs / "install.log", Ended(1, "left out: pip is not installed")
        if importlib.util.find_spec("pip"):
            ended = run("install", (PYTHON, *INSTALL), limit_s, self.environment, log)
        if ended.code != 0:
            ended = run("install", (PYTHON, *BUILD), limit_s, self.environment, log)
            ended = ended._replace(how=f"{ended.how} (built in place: pip may not install here)")
        if self.has_core():
            return Ended(0, ended.how)
        return Ended(
            0, f"left out: the C++ core was not built ({ended.how}); the GPU kernels do without"
        )

    def has_core(self) -> bool:
        return not subprocess.run(
            (PYTHON, "-c", "from dinofast import _C"),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
        ).returncode


def major_version(package: str) -> int:
    """0 if it is not installed."""
    try:
        return int(importlib.metadata.version(package).split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (
            found
            for place in SANITIZER_PLACES
            if (found := shutil.which("compute-sanitizer", path=f"{place}/bin"))
        ),
        None,
    )


def kernels(device: str) -> tuple[str, ...]:
    return PYTHON, "benchmarks/launch_kernels.py", "--device", device


def command(
    name: str, call: Call, limit_s: float, resume: bool
) -> tuple[tuple[str, ...], dict[str, str]] | str:
    """What a part runs, and in what environment beside the usual; or why it cannot."""
    if name == PLANTED:
        return (PYTHON, "-c", "import time\ndef runs_over():\n    time.sleep(600)\nruns_over()"), {}
    if name == "tests" and not importlib.util.find_spec("pytest"):
        return f"FAILED: not run, pytest is not installed in {PYTHON}"
    if name in SANITIZED:
        if call.device == "cpu":
            return kernels(call.device), {}  # a stand-in: without the sanitizer
        if not (tool := sanitizer()):
            return "left out: compute-sanitizer is not on this machine"
        return (
            (
                tool,
                "--tool",
                name,
                "--report-api-errors",
                "no",
                "--error-exitcode",
                "9",
                *kernels(call.device),
            ),
            # each allocation by itself: running over its end is seen
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    begin_s = max(1.0, limit_s - LAST_CASE_S.get(name, 0.4 * limit_s))
    flags = [*(["--resume"] if resume else []), *(["--rehearse"] if call.device == "cpu" else [])]
    return (
        PYTHON,
        f"benchmarks/{SCRIPTS.get(name, f'bench_{name}.py')}",
        "--device",
        call.device,
        "--save-results",
        str(call.results),
        "--limit-s",
        f"{begin_s:.0f}",
        *flags,
    ), {}


def flagged(path: Path) -> str:
    """How many rows of a result are flagged; empty for none."""
    if not path.is_file():
        return ""
    from dinofast.bench.record import flags

    n = sum(len(flags(case)) for case in json.loads(path.read_text()).get("cases", ()))
    return f", {n} flagged in {path.name}" if n else ""


def environment_of(device: str, cache: Path | None) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found |= {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if cache:
        found |= {
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
    return found | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {"DINOFAST_REQUIRE": "triton"})


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(LIMITS)}; none means all"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="$OUT, else benchmarks/results")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="of torch.compile and Triton; default: where they have it",
    )
    parser.add_argument(
        "--total-s",
        type=float,
        default=TOTAL_S,
        metavar="S",
        help=f"of this call (default: {TOTAL_S})",
    )
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="every part at tiny sizes on the CPU, not saved into results",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] = ()) -> int:
    start, args = time.monotonic(), parse(arguments)
    sys.path.insert(0, str(ROOT))  # on a bare machine dinofast is not installed yet
    limits = dict(LIMITS)
    if args.rehearse:  # what runs over stands in the middle, so that parts are seen to go on
        limits = {"install": 0, "probe": TOTAL_S, PLANTED: PLANTED_S} | dict.fromkeys(
            LIMITS, TOTAL_S
        )
    if unknown := [name for name in args.parts if name not in limits]:
        print(f"there is no part '{unknown[0]}': choose from {', '.join(limits)}.")
        return 1
    if not args.rehearse and (reason := gpu_unavailable_reason()):
        print(reason)
        return 1
    # as a shell has it for what runs in the background: parts would inherit it, and could not be
    # interrupted
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # no core files of what is aborted
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    call = make_call(args)
    own = call.results == ROOT / "benchmarks" / "results"
    import torch

    from dinofast.bench.record import commit, device_name, write

    code = f"{commit()} on {device_name(torch.device(call.device))}"
    path = call.results / f"ladder-{'cuda' if call.device == 'cuda' else 'cpu'}.json"
    state = json.loads(path.read_text()) if path.is_file() and not args.again else {}
    if state.get("code") != code:
        state = {"code": code, "parts": {}}
    names = [name for name in limits if not args.parts or name in args.parts or name == "install"]
    for name in names:
        before = state["parts"].get(name, {})
        if before.get("finished") and name != "install":
            state["parts"][name] = before | {
                "how": before["how"].removesuffix(" (before)") + " (before)"
            }
            continue
        left_s = args.total_s - (time.monotonic() - start)
        has_all = args.parts and name not in ("install", PLANTED)
        ended = call.part(name, left_s if has_all else min(limits[name], left_s))
        state["parts"][name] = {
            "how": ended.how + flagged(call.results / f"{name}-{call.device}.json"),
            "code": ended.code,
            "finished": ended.is_finished,
            "calls": before.get("calls", 0) + 1,
            "date": time.strftime("%Y-%m-%d"),
        }
        write(state, path)
    if own:
        subprocess.run((PYTHON, "benchmarks/report.py"), cwd=ROOT, check=True)
    print(
        f"\n==== make gpu, {time.monotonic() - start:.0f} s, results in {call.results}, logs in "
        f"{call.logs}"
    )
    return summarize({name: state["parts"][name] for name in names})


def summarize(parts: dict[str, dict[str, Any]]) -> int:
    """How each part ended, printed; the exit code of the call."""
    for name, part in parts.items():
        print(f"{name:10} {part['how']}")
    left = [
        name
        for name, part in parts.items()
        if not part["finished"] and name not in ("racecheck", PLANTED)
    ]
    if left:
        print(f"left for another call: {', '.join(left)}")
    if any(part["how"].startswith("FAILED") for part in parts.values()):
        return 1
    return MORE if left else 0


def make_call(args: argparse.Namespace) -> Call:
    """Where results, logs and caches go."""
    device = "cpu" if args.rehearse else "cuda"
    own = ROOT / "benchmarks" / "results"
    if args.results or (os.environ.get("OUT") and not args.rehearse):
        results = (args.results or Path(os.environ["OUT"])).resolve()
    else:
        results = Path(tempfile.mkdtemp(prefix="dinofast-rehearsal-")) if args.rehearse else own
    logs = ROOT / "build" / "gpu-logs" if results == own else results / "logs"
    return Call(
        results,
        logs,
        device,
        args.again,
        environment_of(device, args.cache and args.cache.resolve()),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
