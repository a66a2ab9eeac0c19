"""Flags of other programs that have no namesake here: what to do instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

_PROCESSES = (
    "gpus num_gpus n_gpus ngpus n_gpu devices num_devices nproc nproc_per_node num_processes "
    "world_size nodes num_nodes nnodes rank node_rank strategy ddp distributed multi_gpu "
    "multiprocessing_distributed dist_backend master_port master_addr launcher"
)
_ONE_GPU = "gpu gpu_id gpu_ids device_id device_ids cuda_device cuda_visible_devices"
# of pretrain, and of what takes its flags: what to do, and how others call it
_PRETRAIN = (
    (
        "Options in a YAML file are given by `config` FILE.",
        "cfg config_file config_path yaml opts hparams",
    ),
    (
        "The temperatures are `student_temp` and `teacher_temp`.",
        "temperature temp tau temperatures",
    ),
    (
        "Weights to begin with are given by `init` FILE; a run in `output_dir` is gone on with.",
        "pretrained pretrained_weights pretrained_path weights init_weights init_from load_from "
        "finetune checkpoint checkpoint_path ckpt ckpt_path from_pretrained load model_path",
    ),
    (
        "A run in `output_dir` is resumed: give another folder to begin anew.",
        "overwrite force restart from_scratch no_resume fresh exist_ok start_epoch auto_resume",
    ),
    (
        "A run in `output_dir` is resumed by the same command, without a flag.",
        "resume resume_from resume_path resume_from_checkpoint",
    ),
    (
        "The folder of checkpoints and of log.txt is `output_dir`.",
        "checkpoint_dir ckpt_dir checkpoints_dir save_path save exp_name "
        "experiment experiment_name name run_name project",
    ),
    (
        "The numbers go to log.txt and metrics.jsonl in `output_dir`; with `tensorboard` true or "
        "`wandb` PROJECT also there.",
        "tb logger log_file log report_to use_wandb use_tensorboard mlflow csv",
    ),
    (
        "The learning rate follows the official schedule: `warmup_epochs`, then a cosine from `lr` "
        "to `min_lr`.",
        "scheduler lr_scheduler lr_schedule sched schedule decay_epochs lr_decay gamma step_size "
        "milestones cosine",
    ),
    (
        "The rest of the optimizer is as in the official code: `lr`, `weight_decay` and "
        "`weight_decay_end` can be chosen.",
        "beta1 beta2 betas eps opt_eps optim_eps adam_beta1 adam_beta2 adam_epsilon opt_betas "
        "nesterov sgd_momentum",
    ),
    (
        "Labeled images to score on while training are given by `eval_data` DIR; dinofast knn and "
        "dinofast linear measure afterwards.",
        "val_path val val_dir val_split valid validation test test_only eval eval_only evaluate "
        "num_classes n_classes nb_classes classes labels label_file num_labels knn",
    ),
    (
        "The augmentation is the official one: `global_crops_scale`, `local_crops_scale` and "
        "`blur_radius` can be chosen.",
        "augment aug augmentation augmentations color_jitter transform transforms aa auto_augment "
        "solarize blur gaussian_blur hflip scale crop_scale mixup cutmix",
    ),
    (
        "The size of a ViT comes with its `arch`: vit_tiny, vit_small, vit_base.",
        "depth embed_dim num_heads n_heads heads num_layers n_layers layers hidden_dim hidden_size "
        "width mlp_ratio dim",
    ),
    (
        "To train on some of the images, give a text file of their paths as DIR.",
        "limit subset max_images n_images num_images max_samples num_samples fraction debug "
        "fast_dev_run dry_run",
    ),
    ("`device` cpu does without a GPU.", "no_cuda use_cpu cpu_only no_gpu force_cpu"),
    ("`device` is cuda or cpu.", "mps use_mps tpu xpu"),
    ("Choose it by `precision`.", "tf32 allow_tf32 use_amp apex opt_level mixed"),
)
_CHECKED = (
    (
        "The checkpoint is given as `pretrained_weights` FILE.",
        "model model_file checkpoint_dir run output_dir out_dir weights_path",
    ),
    (
        "Features are computed anew each time; dinofast embed writes them into a file.",
        "dump_features load_features features feature_dir",
    ),
)
_COMMANDS = (
    (
        "A trained backbone is used in Python: dinofast.load_backbone('checkpoint.pth').",
        "load finetune",
    ),
    (
        "dinofast export RUN writes a trained backbone for other programs, by its `format`.",
        "onnx convert to-onnx to_onnx export-onnx export_onnx torchscript timm hf huggingface save",
    ),
    (
        "A linear classifier on its features: dinofast linear DIR --pretrained_weights FILE.",
        "eval-linear eval_linear linear-probe linear_probe linear-eval linear_eval lincls probe "
        "classify log-regression log_regression logistic",
    ),
    (
        "dinofast retrieve draws nearest neighbors.",
        "retrieval search nearest neighbors nearest-neighbors nn image-retrieval similarity",
    ),
    (
        "dinofast embed writes the features of images into a file.",
        "extract extract-features extract_features features embedding embeddings infer inference "
        "predict dump-features dump_features",
    ),
    (
        "dinofast segment draws attention and patches of images and videos.",
        "attention attention-maps attention_maps visualize visualize-attention visualize_attention "
        "video_generation video-generation heatmap pca",
    ),
    (
        "dinofast davis segments the videos of DAVIS 2017.",
        "eval_video_segmentation video_segmentation video-segmentation vos",
    ),
    (
        "The same pretrain command goes on with the run in its `output_dir`.",
        "resume continue restart",
    ),
)


def command_instead_of(word: str) -> str:
    """' What to do instead.' of a command that others have, or nothing."""
    found = [sentence for sentence, names in _COMMANDS if word.lower() in names.split()]
    return f" {found[0]}" if found else ""


def instead_of(flag: str, value: str, command: str, flags: Sequence[str]) -> str:
    """' What to do instead.', or nothing. value: what stands behind the flag; flags: those of the
    command."""
    name = flag.lstrip("-").lower().replace("-", "_")
    if command == "pretrain" and name in _PROCESSES.split():
        return f" {_launched(value)}"
    if "--device" in flags and name in f"{_ONE_GPU} {_PROCESSES}".split():
        number = value if re.fullmatch(r"\d+", value) and name in _ONE_GPU.split() else "0"
        return f" One GPU of several is chosen by CUDA_VISIBLE_DEVICES={number} before the command."
    if "-o" in flags and name in ("output", "out", "output_file", "out_file", "save", "file"):
        what = "picture" if "--sheet" in flags else "result"
        return f" The {what} is written to -o FILE."
    table = _CHECKED if "--pretrained_weights" in flags else _PRETRAIN
    if "--arch" not in flags:
        return ""
    for sentence, names in table:
        if name in names.split():
            return f" {sentence}"
    return ""


def _launched(value: str) -> str:
    """How several processes are started; value: how many GPUs, or which."""
    listed = re.fullmatch(r"\d+(,\d+)+", value)
    number = str(value.count(",") + 1) if listed else value if value.isdigit() else "N"
    chosen = f"CUDA_VISIBLE_DEVICES={value} " if listed else ""
    return (
        "Each GPU gets a process, which torchrun starts: "
        f"{chosen}torchrun --nproc_per_node={number} -m dinofast pretrain ..."
    )
