"""The official run of eight steps in tests/official/train.npz: its options, weights and batches."""

import golden
import torch

from dinofast import VisionTransformer
from dinofast.config import Config
from dinofast.nn.dino import Model

GOLDEN = Config(
    arch="vit_tiny",
    patch_size=8,
    out_dim=160,
    head_hidden_dim=64,
    head_bottleneck_dim=24,
    norm_last_layer=False,
    local_crops_number=4,
    global_crops_size=32,
    local_crops_size=16,
    batch_size_per_gpu=4,
    epochs=4,
    warmup_epochs=1,
    lr=0.002 * 256 / 4,
    min_lr=1e-5,
    weight_decay=0.04,
    weight_decay_end=0.4,
    momentum_teacher=0.9,
    clip_grad=0.05,
    freeze_last_layer=1,
    warmup_teacher_temp=0.04,
    teacher_temp=0.07,
    warmup_teacher_temp_epochs=2,
    drop_path_rate=0.0,
    log_steps=1,
    device="cpu",
)


def golden_backbone():
    return VisionTransformer(img_size=[32], patch_size=8, embed_dim=48, depth=3, num_heads=3)


class GoldenLoader:
    """The eight batches of the official run, as a loader gives them."""

    n_images = 8
    steps_per_epoch = 2
    bad_files = []
    wait_s = 0.0
    fingerprint = "f" * 32
    backend = "golden"
    backend_note = ""
    n_unread, unread_reason = 0, ""

    def __init__(self, poison=None):
        self.step, self.poison, self.called = 0, poison, []
        self.data = golden.load("train.npz")

    def begin_run(self):
        self.called.append("begin_run")

    def all_are_here(self, all_equal):
        self.called.append("all_are_here")

    def waited_s(self):
        return 0.0

    def remarks(self):
        return []

    def seek(self, step):
        self.step = step

    def __next__(self):
        crops = [self.data[f"step{self.step % 8}.crop{i}"] for i in range(6)]
        if self.poison is not None and self.step in self.poison:
            crops[3] = crops[3] * float("nan")
        self.step += 1
        return [torch.cat(crops[:2]), torch.cat(crops[2:])]

    def close(self):
        self.closed = True


def golden_model(cfg=GOLDEN):
    """With the official weights."""
    model = Model.from_config(cfg, golden_backbone)
    start = golden.load("train.npz", "init.")
    model.student.load_state_dict(start)
    model.teacher.load_state_dict(start)
    return model
