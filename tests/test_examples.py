"""Each example runs, in a process of its own, on a few drawn images."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(*command: object, folder: Path, **environment: str) -> str:
    """What a command prints; it must succeed."""
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)} | environment
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data of `dinofast sample-data data`, and images.npy, made as examples/README.md says."""
    path = tmp_path_factory.mktemp("examples")
    run("-m", "dinofast", "sample-data", "data", "--n_images", "90", folder=path)
    (array,) = re.findall(r"^python (-c .*)$", (EXAMPLES / "README.md").read_text(), flags=re.M)
    run(*shlex.split(array), folder=path)
    return path


def test_a_data_set_of_your_own(folder: Path) -> None:
    said = run(
        EXAMPLES / "custom_dataset.py", "images.npy", "backbone.pth", "--epochs", "2", folder=folder
    )
    assert (
        "epoch 2: loss " in said
        and "features (96, 64) from 'backbone.pth'" in said
        and "nan" not in said
    )


def test_a_backbone_of_your_own(folder: Path) -> None:
    said = run(
        EXAMPLES / "custom_backbone.py",
        "data/train",
        "runs/convnet",
        "--epochs",
        "2",
        folder=folder,
    )
    assert (
        "model: ConvNet, " in said and "features (1, 64) from 'runs/convnet/checkpoint.pth'" in said
    )
    assert (folder / "runs" / "convnet" / "log.txt").read_text().count("\n") == 2


@pytest.mark.skipif(
    not importlib.util.find_spec("lightning"),
    reason="lightning is not installed (pip install lightning)",
)
def test_lightning(folder: Path) -> None:
    said = run(EXAMPLES / "lightning_dino.py", "images.npy", "--epochs", "2", folder=folder)
    assert re.search(r"^2 steps, loss \d", said, flags=re.M), said
    (path,) = (folder / "runs" / "lightning").rglob("*.ckpt")
    saved = torch.load(path, weights_only=False)["state_dict"]
    assert saved["dino_loss.center"].any()
    assert not torch.equal(saved["student.0.cls_token"], saved["teacher.0.cls_token"])


STANDIN = '''
import argparse, os, torch
class DINOLoss:
    """To be replaced."""
def get_args_parser():
    parser = argparse.ArgumentParser("DINO", add_help=False)
    parser.add_argument("--data_path")
    parser.add_argument("--output_dir", default=".")
    return parser
def train_dino(args):
    dino_loss = DINOLoss(32, 10, 0.04, 0.07, 2, 3)
    student_output = torch.randn(20, 32, requires_grad=True)
    loss = dino_loss(student_output, torch.randn(4, 32), 0)
    loss.backward()
    path = os.path.join(args.output_dir, "checkpoint.pth")
    torch.save({"dino_loss": dino_loss.state_dict()}, path)
    print(type(dino_loss).__module__, loss.item(), student_output.grad.abs().sum().item())
'''


def test_the_official_script(folder: Path) -> None:
    """On a stand-in with the same functions: the official one wants a GPU."""
    (folder / "checkout").mkdir()
    (folder / "checkout" / "main_dino.py").write_text(STANDIN)
    said = run(
        EXAMPLES / "official_script.py",
        "--data_path",
        "data",
        "--output_dir",
        "runs/official",
        folder=folder,
        DINO_OFFICIAL="checkout",
    )
    module, loss, grad = said.split()
    assert module == "dinofast.loss" and float(loss) > 0 and float(grad) > 0
    assert torch.load(folder / "runs" / "official" / "checkpoint.pth")["dino_loss"][
        "center"
    ].shape == (1, 32)


def test_the_official_script_without_a_checkout(folder: Path) -> None:
    with pytest.raises(AssertionError, match="name a checkout of facebookresearch/dino"):
        run(EXAMPLES / "official_script.py", folder=folder, DINO_OFFICIAL="")


def test_every_example_is_named_and_short() -> None:
    text = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in text and len(path.read_text().splitlines()) <= 100, path.name
