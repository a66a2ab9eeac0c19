"""The demo: write drawn objects, pretrain a two-layer ViT on them without labels, and show what it
has learned."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from .. import __version__
from ..config import Config, option
from ..evaluate.attention_maps import (
    attention_maps,
    cls_attention,
    dense_attention_maps,
    likeness,
    mass_on_mask,
    patch_features,
    pca_colors,
)
from ..evaluate.frozen import extract_features
from ..evaluate.images import EvalTransform, LabeledImages, labeled_folder, to_tensor
from ..evaluate.knn import knn_classify
from ..evaluate.pictures import enlarge, overlay, sheet, stretch
from ..nn.dino import Model
from ..report.page import page
from ..runtime.terminal import say
from ..runtime.words import counted
from ..train import train
from ..validation import check_output
from . import sample_data

SIDE, PATCH, BATCH = 32, 4, 48
# of the picture: images, pixels that the backbones see, pixels of a cell
SHOWN, FINE, TILE = 6, 64, 192
PEAK_LR = 4e-3
K = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    output_dir: str | None = option(
        None,
        "Folder of the data, the run and the picture. Default: runs/demo, or runs/demo-seedN for "
        "another seed than 0.",
        metavar="DIR",
    )
    seed: int = option(0, "Of the drawn images and of the run.")
    device: str | None = option(
        None, "Where to train.", choices=("cuda", "cpu"), shown="a GPU if there is one"
    )


def run(options: Options) -> None:
    demo(**asdict(options))


def demo(
    output_dir: str | Path | None = None,
    seed: int = 0,
    epochs: int = 30,
    device: str | None = None,
    n_images: int = 4000,
) -> dict:
    """Run the demo, print its table, and write `attention_maps.png`, `report.html` and
    `result.json` into `output_dir`; returns the result.

    output_dir is runs/demo, or runs/demo-seedN for another seed than 0. The data set goes to
    `output_dir/data`. What an interrupted demo has left is used and continued. device: default a
    GPU if there is one. Raises ValueError when the folder holds the data set of another seed.
    """
    start = time.perf_counter()
    out = Path(output_dir or ("runs/demo" if seed == 0 else f"runs/demo-seed{seed}"))
    check_output("output_dir", str(out), is_folder=True)
    what = "using" if (out / "data" / "train").is_dir() else "writing"
    say(f"{what} {n_images:,} images of drawn objects in '{out / 'data'}'")
    sample_data.write(out / "data", n_images, seed=seed)
    say("The loss alone says little, as its target moves: k-NN at the end is the measure.")

    cfg = settings(out, seed, epochs, device)
    resumed = (out / "checkpoint.pth").exists()
    train_start = time.perf_counter()
    run = train(cfg)
    train_s = time.perf_counter() - train_start

    untrained = Model.from_config(cfg).teacher.backbone.eval()
    trained = run.teacher
    score = evaluate(out / "data", untrained, trained)
    sheet(picture_rows(seed, untrained, trained)).save(out / "attention_maps.png", optimize=True)
    (out / "report.html").write_text(page([run], device=device), encoding="utf-8")
    result = score | {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"dinofast demo --seed {seed}",
        "seed": seed,
        "epochs": epochs,
        "steps": epochs * (score["n_train"] // BATCH),
        "resumed": resumed,
        "train_seconds": round(train_s, 1),
        "total_seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name()
        if _on_gpu(device)
        else f"CPU, {counted(torch.get_num_threads(), 'thread')}",
        "versions": {
            "dinofast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "config": cfg.to_dict(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    _show(result)
    say(
        "\n"
        f"{_meaning(result)}\n"
        f"Picture: {out / 'attention_maps.png'}   All numbers: {out / 'result.json'}\n"
        f"The whole run as a page for a browser: {out / 'report.html'}"
    )
    return result


def settings(out: Path, seed: int, epochs: int, device: str | None) -> Config:
    """A recipe for small images and few steps; what matters most at this width is vit_nano's
    initialization, which is not 0.02.

    On two CPU cores (torch 2.13, 2026-11-23, seed 0, 1,364 steps) K 256, teacher temperature 0.03
    and momentum 0.99 came to a k-NN of 0.74 with 0.36 of the attention on the object; K 64, 0.04
    and 0.98 to 0.78 and 0.53.
    """
    return Config(
        arch="vit_nano",
        patch_size=PATCH,
        drop_path_rate=0.0,
        out_dim=64,
        head_layers=3,
        head_hidden_dim=256,
        head_bottleneck_dim=64,
        norm_last_layer=True,
        freeze_last_layer=0,
        global_crops_size=SIDE,
        global_crops_scale=(0.5, 1.0),
        local_crops_size=16,
        local_crops_number=2,
        local_crops_scale=(0.2, 0.5),
        blur_radius=(0.02, 0.5),
        warmup_teacher_temp=0.04,
        teacher_temp=0.04,
        momentum_teacher=0.98,
        batch_size_per_gpu=BATCH,
        lr=PEAK_LR * 256 / BATCH,
        warmup_epochs=min(2, epochs),
        min_lr=1e-5,
        epochs=epochs,
        weight_decay=0.04,
        weight_decay_end=0.04,
        clip_grad=3.0,
        data_path=str(out / "data" / "train"),
        eval_data=str(out / "data"),
        output_dir=str(out),
        saveckp_freq=0,
        num_workers=2,
        seed=seed,
        device=device,
    )


def evaluate(data: Path, untrained: nn.Module, trained: nn.Module) -> dict:
    """Scores (shares of 1) of raw pixels, the untrained and the trained backbone."""
    transform = EvalTransform(resize=SIDE, crop=SIDE)
    train_set, val_set = (labeled_folder(data / split, transform) for split in ("train", "val"))
    score: dict = {"n_train": len(train_set), "n_val": len(val_set), "k": K}
    for name, backbone in (
        ("raw_pixels", nn.Flatten()),
        ("untrained", untrained),
        ("trained", trained),
    ):
        features = (*extract_features(backbone, train_set), *extract_features(backbone, val_set))
        score[name] = {
            "knn": knn_classify(*features, k=K)[0] / 100,
            "knn_within_palette": _within_palette(train_set.classes, *features),
        }

    images = torch.cat([batch for batch, _, _ in val_set.batches(250, 0)])
    masks = _masks(data, val_set)
    score["object_area"] = masks.mean().item()
    for name, backbone in (("untrained", untrained), ("trained", trained)):
        score[name]["attention_on_object"] = (
            mass_on_mask(attention_maps(backbone, images), masks).mean(0).tolist()
        )
    return score


def picture_rows(seed: int, untrained: nn.Module, trained: nn.Module) -> list[tuple[str, Tensor]]:
    """The rows of the picture: the first unseen image of SHOWN classes, drawn at TILE pixels,
    and what is made of it.

    The backbones see the same drawings at FINE pixels, twice their training's size, for maps of
    FINE / PATCH patches a side, averaged over all shifts of the patches.
    """
    first = (sample_data.VALIDATION_EVERY - 1) * len(sample_data.CLASSES)
    drawn = [
        Image.fromarray(sample_data.draw(first + c, seed=seed, pixels=TILE)[0])
        for c in range(SHOWN)
    ]
    shown = torch.stack([to_tensor(image, mean=(0, 0, 0), std=(1, 1, 1)) for image in drawn])
    images = torch.stack([EvalTransform(resize=FINE, crop=FINE)(image) for image in drawn])

    def heat(maps: Tensor) -> Tensor:
        return overlay(shown, stretch(enlarge(maps, (TILE, TILE))))

    before, after = (
        dense_attention_maps(backbone, images, PATCH) for backbone in (untrained, trained)
    )
    found = [
        ("unseen image", shown),
        ("attention, untrained", heat(before.mean(1))),
        ("attention, trained", heat(after.mean(1))),
    ]
    features = patch_features(trained, images)
    # else images differ more than their patches
    colors = pca_colors(features - features.mean((1, 2), keepdim=True))
    light = likeness(features, cls_attention(trained, images).mean(1)).clamp(min=0)[:, None]
    return [
        *found,
        ("PCA of patches, trained", enlarge(colors, (TILE, TILE)) * enlarge(light, (TILE, TILE))),
    ]


def _within_palette(
    classes: tuple[str, ...],
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
) -> float:
    """k-NN accuracy when the neighbors come only from the two classes that share the image's
    palette: color does not help."""
    palette = torch.tensor(
        [sample_data.PALETTE_OF[sample_data.CLASSES.index(name)] for name in classes]
    )
    right = 0.0
    for p in range(len(sample_data.PALETTES)):
        here, there = palette[train_labels] == p, palette[test_labels] == p
        top1, _ = knn_classify(
            train_features[here], train_labels[here], test_features[there], test_labels[there], K
        )
        right += top1 / 100 * int(there.sum())
    return right / len(test_labels)


def _masks(data: Path, images: LabeledImages) -> Tensor:
    """Share of each pixel that the object covers, (N, SIDE, SIDE)."""
    paths = [(data / "masks" / path.relative_to(data)).with_suffix(".png") for path in images.paths]
    small = [
        np.asarray(Image.open(path).resize((SIDE, SIDE), Image.Resampling.BOX)) for path in paths
    ]
    return torch.from_numpy(np.stack(small)).float() / 255


def _on_gpu(device: str | None) -> bool:
    return device != "cpu" and torch.cuda.is_available()


def _show(result: dict) -> None:
    since = " since it was resumed" if result["resumed"] else ""
    title = (
        f"after {result['steps']} steps without labels, {result['train_seconds']:.0f} "
        f"s{since}, {result['device']}"
    )
    head = ("", f"k-NN (k = {K})", "within palette pairs", "attention on the object", "best head")
    rows = [
        ("chance", "10 %", "50 %", f"{result['object_area']:.0%}", f"{result['object_area']:.0%}")
    ]
    for name in ("raw_pixels", "untrained", "trained"):
        heads = result[name].get("attention_on_object")
        rows.append(
            (
                name.replace("_", " "),
                f"{result[name]['knn']:.1%}",
                f"{result[name]['knn_within_palette']:.1%}",
                f"{np.mean(heads):.0%}" if heads else "",
                f"{max(heads):.0%}" if heads else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    say(f"\n{title}")
    for row in (head, *rows):
        say(
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(t.rjust(w) for t, w in zip(row[1:], widths[1:], strict=True)),
                ]
            ).rstrip()
        )


def _meaning(result: dict) -> str:
    raw, before, after = (result[name] for name in ("raw_pixels", "untrained", "trained"))
    on_object = np.mean(after["attention_on_object"])
    return (
        f"No label was used in training. k-NN accuracy on {result['n_val']} unseen images is "
        f"{after['knn']:.0%}. It is {before['knn']:.0%} before training and {raw['knn']:.0%} for "
        f"raw pixels.\n{on_object:.0%} of the attention lies on the object, which covers "
        f"{result['object_area']:.0%} of the image. Before training it is "
        f"{np.mean(before['attention_on_object']):.0%}.\nColor is a designed cue. Two classes "
        "share each palette, so color alone can reach 50 %. Within these pairs, where chance is 50 "
        f"%, accuracy goes from {before['knn_within_palette']:.0%} to "
        f"{after['knn_within_palette']:.0%}."
    )
