"""The official training step (facebookresearch/dino), rewritten as it is: what `bench-step` and the
benchmarks compare with.

Same numbers as ours, computed its way: a pass of the backbone per crop size, attention by an
explicit softmax, a log-softmax for each pair of crops, gradients clipped and averages taken tensor
by tensor, and the host reading values all along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..nn.dino import Model, MultiCropWrapper
from ..nn.vit import Block, VisionTransformer
from ..optim import param_groups
from ..schedule import Schedule

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Backbone(nn.Module):
    """The official forward pass over the parameters of one of our ViTs: images (B, 3, h, w) of one
    size -> (B, D)."""

    def __init__(self, vit: VisionTransformer, sdpa: bool) -> None:
        super().__init__()
        self.vit, self.sdpa = vit, sdpa

    def forward(self, x: Tensor) -> Tensor:
        vit, (h, w) = self.vit, x.shape[-2:]
        x = vit.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1) + self.positions(h, w)
        for block, rate in zip(vit.blocks, vit.drop_path_rates, strict=True):
            assert isinstance(block, Block)
            x = x + self.drop_path(self.attention(block, block.norm1(x)), rate)
            x = x + self.drop_path(block.mlp(block.norm2(x)), rate)
        return vit.norm(x)[:, 0]

    def positions(self, h: int, w: int) -> Tensor:
        patch, grid, table = self.vit.patch_embed.patch_size, self.vit.grid, self.vit.pos_embed
        rows, cols = h // patch, w // patch
        if h == w and rows == grid:
            return table
        patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(
            patches, scale_factor=((rows + 0.1) / grid, (cols + 0.1) / grid), mode="bicubic"
        )
        return torch.cat((table[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)

    def attention(self, block: Block, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = block.attn.qkv(x).view(b, n, 3, block.attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return block.attn.proj(out.transpose(1, 2).reshape(b, n, d))

    def drop_path(self, x: Tensor, rate: float) -> Tensor:
        if rate == 0 or not self.training:
            return x
        return (
            x.div(1 - rate)
            * torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device).add_(1 - rate).floor_()
        )


class MultiCrop(nn.Module):
    """A pass of the backbone per size, one of the head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: list[Tensor]) -> Tensor:
        sizes = [crop.shape[-1] for crop in crops]
        ends = [i + 1 for i in range(len(crops)) if i + 1 == len(crops) or sizes[i] != sizes[i + 1]]
        features = [
            self.backbone(torch.cat(crops[start:end]))
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return self.head(torch.cat(features))


def _official(network: MultiCropWrapper, sdpa: bool) -> MultiCrop:
    assert isinstance(network.backbone, VisionTransformer)
    return MultiCrop(Backbone(network.backbone, sdpa), network.head)


class OfficialStep:
    """`step(i, batches)` as `step.Step` has it, done the official way; returns the loss ().

    It trains `model`, whose parameters it shares. sdpa, compiled: torch's attention kernel, and
    student and teacher under torch.compile: what a careful user adds. mark: called with the name of
    each part when it has ended.
    """

    def __init__(
        self,
        cfg: Config,
        model: Model,
        device: torch.device,
        schedule: Schedule,
        *,
        sdpa: bool = False,
        compiled: bool = False,
        mark: Callable[[str], None] = lambda part: None,
    ) -> None:
        self.cfg = cfg
        self.model = model.to(device)
        self.device = device
        self.schedule = schedule
        self.mark = mark
        self.student, self.teacher = (
            _official(net, sdpa) for net in (model.student, model.teacher)
        )
        for network in (self.student, self.teacher) if compiled else ():
            network.compile(dynamic=False)
        self.precision = cfg.precision_on(device.type)
        self.scaler = torch.amp.GradScaler(device.type) if self.precision == "fp16" else None
        self.optimizer = torch.optim.AdamW(param_groups(model.student))
        self.center = torch.zeros(1, cfg.out_dim, device=device)
        # as its main_dino.py sets it; of ours nothing is cuDNN's
        torch.backends.cudnn.benchmark = True
        # on the host, as officially: no wait in the step
        self.teacher_temps = schedule.teacher_temp.tolist()

    def __call__(self, step: int, batches: Iterator[list[Tensor]]) -> dict[str, Tensor]:
        cfg, schedule = self.cfg, self.schedule
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = schedule.lr[step]
            if i == 0:
                group["weight_decay"] = schedule.weight_decay[step]
        batch = next(batches)
        self.mark("data")
        crops = [
            crop for size in batch for crop in size.chunk(size.shape[0] // cfg.batch_size_per_gpu)
        ]
        epoch = step // schedule.steps_per_epoch
        with torch.autocast(
            self.device.type, _DTYPES[self.precision], enabled=self.precision != "fp32"
        ):
            with torch.no_grad():
                teacher_output = self.teacher(crops[:2])
            self.mark("teacher")
            student_output = self.student(crops)
            self.mark("student")
            loss, total = dino_loss(
                student_output,
                teacher_output,
                self.center,
                cfg.student_temp,
                self.teacher_temps[epoch],
            )
            momentum = cfg.center_momentum
            self.center = self.center * momentum + total / len(teacher_output) * (1 - momentum)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        self.mark("loss")
        self.optimizer.zero_grad()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.mark("backward")
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if cfg.clip_grad:
            clip_gradients(self.student, cfg.clip_grad)
        if epoch < cfg.freeze_last_layer:
            for p in self.model.last_layer_parameters():
                p.grad = None
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        average(self.student, self.teacher, schedule.momentum[step])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.mark("optimizer")
        return {"loss": loss.detach()}


def dino_loss(
    student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float
) -> tuple[Tensor, Tensor]:
    """The loss () and the sum of the teacher's rows (1, K), as the official `DINOLoss` gets them.

    student (V B, K), teacher (2 B, K), crop-major; center (1, K). A log-softmax for each of the 2
    (V - 1) pairs; softmaxes in fp32 whatever the logits are, as under CUDA's autocast.
    """
    crops = student.shape[0] // (teacher.shape[0] // 2)
    student_chunks = (student / student_temp).chunk(crops)  # V of (B, K)
    q_chunks = (
        F.softmax((teacher - center) / teacher_temp, dim=-1, dtype=torch.float32).detach().chunk(2)
    )
    total: Tensor | int = 0
    pairs = 0
    for t, q in enumerate(q_chunks):  # (B, K)
        for v, chunk in enumerate(student_chunks):
            if v != t:
                total = (
                    total
                    + torch.sum(
                        -q * F.log_softmax(chunk, dim=-1, dtype=torch.float32), dim=-1
                    ).mean()
                )
                pairs += 1
    assert isinstance(total, Tensor)
    return total / pairs, torch.sum(teacher, dim=0, keepdim=True)


def clip_gradients(model: nn.Module, clip: float) -> list[float]:
    """Norm of each gradient tensor, read on the host; those above `clip` are scaled down, in
    place."""
    norms = []
    for p in model.parameters():
        if p.grad is not None:
            norm = p.grad.norm(2)
            norms.append(norm.item())
            factor = clip / (norm + 1e-6)
            if factor < 1:
                p.grad.mul_(factor)
    return norms


@torch.no_grad()
def average(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """The teacher's average, tensor by tensor."""
    for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
        t.mul_(momentum).add_((1 - momentum) * s.detach())
