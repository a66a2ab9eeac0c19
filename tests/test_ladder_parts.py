"""What the parts of `make gpu` find: the probe, the candidates, the record of the GPU tests; on
stand-ins for a GPU."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_step
import gpu_tests
import probe
import step_options
import tables

from dinofast.bench import record, timing
from dinofast.bench import step as step_clock
from dinofast.bench.step import Timed
from dinofast.config import Config
from dinofast.nn.attention import ATTENTIONS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ---- the clock of kernels
class FakeCuda:
    """A device on which `_sleep` takes its cycles at 1 GHz and a call 2 ms; what `timing` asks of
    torch.cuda."""

    def __init__(self):
        self.now_ms, self.allocated, self.peak = 0.0, 2**20, 2**20

    def Event(self, enable_timing):
        event = SimpleNamespace(at_ms=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at_ms", self.now_ms)
        event.elapsed_time = lambda end: end.at_ms - event.at_ms
        return event

    def call(self):
        self.now_ms += 2.0
        self.peak = self.allocated + 3 * 2**20

    def _sleep(self, cycles):
        self.now_ms += cycles / 1e6

    def synchronize(self, device=None):
        pass

    def reset_peak_memory_stats(self, device):
        self.peak = self.allocated

    def memory_allocated(self, device):
        return self.allocated

    def max_memory_allocated(self, device):
        return self.peak

    def get_device_properties(self, device):
        return SimpleNamespace(
            L2_cache_size=50 * 2**20, name="a GPU", major=9, minor=0, total_memory=80 * 2**30
        )

    def mem_get_info(self, device):
        return 79 * 2**30, 80 * 2**30


def test_the_clock_of_kernels_on_a_gpu(monkeypatch):
    """Device time by events: the head start of the host and the flush of the cache are not in
    it."""
    cuda, flushed = FakeCuda(), []
    monkeypatch.setattr(
        timing,
        "torch",
        SimpleNamespace(
            cuda=cuda, randn=lambda n, device: SimpleNamespace(sum=lambda: flushed.append(n))
        ),
    )
    candidates = [timing.Candidate("good", cuda.call), timing.Candidate("fails", lambda: 1 / 0)]
    measured, failed = timing.measure(candidates, CUDA, 0.0)
    assert (
        measured.elapsed_ms == pytest.approx([2.0] * timing.ROUNDS["cuda"][0])
        and measured.extra_mib == 3.0
    )
    assert len(flushed) == 20 and set(flushed) == {64 * 2**20} and measured.launch_ms >= 0
    assert failed.failed == "ZeroDivisionError: division by zero" and failed.elapsed_ms == []


# ---- the probe
def test_the_probe_has_what_the_design_asks_for():
    case = probe.Case("products")
    assert (
        case.runs() == {224: (256, 197), 96: (1024, 37)}
        and sum(n * each for n, each in case.runs().values()) == 88_320
    )
    assert list(probe.WORK) == [
        "device",
        "ceilings",
        "products",
        "attention of large crops",
        "attention of small crops",
        "attention of the mix",
        probe.EAGER,
        probe.COMPILED,
    ]
    assert len({str(case) for case in probe.cases(CUDA)}) == len(probe.WORK)


@pytest.mark.parametrize("what", list(probe.WORK)[1:7])
def test_the_probe_at_tiny_sizes(what):
    (case,) = (case for case in probe.rehearsal() if case.what == what)
    made = probe.measure_case(case, CPU, 0.001)
    rows = {row["candidate"]: row for row in made["rows"]}
    timed = {name: row for name, row in rows.items() if "failed" not in row}
    assert (
        made["case"] == str(case)
        and all(row["median_ms"] > 0 for row in timed.values())
        and record.text(made)
    )
    if what == "ceilings":
        assert timed["copy of 1 MiB"]["gbps"] == pytest.approx(
            2 * 2**20 / timed["copy of 1 MiB"]["median_ms"] / 1e6
        )
        assert timed["product, 256 squared, bf16"]["tflops"] > 0
    if what == "products":
        assert made["tokens"] == 4 * 17 + 16 * 5 and len(timed) == 12
        row = timed["fc1, of the weight"]
        assert row["tflops"] == pytest.approx(
            2 * made["tokens"] * 48 * 192 / row["median_ms"] / 1e9
        )
    if what.startswith("attention"):
        assert {name.split(",")[0] for name in rows} == set(ATTENTIONS) and {
            "sdpa, forward",
            "eager, backward",
        } <= set(timed)
        assert all(
            row["failed"].startswith("ValueError: `attention`")
            for row in rows.values()
            if "failed" in row
        )
        sequences = {
            "large crops": [(4, 17)],
            "small crops": [(16, 5)],
            "the mix": [(4, 17), (16, 5)],
        }[what[13:]]
        scores = sum(n * tokens**2 for n, tokens in sequences)
        assert timed["sdpa, forward"]["tflops"] == pytest.approx(
            4 * 48 * scores / timed["sdpa, forward"]["median_ms"] / 1e9
        )
    if what == probe.EAGER:
        assert made["kernels"][0]["total_us"] > 0 and made["n_kernels"] > 10 and made["stand_in"]
        assert (
            made["kernels_us"] + made["gaps_us"]
            <= 1.5e3 * timed["without the profiler"]["quartiles_ms"][1] * 10
        )


def test_facts_of_a_gpu(monkeypatch):
    for name in ("get_device_properties", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(FakeCuda(), name))
    found = probe.measure_case(probe.Case("device"), CUDA)["facts"]
    assert (
        found["name"] == "a GPU"
        and found["L2_cache_size"] == 50 * 2**20
        and found["free_memory"] == 79 * 2**30
    )
    assert found["clock_rate"] is None and found["numpy"]


@dataclass
class Event:
    name: str
    start: float
    end: float
    device_type: object = torch.autograd.DeviceType.CUDA
    is_user_annotation: bool = False
    cpu_parent: object = None

    @property
    def time_range(self):
        return SimpleNamespace(start=self.start, end=self.end)


def test_the_table_of_kernels():
    """Of two steps: kernels that overlap or lie within others leave no gap, annotations and the
    host are no kernels."""
    host = torch.autograd.DeviceType.CPU
    events = [
        Event("b", 40.0, 50.0),
        Event("a", 0.0, 10.0),
        Event("a", 5.0, 20.0),
        Event("c", 52.0, 53.0),
        Event("c", 41.0, 42.0),
        Event("a", 53.0, 60.0),
        Event("launch", 0.0, 90.0, host),
        Event("Optimizer.step", 0.0, 100.0, is_user_annotation=True),
    ]
    found = probe.spans(events, CUDA)
    assert len(found) == 6
    table = probe.kernel_table(found, 2)
    assert [(row["kernel"], row["calls"], row["total_us"]) for row in table["kernels"]] == [
        ("a", 1.5, 16.0),
        ("b", 0.5, 5.0),
        ("c", 1.0, 1.0),
    ]
    assert sum(row["share"] for row in table["kernels"]) == pytest.approx(1.0)
    assert (table["kernels_us"], table["gaps_us"], table["n_gaps"], table["n_kernels"]) == (
        22.0,
        11.0,
        1.0,
        3.0,
    )
    many = probe.kernel_table([(str(i), i, i + 0.5) for i in range(100)], 1)
    assert (
        len(many["kernels"]) == probe.SHOWN
        and many["n_names"] == 100
        and probe.kernel_table([], 1)["kernels_us"] == 0
    )


# ---- candidates
@pytest.fixture
def steps(monkeypatch):
    """Steps of so many ms as their options say; which were built, and with what loss each
    begins."""
    built, losses = [], {"linear": 9.0}
    ms = {
        "attention": -10.0,
        "residual_precision": -0.5,
        "cuda_graph": 5.0,
        "batch_size_per_gpu": 60.0,
        "linear": -30.0,
    }

    def build(case, device, options):
        if "teacher_precision" in options:
            raise torch.OutOfMemoryError("CUDA out of memory")
        built.append(options)
        step_ms = 100.0 + sum(ms[name] for name in options)
        cfg = SimpleNamespace(batch_size_per_gpu=options.get("batch_size_per_gpu", 128))
        step = SimpleNamespace(
            cfg=cfg, how=f"attention {options.get('attention', 'varlen')}, compiled", ms=step_ms
        )
        loss = next((losses[name] for name in options if name in losses), 11.0)
        return step_options.Best(
            options, step_clock.StepRunner(str(case), step, iter(()), None), (loss, 1.0)
        )

    monkeypatch.setattr(step_options, "build", build)
    monkeypatch.setattr(
        step_clock,
        "in_turns",
        lambda candidates, device, seconds: [
            Timed(candidate.name, [candidate.step.ms] * 3, {}, None) for candidate in candidates
        ],
    )
    step_options._best.clear()
    yield built
    step_options._best.clear()


def climb(*options, before=()):
    """The ledger after these candidates."""
    ledger = record.Ledger(record.environment("options", CPU, "a command"), None)
    ledger.result["cases"] = list(before)
    step = bench_step.rehearsal()[0]
    for each in options:
        record.measure_into(ledger, step_options, step_options.Case(step, each), CPU)
    return {case["case"]: case for case in ledger.cases}


ORDER = [
    (("attention", "fa3"),),
    (("residual_precision", "bf16"),),
    (("linear", "onednn"),),
    (("teacher_precision", "bf16"),),
    (("cuda_graph", True),),
    (("batch_size_per_gpu", 256),),
    (),
]


def test_candidates_stand_on_the_best_so_far(steps):
    """Kept from 1 % on, and not if the losses are others; what fails is flagged, and the next
    stands on what stood before."""
    found = climb(*ORDER)
    assert [name for name, case in found.items() if case["kept"]] == [
        "--attention fa3",
        "--batch_size_per_gpu 256",
    ]
    assert (
        found["--attention fa3"]["gain"] == pytest.approx(100 / 90)
        and found["--attention fa3"]["on_top_of"] == {}
    )
    assert (
        found["--residual_precision bf16"]["gain"] == pytest.approx(90 / 89.5)
        and 90 / 89.5 < step_options.GAIN
    )
    assert [row["median_ms"] for row in found["--cuda_graph true"]["rows"]] == [90.0, 95.0]
    other = found["--linear onednn"]
    assert other["gain"] > 1.4 and other["rows"][1]["same_losses"] is False
    assert other["rows"][1]["losses"] == [[9.0, 1.0], [11.0, 1.0]]
    assert found["--teacher_precision bf16"]["failed"] == "OutOfMemoryError: CUDA out of memory"
    batch = found["--batch_size_per_gpu 256"]
    assert batch["on_top_of"] == {"attention": "fa3"} and batch["gain"] == pytest.approx(
        256 / 150 / (128 / 90)
    )
    last = found[step_options.ALL_KEPT]
    assert last["options"] == {"attention": "fa3", "batch_size_per_gpu": 256} and not last["kept"]
    assert last["gain"] == pytest.approx(256 / 150 / (128 / 100))
    # stays warm
    assert [options for options in steps if options == {"attention": "fa3"}] == [
        {"attention": "fa3"}
    ]


def test_candidates_go_on_from_what_was_kept(steps):
    first = climb(*ORDER[:2])
    step_options._best.clear()  # another process
    found = climb(*ORDER[4:], before=first.values())
    assert found["--cuda_graph true"]["on_top_of"] == {"attention": "fa3"}
    assert found[step_options.ALL_KEPT]["options"] == {
        "attention": "fa3",
        "batch_size_per_gpu": 256,
    }


def test_what_the_best_has_is_no_candidate(steps):
    found = climb((("attention", "varlen"),), ())
    assert found["--attention varlen"]["left_out"] == [
        "--attention varlen: the best so far has it"
    ] and steps == [{}]
    assert found[step_options.ALL_KEPT]["left_out"] == [f"{step_options.ALL_KEPT}: nothing was"]


@pytest.mark.parametrize(
    "option, message",
    [
        (("planted_option", "bf16"), "Config has no option 'planted_option' in this version"),
        (("cuda_graph", "no truth value"), "`cuda_graph` is 'no truth value': give True or False."),
        (("teacher_precision", "bf16"), "`teacher_precision` bf16 goes with `precision` bf16"),
    ],
)
def test_an_option_that_is_unknown_or_refused_is_a_row_with_the_reason(option, message):
    case = step_options.Case(bench_step.rehearsal()[0], (option,))
    with pytest.raises(ValueError, match=message):
        step_options.build(case, CPU, dict(case.options))


def test_a_candidate_is_built_and_warm():
    case = step_options.Case(bench_step.rehearsal()[0], (("attention", "eager"),))
    built = step_options.build(case, CPU, {"attention": "eager"})
    assert built.runner.done == 3 and built.runner.step.how.startswith("attention eager")
    assert 3 < built.first[0] < 5 and built.first[1] > 0


def test_every_candidate_of_the_ladder_is_named_by_its_flag():
    names = [str(case) for case in step_options.cases(CUDA)]
    assert {
        "--attention fa3",
        "--attention cudnn",
        "--residual_precision bf16",
        "--compile max-autotune",
        "--cuda_graph true",
        "--teacher_precision bf16",
        "--batch_size_per_gpu 512",
    } <= set(names)
    assert names[-1] == step_options.ALL_KEPT and len(set(names)) == len(names)


# ---- the GPU tests
TESTS = {
    "test_step.py": """
