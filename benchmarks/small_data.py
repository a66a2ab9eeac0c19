"""What helps on small data: a small ViT pretrained on three data sets of about 1,500 images each,
one option changed at a time.

    python benchmarks/small_data.py --runs DIR --save-results    40 minutes; goes on in DIR

The data sets: drawn objects of `dinofast sample-data`; handwritten digits of scikit-learn; squares
cut from thirteen pictures that scikit-learn and scikit-image ship, of which class is which picture,
and validation takes its right half. Both packages have to be there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinofast.bench import record

DATA = ("drawn", "digits", "pictures")
FIXED = (
    "--arch vit_nano --patch_size 4 --head_hidden_dim 256 --head_bottleneck_dim 64 --epochs 14 "
    "--warmup_epochs 2 --batch_size_per_gpu 48 --local_crops_number 2 --global_crops_size 32 "
    "--local_crops_size 16 --blur_radius 0.02 0.5 --num_workers 1 --device cpu --saveckp_freq 0"
)
TEMPS = ("teacher_temp", "warmup_teacher_temp")
START = {"out_dim": 1024, "momentum_teacher": 0.99, "lr": 0.004} | dict.fromkeys(TEMPS, 0.03)
MILD = {"global_crops_scale": "0.5 1", "local_crops_scale": "0.2 0.5"}
SETTINGS: dict[str, dict[str, object]] = {
    "start": {},
    "lr x 5": {"lr": 0.02},
    "lr / 5": {"lr": 0.0008},
    "lr / 25": {"lr": 0.00016},
    "temperature 0.02": dict.fromkeys(TEMPS, 0.02),
    "temperature 0.04": dict.fromkeys(TEMPS, 0.04),
    "temperature 0.06": dict.fromkeys(TEMPS, 0.06),
    "momentum 0.95": {"momentum_teacher": 0.95},
    "momentum 0.996": {"momentum_teacher": 0.996},
    "out_dim 64": {"out_dim": 64},
    "milder crops": MILD,
    "lr / 5, temperature 0.02, momentum 0.996, milder crops": {
        "lr": 0.0008,
        "momentum_teacher": 0.996,
        **dict.fromkeys(TEMPS, 0.02),
        **MILD,
    },
}


def write_data(folder: Path) -> None:
    if not (folder / "drawn").exists():
        dinofast("sample-data", str(folder / "drawn"), "--n_images", "2000")
    if not (folder / "digits").exists():
        write_digits(folder / "digits")
    if not (folder / "pictures").exists():
        write_pictures(folder / "pictures")


def write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    found = load_digits()
    for i, (levels, label) in enumerate(zip(found.images, found.target, strict=True)):
        image = Image.fromarray((levels / 16 * 255).astype(np.uint8))
        path = folder / ("val" if i % 4 == 3 else "train") / str(label) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(path)


def write_pictures(folder: Path, per_class: int = 160, side: int = 64) -> None:
    import skimage
    import sklearn

    first = Path(skimage.__file__).parent / "data"
    second = Path(sklearn.__file__).parent / "datasets" / "images"
    names = "astronaut chelsea coffee motorcycle_left brick grass gravel ihc".split()
    paths = [first / f"{name}.png" for name in names]
    paths += [first / f"{name}.jpg" for name in ("rocket", "retina", "hubble_deep_field")]
    paths += [second / f"{name}.jpg" for name in ("china", "flower")]
    rng = np.random.default_rng(0)
    for path in paths:
        picture = Image.open(path).convert("RGB")
        scale = 400 / min(picture.size)
        picture = picture.resize((int(picture.width * scale), int(picture.height * scale)))
        for i in range(per_class):
            split = "val" if i >= per_class * 3 // 4 else "train"
            half = picture.width // 2
            ends = (half, picture.width - side) if split == "val" else (0, half - side)
            x, y = rng.integers(*ends), rng.integers(0, picture.height - side)
            target = folder / split / path.stem / f"{i:04}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.crop((x, y, x + side, y + side)).save(target)


def dinofast(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dinofast", *words], check=True, stdout=sys.stderr)


def measure(folder: Path, name: str, data: str) -> dict[str, object]:
    """A run, or what is there of it: 10-NN accuracy in percent, and of each epoch the loss and the
    teacher's entropy as shares of log K."""
    options = START | SETTINGS[name]
    out = folder / "out" / f"{data}_{re.sub('[^a-z0-9]', '_', name)}"
    words = [w for flag, value in options.items() for w in (f"--{flag}", *str(value).split())]
    if not (out / "knn.json").exists():
        source = str(folder / data / "train")
        dinofast("pretrain", source, "--output_dir", str(out), *FIXED.split(), *words)
        found = knn(out / "checkpoint.pth", folder / data)
        (out / "knn.json").write_text(json.dumps(found))
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    log_k = math.log(float(str(options["out_dim"])))
    shares = {
        name: [round(line[f"train_{key}"] / log_k, 3) for line in lines]
        for name, key in (("losses", "loss"), ("entropies", "teacher_entropy"))
    }
    return {"data": data, "knn": json.loads((out / "knn.json").read_text()), **shares}


def knn(weights: Path, data: Path) -> float:
    from dinofast.evaluate.knn import knn

    found = knn(weights, data, nb_knn=(10,), num_workers=0, device="cpu")
    return round(found[10][0], 1)


def untrained(folder: Path, data: str) -> dict[str, object]:
    from dinofast.cli import options_of, parser
    from dinofast.config import Config
    from dinofast.nn.dino import Model

    given = vars(parser("pretrain").parse_args(["pretrain", *FIXED.split()]))
    del given["command"]
    cfg = options_of(Config, given | {"out_dim": 64})
    path = folder / "untrained.pth"
    torch.save(
        {"teacher": Model.from_config(cfg).teacher.state_dict(), "args": cfg.to_dict()}, path
    )
    return {"data": data, "knn": knn(path, folder / data)}


def arguments(description: str) -> argparse.Namespace:
    """`runs`, a folder in which the data sets are now, and `save_results`; a thread for each run
    from here on."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the data and the runs")
    parser.add_argument("--save-results", action="store_true")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    args.runs.mkdir(parents=True, exist_ok=True)
    write_data(args.runs)
    return args


def save(benchmark: str, cases: list[dict[str, object]]) -> None:
    command = f"python benchmarks/{benchmark}.py --runs DIR --save-results"
    result = record.environment(benchmark, torch.device("cpu"), command)
    record.save(result | {"cases": cases}, record.RESULTS)


def main() -> None:
    args = arguments(__doc__.split("\n")[0])
    cases = [{"name": "before training", "rows": [untrained(args.runs, data) for data in DATA]}]
    for name in SETTINGS:
        cases.append({"name": name, "rows": [measure(args.runs, name, data) for data in DATA]})
        print(json.dumps(cases[-1]), flush=True)
    if args.save_results:
        save("small_data", cases)


if __name__ == "__main__":
    main()
