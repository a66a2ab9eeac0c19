"""Small pretraining runs as a person starts them: in a process of their own."""

import subprocess
import sys
from pathlib import Path

import torch

from dinofast import checkpoint

SMALL = (
    "--arch vit_nano --patch_size 4 --global_crops_size 16 --local_crops_size 8 "
    "--local_crops_number 2 --out_dim 64 --head_hidden_dim 32 --head_bottleneck_dim 16 "
    "--batch_size_per_gpu 4 --epochs 3 --warmup_epochs 1 --lr 0.1 --num_workers 1 "
    "--freeze_last_layer 1 --norm_last_layer false --device cpu"
).split()


def command(data: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    return [
        sys.executable,
        *launch,
        "-m",
        "dinofast",
        "pretrain",
        "--data_path",
        str(data),
        "--output_dir",
        str(out),
        *SMALL,
        *more,
    ]


def start(*args: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        command(*args, **options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*args: object, **options: object) -> str:
    """Run to the end and return what it printed."""
    process = start(*args, **options)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def assert_same_run(a: Path, b: Path) -> None:
    """Bitwise the same weights, moments, center and log."""
    first, second = checkpoint.read(a / "checkpoint.pth"), checkpoint.read(b / "checkpoint.pth")
    for part in ("student", "teacher", "dino_loss"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), f"{part}.{name}"
    for i, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, second["optimizer"]["state"][i][name]), (
                f"optimizer {i}.{name}"
            )
    assert (a / "log.txt").read_text() == (b / "log.txt").read_text()
