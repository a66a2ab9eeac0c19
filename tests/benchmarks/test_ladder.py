"""`make gpu`: a ladder that loses nothing. What is done is known, what runs over is interrupted,
what fails is flagged."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gpu
import limited_run
import pytest
import torch

from dinofast.bench import record

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")


# ---- one part as a process
STUCK = (
    "import signal, time\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "{}\n"
    "def is_stuck():\n"
    "    time.sleep(60)\n"
    "is_stuck()"
)


@pytest.mark.parametrize(
    "code, limit_s, how, logged",
    [
        ("print('said')", 60, "ok, ", ("said",)),
        ("raise SystemExit(3)", 60, "FAILED: exit code 3, ", ()),
        (f"raise SystemExit({limited_run.MORE})", 60, "something is left, ", ()),
        (
            "import time\ndef runs_over():\n    time.sleep(60)\nruns_over()",
            3,
            "interrupted",
            ("in runs_over", "KeyboardInterrupt"),
        ),
        (STUCK.format(""), 3, "aborted", ("Fatal Python error: Aborted", "in is_stuck")),
        (STUCK.format("signal.signal(signal.SIGABRT, signal.SIG_IGN)"), 3, "killed", ()),
    ],
    ids=str,
)
def test_a_part_that_runs_over_is_interrupted_then_killed(
    code, limit_s, how, logged, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(limited_run, "LEAST_S", 0)
    # it ends at once, on a busy machine later
    monkeypatch.setattr(limited_run, "INTERRUPTED_S", 30 if how == "interrupted" else 1)
    monkeypatch.setattr(limited_run, "ABORTED_S", 30 if how == "aborted" else 1)
    environment = gpu.environment_of("cpu", None)
    # as `main`: in the background it is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = limited_run.run(
            "some", (sys.executable, "-c", code), limit_s, environment, tmp_path / "some.log"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    if limit_s == 3:
        assert ended.code is None and not ended.is_finished
        how = f"not finished after 3 s, {how}: {tmp_path / 'some.log'} has where it was"
    assert ended.how.startswith(how)
    log = (tmp_path / "some.log").read_text()
    assert all(words in log for words in logged) and log in capsys.readouterr().out


def test_children_of_a_part_end_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(limited_run, "LEAST_S", 0)
    monkeypatch.setattr(limited_run, "INTERRUPTED_S", 2)
    child = tmp_path / "child"
    code = (
        "import pathlib, subprocess, time\n"
        "p = subprocess.Popen(['sh', '-c', 'trap \"\" INT; sleep 60; true'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid))\n"
        "time.sleep(60)"
    )
    limited_run.run(
        "some", (sys.executable, "-c", code), 5, dict(os.environ), tmp_path / "some.log"
    )
    state = subprocess.run(
        ("ps", "-o", "stat=", "-p", child.read_text()), capture_output=True, text=True
    ).stdout.strip()
    assert state[:1] in ("", "Z")  # ZN where the run is nice


def test_a_bare_machine_finds_dinofast_in_the_checkout(monkeypatch):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place) != gpu.ROOT])
    assert gpu.main(["no-such-part"]) == 1 and sys.path[0] == str(gpu.ROOT)


def test_without_time_no_part_is_begun(tmp_path):
    ended = limited_run.run(
        "some", ("no such program",), limited_run.LEAST_S - 1, {}, tmp_path / "some.log"
    )
    assert ended == (None, "not begun, no time was left") and not (tmp_path / "some.log").exists()


def call(tmp_path, device="cuda", again=False):
    return gpu.Call(tmp_path, tmp_path / "logs", device, again, {})


@pytest.mark.parametrize(
    "codes, ran",
    [
        ([0], 1),
        ([1], 1),
        ([None], 1),
        ([limited_run.MORE, 0], 2),
        ([-11, -11, 0], 3),
        ([-11] * 20, gpu.RESTARTS + 1),
    ],
)
def test_a_part_that_crashes_goes_on_in_a_fresh_process(codes, ran, tmp_path, monkeypatch):
    """Also one whose device is lost; not one that is through, or has run over, or crashes for
    ever."""
    seen = []

    def run(name, arguments, limit_s, environment, log):
        seen.append("--resume" in arguments)
        return limited_run.Ended(codes[len(seen) - 1], "words")

    monkeypatch.setattr(gpu, "run", run)
    ended = call(tmp_path, again=True).part("step", 400)
    assert ended.code == codes[ran - 1] and seen == [False, *[True] * (ran - 1)]


def test_a_part_is_not_restarted_when_its_time_is_over(tmp_path, monkeypatch):
    now, seen = [0.0], []

    def run(name, arguments, limit_s, environment, log):
        seen.append(limit_s)
        now[0] += 100.0
        return limited_run.Ended(limited_run.MORE, "something is left")

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    assert call(tmp_path).part("step", 250).code == limited_run.MORE and seen == [250, 150]


def test_the_sanitizer_finds_its_kernels_compiled(tmp_path, monkeypatch):
    ran = []

    def run(name, arguments, limit_s, environment, log):
        ran.append((arguments[0], arguments[-3:], "PYTORCH_NO_CUDA_MEMORY_CACHING" in environment))
        return limited_run.Ended(0, "ok, 1 s")

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "sanitizer", lambda: "compute-sanitizer")
    last = ("benchmarks/launch_kernels.py", "--device", "cuda")
    for name in gpu.SANITIZED:
        assert call(tmp_path).part(name, 60).code == 0
    assert ran == [
        (sys.executable, last, False),
        ("compute-sanitizer", last, True),
        ("compute-sanitizer", last, True),
    ]
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    assert call(tmp_path).part("racecheck", 60) == (
        0,
        "left out: compute-sanitizer is not on this machine",
    )


# ---- the call
@pytest.fixture
def ladder(monkeypatch, tmp_path):
    """A function: `gpu.main` where each part takes half of what it may, or what `takes` says; the
    limits of the parts."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "gpu_unavailable_reason", lambda: "")
    monkeypatch.setattr(record, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(record, "commit", lambda: "abc")
    monkeypatch.delenv("OUT", raising=False)

    def main(*arguments, takes=None, ended=None):
        limits = {}

        def part(self, name, limit_s):
            limits[name] = limit_s
            assert (
                self.environment["DINOFAST_REQUIRE"] == "triton"
                and "TRITON_INTERPRET" not in self.environment
            )
            if limit_s < limited_run.LEAST_S:
                return limited_run.Ended(None, "not begun, no time was left")
            now[0] += min(limit_s, (takes or {}).get(name, limit_s / 2))
            return (ended or {}).get(name, limited_run.Ended(0, "ok, 1 s"))

        monkeypatch.setattr(gpu.Call, "part", part)
        now[0] = 0.0
        return gpu.main([*arguments, "--results", str(tmp_path)]), limits, now[0]

    return main


def test_a_run_says_why_it_cannot_begin(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1 and "sees no CUDA device" in capsys.readouterr().out
    assert gpu.main(["step", "steps"]) == 1
    assert "there is no part 'steps': choose from install, probe" in capsys.readouterr().out


def test_a_call_ends_within_nine_minutes():
    assert gpu.TOTAL_S + limited_run.INTERRUPTED_S + limited_run.ABORTED_S <= 540
    assert list(gpu.LIMITS) == [
        "install",
        "probe",
        "step",
        "options",
        "dino_loss",
        "adamw_ema",
        "tests",
        "data",
        "memcheck",
        "racecheck",
    ]
    for name in gpu.LIMITS:
        made = gpu.command(name, call(Path("results")), 400, True)
        assert (
            isinstance(made, str)
            or (ROOT / next(word for word in made[0] if word.startswith("benchmarks/"))).is_file()
            or (name == "install")
        )


def test_parts_stand_in_order_of_worth_and_share_a_call(ladder, capsys):
    """Each may take its limit, the last ones what is left; what had no time is left for the next
    call, which begins there."""
    code, limits, seconds = ladder(takes=gpu.LIMITS)
    assert code == limited_run.MORE and seconds <= gpu.TOTAL_S
    assert list(limits) == list(gpu.LIMITS) and limits["probe"] == gpu.LIMITS["probe"]
    assert (
        limits["step"] == gpu.TOTAL_S - gpu.LIMITS["install"] - gpu.LIMITS["probe"]
        and limits["options"] == 0
    )
    assert "left for another call: options, dino_loss, " in capsys.readouterr().out
    code, limits, _ = ladder(takes=gpu.LIMITS)
    assert (
        list(limits) == ["install", *list(gpu.LIMITS)[3:]]
        and limits["options"] == gpu.LIMITS["options"]
    )
    assert "step       ok, 1 s (before)" in capsys.readouterr().out


def test_what_is_done_is_not_repeated_unless_asked(ladder):
    parts = ("step", "data")
    assert list(ladder(*parts)[1]) == ["install", "step", "data"]
    code, limits, _ = ladder(*parts)
    assert code == 0 and list(limits) == ["install"]
    assert list(ladder(*parts, "--again")[1]) == ["install", "step", "data"]


def test_named_parts_have_all_of_the_time(ladder):
    limits = ladder("step", "data", takes={"install": 10})[1]
    assert limits["step"] == gpu.TOTAL_S - 10 and limits["data"] == limits["step"] / 2


@pytest.mark.parametrize(
    "ended, code, repeated",
    [
        (limited_run.Ended(1, "FAILED: exit code 1"), 1, False),
        (limited_run.Ended(-11, "FAILED: exit code -11"), 1, True),
        (limited_run.Ended(None, "not finished"), limited_run.MORE, True),
        (limited_run.Ended(limited_run.MORE, "something is left"), limited_run.MORE, True),
    ],
)
def test_how_a_part_ended_decides_on_the_next_call(ended, code, repeated, ladder):
    first, limits, _ = ladder("tests", "data", ended={"tests": ended})
    assert first == code and "data" in limits  # begun whatever became of the tests
    assert ("tests" in ladder("tests", "data")[1]) == repeated


def test_flagged_rows_are_counted(tmp_path):
    rows = [
        {"candidate": "a", "failed": "no"},
        {"candidate": "b", "median_ms": 1.0, "differs": "yes"},
        {"candidate": "c"},
    ]
    cases = [{"case": "x", "rows": rows}, {"case": "y", "rows": [], "failed": "no"}]
    path = record.write({"cases": cases}, tmp_path / "s.json")
    assert (
        gpu.flagged(path) == ", 3 flagged in s.json" and gpu.flagged(tmp_path / "none.json") == ""
    )


def test_caches_are_where_they_can_be_carried(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = gpu.environment_of("cuda", tmp_path)
    assert {found["TORCHINDUCTOR_CACHE_DIR"], found["TRITON_CACHE_DIR"]} == {
        f"{tmp_path}/inductor",
        f"{tmp_path}/triton",
    }
    # nothing is saved into results
    assert gpu.make_call(gpu.parse(["--rehearse"])).results.parent == tmp_path
    assert gpu.make_call(gpu.parse([])).logs == ROOT / "build" / "gpu-logs"  # which git ignores


def test_a_rehearsal(tmp_path, capfd, monkeypatch):
    """The planted part runs over, and those after it are measured; the second call repeats nothing
    else. From the background, where a shell has interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        rehearse(tmp_path, capfd, monkeypatch)
    finally:
        signal.signal(signal.SIGINT, before)


def rehearse(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(limited_run, "LEAST_S", 1)
    monkeypatch.setattr(gpu, "PLANTED_S", 2)
    flags = ("--rehearse", "--results", str(tmp_path), "adamw_ema", "planted")
    assert gpu.main(flags) == 0
    said = capfd.readouterr().out
    assert (
        "in runs_over" in said
        and "KeyboardInterrupt" in said
        and "planted    not finished after 2 s, interrupted" in said
    )
    assert "dinofast" in said and "adamw_ema  ok, " in said
    assert (
        json.loads((tmp_path / "adamw_ema-cpu.json").read_text())["cases"][1]["rows"][1][
            "median_ms"
        ]
        > 0
    )
    assert gpu.main(flags) == 0
    said = capfd.readouterr().out
    assert "in runs_over" in said and "s (before)" in said and "bench_adamw_ema.py" not in said
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "adamw_ema-cpu.json",
        "ladder-cpu.json",
    }


def test_code_without_git_is_known_by_its_contents(monkeypatch, tmp_path):
    monkeypatch.delenv("DINOFAST_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    found = []
    for words in ("x = 1", "x = 1", "x = 2"):
        (tmp_path / "kernels" / "a.py").write_text(words)
        found.append(record.commit())
    assert found[0].startswith("code-") and found[0] == found[1] != found[2]
    monkeypatch.setenv("DINOFAST_COMMIT", "abc")
    assert record.commit() == "abc"
