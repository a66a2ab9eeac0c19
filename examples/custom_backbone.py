"""DINO on a backbone of your own: any module that maps images (B, 3, h, w) to features (B, D).

python examples/custom_backbone.py data/train runs/convnet    # of `dinofast sample-data data`
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from dinofast import Config, load_backbone
from dinofast.train import train


class ConvNet(nn.Module):
    """Three convolutions, the mean over the map, and its normalization: crops of any size."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = (3, width // 4, width // 2, width)
        layers = [
            (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.GELU())
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        self.layers = nn.Sequential(*(module for layer in layers for module in layer))
        self.norm = nn.BatchNorm1d(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.layers(images).mean((2, 3)))  # (B, D)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_path", help="images, as --data_path of `dinofast pretrain`")
    parser.add_argument("output_dir", help="a run that is there goes on")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    cfg = Config(
        data_path=options.data_path,
        output_dir=options.output_dir,
        epochs=options.epochs,
        warmup_epochs=1,
        batch_size_per_gpu=32,
        lr=8e-3,
        weight_decay_end=0.04,
        freeze_last_layer=0,
        momentum_teacher=0.99,
        warmup_teacher_temp=0.03,
        teacher_temp=0.03,
        out_dim=64,
        head_hidden_dim=256,
        head_bottleneck_dim=64,
        global_crops_size=32,
        local_crops_size=16,
        local_crops_number=2,
        global_crops_scale=(0.5, 1.0),
        local_crops_scale=(0.2, 0.5),
        blur_radius=(0.02, 0.5),
        num_workers=2,
    )
    checkpoint = train(cfg, backbone=ConvNet)  # every option but the ViTs' works
    backbone = load_backbone(checkpoint, backbone=ConvNet())  # the teacher's, in eval mode
    print(f"features {tuple(backbone(torch.zeros(1, 3, 48, 48)).shape)} from '{checkpoint}'")


if __name__ == "__main__":
    main()
