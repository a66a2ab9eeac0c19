"""Images/s of the data path onto a GPU: from JPEG files to normalised bf16 crops in its memory, with all cores.

Loaders work ahead, so each has the machine to itself for a turn: it starts, fills its queues, and then `BATCHES` batches are
timed, to the end of the last kernel. Device memory is what the driver counts at most in a rival's first turn, without what was
there before all of them; DALI keeps what it has, so that of the last rival is an upper bound.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import photographs
import torch

from dinofast.bench.record import reason_of, version
from dinofast.bench.timing import quartiles
from dinofast.config import Config
from dinofast.data import Loader, backend_dali, backend_native, make_loader
from dinofast.runtime.backends import cores

ROUNDS, FIRST, BATCHES = 3, 4, 16                # of each rival; batches before the clock starts; those timed
RIVALS = {"dinofast, native": {"data_backend": "native"}, "dinofast": {"data_backend": "dali"},
          "dinofast, decoding engine": {"data_backend": "dali", "hw_decoder_load": 1.0}}


class Case(NamedTuple):
    photographs: int
    batch: int
    sides: tuple[int, int] = (224, 96)

    def __str__(self) -> str:
        return (f"{self.photographs} photographs, batches of {self.batch}, 2 x {self.sides[0]} and 8 x {self.sides[1]} crops, "
                f"bfloat16, {cores()} cores")


def growing(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """The case after each round: every rival has one more turn. One that fails has no more."""
    absent = {"native": backend_native.unavailable_reason(), "dali": backend_dali.unavailable_reason()}
    left_out = [f"{name}: {absent[options['data_backend']]}" for name, options in RIVALS.items()
                if absent[options["data_backend"]]]
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name, options in RIVALS.items()
                                                          if not absent[options["data_backend"]]}
    failed: dict[str, str] = {}
    before = free(device)
    with tempfile.TemporaryDirectory(prefix="dinofast-") as folder:
        photographs.write(Path(folder) / "photographs", case.photographs)
        for rounds in range(ROUNDS):
            for name in [name for name in times if name not in failed]:
                cfg = Config(data_path=f"{folder}/photographs", output_dir=folder, batch_size_per_gpu=case.batch,
                             global_crops_size=case.sides[0], local_crops_size=case.sides[1], num_workers=cores(),
                             precision="bf16", **RIVALS[name])
                try:
                    with closing(make_loader(cfg, device=device)) as loader:
                        times[name].append(take_turn(loader, device, before))
                except Exception as error:
                    failed[name] = reason_of(error)
            yield {"case": str(case), "photographs": case.photographs, "batch": case.batch, "dtype": "bfloat16",
                   "implementation": "dali" if not absent["dali"] else "native", "rounds": rounds + 1,
                   "versions": {name: version(name) for name in ("pillow", "nvidia-dali-cuda130")},
                   "rows": rows_of(times, failed, device), "left_out": left_out}


def rows_of(times: dict[str, list[tuple[float, float, float]]], failed: dict[str, str],
            device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for name, turns in times.items():
        if name in failed:
            rows.append({"rival": name, "failed": failed[name]})
            continue
        elapsed_ms, cpu_ms, device_gib = zip(*turns, strict=True)
        low, median, high = quartiles(elapsed_ms)
        rows.append({"rival": name, "same_crops": False, "images_per_s": 1e3 / median, "median_ms": median,
                     "quartiles_ms": [low, high], "cpu_ms": quartiles(cpu_ms)[1], "elapsed_ms": list(elapsed_ms),
                     "times_faster_than_official": None, "device_gib": device_gib[0] if device.type == "cuda" else None})
    return rows


def free(device: torch.device) -> int:
    """Bytes of device memory that nobody has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def take_turn(loader: Loader, device: torch.device, before: int) -> tuple[float, float, float]:
    """Milliseconds an image: elapsed, and CPU time of all threads; GiB of device memory at most, of `before` bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    least = free(device)
    for _ in range(FIRST):
        next(loader)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed, cpu = time.perf_counter(), time.process_time()
    for _ in range(BATCHES):
        next(loader)
        least = min(least, free(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    images = BATCHES * loader.batch_size
    return ((time.perf_counter() - elapsed) * 1e3 / images, (time.process_time() - cpu) * 1e3 / images,
            (before - least) / 2**30)
