"""Student, teacher, head and loss behind one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Config
from ..loss import DINOLoss
from ..runtime.words import one_line
from .backbones import make_backbones
from .head import DINOHead
from .packing import GroupedCrops, PackedCrops, group_by_size
from .vit import is_exporting


class MultiCropWrapper(nn.Module):
    """A backbone and a head over crops of several sizes: one pass of the head; of the backbone one
    packed pass of our ViTs, of others a pass per run of equal sizes.

    forward: a tensor (n, 3, h, w), a list of them, or what `pack` has made of them -> logits (sum
    of n, K), rows in the order of the list. What a backbone returns is pooled by the rule of
    `features`.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def pack(self, crops: Sequence[Tensor]) -> PackedCrops | GroupedCrops:
        """Crops, a tensor (n, 3, h, w) per size, as this backbone takes them: its own `pack` where
        it has one."""
        pack: Callable[[Sequence[Tensor]], PackedCrops] | None = getattr(
            self.backbone, "pack", None
        )
        return pack(crops) if pack else GroupedCrops(tuple(crops))

    def forward(self, crops: Tensor | Sequence[Tensor] | PackedCrops | GroupedCrops) -> Tensor:
        if is_exporting() and not isinstance(crops, PackedCrops | GroupedCrops):
            return self.head(GroupedCrops(group_by_size(crops)).through(self.backbone))
        packed = (
            crops
            if isinstance(crops, PackedCrops | GroupedCrops)
            else self.pack(group_by_size(crops))
        )
        features = packed.through(self.backbone)
        if isinstance(packed, GroupedCrops):
            features = self._as_head(features)
        return self.head(features)

    def _as_head(self, features: Tensor) -> Tensor:
        """Of a backbone in float64, or in 16 bits without autocast, in the dtype of the head."""
        first = next(self.head.parameters(), features)
        cast = torch.is_autocast_enabled(features.device.type)
        return features if cast and features.dtype != torch.float64 else features.to(first.dtype)


@dataclass
class Losses:
    """Of a forward pass, each (), with gradient. `total` is what is trained on."""

    dino: Tensor

    @property
    def total(self) -> Tensor:
        return self.dino


class Model(nn.Module):
    """The whole of DINO: `model(crops, teacher_temp)` gives the losses (arXiv 2104.14294, figure 2
    and algorithm 1), and after all micro-batches of a step `end_step()` moves the center.

    student, teacher: `MultiCropWrapper`s of equal shape; the teacher starts as a copy of the
    student and takes no gradient. mark: called with the name of each part of a step when it has
    ended, for those who time it.
    """

    def __init__(
        self, student: MultiCropWrapper, teacher: MultiCropWrapper, dino_loss: DINOLoss
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.dino_loss = dino_loss
        self.mark = _unmarked
        _copy_weights(self.student, self.teacher)
        self.notes: list[str] = []  # what there is to say of the backbones
        self.all_trained = True  # a gradient reaches every trainable parameter in every step
        self.teacher.requires_grad_(False)

    def forward(self, crops: Sequence[Tensor], teacher_temp: float | Tensor) -> Losses:
        """crops: one tensor per size, crop-major: (2 B, 3, G, G) global, then (n B, 3, L, L)
        local."""
        packed = self.student.pack(crops)  # once for both
        with torch.no_grad():
            teacher_output = self.teacher(packed.first())
        self.mark("teacher")
        student_output = self.student(packed)
        self.mark("student")
        loss = self.dino_loss.accumulate(student_output, teacher_output, teacher_temp)
        self.mark("loss")
        return Losses(dino=loss)

    def end_step(self) -> dict[str, Tensor]:
        """What there is to say of a step, by name: means over micro-batches and ranks, each (), on
        the device, no gradient."""
        stats = self.dino_loss.step()
        return {
            "loss": stats.loss,
            "teacher_entropy": stats.teacher_entropy,
            "kl": stats.kl,
            "center_norm": self.dino_loss.center.norm(),
        }

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """The student's parameters that `freeze_last_layer` holds fixed."""
        return [
            p
            for name, p in self.student.named_parameters()
            if "last_layer" in name and p.requires_grad
        ]

    @classmethod
    def from_config(cls, cfg: Config, backbone: Callable[[], nn.Module] | None = None) -> Model:
        """Build from options; `backbone` makes any other module that maps images (B, 3, h, w) to
        what `features` can pool to (B, D). Raises `ValueError` for one that cannot train."""
        torch.manual_seed(cfg.seed)
        made = make_backbones(cfg, backbone)

        def head(norm_last_layer: bool) -> DINOHead:
            return DINOHead(
                made.width,
                cfg.out_dim,
                cfg.use_bn_in_head,
                norm_last_layer,
                cfg.head_layers,
                cfg.head_hidden_dim,
                cfg.head_bottleneck_dim,
            )

        loss = DINOLoss(
            cfg.out_dim,
            cfg.n_crops,
            cfg.warmup_teacher_temp,
            cfg.teacher_temp,
            cfg.warmup_teacher_temp_epochs,
            cfg.epochs,
            cfg.student_temp,
            cfg.center_momentum,
        )
        model = cls(
            MultiCropWrapper(made.student, head(cfg.norm_last_layer)),
            MultiCropWrapper(made.teacher, head(True)),
            loss,
        )
        model.notes, model.all_trained = list(made.notes), made.all_trained
        return model


def _unmarked(part: str) -> None:
    """Nobody times the parts."""


def _copy_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Raises `ValueError` for a backbone whose state_dict has no data or cannot be loaded again."""
    state = student.state_dict()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"'{name}' is on the meta device, without data: make the backbone on a real device."
            )
    try:
        teacher.load_state_dict(state)
    except Exception as error:  # hooks of others raise what they like
        raise ValueError(
            f"the backbone's state_dict cannot be loaded into a copy of it ({one_line(error)}): "
            "whatever state_dict() gives, load_state_dict() must take."
        ) from error
