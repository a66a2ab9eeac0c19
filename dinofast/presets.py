"""Options that go together, by how many images there are, for one GPU: `Config(preset="small")`.

All begin with a peak learning rate of 5e-4, that of the official code for a batch of 256, which its
linear rule would make too small for the small batches here. tiny is measured (docs/training.md);
imagenet is the official defaults; small and medium are steps between the two.
"""

from __future__ import annotations

from typing import Any

_SOFT = {"teacher_temp": 0.02, "warmup_teacher_temp": 0.02}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "out_dim": 1024,
        **_SOFT,
        "momentum_teacher": 0.99,
        "batch_size_per_gpu": 32,
        "lr": 0.004,
        "epochs": 200,
        "warmup_epochs": 20,
        "global_crops_scale": (0.5, 1.0),
        "local_crops_scale": (0.2, 0.5),
    },
    "small": {
        "out_dim": 4096,
        **_SOFT,
        "momentum_teacher": 0.994,
        "lr": 0.002,
        "epochs": 200,
        "local_crops_scale": (0.1, 0.4),
    },
    "medium": {
        "out_dim": 16384,
        "warmup_teacher_temp": 0.03,
        "warmup_teacher_temp_epochs": 10,
        "batch_size_per_gpu": 128,
        "lr": 0.001,
        "epochs": 200,
    },
    "imagenet": {},
}


def options_of(preset: Any) -> dict[str, Any]:
    """Of a preset by name, those that it sets; of another word or None nothing."""
    return PRESETS.get(preset, {}) if isinstance(preset, str) else {}
