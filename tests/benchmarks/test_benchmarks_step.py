"""The benchmark of the step at tiny sizes: candidates do the same step, or are flagged."""

import bench_step
import official_checkout
import pytest
import torch
from test_benchmarks import CANDIDATES_OF_THE_STEP, CPU, SMALL_TRAINING

from dinofast.bench import baseline as official
from dinofast.bench import record
from dinofast.bench import step as dinofast_bench_step


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
