"""Linear classification of frozen features, by one of three protocols.

sweep: features once, then 13 learning rates x choices of features trained together, as DINOv2 does;
chosen on a held-out tenth of the training images. official: one layer on random crops, as the
official eval_linear.py. logistic: L2 logistic regression (scikit-learn).
"""

from __future__ import annotations

import os
from dataclasses import MISSING, asdict, dataclass

from ..config import option
from ..validation import check_output
from .frozen_options import FrozenOptions


@dataclass(frozen=True, kw_only=True)
class Options(FrozenOptions):
    data_path: str = option(
        MISSING,
        "Folder with train/ and val/ holding class folders, or class folders alone: then every "
        "fourth image of a class is held out.",
        metavar="DIR",
        positional=True,
    )
    protocol: str = option("sweep", "How.", choices=("sweep", "official", "logistic"))
    per_class: int | None = option(
        None, "Images of each class to train on, drawn by `seed`.", type=int, shown="all"
    )
    seed: int = option(0, "Of what is drawn: images, their order and crops, first weights.")
    json: str = option("", "Write the accuracies into FILE.", metavar="FILE", shown="none")
    epochs: int | None = option(
        None,
        "Of training.",
        type=int,
        shown="sweep: as many as make 12,500 steps, at least 10; official: 100",
    )
    learning_rates: tuple[float, ...] | None = option(
        None,
        "sweep: learning rates to choose from, for 256 images at a time.",
        type=float,
        nargs="+",
        shown="DINOv2's 13, 1e-5 to 0.1",
    )
    lr: float | None = option(
        None, "official: learning rate for 256 images at a time.", type=float, shown="0.001"
    )
    n_last_blocks: int | None = option(
        None,
        "official: blocks of a ViT whose class tokens are taken.",
        type=int,
        shown="4, for ViT-B 1",
    )
    avgpool_patchtokens: bool | None = option(
        None,
        "official: also take the mean of the last block's patch tokens.",
        type=bool,
        shown="false, for ViT-B true",
    )
    num_labels: int | None = option(
        None, "official: outputs of the layer.", type=int, shown="the classes that are there"
    )
    val_freq: int | None = option(
        None, "official: epochs from one validation to the next.", type=int, shown="1"
    )
    output_dir: str | None = option(
        None,
        "official: folder of checkpoint.pth.tar and log.txt. A run found there is resumed.",
        metavar="DIR",
        shown="the current one",
    )
    evaluate: bool = option(
        False, "official: train nothing, measure a layer that is saved.", nargs="?"
    )
    pretrained_linear: str | None = option(
        None,
        "With `evaluate`: the layer, also a released dino_..._linearweights.pth.",
        metavar="FILE",
        shown="that of `output_dir`",
    )
    dist_url: str = option("env://", hidden=True)  # official names: there is one process
    local_rank: int = option(0, hidden=True)


def run(options: Options) -> None:
    from ..evaluate.linear.protocols import linear
    from .results import check_json, write_json

    given = asdict(options)
    for name in ("json", "dist_url", "local_rank"):
        given.pop(name)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            "linear runs in one process: start it as dinofast linear ..., without torchrun; raise "
            "`lr` or `batch_size_per_gpu` for a run that was of several."
        )
    check_json(options.json)
    if options.protocol == "official" and not options.evaluate:
        check_output("output_dir", options.output_dir or ".", is_folder=True)
    found = linear(**given)
    write_json(options, accuracy_percent=_rounded(found))


def _rounded(value: object) -> object:
    """Accuracies to two digits."""
    if isinstance(value, dict):
        exact = ("learning_rate", "C")
        return {name: v if name in exact else _rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 2) if isinstance(value, float) else value
