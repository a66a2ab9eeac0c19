"""Every option of a pretraining run: one flat, frozen dataclass with the official names and
defaults.

The command line is made from it (`dinofast.cli`), so that a flag, its default and its advice stand
in one place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from . import validation
from .options import meant as meant
from .options import name_unknown as name_unknown
from .options import option as option
from .presets import PRESETS
from .runtime.words import plain

VITS = ("vit_tiny", "vit_small", "vit_base", "vit_nano")
# as the official code maps them
OLD_NAMES = {"deit_tiny": "vit_tiny", "deit_small": "vit_small", "deit_base": "vit_base"}
PRECISIONS = ("bf16", "fp16", "fp32")
CLIP_MODES = ("tensor", "global")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@name_unknown
@dataclass(frozen=True)
class Config:
    """Options of `dinofast pretrain`. Names and defaults are those of facebookresearch/dino unless
    marked [dinofast]."""

    arch: str = option(
        "vit_small",
        "Backbone: vit_tiny, vit_small or vit_base (deit_tiny and deit_small are the same); any "
        "torchvision or timm name where that package is installed; vit_nano is a two-layer ViT for "
        "demos. For quick experiments take vit_tiny or vit_small.",
        topic="model",
    )
    patch_size: int = option(
        16,
        "Side of a square patch in pixels (ViT only). Smaller patches learn better features and "
        "cost more memory and time. Below 16, fp32 (`precision` fp32) is the safe choice.",
    )
    init: str | None = option(
        None,
        "[dinofast] Weights to begin with instead of random ones: a checkpoint of ours or of the "
        "official code, or of timm, torchvision, Hugging Face or DINOv2 where the architecture "
        "fits. A run that goes on does not read it.",
        metavar="FILE",
        shown="none",
    )
    drop_path_rate: float = option(
        0.1, "Stochastic depth rate of the student's last block (ViT only)."
    )
    out_dim: int = option(
        65536,
        "Number of prototypes K, the width of the DINO head's output. Large values suit large data "
        "sets; for fewer than 100,000 images try 64 to 8192.",
    )
    norm_last_layer: bool = option(
        True,
        "Keep the last layer's weight norms at 1. Not normalizing can give better features "
        "but is less stable; the official runs use false with vit_small and true with vit_base.",
    )
    use_bn_in_head: bool = option(False, "Batch normalization in the projection head.")
    head_layers: int = option(3, "[dinofast] Layers of the head's MLP.")
    head_hidden_dim: int = option(2048, "[dinofast] Hidden width of the head's MLP.")
    head_bottleneck_dim: int = option(
        256, "[dinofast] Width of the L2-normalized bottleneck before the prototypes."
    )

    global_crops_scale: tuple[float, float] = option(
        (0.4, 1.0),
        "Smallest and largest share of the image's area in a global "
        "crop. Without local crops take a wider range: 0.14 1.",
        topic="crops",
    )
    local_crops_number: int = option(
        8, "Local crops per image; 0 switches multi-crop off (then `global_crops_scale` 0.14 1)."
    )
    local_crops_scale: tuple[float, float] = option(
        (0.05, 0.4), "Smallest and largest share of the image's area in a local crop."
    )
    global_crops_size: int = option(224, "[dinofast] Side of a global crop in pixels.")
    local_crops_size: int = option(96, "[dinofast] Side of a local crop in pixels.")
    blur_radius: tuple[float, float] = option(
        (0.1, 2.0),
        "[dinofast] Smallest and largest radius of the Gaussian blur in "
        "pixels. Scale it down together with the crops.",
    )
    in_channels: int = option(
        3,
        "[dinofast] Channels of an image, 1 to 16. Other than 3: gray files with 1, or a data set "
        "of arrays from Python; then without hue, saturation, gray and solarization.",
    )
    image_mean: tuple[float, ...] = option(
        IMAGENET_MEAN,
        "[dinofast] Mean of each channel in [0, 1]; 0.5 each where there are not three.",
        nargs="+",
    )
    image_std: tuple[float, ...] = option(
        IMAGENET_STD,
        "[dinofast] Standard deviation of each channel; 0.25 each where there are not three.",
        nargs="+",
    )

    warmup_teacher_temp: float = option(
        0.04,
        "Teacher temperature at the start. 0.04 works in most cases; lower it if the "
        "loss does not fall.",
        topic="loss and teacher",
    )
    teacher_temp: float = option(
        0.04,
        "Teacher temperature after its warm-up. Above 0.07 training is usually unstable; start "
        "with 0.04 and raise it slightly if needed.",
    )
    warmup_teacher_temp_epochs: int = option(
        0, "Epochs of linear warm-up of the teacher temperature (30 in the boosted recipe)."
    )
    student_temp: float = option(0.1, "[dinofast] Student temperature.")
    center_momentum: float = option(0.9, "[dinofast] Momentum of the center.")
    momentum_teacher: float = option(
        0.996,
        "First value of the teacher's EMA momentum; it rises to 1 by a cosine. "
        "Take more for small batches: 0.9995 for a batch of 256.",
    )

    optimizer: str = option(
        "adamw",
        "adamw for ViTs; sgd or lars for convolutional networks.",
        choices=("adamw", "sgd", "lars"),
        topic="optimizer",
    )
    lr: float = option(
        0.0005,
        "Highest learning rate for a batch of 256; scaled linearly with the batch over all "
        "processes.",
    )
    warmup_epochs: int = option(10, "Epochs of linear learning-rate warm-up.")
    min_lr: float = option(1e-6, "Learning rate at the end of the cosine.")
    weight_decay: float = option(
        0.04, "Weight decay at the start. With ViTs a smaller value at the beginning works well."
    )
    weight_decay_end: float = option(
        0.4, "Weight decay at the end, reached by a cosine. A larger decay at the end helps ViTs."
    )
    clip_grad: float = option(
        3.0,
        "Largest L2 norm of each parameter tensor's gradient; 0 switches clipping off. "
        "0.3 to 1.0 can help larger ViTs.",
    )
    clip_mode: str = option(
        "tensor",
        "[dinofast] What `clip_grad` limits: tensor, each parameter tensor's gradient by itself as "
        "in the official code; global, the whole gradient, which keeps its direction and needs a "
        "larger limit.",
        choices=CLIP_MODES,
    )
    batch_size_per_gpu: int = option(64, "Images per process and forward pass.")
    accumulate: int = option(
        1,
        "[dinofast] Forward passes whose gradients are summed for one optimizer step. "
        "The learning rate is scaled with the whole batch.",
    )
    epochs: int = option(100, "Number of epochs.")
    freeze_last_layer: int = option(
        1, "Epochs during which the last layer is held fixed. Raise it if the loss does not fall."
    )

    data_path: str = option(
        "/path/to/imagenet/train/",
        "Folder of images (a tree, with or without class folders, or flat) or of WebDataset .tar "
        "shards, one shard, a pattern such as shards-{000000..000146}.tar, or a text file with one "
        "path a line. Also written `data_path` DIR.",
        topic="data",
        metavar="DIR",
        positional=True,
    )
    value_range: tuple[float, float] = option(
        (0.0, 0.0),
        "[dinofast] Values that become black and white in gray images of more than 8 bits, such as "
        "0 4095 for 12 bits in 16-bit files. Default: by the file, see docs/training.md.",
        shown="auto",
    )
    exif: bool = option(
        False,
        "[dinofast] Turn images as their EXIF orientation says; the official code ignores it.",
    )
    max_bad_files: float = option(
        0.5, "[dinofast] Share of unreadable images at which the run stops."
    )
    num_workers: int = option(
        10,
        "Threads (dali, native) or processes (pil) that make crops, per training process; at most "
        "one per core is started.",
    )
    data_backend: str | None = option(
        None,
        "[dinofast] What makes the crops: dali, decoding and cuts by NVIDIA DALI on the GPU; "
        "native, C++ in threads; or pil, processes. native and pil make the same bits, dali the "
        "same but for rounding. Default: dali on a GPU where it is installed, else native where it "
        "was built.",
        choices=("dali", "native", "pil"),
        auto={"cuda": "dali if installed, else native", "cpu": "native if built, else pil"},
    )
    hw_decoder_load: float = option(
        0.0,
        "[dinofast] dali: share of the JPEGs for the GPU's decoding engine (A100, H100), the rest "
        "is decoded by its cores. The two differ slightly: shares between 0 and 1 do not repeat a "
        "run exactly.",
    )

    eval_data: str | None = option(
        None,
        "[dinofast] Labeled images to score the teacher on while it trains: a folder with train/ "
        "and val/ holding class folders, or class folders alone. Without them held-out crops are "
        "scored, which needs no labels.",
        metavar="DIR",
        shown="none",
        topic="scores while training",
    )
    eval_every: int | None = option(
        None,
        "[dinofast] Epochs between two scores; 0: never. best.pth is the best of them. Default: as "
        "often as takes at most 2 % of the run's work, and after the last epoch.",
        type=int,
    )

    output_dir: str = option(
        ".",
        "Folder of the checkpoints and of log.txt. A run found there is resumed.",
        topic="run and checkpoints",
    )
    saveckp_freq: int = option(20, "Keep a numbered checkpoint every so many epochs; 0 keeps none.")
    saveckp_steps: int = option(
        0,
        "[dinofast] Also save checkpoint.pth every so many steps; 0 saves at the end of each epoch "
        "only.",
    )
    log_steps: int = option(
        10, "[dinofast] Steps between two readings of the loss; the device is waited for only then."
    )
    tensorboard: bool = option(
        False, "[dinofast] Also write the metrics for TensorBoard, into tensorboard/."
    )
    wandb: str | None = option(
        None,
        "[dinofast] Also send the metrics to this project of Weights & Biases; WANDB_MODE=offline "
        "keeps them in wandb/.",
        metavar="PROJECT",
        shown="none",
    )
    seed: int = option(0, "Random seed of the weights, the order of images and the augmentation.")
    device: str | None = option(
        None,
        "[dinofast] cuda or cpu. Default: a GPU if there is one.",
        choices=("cuda", "cpu"),
        auto={"cuda": "cuda", "cpu": "cpu"},
    )
    dist_url: str = option("env://", "Where processes meet; torchrun sets it up.")
    local_rank: int = option(0, "Ignored; torchrun sets it through the environment.")

    use_fp16: bool = option(
        True,
        "Mixed precision: true means fp16 with a loss scaler as in the official code, false fp32. "
        "Unless it is given, precision is bf16 on a GPU and fp32 on a CPU. Disable it if the loss "
        "is unstable.",
        shown="not given",
        topic="speed",
    )
    precision: str | None = option(
        None,
        "[dinofast] bf16, fp16 or fp32; overrides `use_fp16`.",
        choices=PRECISIONS,
        auto={"cuda": "bf16", "cpu": "fp32"},
    )
    attention: str | None = option(
        None,
        "[dinofast] Attention of our ViTs: xformers (or mslk, its successor), varlen (torch's own) "
        "or fa3 (FlashAttention-3, for H100 and H200) over all packed crops at once, in bf16 or "
        "fp16 on a GPU; cudnn and sdpa, cuDNN's and torch's kernels for each crop size; eager, the "
        "formula. Default: sdpa.",
        choices=("xformers", "varlen", "fa3", "cudnn", "sdpa", "eager"),
        auto={"cuda": "sdpa", "cpu": "sdpa"},
        aliases={"mslk": "xformers"},
    )
    linear: str | None = option(
        None,
        "[dinofast] Linear layers of our ViTs, in fp32 on a CPU: blas, torch's own way, or onednn, "
        "as convolutions of one pixel. Default: onednn on AMD's CPUs with AVX-512, where it is "
        "faster; blas elsewhere.",
        choices=("blas", "onednn"),
    )
    compile: str | None = option(
        None,
        "[dinofast] on: student and teacher under torch.compile; the first step then takes a "
        "minute, less when the same was compiled before. max-autotune: the same with matrix "
        "products chosen by timing, bias and GELU inside them; compiling takes many minutes. "
        "Default: on for our ViTs on a GPU; on a CPU it gains little.",
        choices=("on", "max-autotune", "off"),
        auto={"cuda": "on", "cpu": "off"},
        aliases={"true": "on", "1": "on", "false": "off", "0": "off"},
    )
    cuda_graph: bool = option(
        False,
        "[dinofast] Replay forward and backward as one CUDA graph, where launches still show: "
        "small models or batches. One process, no `accumulate`.",
    )
    grad_checkpointing: bool = option(
        False,
        "[dinofast] Keep only the inputs of each block but the last for backward and "
        "recompute the rest: less memory, more time (ViT only).",
    )
    teacher_precision: str = option(
        "fp32",
        "[dinofast] bf16: the teacher's weights and tokens are rounded to bf16; its "
        "average stays in fp32, with the optimizer. Goes with `precision` bf16.",
        choices=("fp32", "bf16"),
    )
    residual_precision: str = option(
        "fp32",
        "[dinofast] bf16: the sum that each branch of our ViTs adds to is kept in "
        "bf16, not fp32: fewer bytes to move, less exact. Goes with `precision` bf16.",
        choices=("fp32", "bf16"),
    )

    preset: str | None = option(
        None,
        "[dinofast] Options that go together, by the number of images: tiny, up to 2,000; small, "
        "up to 20,000; medium, up to 200,000; imagenet, the official defaults. Other flags "
        "override them; see docs/training.md.",
        choices=tuple(PRESETS),
        shown="none",
        topic="many options at once",
    )
    config: str | None = option(
        None,
        "[dinofast] A YAML file of options, such as config.yaml of an earlier run; flags override "
        "it.",
        metavar="FILE",
        shown="none",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            value = plain(getattr(self, f.name))
            if "aliases" in f.metadata and isinstance(value, str | bool):
                value = meant(f.metadata["aliases"], value)
            object.__setattr__(self, f.name, value)
        usual = {"image_mean": (IMAGENET_MEAN, 0.5), "image_std": (IMAGENET_STD, 0.25)}
        for name, (of_colors, of_others) in usual.items():
            if self.in_channels in validation.OTHER_CHANNELS and getattr(self, name) == of_colors:
                object.__setattr__(self, name, (of_others,) * self.in_channels)

    # ----------------------------------------------------------------------------------------------
    @property
    def n_crops(self) -> int:
        """Crops per image, V: two global ones and the local ones."""
        return 2 + self.local_crops_number

    @property
    def warmup(self) -> int:
        """Epochs of learning-rate warm-up: one where the default is longer than the whole run."""
        return self.warmup_epochs if self.warmup_epochs <= self.epochs else min(1, self.epochs - 1)

    @property
    def vit(self) -> str | None:
        """Which of our ViTs `arch` names, None for a backbone of another package."""
        arch = OLD_NAMES.get(self.arch, self.arch)
        return arch if arch in VITS else None

    @property
    def given_value_range(self) -> tuple[float, float] | None:
        """`value_range`, None if the files decide."""
        return None if self.value_range == (0, 0) else self.value_range

    def precision_on(self, device_type: str) -> str:
        """bf16, fp16 or fp32: what the forward pass runs in on a device of this type."""
        if self.precision is not None:
            return self.precision
        return "bf16" if self.use_fp16 and device_type == "cuda" else "fp32"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self) -> Config:
        """Raise `ValueError` (one sentence: the value and the way out) for the first option that
        cannot be right."""
        validation.check_values(self)
        validation.check_ranges(self)
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
            default = Config.__dataclass_fields__[name].default
            if getattr(self, name) not in (default, *range(self.epochs + 1)):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} but `epochs` is only {self.epochs}: the "
                    f"warm-up cannot be longer than the training; lower `{name}` or raise `epochs`."
                )
        if self.vit is not None:
            validation.check_patches(self, "global_crops_size", needed=True)
            validation.check_patches(self, "local_crops_size", needed=self.local_crops_number > 0)
        return self
