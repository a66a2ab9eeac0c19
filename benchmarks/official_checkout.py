"""The official DINO's own code (facebookresearch/dino) as a candidate, from the checkout that
$DINO_OFFICIAL names.

One class or function is executed at a time, because importing its scripts would ask for packages
that a machine for benchmarks need not have. `dinofast.bench.baseline` is our rewrite of the same.
"""

from __future__ import annotations

import ast
import atexit
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinofast.config import Config
from dinofast.nn.dino import Model
from dinofast.schedule import Schedule

NOT_SET = "DINO_OFFICIAL does not name a checkout of the official code"


def is_there() -> bool:
    return bool(os.environ.get("DINO_OFFICIAL"))


def take(file: str, name: str, **more_names: Any) -> Any:
    """The class or function `name` of `file` in $DINO_OFFICIAL, which may use `more_names` beside
    torch's. Raises ValueError if it is not there."""
    path = Path(os.environ["DINO_OFFICIAL"]) / file
    if not path.is_file():
        raise ValueError(
            f"DINO_OFFICIAL is '{path.parent}' but has no {file}: name a checkout of "
            "facebookresearch/dino."
        )
    found = [
        node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name
    ]
    if not found:
        raise ValueError(
            f"'{path}' defines no {name}: DINO_OFFICIAL must name a checkout of "
            "facebookresearch/dino."
        )
    names = {"torch": torch, "nn": nn, "F": F, "np": np, "dist": dist, **more_names}
    exec(compile(ast.Module([found[-1]], []), str(path), "exec"), names)
    return names[name]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def dino_loss(
    crops: int, prototypes: int, student_temp: float, teacher_temp: float, device: torch.device
) -> nn.Module:
    """The checkout's own `DINOLoss`, with the process group of one process that its all-reduce asks
    for."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
        atexit.register(_leave)
    loss = take("main_dino.py", "DINOLoss")
    return loss(prototypes, crops, teacher_temp, teacher_temp, 0, 1, student_temp=student_temp).to(
        device
    )


def networks(cfg: Config) -> tuple[nn.Module, nn.Module]:
    """Student and teacher as its `train_dino` makes them, the teacher without gradients."""
    names: dict[str, Any] = {
        "math": math,
        "partial": partial,
        "trunc_normal_": nn.init.trunc_normal_,
    }
    for name in (
        "drop_path",
        "DropPath",
        "Mlp",
        "Attention",
        "Block",
        "PatchEmbed",
        "VisionTransformer",
        "DINOHead",
        cfg.arch,
    ):
        names[name] = take("vision_transformer.py", name, **names)
    wrapper = take("utils.py", "MultiCropWrapper")

    def network(rate: float) -> nn.Module:
        backbone = names[cfg.arch](
            patch_size=cfg.patch_size, drop_path_rate=rate, img_size=[cfg.global_crops_size]
        )
        return wrapper(backbone, names["DINOHead"](backbone.embed_dim, cfg.out_dim))

    return network(cfg.drop_path_rate), network(0.0).requires_grad_(False)


class Step:
    """`step(i, batches)` of the checkout's own networks, loss, groups and clip, put together as in
    its `train_one_epoch`.

    It starts from the weights of `model`.
    """

    def __init__(
        self, cfg: Config, model: Model, device: torch.device, schedule: Schedule, precision: str
    ) -> None:
        self.cfg, self.device, self.schedule = cfg, device, schedule
        self.student, self.teacher = networks(cfg)
        for network, like in ((self.student, model.student), (self.teacher, model.teacher)):
            network.load_state_dict(like.state_dict())
            network.to(device)
        self.loss = dino_loss(cfg.n_crops, cfg.out_dim, cfg.student_temp, cfg.teacher_temp, device)
        self.optimizer = torch.optim.AdamW(take("utils.py", "get_params_groups")(self.student))
        self.clip = take("utils.py", "clip_gradients")
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None

    def __call__(self, step: int, batches: Iterator[list[Tensor]]) -> dict[str, Tensor]:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.schedule.lr[step]
            if i == 0:
                group["weight_decay"] = self.schedule.weight_decay[step]
        crops = [
            crop
            for size in next(batches)
            for crop in size.chunk(size.shape[0] // self.cfg.batch_size_per_gpu)
        ]
        with torch.autocast(self.device.type, torch.float16, enabled=self.scaler is not None):
            teacher_output = self.teacher(crops[:2])
            student_output = self.student(crops)
            loss = self.loss(student_output, teacher_output, 0)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.optimizer.zero_grad()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        self.clip(self.student, self.cfg.clip_grad)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        momentum = self.schedule.momentum[step]
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.data.mul_(momentum).add_((1 - momentum) * s.detach().data)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {"loss": loss.detach()}
