"""Tables and chart from results."""

import json
import shutil

import bench_dino_loss
import cells
import official_checkout
import pytest
import report
import tables
import tables_on_gpu
from test_benchmarks import CPU, ROW, SMALL_LOSS

from dinofast.bench import record
from dinofast.bench import step as dinofast_bench_step


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
    assert tables_on_gpu.gpu() == tables_on_gpu.NO_GPU and "\n" not in tables_on_gpu.NO_GPU


@pytest.mark.parametrize(
    "ms, shown", [(0.01234, "0.0123"), (1.234, "1.23"), (45.67, "45.7"), (1234.5, "1,234")]
)
def test_digits(ms, shown):
    assert cells.digits(ms) == shown


def test_the_front_page_shows_the_gpu_and_a_cpu_until_there_is_one(monkeypatch, tmp_path):
    shown = tables.headline().splitlines()
    assert shown[0].startswith("| NVIDIA") and sum(line.startswith("| ") for line in shown) == 7
    assert shown[-1].startswith("CPU, ") and "; clip, AdamW and EMA: **" in shown[-1]
    shutil.copy(tables.RESULTS / "step-cpu.json", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    shown = tables.headline().splitlines()
    assert shown[0].startswith("| CPU, ") and len(shown) == 5
