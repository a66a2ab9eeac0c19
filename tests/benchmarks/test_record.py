"""A benchmark as a script: cases are kept as they end, failures flagged, a second call goes on."""

import itertools
import json
import sys

import gpu
import pytest
import torch
from test_ladder import CPU

from dinofast.bench import record


# ---- one benchmark as a script
class Module:
    """Cases "a", "b", "c"; what `trouble` has for one of them is raised."""

    NAME, __doc__, SECONDS = "some", "Words.", {"cpu": 5.0}

    def __init__(self, **trouble):
        self.trouble, self.begun = trouble, []

    def cases(self, device):
        return ["a", "b", "c"]

    def rehearsal(self):
        return ["a"]

    def candidates_of(self, case):
        return ("dinofast",)

    def growing(self, case, device):
        self.begun.append(case)
        row = {
            "candidate": "dinofast",
            "median_ms": 1.0,
            "quartiles_ms": [1.0, 1.0],
            "elapsed_ms": [1.0],
        }
        yield {"case": case, "rows": [row], "left_out": []}
        if case in self.trouble:
            raise self.trouble[case]
        yield {"case": case, "rounds": 3, "rows": [row | {"median_ms": 2.0}], "left_out": []}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """A function: the exit code of a module as a script, with results in tmp_path."""
    monkeypatch.setattr(record, "commit", lambda: "abc")

    def main(module, *flags):
        monkeypatch.setattr(
            sys,
            "argv",
            ["bench_some.py", "--device", "cpu", "--save-results", str(tmp_path), *flags],
        )
        return record.main(module)

    return main


def kept(folder, device="cpu"):
    return {
        case["case"]: case
        for case in json.loads((folder / f"some-{device}.json").read_text())["cases"]
    }


def test_a_case_that_fails_is_flagged_with_what_it_had(script, tmp_path, capsys):
    module = Module(b=RuntimeError("CUDA error: out of memory\nmore"))
    assert script(module) == 0 and module.begun == ["a", "b", "c"]
    found = kept(tmp_path)
    assert (
        found["b"]["failed"] == "RuntimeError: CUDA error: out of memory"
        and found["b"]["rows"][0]["median_ms"] == 1.0
    )
    assert found["c"]["rows"][0]["median_ms"] == 2.0 and not any(
        "begun" in case for case in found.values()
    )
    assert "FLAGGED: b: RuntimeError: CUDA error: out of memory" in capsys.readouterr().out
    result = json.loads((tmp_path / "some-cpu.json").read_text())
    assert (
        result["command"] == "python benchmarks/bench_some.py --device cpu --save-results"
        and result["commit"] == "abc"
    )


def test_a_second_call_goes_on_where_the_first_ended(script, tmp_path, monkeypatch, capsys):
    """An interruption leaves the rows that are there; the case at hand is begun again, and those
    before are not."""
    module = Module(b=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        script(module)
    assert kept(tmp_path)["b"]["begun"] == 1 and kept(tmp_path)["b"]["rows"][0]["median_ms"] == 1.0
    module = Module()
    assert (
        script(module, "--resume") == 0
        and module.begun == ["b", "c"]
        and "a: measured before" in capsys.readouterr().out
    )
    assert list(kept(tmp_path)) == ["a", "b", "c"] and kept(tmp_path)["b"]["rounds"] == 3
    # all anew: as asked, for another commit
    for other, flags in (("abc", ()), ("def", ("--resume",))):
        module = Module()
        monkeypatch.setattr(record, "commit", lambda other=other: other)
        assert script(module, *flags) == 0 and module.begun == ["a", "b", "c"]


def test_what_ends_its_process_twice_is_not_begun_again(script, tmp_path):
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            script(Module(b=KeyboardInterrupt()), "--resume")
    module = Module(b=KeyboardInterrupt())
    assert script(module, "--resume") == 0 and module.begun == ["c"]
    assert kept(tmp_path)["b"]["failed"].startswith("begun 2 times")


def test_no_case_is_begun_after_the_limit(script, monkeypatch):
    now = itertools.count(0.0, 10.0)
    monkeypatch.setattr(record.time, "perf_counter", lambda: next(now))
    module = Module()
    assert script(module, "--limit-s", "15") == record.MORE == gpu.MORE and module.begun == ["a"]


def test_a_rehearsal_takes_tiny_cases_and_little_time(script):
    module = Module()
    assert (
        script(module, "--rehearse") == 0
        and module.begun == ["a"]
        and module.SECONDS == {"cpu": 0.1}
    )


def test_a_lost_device_asks_for_another_process(script, tmp_path, monkeypatch):
    """After a bad access each later call fails: the cases to come are left to a process of their
    own."""
    lost = []

    def synchronize(device):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    for name, value in dict(
        get_device_name=lambda device: "a GPU", synchronize=synchronize, empty_cache=lambda: None
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    module = Module(b=RuntimeError("CUDA error: an illegal memory access was encountered"))
    module.growing = lambda case, device: (
        lost.append(1) if case == "b" else None,
        Module.growing(module, case, device),
    )[1]
    assert script(module, "--device", "cuda") == record.MORE and module.begun == ["a", "b"]
    lost.clear()
    module = Module()
    assert script(module, "--device", "cuda", "--resume") == 0 and module.begun == ["c"]
    assert kept(tmp_path, "cuda")["b"]["failed"].startswith(
        "RuntimeError: CUDA error: an illegal memory access"
    )


def test_a_case_with_more_candidates_takes_the_place_of_its_first_time():
    ledger = record.Ledger(record.environment("some", CPU, "a command"), None)
    for name, candidates in (
        ("one", ["dinofast"]),
        ("two", ["dinofast"]),
        ("one", ["official", "dinofast"]),
    ):
        assert not ledger.is_done(name, candidates)
        ledger.put(
            {
                "case": name,
                "rows": [{"candidate": candidate} for candidate in candidates],
                "left_out": ["official checkout: not here"],
            }
        )
    assert [len(case["rows"]) for case in ledger.cases] == [2, 1]
    assert ledger.is_done(
        "one", ["official", "dinofast", "official checkout"]
    ) and not ledger.is_done("two", ["official"])


def test_another_devices_numbers_are_kept_under_its_name(tmp_path):
    result = record.environment("some", CPU, "a command") | {"device": "NVIDIA H100 80GB HBM3"}
    record.Ledger(result, tmp_path).put({"case": "one", "rows": []})
    ledger = record.Ledger(result | {"device": "NVIDIA H200"}, tmp_path)
    assert ledger.cases == [] and [path.name for path in tmp_path.iterdir()] == [
        "some-cpu-NVIDIA-H100-80GB-HBM3.json"
    ]
