"""The measurement of the step: numbers that agree with each other, every word of the report, and
nothing left behind."""

import re
import tempfile
import threading
from dataclasses import replace

import pytest
import torch

from dinofast import cli
from dinofast.bench import step as bench_step
from dinofast.bench.step import (
    PARTS,
    Clock,
    StepRunner,
    Synthetic,
    Timed,
    in_turns,
    measure,
    report,
    warm_up,
)
from dinofast.config import Config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = dict(
    arch="vit_nano",
    patch_size=4,
    global_crops_size=16,
    local_crops_size=8,
    local_crops_number=2,
    out_dim=64,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    batch_size_per_gpu=4,
    num_workers=1,
    device="cpu",
)
FLAGS = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
MS = {
    "data": 1.0,
    "teacher": 20.0,
    "student": 30.0,
    "loss": 4.0,
    "backward": 40.0,
    "optimizer": 5.0,
}


@pytest.fixture(autouse=True)
def peak(monkeypatch):
    """Measuring it takes longer than all that is tested here."""
    monkeypatch.setattr(
        bench_step, "peak_flops", lambda device, dtype: (1e12, "1 TFLOP/s by my word")
    )


def table(text):
    """Rows of a report, name -> column -> number."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if "images/s" in line and "MFU" in line)
    ends = {m[0]: m.end() for m in re.finditer(r"\S+", lines[at])}
    rows = {}
    for line in lines[at + 1 : lines.index("", at)]:
        cells = {
            name: re.search(r"(\[[^\]]*\]|\S+)?$", line.ljust(end)[:end])[0]
            for name, end in ends.items()
        }
        rows[re.split("  +", line)[0]] = {
            name: float(cell.strip("%").replace(",", ""))
            for name, cell in cells.items()
            if cell and name != "[quartiles]"
        }
    return rows


@pytest.mark.parametrize(
    "flags, rows",
    [([], 2), (["--local_crops_number", "0"], 2), (["FOLDER"], 3), (["--data_path", "FOLDER"], 3)],
    ids=str,
)
def test_the_command(flags, rows, photographs, tmp_path, monkeypatch, capsys):
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    for folder in (here, temporary):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    flags = [str(photographs) if flag == "FOLDER" else flag for flag in flags]
    assert (
        cli.main(
            [
                "bench-step",
                *FLAGS,
                "--seconds",
                "0.1",
                "--output_dir",
                "out",
                "--linear",
                "blas",
                *flags,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    crops = "2 x 16" if "0" in flags else "2 x 16 and 2 x 8"
    assert said.startswith(
        f"vit_nano/4, 4 images a step, {crops} crops, K = 64; CPU, {torch.get_num_threads()} "
        "threads\ndinofast: fp32, attention sdpa, not compiled\nofficial loop: fp32, eager, as "
        "published\nwarming up, then 0.1 s in turns\n"
    )
    found = table(said)
    assert list(found) == ["dinofast", *["dinofast, from files"][: rows - 2], "official loop"]
    cfg = replace(Config(**TINY), local_crops_number=0 if "0" in flags else 2)
    flops = bench_step.flops_of(cfg, bench_step.new_model(cfg).student.backbone)
    assert f"an image takes {flops / 1e9:.4g} GFLOP" in said
    for row in found.values():
        assert set(row) == {"images/s", "MFU", "ms/step", *PARTS}  # no GiB on a CPU
        assert row["images/s"] == pytest.approx(4e3 / row["ms/step"], rel=0.02)  # both are rounded
        share = row["images/s"] * flops / 1e12 * 100  # in three digits, MFU in one decimal
        assert abs(row["MFU"] - share) <= 0.051 + 0.01 * share
        # medians of few turns, on a machine that may be busy
        assert 0.2 < sum(row[part] for part in PARTS) / row["ms/step"] < 1.8
    ratio = found["dinofast"]["images/s"] / found["official loop"]["images/s"]
    assert float(re.search(r"\n([\d.]+) times as many images a second", said)[1]) == pytest.approx(
        ratio, rel=0.02
    )
    assert (" times from files" in said) == (rows == 3)
    assert not list(here.iterdir()) and not list(temporary.glob("dinofast*"))
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("dinofast-crops")
    ]


def test_the_report():
    timed = [
        Timed("dinofast", [90.0, 100.0, 104.0], MS, 1.5),
        Timed("dinofast, from files", [200.0, 200.0, 200.0], MS, 1.5),
        Timed("official loop", [399.0, 400.0, 402.0], {**MS, "optimizer": 305.0}, 3.25),
    ]
    text = report(timed, 64, 10**9, 1e12, "the data sheet's 1 TFLOP/s", 10)
    assert max(map(len, text.splitlines())) <= 125
    rows = table(text)
    other = table(
        report(
            [*timed[:2], replace(timed[2], of_peak=False)],
            64,
            10**9,
            1e12,
            "the data sheet's 1 TFLOP/s",
            10,
        )
    )
    assert (
        "MFU" not in other["official loop"]
        and other["official loop"]["images/s"] == rows["official loop"]["images/s"]
    )
    assert rows["dinofast"] == {"images/s": 640, "MFU": 64.0, "ms/step": 100, **MS, "GiB": 1.5}
    assert rows["official loop"] == {
        "images/s": 160,
        "MFU": 16.0,
        "ms/step": 400,
        **MS,
        "optimizer": 305.0,
        "GiB": 3.25,
    }
    assert "[95.0, 102]" in text and "CUDA graph" not in text
    legend = dict(
        line.split(maxsplit=1) for line in text.split("\n\n")[1].splitlines() if line[0] != " "
    )
    assert list(legend) == ["MFU", "ms/step", *PARTS, "GiB"]
    assert legend["ms/step"] == "median of 3 turns of 10 steps; then its parts, in ms as well"
    assert legend["MFU"].startswith("share of the data sheet's 1 TFLOP/s; an image takes 1 GFLOP, ")
    assert text.endswith(
        "\n\n4.00 times as many images a second as the official loop, 2.00 times from files"
    )


def test_the_report_of_a_cuda_graph():
    timed = [
        Timed("dinofast", [90.0, 100.0, 104.0], {}, None),
        Timed("official loop", [400.0] * 3, MS, 3.25),
    ]
    text = report(timed, 64, 10**9, 1e12, "my word", 10)
    assert table(text)["dinofast"] == {"images/s": 640, "MFU": 64.0, "ms/step": 100}
    assert (
        "which a CUDA graph does not tell apart" in " ".join(text.split())
        and "keeps its own" in text
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seconds", "0"], "--seconds is 0: give a number above 0"),
        (["--seconds", "inf"], "--seconds is inf"),
        (
            ["--accumulate", "2"],
            "--accumulate is 2: the official loop that is timed beside has 1 alone; leave it out",
        ),
        (
            ["--optimizer", "sgd"],
            "--optimizer is sgd: the official loop that is timed beside has adamw alone",
        ),
        (
            ["--arch", "resnet50"],
            "--arch resnet50: the operations of our ViTs alone are counted; take vit_tiny",
        ),
        (["--patch_size", "5"], "--global_crops_size 16 is not a multiple of --patch_size 5"),
        (["--second", "3"], "Did you mean --seconds?"),
        (["no such folder"], "'no such folder' does not exist"),
        (["--teacher_precision", "bf16"], "--teacher_precision bf16 goes with"),
        (["FOLDER", "--batch_size_per_gpu", "49"], "has 48 images but one step takes 49"),
    ],
)
def test_what_cannot_be_is_said(flags, message, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [str(photographs) if flag == "FOLDER" else flag for flag in flags]
    assert cli.main(["bench-step", *FLAGS, *flags]) == 2
    out, said = capsys.readouterr()
    assert message in said and said.count("\n") == 1 and not out and not list(tmp_path.iterdir())


def test_what_is_not_done_is_said():
    lines = []
    measure(Config(**TINY, cuda_graph=True), None, 0.01, lines.append)
    assert lines[2] == "note: `cuda_graph`: without it, as there is no GPU"


@pytest.mark.parametrize(
    "precision, official", [(None, "fp16"), ("bf16", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")]
)
def test_precision_of_the_official_loop(precision, official):
    """It has no bf16, and autocasts on GPUs alone."""
    cfg = Config(precision=precision)
    assert (
        bench_step.official_precision(cfg, CUDA) == official
        and bench_step.official_precision(cfg, CPU) == "fp32"
    )


def test_synthetic_crops():
    first, second = (next(Synthetic(Config(**TINY), CPU, torch.bfloat16)) for _ in range(2))
    assert [tuple(x.shape) for x in first] == [(8, 3, 16, 16), (8, 3, 8, 8)] and first[
        0
    ].dtype == torch.bfloat16
    assert (
        all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        and 0.9 < first[0].float().std() < 1.1
    )
    assert len(next(Synthetic(Config(**TINY | {"local_crops_number": 0}), CPU, torch.float32))) == 1


def test_the_clock_on_a_cpu(monkeypatch):
    seconds = iter([1.0, 1.5, 1.75, 2.75, 2.875, 7.0, 7.25])
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: next(seconds))
    clock = Clock(CPU)
    for part in ("start", "data", "teacher", "data", "teacher"):  # two steps
        clock.mark(part)
    assert clock.take() == {"data": 1500.0, "teacher": 375.0} and clock.take() == {}
    clock.mark("start")
    clock.mark("loss")
    assert clock.take() == {"loss": 250.0}


def test_the_clock_on_a_gpu(monkeypatch):
    """Events alone are recorded: the device's times are asked for in `take`, and by then it has
    finished."""
    now, asked = iter([10.0, 12.0, 15.0, 16.5]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_ms = next(now)

        def elapsed_time(self, end):
            asked.append(end)
            return end.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(CUDA)
    for part in ("start", "data", "teacher", "data"):
        clock.mark(part)
    assert not asked and clock.take() == {"data": 3.5, "teacher": 3.0} and clock.take() == {}


class Counted:
    """A step that notes its turns and whether gradients were there when a turn began."""

    def __init__(self, name, order):
        self.name, self.order, self.graph, self.steps, self.active = name, order, None, [], False
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1)

    def activate(self):
        self.active = True

    def __call__(self, step, batches):
        self.order.append((self.name, self.weight.grad is None, self.active))
        self.steps.append(step)
        self.weight.grad = torch.ones(1)
        return self.weight.sum()


def test_candidates_take_turns(monkeypatch):
    monkeypatch.setattr(bench_step, "TABLE_STEPS", 4)
    order = []
    steps = [Counted(name, order) for name in "AB"]
    candidates = [StepRunner(step.name, step, iter(()), None) for step in steps]
    for candidate in candidates:
        warm_up(candidate, CPU)
    timed = in_turns(candidates, CPU, 0.0)
    assert "".join(name for name, _, _ in order) == "AABBABABAB"  # each warmed up, then three turns
    # gradients are let go of between turns
    assert [free for _, free, _ in order] == [True, False, True, False] + [True] * 6
    assert all(active for *_, active in order)
    assert steps[0].steps == [0, 1, 2, 3, 0]  # within the tables
    assert [(len(t.step_ms), t.parts_ms, t.peak_gib) for t in timed] == [(3, {}, None)] * 2


class Ahead:
    """A loader that makes a batch a second, `ready` of them ahead, and steps that take no time:
    what is made meanwhile is there at once."""

    def __init__(self, ready, clock):
        self.ready, self.made_at, self.clock = ready, [], clock

    def __next__(self):
        self.made_at = [max(at, self.clock[0] - self.ready) for at in self.made_at[-1:]] or [
            self.clock[0]
        ]
        self.made_at[0] += 1.0
        self.clock[0] = max(self.clock[0], self.made_at[0])
        return []


@pytest.mark.parametrize("device, steps", [(CPU, 1), (CUDA, 10)], ids=str)
def test_batches_made_in_the_turns_of_others_do_not_count(device, steps, monkeypatch):
    """Three are ready when a turn begins, and each later one takes a second: so does each step, by
    the clock of the turn."""
    now, ready = [0.0], 3
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    counted = Counted("from files", [])
    loader, take = Ahead(ready, now), counted.__call__
    monkeypatch.setattr(
        Counted, "__call__", lambda self, step, batches: (next(batches), take(step, batches))[1]
    )
    for discarded, ms in ((ready, 1000.0), (0, 1000.0 * max(0, steps - ready) / steps)):
        candidate = StepRunner("from files", counted, loader, None, ready=discarded)
        candidate.turn(device, steps)
        now[0] += 100.0  # others have their turns
        assert candidate.turn(device, steps)[0] == pytest.approx(ms)


def test_marks_of_steps_that_do_not_count_are_dropped(monkeypatch):
    """Each step takes a second, of which two do not count."""
    now = [0.0]
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: now[0])
    counted, clock = Counted("from files", []), Clock(CPU)

    def take(self, step, batches):
        now[0] += 1.0
        clock.mark("data")

    monkeypatch.setattr(Counted, "__call__", take)
    candidate = StepRunner("from files", counted, iter(()), clock, ready=2)
    assert candidate.turn(CPU, 3) == (1000.0, {"data": 1000.0}) and candidate.done == 5


@pytest.mark.parametrize(
    "backend, workers, ready",
    [("native", 4, 3), ("dali", 1, 3), ("pil", 4, 8), ("pil", 0, 0), ("native", 0, 0)],
)
def test_batches_that_a_loader_may_have_ready(backend, workers, ready):
    loader = type("Loader", (), {"backend": backend, "n_workers": workers})
    assert bench_step.ready(loader) == ready


def test_memory_of_a_gpu_is_what_a_turn_adds(monkeypatch):
    """A CUDA graph's memory stays, so nothing is said of it."""
    for name, value in dict(
        synchronize=None,
        reset_peak_memory_stats=None,
        memory_allocated=2**30,
        max_memory_allocated=3 * 2**30 + 2**29,
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    plain, graph = Counted("plain", []), Counted("graph", [])
    graph.graph = object()
    candidates = [StepRunner(step.name, step, iter(()), None) for step in (plain, graph)]
    for candidate in candidates:
        warm_up(candidate, CUDA)
    timed = in_turns(candidates, CUDA, 0.0)
    assert [t.peak_gib for t in timed] == [2.5, None]
    assert len(plain.steps) == bench_step.WARM_UP + 3 * bench_step.TURN["cuda"]


def test_a_cuda_graph_has_no_parts(monkeypatch):
    cfg = Config(**TINY)
    schedule = bench_step.schedule_of(cfg, CPU)
    step, clock = bench_step.ours(cfg, CPU, schedule)
    assert clock is not None and step.model.mark == clock.mark
    monkeypatch.setattr(
        bench_step.Step, "_choose_graph", lambda self: setattr(self, "graph", object()) or "a graph"
    )
    assert bench_step.ours(cfg, CPU, schedule)[1] is None
