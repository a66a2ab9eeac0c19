"""Backbones that tests train, and those they add to."""

import torch
from torch import nn

from dinofast.config import Config
from dinofast.nn.dino import Model
from dinofast.optim import AdamWEMA, param_groups

SMALL = dict(
    out_dim=32,
    head_hidden_dim=16,
    head_bottleneck_dim=8,
    local_crops_number=2,
    global_crops_size=16,
    local_crops_size=8,
    batch_size_per_gpu=2,
)
CFG = Config(**SMALL)


class Net(nn.Module):
    """Any size; `extra` is what a test adds to it."""

    def __init__(self, **extra):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU())
        for name, value in extra.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.layers(x)


def trained(make, steps=2, cfg=CFG):
    """A model after some whole steps, teacher included."""
    model = Model.from_config(cfg, make)
    optimizer = AdamWEMA(
        param_groups(model.student), lr=0.1, student=model.student, teacher=model.teacher
    )
    for _ in range(steps):
        model([torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)], 0.04).total.backward()
        optimizer.step(momentum=0.5)
        optimizer.zero_grad()
    assert all(
        torch.isfinite(p.float()).all() for p in model.student.parameters() if p.is_floating_point()
    )
    return model


class FixedSize(nn.Module):
    def __init__(self, side=16):
        super().__init__()
        self.layer, self.side = nn.Linear(3 * side * side, 4), side

    def forward(self, x):
        assert x.shape[-1] == self.side, f"Wrong image height! Expected {self.side}"
        return self.layer(x.flatten(1))
