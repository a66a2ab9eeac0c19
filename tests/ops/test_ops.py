"""The public side of ops: what is refused and how, and what happens without the C++ core."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinofast import ops, reference
from dinofast.bench.inputs import loss_inputs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": torch.zeros(1, 2, 5), "teacher": torch.zeros(1, 2, 5)},
            "student has 1 crop and teacher has 1",
        ),
        ({"student": torch.zeros(2, 5)}, r"student has shape \(2, 5\)"),
        ({"student": torch.zeros(3, 2, 0)}, r"student has shape \(3, 2, 0\)"),
        (
            {"teacher": torch.zeros(2, 3, 5)},
            r"teacher has shape \(2, 3, 5\): expected \(T, 2, 5\) to go with student \(3, 2, 5\)",
        ),
        ({"teacher": torch.zeros(0, 2, 5)}, r"teacher has shape \(0, 2, 5\)"),
        ({"center": torch.zeros(1, 5)}, r"center has shape \(1, 5\): expected \(5,\)"),
        ({"teacher": torch.zeros(2, 2, 5, dtype=torch.int64)}, "teacher is torch.int64"),
        ({"center": torch.zeros(5, device="meta")}, "center is on meta but student is on cpu"),
        ({"student_temp": 0.0}, "student_temp is 0.0"),
        ({"teacher_temp": -0.04}, "teacher_temp is -0.04"),
        ({"teacher_temp": float("nan")}, "teacher_temp is nan"),
        ({"teacher_temp": torch.tensor(0.0)}, "teacher_temp is 0.0"),
        ({"teacher_temp": torch.ones(2)}, r"teacher_temp has shape \(2,\)"),
        ({"impl": "fast"}, "impl is 'fast': use one of None, 'reference', 'cpp', 'triton'"),
        (
            {"impl": "cpp", "teacher": torch.zeros(2, 2, 5, dtype=torch.float64)},
            "impl='cpp' takes float32, bfloat16 and float16",
        ),
    ],
)
def test_dino_loss_refuses(change: dict[str, object], message: str) -> None:
    good = {
        "student": torch.zeros(3, 2, 5),
        "teacher": torch.zeros(2, 2, 5),
        "center": torch.zeros(5),
        "student_temp": 0.1,
        "teacher_temp": 0.04,
        "impl": None,
    }
    ops.dino_loss(**good)
    with pytest.raises(ValueError, match=message):
        ops.dino_loss(**good | change)


def test_no_kernel_for_a_device() -> None:
    meta = [x.to("meta") for x in loss_inputs("flat", 3, 2, 5)]
    assert ops.dino_loss(*meta, 0.1, 0.04)[2].shape == (5,)
    with pytest.raises(ValueError, match="impl='cpp' has no dino_loss for meta tensors"):
        ops.dino_loss(*meta, 0.1, 0.04, "cpp")


def test_paths_name_every_operation() -> None:
    assert list(ops.paths()) == list(ops.OPERATIONS)
    for devices in ops.paths().values():
        assert set(devices) == {"cpu", "cuda"} and all(devices.values())


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_an_operation_is_found_in_all_its_places(name: str) -> None:
    operation, root = ops.OPERATIONS[name], Path(__file__).parents[2]
    assert hasattr(ops, name) and hasattr(reference, name) == operation.has_reference
    assert ("triton" in operation.kernels.values()) == (
        root / "kernels" / f"{operation.file}.py"
    ).is_file()
    assert (operation.core is not None) == ("cpp" in operation.kernels.values())
    assert operation.core is None or (root / "csrc" / "cpu" / f"{operation.core}.cpp").is_file()
    assert (root / "tests" / "ops" / f"test_{operation.file}.py").is_file()
    for script in ("tests/ops/ahead_of_time.py", "benchmarks/launch_kernels.py"):
        assert f"\ndef {operation.file}(" in (root / script).read_text(), script


def test_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = loss_inputs("peaked", 3, 2, 37)
    monkeypatch.setattr(ops._choice, "NO_CPP", "the C++ core was left out")
    monkeypatch.delenv("DINOFAST_REQUIRE", raising=False)
    assert ops.paths()["dino_loss"]["cpu"] == "reference (plain torch): the C++ core was left out"
    with pytest.warns(
        UserWarning, match="dinofast.dino_loss runs in plain torch.*the C[+][+] core was left out"
    ):
        loss = ops.dino_loss(*inputs, 0.1, 0.04)[0]
    assert torch.equal(loss, reference.dino_loss(*inputs, 0.1, 0.04)[0])
    with pytest.raises(
        RuntimeError, match="impl='cpp' was asked for, but the C[+][+] core was left out"
    ):
        ops.dino_loss(*inputs, 0.1, 0.04, "cpp")
    compiled = torch.compile(
        lambda *x: ops.dino_loss(*x, 0.1, 0.04)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), loss)
    monkeypatch.setenv("DINOFAST_REQUIRE", "triton,cpp")
    with pytest.raises(
        RuntimeError, match="DINOFAST_REQUIRE names cpp, but the C[+][+] core was left out"
    ):
        ops.dino_loss(*inputs, 0.1, 0.04)


def test_imports_without_the_core() -> None:
    code = """if True:
        import sys, warnings
        warnings.simplefilter("error")
        sys.modules["dinofast._C"] = None
        from dinofast import ops
        print(ops.paths()["dino_loss"]["cpu"])"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert out.startswith("reference (plain torch): the C++ core dinofast._C does not load")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_modes_see_the_operation() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    student, teacher, center = loss_inputs("peaked", 3, 2, 37)
    student.requires_grad_()
    expected = ops.dino_loss(student, teacher, center, 0.1, 0.04)[0]
    with Names():
        assert torch.equal(ops.dino_loss(student, teacher, center, 0.1, 0.04)[0], expected)
    assert "dinofast.dino_loss.default" in seen
    with torch.profiler.profile() as profile:
        ops.dino_loss(student, teacher, center, 0.1, 0.04)
    assert "dinofast::dino_loss" in {event.key for event in profile.key_averages()}
    both = torch.stack((student.detach(), student.detach() * 2))
    each = torch.vmap(lambda x: ops.dino_loss(x, teacher, center, 0.1, 0.04)[0])(both)
    assert torch.equal(each[0], expected) and torch.equal(
        each[1], ops.dino_loss(both[1], teacher, center, 0.1, 0.04)[0]
    )
