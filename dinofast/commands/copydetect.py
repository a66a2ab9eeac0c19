"""Copy detection on Copydays, the protocol of the official eval_copy_detection.py: mean average
precision of each block of DIR, of which the strong one is reported.

Features are the CLS token beside GeM-pooled patch tokens, of a ViT.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from ..config import option
from .frozen_options import FrozenOptions, of_backbone


@dataclass(frozen=True, kw_only=True)
class Options(FrozenOptions):
    data_path: str = option(
        MISSING,
        "Folder with original/ and strong/, perhaps jpegqual/ and crops/.",
        metavar="DIR",
        positional=True,
    )
    whitening_path: str | None = option(
        None,
        "Images to learn a whitening from, any source; officially 20,000 of YFCC100M.",
        metavar="DIR",
        shown="no whitening",
    )
    distractors_path: str | None = option(
        None,
        "Images to search beside the originals, any source; officially 10,000 of YFCC100M.",
        metavar="DIR",
        shown="none",
    )
    imsize: int = option(320, "Side of the squares that images are resized to, in pixels.")
    json: str = option("", "Write the numbers into FILE.", metavar="FILE", shown="none")
    batch_size_per_gpu: int = option(16, "Images at a time.")
    resize: int | None = option(None, type=int, hidden=True)  # images are squares of `imsize`
    crop: int | None = option(None, type=int, hidden=True)


def run(options: Options) -> None:
    from ..evaluate.retrieval.copy_detection import copy_detection
    from .results import check_json, write_json

    check_json(options.json)
    given = of_backbone(options)
    for name in ("resize", "crop"):
        if given.pop(name) is not None:
            raise ValueError(f"`{name}` has no part in copy detection: give `imsize`.")
    given |= {
        "whitening_path": options.whitening_path,
        "distractors_path": options.distractors_path,
        "imsize": options.imsize,
        "batch_size_per_gpu": options.batch_size_per_gpu,
        "num_workers": options.num_workers,
    }
    found = copy_detection(data_path=options.data_path, **given)
    write_json(options, mean_average_precision=found)
