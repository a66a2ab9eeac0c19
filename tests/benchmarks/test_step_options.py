"""Options of the step, tried one at a time, each on top of the best so far; on
stand-ins for a GPU."""

from pathlib import Path
from types import SimpleNamespace

import bench_step
import pytest
import step_options
import tables
import tables_on_gpu
import torch

from dinofast.bench import record
from dinofast.bench import step as step_clock
from dinofast.bench.step import Timed
from dinofast.config import Config

ROOT = Path(__file__).parents[2]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    assert tables_on_gpu.gpu() == tables_on_gpu.NO_GPU
    base = record.environment("options", CPU, "a command") | {"device_type": "cuda"}
    record.save(base | {"cases": list(climb(*ORDER).values())}, tmp_path)
    rows = [
        {"candidate": "qkv, forward", "median_ms": 0.1234, "tflops": 612.3, "gbps": None},
        {"candidate": "fa3", "failed": "not here"},
    ]
    kernels = {
        "case": "one step",
        "kernels": [
            {"kernel": "nvjet_sm90_tst_192x192", "total_us": 21_000.0},
            {"kernel": "triton_poi_fused_gelu_gelu_backward_31", "total_us": 3_260.0},
            {"kernel": "_gradient", "total_us": 90.0},
            {"kernel": "Memset (Device)", "total_us": 40.0},
        ],
        "n_kernels": 1234.0,
        "kernels_us": 60_000.0,
        "gaps_us": 2500.0,
        "rows": [{"candidate": "without the profiler", "median_ms": 62.5}],
    }
    record.save(
        base | {"benchmark": "probe", "cases": [{"case": "products", "rows": rows}, kernels]},
        tmp_path,
    )
    outcomes = {"a": {"outcome": "passed"}, "b": {"begun": 1}}
    outcomes["c"] = {"outcome": "skipped", "reason": "('x.py', 3, 'Skipped: no DALI (pip it)')"}
    record.write(base | {"benchmark": "tests", "tests": outcomes}, tmp_path / "tests-cuda.json")
    shown = tables_on_gpu.gpu()
    for words in (
        "| --attention fa3 |  | 1,280 | 1,422 | 1.111 | yes |",
        "| --cuda_graph true | --attention fa3 | 1,422 | 1,347 | 0.947 |  |",
        "| products | qkv, forward | 0.123 | 612 |",
        "Flagged: products, fa3: not here.",
        "one step: 1,234 kernels, 60.0 ms (matrix products 21.0, GELU 3.3, loss and optimizer "
        "0.1); the GPU idles for 2.5 ms.",
        "GPU tests: 1 passed, 1 interrupted, 1 skipped; skipped 1: no DALI. ",
        "Flagged: --teacher_precision bf16, OutOfMemoryError: CUDA out of memory.",
    ):
        assert words in shown, shown
    assert "no measurement" not in shown and "dino_loss" not in shown
