"""Images/s of the data path onto a GPU: from JPEG files to normalized bf16 crops in its memory,
with all cores.

Loaders work ahead, so each has the machine to itself for a turn: it starts, fills its queues, and
then `BATCHES` batches are timed, to the end of the last kernel. Device memory is what the driver
counts at most in a candidate's first turn, without what was there before all of them; DALI keeps
what it has, so that of the last candidate is an upper bound.
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

from dinofast.bench.record import version
from dinofast.bench.timing import Turns, add_ratios, quartiles, row_of
from dinofast.config import Config
from dinofast.data import Loader, backend_dali, backend_native, make_loader
from dinofast.runtime.backends import cores

ROUNDS, FIRST, BATCHES = 3, 4, 16  # of each candidate; batches before the clock starts; those timed
CANDIDATES = {
    "dinofast, native": {"data_backend": "native"},
    "dinofast": {"data_backend": "dali"},
    "dinofast, decoding engine": {"data_backend": "dali", "hw_decoder_load": 1.0},
}


class Case(NamedTuple):
    photographs: int
    batch: int
    sides: tuple[int, int] = (224, 96)

    def __str__(self) -> str:
        return (
            f"{self.photographs} photographs, batches of {self.batch}, 2 x {self.sides[0]} and 8 x "
            f"{self.sides[1]} crops, bfloat16, {cores()} cores"
        )


def growing(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """The case after each round: every candidate has one more turn. One that fails has no more."""
    absent = {
        "native": backend_native.unavailable_reason(),
        "dali": backend_dali.unavailable_reason("cuda"),
    }
    left_out = [
        f"{name}: {absent[options['data_backend']]}"
        for name, options in CANDIDATES.items()
        if absent[options["data_backend"]]
    ]
    before = free(device)
    with tempfile.TemporaryDirectory(prefix="dinofast-") as folder:
        photographs.write(Path(folder) / "photographs", case.photographs)
        turns = Turns(
            {
                name: lambda name=name: take_turn(case, name, folder, device, before)
                for name, options in CANDIDATES.items()
                if not absent[options["data_backend"]]
            }
        )
        for _ in range(ROUNDS):
            turns.round()
            rows = [
                {"candidate": name, "failed": turns.failed[name]}
                if name in turns.failed
                else row_of_gpu(name, found, device)
                for name, found in turns.results.items()
            ]
            yield {
                "case": str(case),
                "photographs": case.photographs,
                "batch": case.batch,
                "dtype": "bfloat16",
                "implementation": "dali" if not absent["dali"] else "native",
                "rounds": turns.rounds,
                "versions": {name: version(name) for name in ("pillow", "nvidia-dali-cuda130")},
                "rows": add_ratios(rows),
                "left_out": left_out,
            }


def free(device: torch.device) -> int:
    """Bytes of device memory that nobody has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def row_of_gpu(
    name: str, turns: list[tuple[float, float, float]], device: torch.device
) -> dict[str, Any]:
    elapsed_ms, cpu_ms, device_gib = ([turn[i] for turn in turns] for i in range(3))
    return row_of(
        name,
        elapsed_ms,
        same_crops=False,
        images_per_s=1e3 / quartiles(elapsed_ms)[1],
        cpu_ms=quartiles(cpu_ms)[1],
        device_gib=device_gib[0] if device.type == "cuda" else None,
    )


def take_turn(
    case: Case, name: str, folder: str, device: torch.device, before: int
) -> tuple[float, float, float]:
    """Of a loader of its own: see `time_batches`."""
    cfg = Config(
        data_path=f"{folder}/photographs",
        output_dir=folder,
        batch_size_per_gpu=case.batch,
        global_crops_size=case.sides[0],
        local_crops_size=case.sides[1],
        num_workers=cores(),
        precision="bf16",
        **CANDIDATES[name],
    )
    with closing(make_loader(cfg, device=device)) as loader:
        return time_batches(loader, device, before)


def time_batches(loader: Loader, device: torch.device, before: int) -> tuple[float, float, float]:
    """Milliseconds an image: elapsed, and CPU time of all threads; GiB of device memory at most, of
    `before` bytes."""
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
    return (
        (time.perf_counter() - elapsed) * 1e3 / images,
        (time.process_time() - cpu) * 1e3 / images,
        (before - least) / 2**30,
    )
