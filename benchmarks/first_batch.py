"""Time from the start of a loader to its first batch, over a folder of N files.

    python benchmarks/first_batch.py 1280000 --save-results    4 minutes; kept in benchmarks/results

The files are hard links to a few small JPEGs, in folders of 1000. Cold: the kernel's caches are
dropped first, which only root may do; otherwise names and files lie in the page cache, and the
result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinofast.bench import record
from dinofast.config import Config
from dinofast.data import make_loader

LINKS = 60_000  # of one file; ext4 allows 65,000
A_FOLDER = 1000  # files
BATCH = 64


def measure(n: int) -> dict[str, float | int | bool]:
    """Seconds to list the files and to the first batch, cold if that can be and warm; peak MiB
    beyond what was there before; bytes that the list keeps."""
    with tempfile.TemporaryDirectory(prefix="dinofast-") as place:
        write(Path(place) / "images", n)
        os.sync()  # or the first start would share the disk with what is still to be written
        cold = drop_caches()
        first, second = (_in_a_process(place) for _ in range(2))
    assert first["fingerprint"] == second["fingerprint"] and first["images"] == n
    return (
        {"files": n, "batch": BATCH, "is_cold": cold}
        | {
            f"{when}_{name}": told[name]
            for when, told in (("first", first), ("again", second))
            for name in ("list_s", "first_batch_s", "cpu_s", "peak_mib")
        }
        | {"list_bytes_an_image": first["list_bytes"] / n}
    )


def write(folder: Path, n: int) -> None:
    """n JPEGs of 64 x 64 pixels in folders of 1000."""
    folder.mkdir()
    for i in range(n):
        if i % LINKS == 0:
            original = folder.parent / f"{i}.jpg"
            coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(original)
        below = folder / f"n{i // A_FOLDER:08}"
        if i % A_FOLDER == 0:
            below.mkdir()
        os.link(original, f"{below}/n{i // A_FOLDER:08}_{i % A_FOLDER}.JPEG")


def drop_caches() -> bool:
    """Whether the kernel has forgotten files and names."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def _in_a_process(place: str) -> dict:
    """One start in a process of its own, as peaks are of a process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one-start", place],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def one_start(place: str) -> dict:
    cfg = Config(
        data_path=os.path.join(place, "images"),
        output_dir=os.path.join(place, "run"),
        batch_size_per_gpu=BATCH,
        device="cpu",
    )
    before, start, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    with closing(make_loader(cfg)) as loader:
        listed = time.perf_counter()
        next(loader)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    files = loader.reader.dataset.files
    return {
        "list_s": listed - start,
        "first_batch_s": seconds,
        "cpu_s": cpu_s,
        "peak_mib": _peak_mib() - before,
        "images": loader.n_images,
        "fingerprint": loader.fingerprint,
        "list_bytes": files.text.nbytes + files.ends.nbytes,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=int, nargs="?", default=200_000, help="(default: 200000)")
    parser.add_argument("--save-results", nargs="?", const=record.RESULTS, type=Path, metavar="DIR")
    parser.add_argument("--one-start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_start:
        print(json.dumps(one_start(args.one_start)))
    else:
        measured = measure(args.files)
        for name, value in measured.items():
            print(f"{name:22} {value:,.2f}" if isinstance(value, float) else f"{name:22} {value:,}")
        if args.save_results:
            command = f"python benchmarks/first_batch.py {args.files} --save-results"
            record.save(
                record.environment("first_batch", torch.device("cpu"), command)
                | {"cases": [measured | {"rows": [], "left_out": []}]},
                args.save_results,
            )
