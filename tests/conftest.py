import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see cli.main

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    # before triton is imported: its kernels are decorated then
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """48 small JPEGs of smooth noise in a flat folder."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(48):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((50 + i % 7, 40 + i % 5), Image.BICUBIC).save(folder / f"{i:03}.jpg")
    return folder


@pytest.fixture
def forget_graphs():
    yield
    torch.compiler.reset()


# ---- what a test needs that may not be here
def why_not_here(impl):
    """Why an implementation cannot run in this test run, in a sentence; empty if it can."""
    from dinofast import ops

    if impl in (None, "reference"):
        return ""
    if reason := ops._choice.unavailable_reason(impl):
        return reason
    if impl == "triton":
        if not ops._choice.interpreted():
            return (
                "Triton kernels are compiled in this run (TRITON_INTERPRET is not 1), for the "
                "GPU alone"
            )
        triton, numpy = (
            tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
            for name in ("triton", "numpy")
        )
        if triton < (3, 7) and numpy >= (2, 4):
            return (
                "the interpreter of Triton 3.6 does not work with NumPy 2.4 and newer: pip "
                "install 'numpy<2.4' to run it"
            )
    return ""


@pytest.fixture(autouse=True)
def implementation_is_here(request):
    """Skips a test whose parameter `impl`, or else its module's NEEDS, names what is not here."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if reason := why_not_here(
        params["impl"] if "impl" in params else getattr(request.module, "NEEDS", None)
    ):
        pytest.skip(reason)


@pytest.fixture
def interpreter():
    if reason := why_not_here("triton"):
        pytest.skip(reason)


@pytest.fixture
def gpu():
    from dinofast import ops

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if ops._choice.interpreted():
        pytest.skip("TRITON_INTERPRET is 1: Triton kernels are not compiled in this run")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what `-m` does not name
def pytest_collection_modifyitems(items):
    """What uses the fixture `gpu` has the mark `gpu`: 86 tests that were to be marked by hand were
    not."""
    for item in items:
        if "gpu" in item.fixturenames:
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def compiled_ahead_of_time():
    """A function: what ahead_of_time.py found in the machine code of an operation's kernels."""
    from dinofast import ops

    def found(operation):
        if ops._choice.NO_TRITON:
            pytest.skip(ops._choice.NO_TRITON)
        if operation not in done:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            # Triton warns where it is left to choose whether to fuse
            script = Path(__file__).parent / "ops" / "ahead_of_time.py"
            process = subprocess.run(
                [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", script, operation],
                timeout=300,
                capture_output=True,
                text=True,
                env=environment,
            )
            assert process.returncode == 0, process.stderr
            done[operation] = json.loads(process.stdout)
        return done[operation]

    done = {}
    return found


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """A function: what a script of fake_cuda/ prints last. Each run is a process of its own, as the
    fake device must be there before torch is (see fake_cuda/device.py)."""
    folder = Path(__file__).parent / "fake_cuda"
    sys.path.insert(0, str(folder))
    import device

    if reason := device.why_not():
        pytest.skip(reason)
    environment = device.environment(tmp_path_factory.mktemp("fake_cuda"))

    def run(script, *arguments):
        done = subprocess.run(
            [sys.executable, folder / script, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


# ---- which implementations this test run went through; printed in its last lines
_calls = {"cpp": 0, "triton": 0, "xformers": 0, "dali": 0}


def pytest_configure(config):
    from dinofast import ops
    from dinofast.nn.attention import xformers_unavailable_reason

    if ops._choice._C is not None:
        for name in [n for n in dir(ops._choice._C) if not n.startswith("_")]:
            if callable(getattr(ops._choice._C, name)):
                _count(ops._choice._C, name, "cpp")
    if not ops._choice.NO_TRITON:
        from dinofast.kernels import adamw_ema, color, dino_loss, dino_loss_backward, normalize

        for module, names in (
            (dino_loss, "dino_loss"),
            (dino_loss_backward, "dino_loss_backward"),
            (adamw_ema, "adamw_ema_ ema_ grad_norms"),
            (color, "color"),
            (normalize, "normalize"),
        ):
            for name in names.split():
                _count(module, name, "triton")
    if torch.cuda.is_available() and not xformers_unavailable_reason():
        from dinofast.nn.attention import fmha

        _count(fmha(), "memory_efficient_attention_forward_requires_grad", "xformers")
    from dinofast.data import backend_dali

    _count(backend_dali.Batches, "_run", "dali")


def _count(module, name, kind):
    inner = getattr(module, name)

    def call(*args, **arguments):
        _calls[kind] += 1
        return inner(*args, **arguments)

    setattr(module, name, call)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `make test`: one more than cores, as a third of the time some test waits for a process of
    its own, and three at most; but one on a GPU, of which some tests need most of the memory and
    others all of the time."""
    from dinofast.runtime.backends import cores

    return 0 if torch.cuda.is_available() else min(3, cores() + 1)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of one of several processes (pytest -n)
        session.config.workeroutput["calls"] = _calls


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for kind, n in getattr(node, "workeroutput", {}).get("calls", {}).items():
        _calls[kind] += n


def pytest_terminal_summary(terminalreporter):
    from dinofast import ops
    from dinofast.data import backend_dali
    from dinofast.nn.attention import xformers_unavailable_reason

    gpu = "no GPU here" if not torch.cuda.is_available() else "a GPU is here"
    interpreted = ops._choice.interpreted()
    done = {
        kind: f"exercised, {n} {'batches' if kind == 'dali' else 'calls'}" if n else "NOT exercised"
        for kind, n in _calls.items()
    }
    lines = {
        "cpp": done["cpp"],
        "triton interpreted": done["triton"]
        if interpreted
        else f"not exercised: TRITON_INTERPRET is not 1 ({gpu})",
        "triton compiled": f"not exercised: TRITON_INTERPRET is 1 ({gpu})"
        if interpreted
        else done["triton"],
        "cuda": f"not exercised: no CUDA kernel in this version ({gpu})",
        "xformers": done["xformers"]
        if torch.cuda.is_available() and not xformers_unavailable_reason()
        else f"not exercised: {xformers_unavailable_reason() or 'it has nothing for a CPU'} "
        f"({gpu})",
        "dali": f"{done['dali']}, on its {'GPU' if torch.cuda.is_available() else 'CPU'} operators"
        if _calls["dali"]
        else "NOT exercised: "
        f"{backend_dali.unavailable_reason('cpu') or 'no test of it was chosen'}",
    }
    terminalreporter.section("paths")
    for name, what in lines.items():
        terminalreporter.line(f"{name:20} {what}")
