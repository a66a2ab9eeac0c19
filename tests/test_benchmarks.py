"""The machinery of the benchmarks at tiny sizes: candidates agree, numbers are what they are
called, files hold every field."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_adamw_ema
import bench_data
import bench_dino_loss
import bench_step
import cells
import data_on_gpu
import first_batch
import launch_kernels
import official_checkout
import photographs
import report
import tables

from dinofast.bench import baseline as official
from dinofast.bench import record, timing
from dinofast.bench import step as dinofast_bench_step

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


@pytest.fixture
def not_compiled(monkeypatch):
    # 5 s for nothing that is tested here
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Stands in for a checkout: scripts that cannot be imported, with what is taken from them."""
    (tmp_path / "main_dino.py").write_text(
        textwrap.dedent("""\
        import package_that_does_not_exist
        class DINOLoss(nn.Module):
            def __init__(self, out_dim, ncrops, warmup, temp, epochs, nepochs, student_temp=0.1):
                super().__init__()
                self.ncrops, self.temp, self.student_temp = ncrops, np.float64(temp), student_temp
                self.register_buffer('center', torch.zeros(1, out_dim))
            def forward(self, student, teacher, epoch):
                q = F.softmax((teacher - self.center) / self.temp, dim=-1).detach().chunk(2)
                p = F.log_softmax(student / self.student_temp, dim=-1).chunk(self.ncrops)
                batch_center = teacher.sum(0, keepdim=True)
                dist.all_reduce(batch_center)
                rows = len(teacher) * dist.get_world_size()
                self.center = 0.9 * self.center + 0.1 * batch_center / rows
                pairs = [(t, v) for t in range(2) for v in range(self.ncrops) if v != t]
                return sum(-(q[t] * p[v]).sum(-1).mean() for t, v in pairs) / len(pairs)
        """)
    )
    (tmp_path / "utils.py").write_text(
        textwrap.dedent("""\
        import package_that_does_not_exist
        def clip_gradients(model, clip):
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(torch.clamp(clip / (p.grad.norm() + 1e-6), max=1))
        def get_params_groups(model):
            some = [p for p in model.parameters() if p.requires_grad]
            plain = [p for p in some if p.ndim == 1 or p.shape[0] == 1]
            return [{'params': [p for p in some if p.ndim > 1 and p.shape[0] > 1]},
                    {'params': plain, 'weight_decay': 0.0}]
        class MultiCropWrapper(nn.Module):
            def __init__(self, backbone, head):
                super().__init__()
                self.backbone, self.head = backbone, head
            def forward(self, crops):
                return self.head(torch.cat([self.backbone(crop) for crop in crops]))
        """)
    )
    (tmp_path / "vision_transformer.py").write_text(
        textwrap.dedent("""\
        import package_that_does_not_exist
        def drop_path(): ...
        class DropPath: ...
        class Mlp: ...
        class Attention: ...
        class Block: ...
        class PatchEmbed: ...
        class VisionTransformer: ...
        def vit_nano(**options):
            from dinofast.nn.vit import vit_nano
            return vit_nano(**options)
        def DINOHead(width, out_dim):
            from dinofast.nn.head import DINOHead
            return DINOHead(width, out_dim)
        """)
    )
    monkeypatch.setenv("DINO_OFFICIAL", str(tmp_path))
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


