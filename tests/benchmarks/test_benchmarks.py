"""The machinery of the benchmarks at tiny sizes: candidates agree, numbers are what they are
called, files hold every field."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_adamw_ema
import bench_data
import bench_dino_loss
import bench_step
import launch_kernels
import official_checkout
import pytest
import torch

from dinofast.bench import baseline as official
from dinofast.bench import record, timing

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")
SMALL_LOSS = bench_dino_loss.Case(4, 3, 50, torch.float32)
SMALL_DATA = bench_data.Case(4, 2, (32, 16))
SMALL_STEP = bench_adamw_ema.Case("step", 2)
SMALL_TRAINING = bench_step.Case("vit_nano", 4, 2, ("official", "dinofast"), 16, 8, 50)
CANDIDATES_OF_THE_STEP = (*bench_step.ON_CPU, "dinofast, from files")
ROW = {
    "candidate",
    "median_ms",
    "quartiles_ms",
    "moved_bytes",
    "gbps",
    "extra_mib",
    "launch_ms",
    "times_faster_than_official",
    "times_the_copy",
    "share_of_copy_bandwidth",
}


def rows(*timings):
    """Rows of candidates given as (name, bytes, times in ms)."""
    return rows_of_timings(
        [
            timing.Timing(timing.Candidate(name, lambda: None, moved), times, 1.0, None)
            for name, moved, times in timings
        ]
    )


def rows_of_timings(timings):
    return {row["candidate"]: row for row in record.rows_of(timings)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates_of_the_loss_agree(not_compiled, monkeypatch, dtype):
    monkeypatch.delenv("DINO_OFFICIAL", raising=False)
    case = bench_dino_loss.measure_case(SMALL_LOSS._replace(dtype=dtype), CPU, 0.01)
    assert [row["candidate"] for row in case["rows"]] == [
        "official",
        "reference",
        "reference, compiled",
        "dinofast",
        "copy of the student's logits",
    ]
    assert case["left_out"] == [f"official checkout: {official_checkout.NOT_SET}"]


def test_a_candidate_that_differs_is_flagged(not_compiled, monkeypatch):
    good = timing.Candidate("official", lambda: (torch.ones(()), torch.ones(3), torch.ones(3)))
    bad = timing.Candidate(
        "wrong", lambda: (torch.ones(()), torch.tensor([1.0, 1.0, 1.01]), torch.ones(3))
    )
    nan = timing.Candidate(
        "nan", lambda: (torch.tensor(float("nan")), torch.ones(3), torch.ones(3))
    )
    fails = timing.Candidate("fails", lambda: 1 / 0)
    assert bench_dino_loss.differing([good, bad, nan, fails], 1e-4) == {
        "wrong": "gradient is off by 0.0058 from that of 'official', above 0.0001",
        "nan": "loss is off by nan from that of 'official', above 0.0001",
    }
    monkeypatch.setattr(
        bench_dino_loss, "differing", lambda candidates, tolerance: {"dinofast": "no"}
    )
    case = bench_dino_loss.measure_case(SMALL_LOSS, CPU, 0.01)
    assert [row["candidate"] for row in case["rows"] if "differs" in row] == ["dinofast"]
    assert "FLAGGED: dinofast: no" in record.text(case)


def test_an_optimizer_that_differs_is_flagged(monkeypatch):
    model = bench_adamw_ema.make_model(SMALL_STEP)
    other = bench_adamw_ema._shifted(model)
    assert bench_adamw_ema.differing((model, model), (model, model)) == ""
    assert bench_adamw_ema.differing((model, other), (model, model)).endswith(
        "is off by up to 0.1 from the official one"
    )
    monkeypatch.setattr(
        bench_adamw_ema.official, "average", lambda student, teacher, momentum: None
    )
    case = bench_adamw_ema.measure_case(SMALL_STEP, CPU, 0.01)
    assert {row["candidate"] for row in case["rows"] if "differs" in row} == {
        "torch, foreach and fused",
        "dinofast",
    }


def test_a_candidate_that_fails_is_flagged_and_the_others_go_on():
    calls = []

    def fails_at_last():
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("out of memory")

    candidates = [
        timing.Candidate("official", lambda: None),
        timing.Candidate("at once", lambda: 1 / 0),
        timing.Candidate("later", fails_at_last),
        timing.Candidate("good", lambda: None),
    ]
    found = rows_of_timings(timing.measure(candidates, CPU, 0.0))
    assert found["at once"] == {
        "candidate": "at once",
        "failed": "ZeroDivisionError: division by zero",
    }
    assert found["later"]["failed"] == "RuntimeError: out of memory" and len(calls) == 5
    assert len(found["good"]["elapsed_ms"]) == 5 and found["good"]["times_faster_than_official"] > 0
    alone = rows_of_timings(timing.measure([timing.Candidate("good", lambda: None)], CPU, 0.0))[
        "good"
    ]
    assert alone["times_faster_than_official"] is None and alone["times_the_copy"] is None


def test_without_a_compiler_the_row_is_left_out():
    def fails():
        raise torch._dynamo.exc.BackendCompilerFailed(
            lambda: None, RuntimeError("No working C++ compiler"), None
        )

    assert "torch.compile fails here (BackendCompilerFailed" in bench_dino_loss.why_not(fails)


def test_checkout_is_a_row(not_compiled, checkout):
    case = bench_dino_loss.measure_case(SMALL_LOSS, CPU, 0.01)
    assert (
        "official checkout" in [row["candidate"] for row in case["rows"]] and not case["left_out"]
    )
    case = bench_adamw_ema.measure_case(SMALL_STEP, CPU, 0.01)
    assert (
        "official checkout" in [row["candidate"] for row in case["rows"]] and not case["left_out"]
    )
    assert record.environment("x", CPU, "y")["command"] == "DINO_OFFICIAL=DIR y"


def test_what_is_no_checkout(checkout):
    with pytest.raises(
        ValueError, match="has no missing.py: name a checkout of facebookresearch/dino"
    ):
        official_checkout.take("missing.py", "DINOLoss")
    with pytest.raises(ValueError, match="defines no DINOLoss: DINO_OFFICIAL must name a checkout"):
        official_checkout.take("utils.py", "DINOLoss")


def test_our_rewrite_clips_as_the_official_code():
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 2), 3.0), torch.tensor([0.3, 0.4])
    norms = official.clip_gradients(layer, 3.0)
    assert norms == pytest.approx([6.0, 0.5])
    torch.testing.assert_close(layer.weight.grad, torch.full((2, 2), 1.5))
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.3, 0.4]))


def test_arithmetic_of_the_rows():
    made = rows(
        ("official", None, [40.0, 41.0, 39.0]),
        ("dinofast", 8 * 10**9, [2.0, 1.0, 4.0]),
        ("copy of the logits", 10**9, [0.5, 0.5, 0.5]),
        ("copy of 1 GiB", 2 * 10**9, [0.4, 0.4, 0.4]),
    )
    ours = made["dinofast"]
    assert ours["median_ms"] == 2.0 and ours["quartiles_ms"] == [1.5, 3.0]
    assert ours["times_faster_than_official"] == 20.0 and ours["times_the_copy"] == 4.0
    # of the larger copy
    assert ours["gbps"] == 4000.0 and ours["share_of_copy_bandwidth"] == pytest.approx(0.8)
    assert made["official"]["gbps"] is None and made["official"]["share_of_copy_bandwidth"] is None


def test_bytes_are_those_of_the_scheme(monkeypatch):
    student = torch.empty(10, 3, 7, dtype=torch.bfloat16)
    for implementation, slabs in (("cpp", 22), ("triton", 34)):
        monkeypatch.setattr(
            bench_dino_loss.ops, "paths", lambda i=implementation: {"dino_loss": {"cpu": i}}
        )
        assert bench_dino_loss.moved_bytes(student) == slabs * 3 * 7 * 2
    monkeypatch.setattr(
        bench_dino_loss.ops, "paths", lambda: {"dino_loss": {"cpu": "reference (plain torch)"}}
    )
    assert bench_dino_loss.moved_bytes(student) is None


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setitem(timing.ROUNDS, "cpu", (3, 3))
    order = []
    timings = timing.measure(
        [timing.Candidate(name, lambda name=name: order.append(name)) for name in "AB"], CPU, 0.0
    )
    assert "".join(order[-12:]) == "AABBAABBAABB"  # each once untimed, then timed
    assert [len(t.elapsed_ms) for t in timings] == [3, 3]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_of_a_call_on_the_cpu():
    def call():
        scratch = torch.ones(48 * timing.MIB // 4)
        return (scratch[: 16 * timing.MIB // 4].clone(),)

    found = timing._CpuClock().extra_mib(call)
    assert found == pytest.approx(48, abs=6)  # the 16 MiB that it returns are not extra


@pytest.mark.skipif(
    not importlib.util.find_spec("pytest_benchmark"), reason="needs pytest-benchmark"
)
@pytest.mark.parametrize("broken", [False, True])
def test_pytest_runs_and_reports_the_cases(tmp_path, broken):
    """A whole session over one small case: pytest-benchmark records its rows; a candidate that
    differs fails the test."""
    for name in ("conftest.py", "official_checkout.py", "bench_adamw_ema.py"):
        (tmp_path / name).write_text((ROOT / "benchmarks" / name).read_text())
    with (tmp_path / "bench_adamw_ema.py").open("a") as f:
        f.write("\n\ndef cases(device):\n    return [Case('step', 2)]\n")
        if broken:
            f.write(
                "\n\nMOMENTUM = 0.5\nofficial.average = lambda student, teacher, momentum: None\n"
            )
    environment = {
        k: v
        for k, v in os.environ.items()
        if k != "DINO_OFFICIAL" and not k.startswith("PYTEST_XDIST")
    }
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        (
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-o",
            "python_files=bench_*.py",
            ".",
            "--device",
            "cpu",
            "--save-results",
            "results",
            "--benchmark-json",
            "record.json",
            "-p",
            "no:cacheprovider",
        ),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    rows = json.loads((tmp_path / "results" / "adamw_ema-cpu.json").read_text())["cases"][0]["rows"]
    assert official_checkout.NOT_SET in done.stdout and "official / it" in done.stdout
    if broken:
        assert (
            done.returncode == 1
            and "from the official one" in done.stdout
            and "FLAGGED" in done.stdout
        ), done.stdout
        return
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (one,) = json.loads((tmp_path / "record.json").read_text())["benchmarks"]
    assert one["extra_info"]["rows"] == rows and one["stats"]["rounds"] == 1


@pytest.mark.parametrize(
    "module, small",
    [(bench_dino_loss, SMALL_LOSS), (bench_adamw_ema, SMALL_STEP)],
    ids=["dino_loss", "adamw_ema"],
)
def test_on_a_gpu(gpu, not_compiled, monkeypatch, module, small):
    monkeypatch.delenv("DINO_OFFICIAL", raising=False)
    case = module.measure_case(small, torch.device("cuda"), 0.01)
    rows = {row["candidate"]: row for row in case["rows"]}
    assert 100 < rows["copy of 1 GiB"]["gbps"] < 20_000
    assert all(row["launch_ms"] > 0 and row["median_ms"] > 0 for row in rows.values())
    assert rows["copy of 1 GiB"]["extra_mib"] == 0


def test_the_step_on_a_gpu(gpu, not_compiled):
    candidates = ("official", bench_step.CAREFUL, "dinofast", "dinofast, from files")
    case = bench_step.measure_case(
        SMALL_TRAINING._replace(candidates=candidates), torch.device("cuda"), 0.01
    )
    assert tuple(row["candidate"] for row in case["rows"]) == candidates and not record.flags(case)
    for row in case["rows"]:
        assert row["extra_mib"] > 0 and sum(row["parts_ms"].values()) == pytest.approx(
            row["median_ms"], rel=0.5
        )


def test_kernels_are_launched():
    assert launch_kernels.dino_loss(CPU) > 10 and launch_kernels.adamw_ema(CPU) > 10
