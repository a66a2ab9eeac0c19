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

from pathlib import Path

from ..config import Config

Options = Config
_SOURCES = "give a folder of images or .tar shards, or a text file of their paths"


def run(options: Config) -> None:
    data, output_dir = Path(options.data_path), Path(options.output_dir)
    if options.data_path == Config.data_path:
        raise ValueError(f"DIR is missing: {_SOURCES}.")
    # a pattern; before torch is even imported
    if not data.exists() and "{" not in options.data_path:
        raise ValueError(f"`data_path` '{data}' does not exist: {_SOURCES}.")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` '{output_dir}' is a file: give a folder.")
    from ..train import train

    train(options)
