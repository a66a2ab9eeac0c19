"""Whether a preset learns: a small ViT pretrained with it on three small data sets, three seeds
each, against the same network before training and against raw pixels.

    python benchmarks/presets.py --runs DIR --save-results    2 hours; goes on in DIR

The data sets are those of small_data.py: drawn objects, handwritten digits, squares cut from
photographs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import small_data
import torch

PRESET, SEEDS, K = "tiny", (0, 1, 2), 10
# what the images ask for, whatever the preset: 32 pixels on a CPU, in a fifth of its epochs
NETWORK = (
    "--arch vit_nano --patch_size 4 --head_hidden_dim 256 --head_bottleneck_dim 64 "
    "--global_crops_size 32 --local_crops_size 16 --local_crops_number 4 --blur_radius 0.02 0.5 "
    "--epochs 40 --warmup_epochs 4 --num_workers 0 --device cpu --saveckp_freq 0 --eval_every 0"
).split()
RUNS_AT_ONCE = 2  # of a thread each


def accuracy(weights: Path, data: Path) -> float:
    from dinofast.evaluate.knn import knn

    return round(knn(weights, data, nb_knn=(K,), num_workers=0, device="cpu")[K][0], 1)


def untrained(run: Path) -> Path:
    """The teacher with which a run has begun, in a file."""
    from dinofast import Config, Model, RunFolder

    cfg, path = Config(**RunFolder(run).options), run / "untrained.pth"
    weights = Model.from_config(cfg).teacher.state_dict()
    torch.save({"teacher": weights, "args": cfg.to_dict()}, path)
    return path


def raw_pixels(data: Path) -> float:
    from dinofast.evaluate.frozen import extract_features
    from dinofast.evaluate.images import EvalTransform, train_and_val
    from dinofast.evaluate.knn import knn_classify

    train, val, _ = train_and_val(data, EvalTransform(37, 32))
    features = [extract_features(torch.nn.Flatten(), half) for half in (train, val)]
    return round(knn_classify(*features[0], *features[1], k=K)[0], 1)


def pretrain(folder: Path, data: str, seed: int) -> Path:
    """A run, or what is there of it."""
    out = folder / "presets" / f"{data}_{seed}"
    words = [
        *("pretrain", str(folder / data / "train"), "--output_dir", str(out)),
        *("--preset", PRESET, "--seed", str(seed), *NETWORK),
    ]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "said.txt").open("a") as said:
        subprocess.run([sys.executable, "-m", "dinofast", *words], check=True, stdout=said)
    return out


def measure(folder: Path, data: str, seed: int) -> dict[str, object]:
    """10-NN accuracy in percent before and after, and the teacher's entropy at the end as a share
    of log K."""
    from dinofast import RunFolder

    run = RunFolder(pretrain(folder, data, seed))
    log_k = torch.tensor(float(run.options["out_dim"])).log().item()
    return {
        "data": data,
        "seed": seed,
        "untrained": accuracy(untrained(run.path), folder / data),
        "trained": accuracy(run.checkpoint, folder / data),
        "entropy": round(run.metrics[-1]["train_teacher_entropy"] / log_k, 3),
    }


def main() -> None:
    args = small_data.arguments(__doc__.split("\n")[0])
    jobs = [(data, seed) for data in small_data.DATA for seed in SEEDS]
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        rows = list(pool.map(lambda job: measure(args.runs, *job), jobs))
    pixels = {data: raw_pixels(args.runs / data) for data in small_data.DATA}
    cases = [{"name": PRESET, "raw_pixels": pixels, "rows": rows}]
    print(json.dumps(cases, indent=1))
    if args.save_results:
        small_data.save("presets", cases)


if __name__ == "__main__":
    main()
