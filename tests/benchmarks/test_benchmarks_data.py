"""Benchmarks of the data path at tiny sizes: crops agree, the first batch is timed."""

import os

import bench_data
import data_on_gpu
import first_batch
import official_checkout
import photographs
import pytest
import tables
import torch
from test_benchmarks import CPU, SMALL_DATA

from dinofast.bench import record


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
