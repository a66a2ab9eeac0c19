"""Student, teacher, head and loss behind one forward."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import VITS, Config, nearest
from ..loss import DINOLoss
from . import vit
from .head import DINOHead
from .packing import GroupedCrops, PackedCrops, group_by_size

# where torchvision keeps the layer that makes class scores
_CLASSIFIERS = ("fc", "head", "heads", "classifier")


class MultiCropWrapper(nn.Module):
    """A backbone and a head over crops of several sizes: one pass of the head; of the backbone one
    packed pass of our ViTs, of others a pass per run of equal sizes.

    forward: a tensor (n, 3, h, w), a list of them, or what `pack` has made of them -> logits (sum
    of n, K), rows in the order of the list. A backbone that returns a tuple is taken by its first
    element.
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
        packed = (
            crops
            if isinstance(crops, PackedCrops | GroupedCrops)
            else self.pack(group_by_size(crops))
        )
        return self.head(packed.through(self.backbone))


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
        features (B, D)."""
        torch.manual_seed(cfg.seed)
        student_backbone = backbone() if backbone else build_backbone(cfg, cfg.drop_path_rate)
        teacher_backbone = copy.deepcopy(student_backbone) if backbone else build_backbone(cfg, 0.0)
        width = feature_width(student_backbone, cfg.global_crops_size)

        def head(norm_last_layer: bool) -> DINOHead:
            return DINOHead(
                width,
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
        student = MultiCropWrapper(student_backbone, head(cfg.norm_last_layer))
        return cls(student, MultiCropWrapper(teacher_backbone, head(True)), loss)


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
        said = " ".join(str(error).split())
        raise ValueError(
            f"the backbone's state_dict cannot be loaded into a copy of it ({said}): whatever "
            "state_dict() gives, load_state_dict() must take."
        ) from error


def build_backbone(cfg: Config, drop_path_rate: float) -> nn.Module:
    """A ViT, or a torchvision or timm model without its classifier. Raises `ValueError` for an
    unknown name."""
    return backbone_maker(cfg)(drop_path_rate)


def backbone_maker(cfg: Config) -> Callable[[float], nn.Module]:
    """What builds `cfg.arch` for a stochastic depth rate (only our ViTs have one). Raises
    `ValueError` for an unknown name."""
    if cfg.vit is not None:
        make = getattr(vit, cfg.vit)
        return lambda rate: make(
            patch_size=cfg.patch_size, drop_path_rate=rate, img_size=(cfg.global_crops_size,)
        )
    missing = []
    for package, find in {"torchvision.models": _from_torchvision, "timm": _from_timm}.items():
        try:
            library = importlib.import_module(package)
        except Exception as error:  # one that was built for another torch raises all kinds
            missing.append(f"{package} ({error})")
            continue
        build = find(library, cfg.arch)
        if build is not None:
            return lambda rate: build()
    hint = (
        f" Other names need torchvision or timm installed; not importable: {'; '.join(missing)}."
        if missing
        else ""
    )
    raise ValueError(
        f"`arch` '{cfg.arch}' is not known: choose from "
        f"{', '.join(VITS)}.{nearest(cfg.arch, list(VITS))}{hint} A model of your own goes through "
        "Python, dinofast.train.train(cfg, backbone=...)."
    )


def _from_torchvision(library, arch: str) -> Callable[[], nn.Module] | None:
    make = getattr(library, arch, None)
    if not (arch.islower() and inspect.isfunction(make)):
        return None

    def build() -> nn.Module:
        model = make(weights=None)
        for name in _CLASSIFIERS:
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, nn.Identity())
                return model
        raise ValueError(
            f"`arch` {arch}: this torchvision model has no classifier that could be taken off; "
            "pass it through the Python API, dinofast.train.train(cfg, backbone=...)."
        )

    return build


def _from_timm(library, arch: str) -> Callable[[], nn.Module] | None:
    if not library.is_model(arch):
        return None

    def build() -> nn.Module:
        try:  # transformers: crops of two sizes
            return library.create_model(
                arch, pretrained=False, num_classes=0, dynamic_img_size=True
            )
        except TypeError:
            return library.create_model(arch, pretrained=False, num_classes=0)

    return build


@torch.no_grad()
def feature_width(backbone: nn.Module, image_size: int) -> int:
    """D, the length of a backbone's features, found by a trial image unless it is one of our
    ViTs."""
    if isinstance(backbone, vit.VisionTransformer):
        return backbone.embed_dim
    training = backbone.training
    backbone.eval()  # batch statistics must not see the trial
    features = backbone(torch.zeros(1, 3, image_size, image_size))
    backbone.train(training)
    features = features[0] if isinstance(features, tuple) else features
    if features.ndim != 2:
        raise ValueError(
            f"the backbone returns features of shape {tuple(features.shape)}: expected (B, D), one "
            "row per image."
        )
    return features.shape[1]
