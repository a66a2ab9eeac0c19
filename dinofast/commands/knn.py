"""Weighted k-NN classification of frozen features, the protocol of the official eval_knn.py."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ..config import option
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
    nb_knn: tuple[int, ...] = option((10, 20, 100, 200), "Numbers of neighbors.", nargs="+")
    temperature: float = option(0.07, "Of the votes, exp(similarity / temperature).")
    json: str = option("", "Write the accuracies into FILE.", metavar="FILE", shown="none")
    use_cuda: bool = option(True, hidden=True)  # official name; says where features are kept


def run(options: Options) -> None:
    from ..evaluate.knn import knn
    from .results import check_json, write_json

    check_json(options.json)
    given = asdict(options)
    for name in ("json", "use_cuda"):
        given.pop(name)
    found = knn(**given)
    rounded = {k: {"top1": round(a, 2), "top5": round(b, 2)} for k, (a, b) in found.items()}
    write_json(options, accuracy_percent=rounded)
