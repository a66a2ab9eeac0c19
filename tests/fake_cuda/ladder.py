"""The measuring parts of `make gpu` on fake CUDA tensors: every line of them but what kernels do.
Times mean nothing.

    python ladder.py probe | step | options FOLDER [full]    prints the result; full: full size
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "benchmarks"))

import steps

# isort: split
import bench_step
import probe
import step_options
import torch
from device import DEVICE
from torch._subclasses import fake_tensor

from dinofast.bench import record, timing
from dinofast.bench import step as step_clock
from dinofast.nn.dino import Model

GIB = 2**30


class Event:
    """Each is half a millisecond after the one before."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at_ms = 0.0

    def record(self, stream: Any = None) -> None:
        Event.now_ms += 0.5
        self.at_ms = Event.now_ms

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


class Profiler:
    """Has seen kernels of 8 us with gaps of 2 us."""

    def __init__(self, activities: list[Any]) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def events(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=f"kernel {i % 7}",
                device_type=torch.autograd.DeviceType.CUDA,
                time_range=SimpleNamespace(start=10.0 * i, end=10.0 * i + 8),
            )
            for i in range(300)
        ]


class Loader(step_clock.Synthetic):
    """Stands in for one of files."""

    n_workers, backend = 4, "native"


def new_model(cfg: Any) -> Model:
    """On the device, where it stays."""
    with torch.device(DEVICE):
        model = Model.from_config(cfg)
    object.__setattr__(model, "to", lambda *args, **options: model)
    object.__setattr__(model.teacher, "to", lambda dtype: steps.convert(model.teacher, dtype))
    return model


def pretend() -> None:
    """What the official loop reads on the host is made up, as are the device's clock and memory."""
    steps.prepare(None)
    torch.nn.Module.compile = lambda self, *args, **options: None
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": GIB,
        "empty_cache": None,
        "max_memory_allocated": 3 * GIB,
        "_sleep": None,
        "mem_get_info": (79 * GIB, 80 * GIB),
    }.items():
        setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    torch.cuda.Event, torch.profiler.profile = Event, Profiler
    # a number that is copied to the device would be copied for real
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0
    as_bool, as_list = torch.Tensor.__bool__, torch.Tensor.tolist

    def is_fake(x: torch.Tensor) -> bool:
        return isinstance(x, fake_tensor.FakeTensor)

    torch.Tensor.item = lambda self: 11.0
    torch.Tensor.__bool__ = lambda self: True if is_fake(self) else as_bool(self)
    torch.Tensor.tolist = lambda self: [0.04] * self.numel() if is_fake(self) else as_list(self)
    step_clock.new_model = new_model
    bench_step.photographs_of = lambda cfg, device, stack: Loader(cfg, device, torch.bfloat16)
    step_clock.TURN, step_clock.WARM_UP = {"cuda": 1}, 1
    timing.ROUNDS["cuda"] = (2, 2)


def main(part: str, folder: str, *size: str) -> None:
    module = {"probe": probe, "step": bench_step, "options": step_options}[part]
    sys.argv = [
        part,
        "--device",
        "cuda",
        "--save-results",
        folder,
        *([] if size else ["--rehearse"]),
    ]
    pretend()
    module.SECONDS = {"cuda": 0.0}
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        code = record.main(module)
    cases = json.loads((Path(folder) / f"{part}-cuda.json").read_text())["cases"]
    print(json.dumps({"code": code, "cases": cases}))


if __name__ == "__main__":
    main(*sys.argv[1:])
