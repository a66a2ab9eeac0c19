"""The index pass over N files, the first time and from the cache.

    python benchmarks/index_pass.py 1280000 --save-results      4 minutes; keeps what it prints in benchmarks/results

The files are hard links to a few small JPEGs, so they lie in the page cache and the disk plays no part.
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
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinofast.bench import record
from dinofast.data import index

LINKS = 60_000  # of one file; ext4 allows 65,000
A_FOLDER = 1000  # files


def measure(n: int) -> dict[str, float]:
    """Seconds and microseconds a file of both passes, peak MiB beyond what was there before, bytes of cache and index."""
    with tempfile.TemporaryDirectory(prefix="dinofast-") as place:
        write(Path(place) / "images", n)
        os.sync()                                    # or the first pass would share the cores with what is still to be written
        first, second = (_in_a_process(place) for _ in range(2))
    assert first["fingerprint"] == second["fingerprint"] and first["images"] == second["images"] == n
    return {"files": n} | {f"{when}_{name}": told[name] for when, told in (("first", first), ("cached", second))
                           for name in ("seconds", "us_a_file", "peak_mib")} | {
        "cache_mib": first["cache_bytes"] / 2**20, "cache_bytes_a_file": first["cache_bytes"] / n,
        "index_bytes_an_image": first["index_bytes"] / n}


def write(folder: Path, n: int) -> None:
    """n JPEGs of 64 x 64 pixels in folders of 1000, an hour old."""
    folder.mkdir()
    for i in range(n):
        if i % LINKS == 0:
            original = folder.parent / f"{i}.jpg"
            coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC).save(original)
            os.utime(original, (time.time() - 3600,) * 2)
        below = folder / f"n{i // A_FOLDER:08}"
        if i % A_FOLDER == 0:
            below.mkdir()
        os.link(original, f"{below}/n{i // A_FOLDER:08}_{i % A_FOLDER}.JPEG")


def _in_a_process(place: str) -> dict:
    """One pass in a process of its own, as peaks are of a process."""
    done = subprocess.run([sys.executable, __file__, "--one-pass", place], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def one_pass(place: str) -> dict:
    before, start = _peak_mib(), time.perf_counter()
    found, _ = index.build(os.path.join(place, "images"), 0.0, cache=os.path.join(place, "index.npz"))
    seconds = time.perf_counter() - start
    arrays = (found.files.ends, found.members.ends, found.file, found.places, found.sizes)
    return {"seconds": seconds, "us_a_file": seconds / len(found) * 1e6, "peak_mib": _peak_mib() - before,
            "images": len(found), "fingerprint": found.fingerprint, "cache_bytes": os.path.getsize(f"{place}/index.npz"),
            "index_bytes": len(found.files.text) + len(found.members.text) + sum(array.nbytes for array in arrays)}


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=int, nargs="?", default=200_000, help="(default: 200000)")
    parser.add_argument("--save-results", nargs="?", const=record.RESULTS, type=Path, metavar="DIR")
    parser.add_argument("--one-pass", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_pass:
        print(json.dumps(one_pass(args.one_pass)))
    else:
        measured = measure(args.files)
        for name, value in measured.items():
            print(f"{name:22} {value:,.2f}" if isinstance(value, float) else f"{name:22} {value:,}")
        if args.save_results:
            command = f"python benchmarks/index_pass.py {args.files} --save-results"
            record.save(record.environment("index", torch.device("cpu"), command) | {
                "cases": [measured | {"rows": [], "left_out": []}]}, args.save_results)