def test_candidates_of_the_data_path_agree(monkeypatch, tmp_path):
    monkeypatch.delenv("DINO_OFFICIAL", raising=False)
    monkeypatch.setattr(
        bench_data.backend_dali, "unavailable_reason", lambda device_type: "not here"
    )
    result = record.environment("data", CPU, "a command") | {
        "cases": [bench_data.measure_case(SMALL_DATA, CPU)]
    }
    case = result["cases"][0]
    made = {row["candidate"]: row for row in case["rows"]}
    native = (
        [] if bench_data.backend_native.unavailable_reason() else ["dinofast", bench_data.ALL_CORES]
    )
    assert list(made) == ["official", "dinofast, pil", *native]
    assert (
        case["left_out"][:2]
        == [f"official checkout: {official_checkout.NOT_SET}", "DALI: not here"]
        and case["rounds"] == 2
    )
    for row in made.values():
        assert (
            row["same_crops"]
            and row["cpu_ms"] > 0
            and row["images_per_s"] == 1e3 / row["median_ms"]
        )
    record.save(result, tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert f"| official | {made['official']['images_per_s']:,.0f} | " in tables.data("cpu")


def test_the_data_path_onto_a_gpu_rehearsed(monkeypatch, tmp_path):
    """On the CPU, where the device's memory is not looked at."""
    monkeypatch.setattr(data_on_gpu, "BATCHES", 2)
    case = data_on_gpu.Case(8, 4, (32, 16))
    assert bench_data.candidates_of(case) == tuple(data_on_gpu.CANDIDATES)
    result = record.environment("data", CPU, "a command") | {
        "device_type": "cuda",
        "cases": [bench_data.measure_case(case, CPU)],
    }
    rows = {row["candidate"]: row for row in result["cases"][0]["rows"]}
    absent = [reason.split(":")[0] for reason in result["cases"][0]["left_out"]]
    assert sorted([*rows, *absent]) == sorted(data_on_gpu.CANDIDATES)
    for row in rows.values():
        assert (
            row["images_per_s"] == 1e3 / row["median_ms"] > 0
            and row["cpu_ms"] > 0
            and row["device_gib"] is None
        )
    record.save(result, tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.data("cuda")
    assert "official" not in table.split("|")[1:8] and all(
        f"{row['images_per_s']:,.0f} |" in table or f"{row['images_per_s']:,.0f}** |" in table
        for row in rows.values()
    )


def test_candidates_of_the_step_agree(not_compiled, checkout, monkeypatch, tmp_path):
    first = bench_step.measure_case(
        SMALL_TRAINING._replace(candidates=CANDIDATES_OF_THE_STEP), CPU, 0.01
    )
    made = {row["candidate"]: row for row in first["rows"]}
    assert tuple(made) == CANDIDATES_OF_THE_STEP and not first["left_out"] and first["rounds"] >= 3
    for row in made.values():
        assert row["images_per_s"] == 2 / row["median_ms"] * 1e3 and (
            row["extra_mib"] is None or row["extra_mib"] >= 0
        )
        share = row["images_per_s"] * first["gflop_an_image"] / first["peak_tflops"] / 1e3
        assert (
            row["mfu"] is None
            if row["candidate"].endswith("bf16")
            else row["mfu"] == pytest.approx(share)
        )
        assert row["times_faster_than_official"] == made["official"]["median_ms"] / row["median_ms"]
        assert list(row["parts_ms"]) == (
            [] if row["candidate"] == "official checkout" else list(dinofast_bench_step.PARTS)
        )
    assert "official / it" in record.text(first) and "dinofast, from files" in record.text(first)


def test_ours_is_kept_before_the_others_are_begun(not_compiled, checkout):
    """Each stage of a case; the last row of a candidate replaces the one of its turn alone."""
    stages = []
    for made in bench_step.growing(SMALL_TRAINING, CPU, 0.01):
        stages.append(
            [
                (row["candidate"], len(row["elapsed_ms"]) >= 3, row.get("same_losses"))
                for row in made["rows"]
            ]
        )
    assert stages == [
        [("dinofast", False, None)],
        [("official", False, None), ("dinofast", False, None)],
        [("official", False, True), ("dinofast", False, True)],
        [("official", True, True), ("dinofast", True, True)],
    ]


def test_a_step_that_is_another_is_flagged(not_compiled, monkeypatch):
    monkeypatch.setattr(
        official,
        "clip_gradients",
        lambda model, clip: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
    )
    first, second = bench_step.measure_case(SMALL_TRAINING, CPU, 0.01)["rows"]
    assert (
        first["same_losses"] is True and second["same_losses"] is False and second["median_ms"] > 0
    )
    ours, theirs = second["losses"]
    assert abs(ours - theirs) > bench_step.SAME * theirs
    assert second["differs"] == (
        f"it has a loss of {ours:.6f}, 'official' one of {theirs:.6f}: not the same training step"
    )


@pytest.mark.parametrize(
    "loss, same", [(4.19, True), (4.21, False), (3.79, False), (float("nan"), False)]
)
def test_losses_with_stochastic_depth_are_near(loss, same):
    said = bench_step.compare({"official": [4.0], "dinofast": [loss]}, bench_step.NEAR)
    assert said["official"] == {"same_losses": True} and said["dinofast"]["same_losses"] is same
    assert bench_step.compare({"dinofast": [loss]}, bench_step.NEAR) == {}


@pytest.mark.parametrize("broken", ["official", "dinofast"])
def test_a_candidate_of_the_step_that_fails_is_flagged(broken, not_compiled, monkeypatch):
    """Where it is built; a row of the other is there, and the case goes on."""
    make = bench_step.make

    def fails(case, name, *args, **exact):
        if name == broken:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 GiB\nmore words"
            )
        return make(case, name, *args, **exact)

    monkeypatch.setattr(bench_step, "make", fails)
    case = bench_step.measure_case(SMALL_TRAINING, CPU, 0.01)
    rows = {row["candidate"]: row for row in case["rows"]}
    (other,) = set(rows) - {broken}
    assert rows[broken] == {
        "candidate": broken,
        "failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB",
    }
    assert (
        rows[other]["median_ms"] > 0
        and case["rounds"] >= 3
        and "FLAGGED: " + broken in record.text(case)
    )
    assert rows[other]["times_faster_than_official"] == (1.0 if other == "official" else None)


def test_a_step_without_a_checkout(monkeypatch):
    monkeypatch.delenv("DINO_OFFICIAL", raising=False)
    case = bench_step.measure_case(
        SMALL_TRAINING._replace(candidates=("official checkout", "dinofast")), CPU, 0.01
    )
    assert case["left_out"] == [f"official checkout: {official_checkout.NOT_SET}"]
    assert [row["times_faster_than_official"] for row in case["rows"]] == [None]


def test_crops_that_differ_are_not_timed():
    one = bench_data.Turn("official", lambda: [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)])
    same, off = torch.zeros(4, 3, 4, 4), torch.zeros(4, 3, 4, 4)
    off[3, 2, 3, 3] = 1e-6
    bench_data.check_same(
        [
            one,
            bench_data.Turn("same", lambda: [same]),
            bench_data.Turn("DALI", lambda: [off], same=False),
        ]
    )
    with pytest.raises(AssertionError, match="crops of 'dinofast' differ from 'official'"):
        bench_data.check_same([one, bench_data.Turn("dinofast", lambda: [off])])
    with pytest.raises(AssertionError, match="'DALI' makes other batches"):
        bench_data.check_same([one, bench_data.Turn("DALI", lambda: [off[:2]], same=False)])


