"""Video object segmentation on DAVIS 2017, the protocol of the official eval_video_segmentation.py:
the masks of the first frame are carried on by the likeness of patches alone. Writes the PNGs that
DAVIS's own evaluation takes, and measures J and F.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ..config import option
from .frozen_options import BackboneOptions


@dataclass(frozen=True, kw_only=True)
class Options(BackboneOptions):
    data_path: str = option(
        MISSING,
        "DAVIS's folder, with JPEGImages/480p, Annotations/480p and ImageSets/2017.",
        metavar="DIR",
        positional=True,
    )
    output_dir: str = option(
        "runs/davis", "Folder of the masks, one folder a video.", metavar="DIR"
    )
    json: str = option("", "Write the measures into FILE.", metavar="FILE", shown="none")
    split: str = option("val", "Which videos: those of ImageSets/2017/NAME.txt.")
    n_last_frames: int = option(7, "Frames before this one to look at, beside the first.")
    size_mask_neighborhood: int = option(
        12, "Patches up, down, left and right to look at; 0: the whole frame."
    )
    topk: int = option(5, "Most similar patches that vote.")
    temperature: float = option(0.1, "Of the votes, exp(similarity / temperature).")
    size: int = option(480, "Shorter side of the frames, in pixels.")


def run(options: Options) -> None:
    from ..evaluate.segmentation.davis import davis
    from .results import check_json, write_json

    check_json(options.json)
    given = asdict(options)
    given.pop("json")
    write_json(options, measures=davis(**given))
