"""DINO as a LightningModule: Lightning owns the loop, processes and precision, dinofast the loss
and the optimizer.

    python examples/lightning_dino.py images.npy    # uint8 (N, H, W, 3)

Needs `pip install lightning`.
"""

from __future__ import annotations

import argparse
import copy
import math

import lightning
import numpy as np
import torch
from custom_dataset import N_LOCAL, OUT_DIM, Crops
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinofast import AdamWEMA, DINOHead, DINOLoss, param_groups, vit_nano


class DINO(lightning.LightningModule):
    def __init__(self, epochs: int, lr: float = 5e-4, momentum: float = 0.98) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student = nn.Sequential(
            vit_nano(), DINOHead(64, OUT_DIM, hidden_dim=256, bottleneck_dim=64)
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        # its center is part of the checkpoint
        self.dino_loss = DINOLoss(OUT_DIM, 2 + N_LOCAL, 0.04, 0.04, 0, epochs)

    def training_step(self, crops: list[Tensor], batch_index: int) -> Tensor:
        both = [torch.cat(crops[:2]), torch.cat(crops[2:])]
        loss = self.dino_loss(self.student(both), self.teacher(both[0]), self.current_epoch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Clips by itself: leave the Trainer's gradient_clip_val alone.
        return AdamWEMA(
            param_groups(self.student),
            lr=self.hparams.lr,
            weight_decay=0.04,
            student=self.student,
            teacher=self.teacher,
            clip_grad=3.0,
        )

    def optimizer_step(self, epoch, batch_index, optimizer, optimizer_closure=None) -> None:
        done = self.trainer.global_step / self.trainer.estimated_stepping_batches
        momentum = 1 - (1 - self.hparams.momentum) * (math.cos(math.pi * done) + 1) / 2
        optimizer.step(closure=optimizer_closure, momentum=momentum)  # clip, AdamW, teacher average


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help=".npy, uint8 (N, H, W, 3)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output_dir", default="runs/lightning")
    options = parser.parse_args()

    lightning.seed_everything(0)
    loader = DataLoader(
        Crops(np.load(options.images, mmap_mode="r")), batch_size=48, shuffle=True, drop_last=True
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs, default_root_dir=options.output_dir, log_every_n_steps=1
    )
    trainer.fit(DINO(options.epochs), loader)
    print(f"{trainer.global_step} steps, loss {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
