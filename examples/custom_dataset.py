"""DINO on a data set of your own, here one array of images, in a training loop of your own.

    python examples/custom_dataset.py images.npy backbone.pth        # uint8 (N, H, W, 3)

For image files and tar shards `dinofast pretrain` needs no code.
"""

from __future__ import annotations

import argparse
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinofast import AdamWEMA, DINOHead, DINOLoss, load_backbone, param_groups, vit_nano

N_LOCAL, OUT_DIM = 2, 64  # few prototypes for thousands of images


class Crops(Dataset):
    """images: uint8 (N, H, W, 3) -> two global crops (3, 32, 32) and N_LOCAL local ones (3, 16,
    16)."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1) / 255
        return [random_crop(image, 32, 0.5, 1.0) for _ in range(2)] + [
            random_crop(image, 16, 0.2, 0.5) for _ in range(N_LOCAL)
        ]


def random_crop(image: Tensor, size: int, low: float, high: float) -> Tensor:
    """A square of `low` to `high` of the area, resized, flipped, with another brightness and
    contrast."""
    side = int(min(image.shape[1:]) * math.sqrt(low + (high - low) * torch.rand(()).item()))
    top, left = (int(torch.randint(n - side + 1, ())) for n in image.shape[1:])
    crop = F.interpolate(
        image[None, :, top : top + side, left : left + side], size, mode="bicubic", antialias=True
    )[0]
    crop = crop.flip(-1) if torch.rand(()) < 0.5 else crop
    brightness, contrast = 0.6 + 0.8 * torch.rand(2)
    crop = (crop - crop.mean()) * contrast + crop.mean() * brightness
    return (crop.clamp(0, 1) - 0.45) / 0.225


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help=".npy, uint8 (N, H, W, 3)")
    parser.add_argument("backbone", help="written: the teacher's backbone")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(
        Crops(np.load(options.images, mmap_mode="r")), batch_size=48, shuffle=True, drop_last=True
    )
    student = nn.Sequential(
        vit_nano(), DINOHead(64, OUT_DIM, hidden_dim=256, bottleneck_dim=64)
    ).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    dino_loss = DINOLoss(OUT_DIM, 2 + N_LOCAL, 0.04, 0.04, 0, options.epochs).to(device)
    optimizer = AdamWEMA(
        param_groups(student),
        lr=5e-4,
        weight_decay=0.04,
        student=student,
        teacher=teacher,
        clip_grad=3.0,
    )
    for epoch in range(options.epochs):
        for crops in loader:  # a list of (B, 3, size, size)
            both = [torch.cat(crops[:2]).to(device), torch.cat(crops[2:]).to(device)]
            loss = dino_loss(student(both), teacher(both[0]), epoch)  # also updates the center
            loss.backward()
            optimizer.step(momentum=0.98)  # clip, AdamW, teacher average
            optimizer.zero_grad()
        # after a collapse to a uniform output it stays at log K
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, log K {math.log(OUT_DIM):.4f}")
    torch.save(teacher[0].state_dict(), options.backbone)
    features = load_backbone(options.backbone, arch="vit_nano")(both[0].cpu())
    print(f"features {tuple(features.shape)} from '{options.backbone}'")


if __name__ == "__main__":
    main()
