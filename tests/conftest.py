import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # before torch is imported; see cli.main

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402


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
_calls = {"cpp": 0}


def pytest_configure(config):
    from dinofast import ops

    if ops._C is None:
        return
    for name in [n for n in dir(ops._C) if not n.startswith("_")]:
        inner = getattr(ops._C, name)
        if callable(inner):
            setattr(ops._C, name, _counting(inner))


def _counting(inner):
    def call(*args, **arguments):
        _calls["cpp"] += 1
        return inner(*args, **arguments)

    return call


def pytest_terminal_summary(terminalreporter):
    import torch

    gpu = "no GPU here" if not torch.cuda.is_available() else "a GPU is here"
    lines = {
        "cpp": f"exercised, {_calls['cpp']} calls" if _calls["cpp"] else "NOT exercised",
        "triton interpreted": "not exercised: no Triton kernel in this version",
        "triton compiled": f"not exercised: no Triton kernel in this version ({gpu})",
        "cuda": f"not exercised: no CUDA kernel in this version ({gpu})",
        "xformers": f"not exercised: not used in this version ({gpu})",
        "dali": "not exercised: not used in this version",
    }
    terminalreporter.section("paths")
    for name, what in lines.items():
        terminalreporter.line(f"{name:20} {what}")
