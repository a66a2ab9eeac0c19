"""DINO on a backbone of your own: any module that maps images (B, 3, h, w) to features (B, D).

    python examples/custom_backbone.py DIR/train runs/convnet        # DIR: of `dinofast sample-data DIR`
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from dinofast import Config, load_backbone
from dinofast.train import train


class ConvNet(nn.Module):
    """Three convolutions and the mean over what they see: crops of any size."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = (3, width // 4, width // 2, width)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1:])

    def forward(self, images: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            images = torch.relu(norm(layer(images)))
        return images.mean((2, 3))                                          # (B, D)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_path", help="images, as --data_path of `dinofast pretrain`")
    parser.add_argument("output_dir", help="a run that is there goes on")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    cfg = Config(data_path=options.data_path, output_dir=options.output_dir, epochs=options.epochs, warmup_epochs=1,
                 warmup_teacher_temp=0.03, teacher_temp=0.03, momentum_teacher=0.99,
                 batch_size_per_gpu=32, lr=0.016, out_dim=256, head_hidden_dim=256, head_bottleneck_dim=64,
                 global_crops_size=32, local_crops_size=16, local_crops_number=4, blur_radius=(0.03, 0.6), num_workers=2)
    checkpoint = train(cfg, backbone=ConvNet)                               # every option but the ViTs' works
    backbone = load_backbone(checkpoint, backbone=ConvNet())                # the teacher's, in eval mode
    print(f"features {tuple(backbone(torch.zeros(1, 3, 48, 48)).shape)} from '{checkpoint}'")


if __name__ == "__main__":
    main()