def test_photographs_are_repeatable(tmp_path):
    for name in "ab":
        photographs.write(tmp_path / name, 8)
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert 60_000 < sum(path.stat().st_size for path in files[0]) / 8 < 130_000


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


@pytest.fixture
def results(not_compiled, monkeypatch, tmp_path):
    """A results folder with the loss on a CPU."""
    monkeypatch.delenv("DINO_OFFICIAL", raising=False)
    result = record.environment("dino_loss", CPU, "a command")
    result["cases"] = [
        bench_dino_loss.measure_case(SMALL_LOSS._replace(images=b), CPU, 0.01) for b in (3, 5)
    ]
    record.save(result, tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    return tmp_path


def test_a_result_file_has_every_field(results):
    result = json.loads((results / "dino_loss-cpu.json").read_text())
    assert set(result) == {
        "benchmark",
        "device_type",
        "device",
        "threads",
        "cuda",
        "versions",
        "commit",
        "date",
        "command",
        "cases",
    }
    assert set(result["versions"]) == {"dinofast", "python", "torch", "triton"} and result["commit"]
    for case in result["cases"]:
        assert case["rounds"] >= 5 and case["implementation"] and case["dtype"] == "float32"
        assert {frozenset(row) for row in case["rows"]} == {frozenset(ROW)}
    assert [path.name for path in results.iterdir()] == ["dino_loss-cpu.json"]


def test_report_renders_a_file(results):
    shown = tables.speed("dino_loss", "cpu")
    assert "), V = 4, B = 3, K = 50, float32:" in shown and "| B = 5 |" in shown
    row = json.loads((results / "dino_loss-cpu.json").read_text())["cases"][0]["rows"][3]
    assert f"| **dinofast** | **{cells.digits(row['median_ms'])} [" in shown
    assert f"| **{row['times_faster_than_official']:.1f}** |" in shown
    assert (
        f"Left out: official checkout: {official_checkout.NOT_SET}." in shown
        and "`a command`" in shown
    )


def test_report_renders_the_step(monkeypatch, tmp_path):
    def row(name, ms, gib, parts, faster):
        return {
            "candidate": name,
            "median_ms": ms,
            "quartiles_ms": [ms - 1, ms + 1],
            "images_per_s": 128e3 / ms,
            "mfu": 20 / ms,
            "parts_ms": parts,
            "extra_mib": gib and gib * 1024,
            "elapsed_ms": [ms],
            "times_faster_than_official": faster,
        }

    parts = dict.fromkeys(dinofast_bench_step.PARTS, 12.0)
    cases = [
        {
            "case": "one",
            "images": 128,
            "rounds": 3,
            "gflop_an_image": 113.4,
            "peak_tflops": 989,
            "peak": "my word",
            "rows": [
                row("official", 400.0, 20.5, parts, 1.0),
                row("dinofast", 100.0, 10.25, parts, 4.0),
                row("dinofast, CUDA graph", 80.0, None, {}, 5.0),
            ],
            "left_out": ["official checkout: not here"],
        }
    ]
    cases += [
        cases[0] | {"case": "two", "left_out": []},
        {
            **cases[0],
            "case": "three",
            "left_out": [],
            "rows": [row("dinofast", 50.0, 3.0, parts, None)],
        },
    ]
    record.save(
        record.environment("step", CPU, "a command") | {"device_type": "cuda", "cases": cases},
        tmp_path,
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.step("cpu") == "The step: no measurement has been committed yet."
    shown = tables.step("cuda")
    assert shown.startswith("The whole step, one; 113.4 GFLOP an image, MFU of my word:\n\n")
    for line in (
        "| official | 320 | 400 [399, 401] | 1.00 | 5% | 20.50 GiB |",
        "| official |" + " 12.0 |" * 6,
        "| **dinofast** | **1,280** | **100 [99.0, 101]** | **4.00** | **20%** | **10.25 GiB** |",
        "| **dinofast** |" + " **12.0** |" * 6,
        "| dinofast, CUDA graph | 1,600 | 80.0 [79.0, 81.0] | 5.00 | 25% |  |",
        "| two | official | 320 | 1.00 | 5% | 20.50 GiB |",
        "|  | dinofast | 1,280 | 4.00 | 20% | 10.25 GiB |",
        "|  | dinofast, CUDA graph | 1,600 | 5.00 | 25% |  |",
        "| three | dinofast | 2,560 |  | 40% | 3.00 GiB |",
    ):
        assert line in shown, shown
    assert "Left out: official checkout: not here." in shown and "`a command`" in shown
    chart = report.bars()  # of the GPU as soon as there is one
    assert (
        chart.count("<rect") == 3
        and ">1,280 (4.00 x)<" in chart
        and "official in fp16" in chart
        and "threads" not in chart
    )


def test_report_without_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert (
        tables.speed("dino_loss", "cuda") == "`dino_loss`: no measurement has been committed yet."
    )
    assert tables.gpu() == tables.NO_GPU and "\n" not in tables.NO_GPU


@pytest.mark.parametrize(
    "ms, shown", [(0.01234, "0.0123"), (1.234, "1.23"), (45.67, "45.7"), (1234.5, "1,234")]
)
def test_digits(ms, shown):
    assert cells.digits(ms) == shown


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
    ids=lambda x: str(x),
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


def test_the_first_batch_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(first_batch, "drop_caches", lambda: False)  # others need them
    monkeypatch.setattr(os, "sync", lambda: None)
    told = first_batch.measure(1003)  # two folders
    assert told["files"] == 1003 and not told["is_cold"]
    for when in ("first", "again"):
        assert (
            0 < told[f"{when}_list_s"] < told[f"{when}_first_batch_s"]
            and told[f"{when}_peak_mib"] >= 0
        )
    assert 30 < told["list_bytes_an_image"] < 60
    cases = [told | {"rows": [], "left_out": []}]
    record.save(record.environment("first_batch", CPU, "a command") | {"cases": cases}, tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| page cache | " in tables.first_batch() and "1,003 JPEGs" in tables.first_batch()
