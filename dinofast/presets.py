"""Options that go together, by how many images there are: `Config(preset="small")`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {},
    "medium": {},
    "imagenet": {},
}


def options_of(preset: Any) -> dict[str, Any]:
    """Of a preset by name, those that it sets; of another word or None nothing."""
    return PRESETS.get(preset, {})
