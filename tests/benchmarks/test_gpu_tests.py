"""The GPU tests as a part of the ladder: each is kept as it ends, the cheap ones first."""

import ast
import json
import sys

import gpu_tests
import pytest
from test_step_options import CPU, ROOT

from dinofast.bench import record

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
    files = sorted(filter(has_gpu_tests, (ROOT / "tests").rglob("test_*.py")))
    stems = sorted((path.stem for path in files), key=gpu_tests.rank)
    at = {stem: stems.index(stem) for stem in stems}
    assert at["test_dino_loss_triton"] < at["test_attention"] < at["test_step_on_gpu"]
    assert at["test_adamw_ema_triton"] < at["test_attention"]
    assert at["test_step_on_gpu"] < at["test_benchmarks"] < at["test_side_stream"]
    assert at["test_step_on_gpu"] < at["test_dali"]


def has_gpu_tests(path):
    """Whether a test or a fixture of the file asks for the fixture `gpu`."""
    return any(
        isinstance(node, ast.FunctionDef) and any(a.arg == "gpu" for a in node.args.args)
        for node in ast.walk(ast.parse(path.read_text()))
    )
