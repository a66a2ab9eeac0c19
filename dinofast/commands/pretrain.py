"""Train a backbone on a folder of images without labels. A run found in --output_dir is resumed.

recipes:
  vanilla    DIR
  boosted    --epochs 300 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30
             --norm_last_layer false
  ResNet-50  --arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4
             --global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14
  small data (thousands of images)
             --out_dim 1024 --momentum_teacher 0.99 --teacher_temp 0.02
             --warmup_teacher_temp 0.02

several GPUs: torchrun --nproc_per_node N -m dinofast pretrain DIR ...
"""

from __future__ import annotations

import os
import shlex
from itertools import islice
from pathlib import Path

from ..config import Config
from ..runtime.terminal import launched_rank, say
from ..validation import SOURCES, check_output, check_source

Options = Config
LOOKED_AT = 1000


def run(options: Config) -> None:
    data = Path(options.data_path)
    if options.data_path == Config.data_path:
        raise ValueError(f"DIR is missing: {SOURCES}.")
    check_source(options.data_path)  # before torch is even imported
    is_main = launched_rank() == "0"  # of several processes one writes and speaks
    if is_main:
        check_output("output_dir", options.output_dir, is_folder=True)
    from ..train import train

    train(options)
    if is_main:
        say(what_next(Path(options.output_dir) / "checkpoint.pth", data))


def what_next(path: Path, data: Path) -> str:
    """What a checkpoint is good for, in commands. data: the images that it was trained on, which
    may have labels too."""
    if data.name == "train" and os.path.isdir(data.parent / "val"):
        data = data.parent
    folder = shlex.quote(str(data)) if _is_labeled(data) else "LABELED_DIR"
    file = shlex.quote(str(path))
    return (
        f"measure it: dinofast knn {folder} --pretrained_weights {file}\n"
        f"use it: backbone = dinofast.load_backbone({str(path)!r})\n"
        f"export it: dinofast export {file} --format onnx\n"
        f"see how it went: dinofast report {shlex.quote(str(path.parent))}"
    )


def _is_labeled(data: Path) -> bool:
    """Whether there are two folders or more among the first LOOKED_AT things in it: a million files
    are not asked one by one. Training has ended well: nothing here is an error."""
    try:
        with os.scandir(data) as entries:
            return sum(entry.is_dir() for entry in islice(entries, LOOKED_AT)) > 1
    except OSError:  # a list, or a storage that has gone away
        return False
