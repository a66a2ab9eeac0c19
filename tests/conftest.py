import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # before torch is imported; see cli.main

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")           # before triton is imported: its kernels are decorated then


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """48 small JPEGs of smooth noise in a flat folder."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(48):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((50 + i % 7, 40 + i % 5), Image.BICUBIC).save(folder / f"{i:03}.jpg")
    return folder


# ---- which implementations this test run went through; printed in its last lines
_calls = {"cpp": 0, "triton": 0}


def pytest_configure(config):
    from dinofast import ops

    if ops._choice._C is not None:
        for name in [n for n in dir(ops._choice._C) if not n.startswith("_")]:
            if callable(getattr(ops._choice._C, name)):
                _count(ops._choice._C, name, "cpp")
    if not ops._choice.NO_TRITON:
        from dinofast.kernels import adamw_ema, dino_loss

        for module, name in ((dino_loss, "dino_loss"), *((adamw_ema, name) for name in ("adamw_ema_", "ema_", "grad_norms"))):
            _count(module, name, "triton")


def _count(module, name, kind):
    inner = getattr(module, name)

    def call(*args, **arguments):
        _calls[kind] += 1
        return inner(*args, **arguments)

    setattr(module, name, call)


def pytest_terminal_summary(terminalreporter):
    from dinofast import ops

    gpu = "no GPU here" if not torch.cuda.is_available() else "a GPU is here"
    interpreted = ops._choice.interpreted()
    done = {kind: f"exercised, {n} calls" if n else "NOT exercised" for kind, n in _calls.items()}
    lines = {
        "cpp": done["cpp"],
        "triton interpreted": done["triton"] if interpreted else f"not exercised: TRITON_INTERPRET is not 1 ({gpu})",
        "triton compiled": f"not exercised: TRITON_INTERPRET is 1 ({gpu})" if interpreted else done["triton"],
        "cuda": f"not exercised: no CUDA kernel in this version ({gpu})",
        "xformers": f"not exercised: not used in this version ({gpu})",
        "dali": "not exercised: not used in this version",
    }
    terminalreporter.section("paths")
    for name, what in lines.items():
        terminalreporter.line(f"{name:20} {what}")