import os, pytest
def test_first():
    assert 'all is well'
def test_second():
    assert 0, 'planted'
def test_third():
    if os.environ.get('INTERRUPT'):
        raise KeyboardInterrupt
def test_last():
    pytest.skip('no reason')
""",
    "test_triton.py": "def test_cheap():\n    pass\n",
}


def test_each_gpu_test_is_kept_as_it_ends(tmp_path, monkeypatch, capsys):
    """Cheapest first; a failure is told at once; what has ended is not repeated, what ends the run
    twice is given up."""
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text)
        # a test file of ours, in a whole run
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.setattr(record, "commit", lambda: "abc")

    def session():
        keeper = gpu_tests.Keeper(tmp_path / "tests-cpu.json", CPU, resume=True)
        code = pytest.main(
            ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
            plugins=[keeper],
        )
        said = capsys.readouterr().out
        return (
            code,
            said,
            {
                name.split("::")[1]: test
                for name, test in json.loads(keeper.path.read_text())["tests"].items()
            },
        )

    monkeypatch.setenv("INTERRUPT", "1")
    code, said, kept = session()
    assert code == pytest.ExitCode.INTERRUPTED and list(kept) == [
        "test_cheap",
        "test_first",
        "test_second",
        "test_third",
    ]
    assert kept["test_first"]["outcome"] == "passed"
    assert "outcome" not in kept["test_third"] and kept["test_third"]["begun"] == 1
    assert kept["test_second"]["outcome"] == "failed" and "planted" in kept["test_second"]["reason"]
    assert said.index("test_second (call)") < said.index("KeyboardInterrupt") and "assert 0" in said
    code, said, kept = session()
    assert (
        code == pytest.ExitCode.INTERRUPTED
        and kept["test_third"]["begun"] == 2
        and kept["test_first"]["begun"] == 1
    )
    code, said, kept = session()
    assert code == pytest.ExitCode.OK and kept["test_third"]["reason"].startswith("begun 2 times")
    assert kept["test_last"]["outcome"] == "skipped" and "1 skipped" in said


def test_gpu_tests_stand_by_what_they_cost():
    files = sorted((path.stem for path in (ROOT / "tests").glob("test_*.py")), key=gpu_tests.rank)
    at = {stem: files.index(stem) for stem in files}
    assert at["test_dino_loss_triton"] < at["test_attention"] < at["test_step"] < at["test_dali"]
    assert at["test_adamw_ema_triton"] < at["test_attention"]
    assert at["test_step"] < at["test_benchmarks"] < at["test_side_stream"]


@pytest.mark.parametrize(
    "images, first, same",
    [
        (128, (11.03, 2.01), True),
        (128, (11.2, 2.0), False),
        (128, (11.0, 2.05), False),
        (128, (float("nan"), 2.0), False),
        (256, (11.2, 3.0), True),
        (256, (12.0, 2.0), False),
    ],
)
def test_a_candidate_must_do_the_same_step(images, first, same):
    """Loss and gradient norm, as at the start the loss is the same whatever the network does;
    another batch has other crops."""
    before, challenger = (
        step_options.Best(
            {},
            step_clock.StepRunner(
                "a", SimpleNamespace(cfg=Config(batch_size_per_gpu=n)), iter(()), None
            ),
            values,
        )
        for n, values in ((128, (11.0, 2.0)), (images, first))
    )
    found = step_options.compared("a", before, challenger)
    assert found["same_losses"] == same and ("differs" in found) == (not same)


# ---- what README shows of them
def test_report_of_a_gpu(monkeypatch, tmp_path, steps):
    """One line without results; else a table for each that is there, flagged rows as notes."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.gpu() == tables.NO_GPU
    base = record.environment("options", CPU, "a command") | {"device_type": "cuda"}
    record.save(base | {"cases": list(climb(*ORDER).values())}, tmp_path)
    rows = [
        {"candidate": "qkv, forward", "median_ms": 0.1234, "tflops": 612.3, "gbps": None},
        {"candidate": "fa3", "failed": "not here"},
    ]
    kernels = {
        "case": "one step",
        "kernels": [],
        "n_kernels": 1234.0,
        "kernels_us": 60_000.0,
        "gaps_us": 2500.0,
        "rows": [{"candidate": "without the profiler", "median_ms": 62.5}],
    }
    record.save(
        base | {"benchmark": "probe", "cases": [{"case": "products", "rows": rows}, kernels]},
        tmp_path,
    )
    shown = tables.gpu()
    for words in (
        "| --attention fa3 |  | 1,280 | 1,422 | 1.111 | yes |",
        "| --cuda_graph true | --attention fa3 | 1,422 | 1,347 | 0.947 |  |",
        "| products | qkv, forward | 0.123 | 612 |",
        "Flagged: products, fa3: not here.",
        "one step: 1,234 kernels, 60.0 ms; none runs for 2.5 ms.",
        "Flagged: --teacher_precision bf16, OutOfMemoryError: CUDA out of memory.",
    ):
        assert words in shown, shown
    assert "no measurement" not in shown and "dino_loss" not in shown
