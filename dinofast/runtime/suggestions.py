"""The right word for one that does not exist: by meaning first, then by spelling."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# what people call it, by what it is called here; of several the first that there is
_MEANT = {
    "pretrain": "train fit pre-train pretraining main run start",
    "knn": "eval evaluate evaluation eval-knn eval_knn test validate k-nn",
    "doctor": "info env environment version versions check-install status",
    "show-crops": "visualize show augmentations crops preview",
    "check-data": "check verify validate-data scan",
    "bench-step": "bench benchmark speed profile",
    "sample-data": "data download dataset make-data",
    "batch_size_per_gpu": "batch_size bs batch b batch_size_per_device train_batch_size",
    "lr": "learning_rate base_lr max_lr blr",
    "weight_decay": "wd",
    "num_workers": "workers n_workers j num_threads threads",
    "arch": "model backbone architecture net network model_name",
    "pretrained_weights": "weights checkpoint ckpt resume model_path pretrained path load",
    "data_path": "data dataset input input_dir data_dir train_dir images root data_root imagenet",
    "output_dir": "output out out_dir save_dir log_dir logdir outdir work_dir resume",
    "precision": "amp fp16 bf16 fp32 mixed_precision half dtype",
    "global_crops_size": "img_size image_size crop_size size resolution input_size",
    "epochs": "num_epochs n_epochs max_epochs e steps max_steps",
    "teacher_temp": "temp tau temperature_teacher",
    "momentum_teacher": "momentum ema ema_decay ema_momentum teacher_momentum m",
    "out_dim": "k num_prototypes n_prototypes prototypes output_dim head_out_dim",
    "clip_grad": "grad_clip clip max_grad_norm gradient_clip gradient_clip_val clip_norm",
    "accumulate": "gradient_accumulation_steps accumulation_steps accum_iter grad_accum accum",
    "saveckp_freq": "save_freq save_every checkpoint_freq save_interval",
    "saveckp_steps": "save_steps checkpoint_steps",
    "eval_every": "eval_freq eval_interval eval_epochs val_freq validate_every",
    "eval_data": "eval_path eval_dir knn_data labeled_data",
    "log_steps": "log_every print_freq log_freq log_interval logging_steps",
    "nb_knn": "k n_neighbors neighbors",
    "warmup_epochs": "warmup warmup_steps lr_warmup",
    "drop_path_rate": "drop_path stochastic_depth",
    "local_crops_number": "n_crops num_crops n_local_crops num_local_crops local_crops n_local",
    "device": "gpu cuda cpu gpus accelerator use_cuda",
    "compile": "torch_compile no_compile",
    "grad_checkpointing": "gradient_checkpointing checkpointing activation_checkpointing",
    "optimizer": "opt optim",
    "json": "out output o save result",
}


def _joined(word: str) -> str:
    return word.replace("_", "").replace("-", "")


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """' Did you mean X?', or nothing. words: all that there are; a dash may stand for an
    underscore, and dashes before the word do not count."""
    plain = {w.lstrip("-"): w for w in words}
    wanted = word.lstrip("-").lower().replace("-", "_")
    found = [
        known
        for known, others in _MEANT.items()
        if known in plain and _joined(wanted) in map(_joined, (known, *others.split()))
    ]
    if not found:
        begins = [name for name in plain if name.replace("-", "_").startswith(wanted + "_")]
        found = begins if len(begins) == 1 and len(wanted) > 2 else []
    if not found:
        found = difflib.get_close_matches(wanted, plain, n=1) or difflib.get_close_matches(
            wanted.replace("_", "-"), plain, n=1
        )
    return f" Did you mean {plain[found[0]]}?" if found else ""
