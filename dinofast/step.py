"""The whole optimizer step: what `train` repeats and `bench-step` times. Eager, compiled, or its
greater part a CUDA graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import Config
from .nn.attention import activate, select_attention
from .nn.dino import Model
from .nn.onednn_linear import select_library
from .nn.vit import VisionTransformer
from .nn.weight_copies import Copies, reading
from .optim import OPTIMIZERS, param_groups
from .runtime import distributed
from .runtime.cuda_graph import CUDAGraphStep
from .runtime.words import first_line
from .schedule import Schedule, step_seed

_NOT_ONE_GRAPH = "batch statistics over several GPUs (`use_bn_in_head`) do not go into a graph"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what gloo and nccl both send
_SENT = (
    *_DTYPES.values(),
    *(torch.float64, torch.complex64, torch.complex128),
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
)


class Step:
    """`step(i, batches)` takes micro-batches from `batches`, does optimizer step i and returns its
    metrics by name, each () on the device. Nothing in it waits for the device.

    model, optimizer, scaler (None without fp16): what a checkpoint holds. how: what does the work,
    in words. compiles: whether the first step takes long for it. notes: what was asked for or is
    usual and is not done, and why. Raises ValueError for options that cannot be met here.
    """

    def __init__(
        self, cfg: Config, model: Model, process: distributed.Process, schedule: Schedule
    ) -> None:
        self.model, self.process, device = model.to(process.device), process, process.device
        self.cfg, self.schedule = cfg, schedule
        self.precision = cfg.precision_on(device.type)
        self.dtype = _DTYPES[self.precision]
        self.notes = list(model.notes)
        for name in ("teacher_precision", "residual_precision"):
            # autocast to fp16 refuses to join bf16 tensors with others
            if getattr(cfg, name) == "bf16" != self.precision:
                raise ValueError(
                    f"`{name}` bf16 goes with `precision` bf16, and this run computes in "
                    f"{self.precision}: give that too, or leave it out."
                )
        if cfg.teacher_precision == "bf16":
            model.teacher.to(torch.bfloat16)  # the optimizer averages in float32 and rounds into it
        compiled = self._compile()
        self.compiles = compiled != "not compiled"
        self.how = ", ".join(filter(None, (self._choose_kernels(), compiled, self._choose_graph())))
        self.optimizer = OPTIMIZERS[cfg.optimizer](
            param_groups(model.student),
            student=model.student,
            teacher=model.teacher,
            clip_grad=cfg.clip_grad,
            clip_mode=cfg.clip_mode,
        )
        self.copies = Copies(
            (model.student, model.teacher) if self.precision != "fp32" else (),
            self.dtype,
        )
        self.optimizer.copies = self.copies.of
        # before any hook of others
        self.optimizer.register_step_post_hook(lambda *_: self.copies.written())
        self.scaler = torch.amp.GradScaler(device.type) if self.precision == "fp16" else None
        self.parallel = _distribute(model, process)
        self.activate()

    def activate(self) -> None:
        """To be called before this step after another one has run in the same process."""
        if self._vits():
            activate(self.attention)

    def __call__(self, step: int, batches: Iterator[list[Tensor]]) -> dict[str, Tensor]:
        values, epoch = self.schedule.at(step), step // self.schedule.steps_per_epoch
        for group, decay in zip(
            self.optimizer.param_groups, (values.weight_decay, 0.0), strict=True
        ):
            group["lr"], group["weight_decay"] = values.lr, decay
        self.copies.refresh()
        stats = self.gradients(step, batches, self.schedule.teacher_temp[epoch])
        if epoch < self.cfg.freeze_last_layer:
            for p in self.model.last_layer_parameters():
                p.grad = None
        bad = ~torch.isfinite(stats["loss"])
        if self.scaler:
            self.scaler.step(self.optimizer, momentum=values.momentum, skip=bad)
            self.scaler.update()
        else:
            self.optimizer.step(momentum=values.momentum, skip=bad)  # clip, update, teacher average
        self.optimizer.zero_grad(set_to_none=True)
        self.model.mark("optimizer")
        return stats | {"grad_norm": self.optimizer.grad_norm.float()}

    def gradients(
        self, step: int, batches: Iterator[list[Tensor]], teacher_temp: Tensor
    ) -> dict[str, Tensor]:
        """Gradients of all micro-batches in `grad`; what `Model.end_step` says of them."""
        cfg, process = self.cfg, self.process
        for micro in range(cfg.accumulate):
            crops = next(batches)  # on the device already
            self.model.mark("data")
            # drop path: the same after a resume
            torch.manual_seed(step_seed(cfg.seed, step, micro, process.rank))
            if self.graph:
                return self.graph(crops, teacher_temp)
            last = micro == cfg.accumulate - 1
            with (
                nullcontext()
                if last or not isinstance(self.parallel, DistributedDataParallel)
                else self.parallel.no_sync()
            ):
                self.forward_backward(crops, teacher_temp)
        return self.model.end_step()  # all-reduce; the center moves

    def forward_backward(self, crops: list[Tensor], teacher_temp: Tensor) -> None:
        with reading():  # in backward too, for checkpointed blocks
            with torch.autocast(
                self.process.device.type,
                self.dtype,
                enabled=self.precision != "fp32",
                cache_enabled=self.graph is None,
            ):
                loss = self.parallel(crops, teacher_temp).total / self.cfg.accumulate
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.model.mark("backward")

    def _whole(self, crops: list[Tensor], teacher_temp: Tensor) -> dict[str, Tensor]:
        self.forward_backward(crops, teacher_temp)
        return self.model.end_step()

    # ---- what does the work
    def _vits(self) -> list[VisionTransformer]:
        backbones = (self.model.student.backbone, self.model.teacher.backbone)
        return [b for b in backbones if isinstance(b, VisionTransformer)]

    def _choose_kernels(self) -> str:
        cfg = self.cfg
        if not self._vits():
            asked = {
                "attention": cfg.attention,
                "linear": cfg.linear,
                "grad_checkpointing": cfg.grad_checkpointing,
                "residual_precision": cfg.residual_precision == "bf16",
            }
            for flag in (flag for flag, given in asked.items() if given):
                raise ValueError(
                    f"`{flag}` {getattr(cfg, flag)} is for our ViTs, not for {cfg.arch}: leave it "
                    "out."
                )
            return ""
        device, dtype = self.process.device, self.dtype
        width = self._vits()[0].head_width
        self.attention = select_attention(cfg.attention, device, dtype, width).name
        library = select_library(cfg.linear, device, dtype)
        for vit in self._vits():
            vit.set_execution(
                self.attention,
                cfg.grad_checkpointing,
                library,
                torch.bfloat16 if cfg.residual_precision == "bf16" else None,
            )
        also = {
            "large linear layers of the ViT by oneDNN": library == "onednn",
            "activations checkpointed": cfg.grad_checkpointing,
            "the teacher in bf16": cfg.teacher_precision == "bf16",
            "residual stream in bf16": cfg.residual_precision == "bf16",
        }
        chosen = [what for what, holds in also.items() if holds]
        return ", ".join([f"attention {self.attention}", *chosen])

    def _compile(self) -> str:
        """Student and teacher as one graph each."""
        asked, on_gpu = self.cfg.compile, self.process.device.type == "cuda"
        tuned = asked == "max-autotune"
        if asked == "off" or (asked is None and not (on_gpu and self._vits())):
            return "not compiled"
        if not self._vits():
            raise ValueError(
                f"`compile` {asked} is for our ViTs, not for {self.cfg.arch}: leave it out, and "
                "compile a backbone of your own before you give it."
            )
        synced = on_gpu and self.process.world > 1 and self.cfg.use_bn_in_head
        if reason := _NOT_ONE_GRAPH if synced else compiler_unavailable_reason(self.process.device):
            if asked:
                raise ValueError(f"`compile` {asked} was asked for, but {reason}.")
            self.notes.append(f"not compiled, and slower for it: {reason}")
            return "not compiled"
        for network in (self.model.student, self.model.teacher):
            network.compile(
                fullgraph=True,
                dynamic=False,
                **({"mode": "max-autotune-no-cudagraphs"} if tuned else {}),
            )
        how_long = "many minutes" if tuned else "up to a minute"
        self.notes.append(
            f"the first step compiles student and teacher: {how_long}, seconds when it has been "
            "done before"
        )
        return "compiled, max-autotune" if tuned else "compiled"

    def _choose_graph(self) -> str:
        self.graph: CUDAGraphStep | None = None
        if not self.cfg.cuda_graph:
            return ""
        reasons = {
            "there is no GPU": self.process.device.type != "cuda",
            "there are several processes": self.process.world > 1,
            f"`accumulate` is {self.cfg.accumulate}": self.cfg.accumulate > 1,
        }
        for reason, holds in reasons.items():
            if holds:
                self.notes.append(f"`cuda_graph`: without it, as {reason}")
                return ""
        self.graph = CUDAGraphStep(
            self._whole, [p for p in self.model.student.parameters() if p.requires_grad]
        )
        return "forward and backward as a CUDA graph"


def compiler_unavailable_reason(device: torch.device) -> str | None:
    """Why `torch.compile` does not work here, found by trying it on next to nothing."""
    try:
        torch.compile(lambda x: x.exp() + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a compiler, or its absence, may raise
        return f"torch.compile does not work here ({first_line(error)})"
    return None


def _distribute(model: Model, process: distributed.Process) -> Model | DistributedDataParallel:
    """Gradients averaged over processes; batch statistics too where torch can (on GPUs)."""
    if process.world == 1:
        return model
    _check_broadcast(model)
    on_gpu = process.device.type == "cuda"
    if on_gpu:
        model.student, model.teacher = map(
            nn.SyncBatchNorm.convert_sync_batchnorm, (model.student, model.teacher)
        )
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.13; 2.11
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    unsynced: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        model,
        device_ids=[process.device] if on_gpu else None,
        gradient_as_bucket_view=True,
        # a look at the graph in each step, which ours does without
        find_unused_parameters=not model.all_trained,
        **unsynced,
    )


def _check_broadcast(model: Model) -> None:
    """Raise ValueError for a parameter or buffer that DistributedDataParallel cannot send to the
    other processes at the start."""
    named = [*model.student.named_parameters(), *model.student.named_buffers()]
    for name, x in named:
        plain = x.layout is torch.strided and not x.is_nested and not x.is_quantized
        if not plain:
            is_what = "quantized" if x.is_quantized else f"of {x.layout}"
        elif x.dtype not in _SENT:
            is_what = f"of {x.dtype}"
        elif x.numel() > 1 and 0 in [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]:
            is_what = "an expanded view"
        else:
            continue
        raise ValueError(
            f"'{name}' is {is_what}, which torch cannot send between processes: train with one "
            "process, or keep it as a plain tensor of a usual dtype (dense, int32, float32)."
        )
