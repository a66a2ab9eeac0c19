"""What a run's options choose of the data path: the backend, and the kinds of crop."""

from __future__ import annotations

from dinofast.config import Config
from dinofast.data import backend_dali, backend_native
from dinofast.data.augmentation import View
from dinofast.runtime.backends import Selection, select


def select_backend(asked: str | None, device_type: str) -> Selection:
    """Which backend executes the plan, and why not a faster one. Raises `ValueError` if what was
    asked for cannot run here."""
    reasons = {
        "dali": backend_dali.unavailable_reason(device_type),
        "native": backend_native.unavailable_reason(),
        "pil": None,
    }
    # on a CPU DALI is for tests
    by_speed = ["dali", "native", "pil"] if device_type == "cuda" else ["native", "pil"]
    return select("data_backend", asked, reasons, by_speed)


def views(cfg: Config) -> tuple[View, ...]:
    """The official kinds of crop: two global ones, which differ in blur and solarization, and the
    local ones."""
    big, small, blur = cfg.global_crops_size, cfg.local_crops_size, cfg.blur_radius
    first = View(big, cfg.global_crops_scale, blur_p=1.0, solarize_p=0.0, blur_radius=blur)
    second = View(big, cfg.global_crops_scale, blur_p=0.1, solarize_p=0.2, blur_radius=blur)
    local = View(small, cfg.local_crops_scale, blur_p=0.5, solarize_p=0.0, blur_radius=blur)
    return first, second, *[local] * cfg.local_crops_number
