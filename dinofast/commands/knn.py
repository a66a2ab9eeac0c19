"""Weighted k-NN classification of frozen features, the protocol of the official eval_knn.py."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass

from ..config import option
from ..validation import check_output


@dataclass(frozen=True, kw_only=True)
class Options:
    pretrained_weights: str = option(
        MISSING, "A checkpoint of dinofast or of the official code.", metavar="FILE"
    )
    data_path: str = option(
        MISSING,
        "Folder with train/ and val/ holding class folders, or class folders alone: then every "
        "fourth image of a class is held out.",
        metavar="DIR",
        positional=True,
    )
    checkpoint_key: str = option(
        "teacher",
        "Whose weights; untrained: the same network at random, to compare with.",
        choices=("teacher", "student", "untrained"),
    )
    arch: str | None = option(
        None,
        "Only where the checkpoint does not tell its architecture.",
        shown="from the checkpoint",
    )
    patch_size: int | None = option(
        None,
        "Side of a patch, likewise.",
        type=int,
        shown="from the checkpoint",
    )
    nb_knn: tuple[int, ...] = option((10, 20, 100, 200), "Numbers of neighbors.", nargs="+")
    temperature: float = option(0.07, "Of the votes, exp(similarity / temperature).")
    resize: int | None = option(
        None, "Shorter side before the center crop, in pixels.", type=int, shown="8/7 of `crop`"
    )
    crop: int | None = option(
        None,
        "Side of the center crop, in pixels.",
        type=int,
        shown="the global crops' in training, 224 for official checkpoints",
    )
    batch_size_per_gpu: int = option(128, "Images at a time.")
    num_workers: int = option(10, "Processes that read images.", shown="10, at most one per core")
    device: str | None = option(
        None, "Where features are computed.", choices=("cuda", "cpu"), shown="a GPU if there is one"
    )
    json: str = option("", "Write the accuracies into FILE.", metavar="FILE", shown="none")
    use_cuda: bool = option(True, hidden=True)  # official name; says where features are kept


def run(options: Options) -> None:
    from ..evaluate.knn import knn

    given = asdict(options)
    given.pop("use_cuda")
    path = given.pop("json")
    if path:
        check_output("json", path)
    found = knn(**given)
    if path:
        rounded = {k: {"top1": round(a, 2), "top5": round(b, 2)} for k, (a, b) in found.items()}
        settings = {name: value for name, value in given.items() if value is not None}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({**settings, "accuracy_percent": rounded}, file, indent=1)
