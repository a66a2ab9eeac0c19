"""`make gpu` rehearsed on a fake GPU: what measures there runs to its end, with a row for all that
can be there."""

from pathlib import Path

import pytest

from dinofast.bench import record
from dinofast.nn.attention import ATTENTIONS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ladder(fake_cuda, tmp_path_factory):
    """A function: the cases that a part has measured, by name."""

    def run(part):
        found = fake_cuda("ladder.py", part, tmp_path_factory.mktemp("ladder"))
        assert found["code"] == 0
        return {case["case"]: case for case in found["cases"]}

    return run


def test_the_probe_on_a_fake_gpu(ladder):
    found = ladder("probe")
    flags = {flag for case in found.values() for flag in record.flags(case)}
    assert flags <= {"fa3: ModuleNotFoundError: No module named 'flash_attn_interface'"}
    assert found["device"]["facts"]["multi_processor_count"] == 132
    rows = found["attention of the mix, 2 images"]["rows"]
    assert {row["candidate"].split(",")[0] for row in rows} == set(ATTENTIONS)
    for name in ("one step, eager, 2 images", "one step, compiled, 2 images"):
        assert found[name]["n_kernels"] == 100 and found[name]["gaps_us"] == pytest.approx(
            299 * 2 / 3
        )


def test_the_step_on_a_fake_gpu(ladder):
    for case in ladder("step").values():
        assert not record.flags(case) and case["rounds"] >= 3
        for row in case["rows"]:
            assert (
                row["median_ms"] > 0
                and row["extra_mib"] == 2048
                and sum(row["parts_ms"].values()) > 0
            )


def test_the_candidates_on_a_fake_gpu(ladder):
    found = ladder("options")
    measured = {name for name, case in found.items() if case["rows"]}
    assert {"--attention eager", "--teacher_precision bf16", "--batch_size_per_gpu 4"} <= measured
    assert [name for name, case in found.items() if "failed" in case] == [
        "--planted_option bf16",
        "--cuda_graph no truth value",
    ]
