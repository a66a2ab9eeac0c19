"""Options that go together, by how many images there are: `Config(preset="small")`."""

from __future__ import annotations

from typing import Any

_SOFT = {"teacher_temp": 0.02, "warmup_teacher_temp": 0.02}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"out_dim": 1024, "momentum_teacher": 0.99, **_SOFT},
    "small": {"out_dim": 4096, "momentum_teacher": 0.99, **_SOFT},
    "medium": {"out_dim": 16384},
    "imagenet": {},
}


def options_of(preset: Any) -> dict[str, Any]:
    """Of a preset by name, those that it sets; of another word or None nothing."""
    return PRESETS.get(preset, {}) if isinstance(preset, str) else {}
