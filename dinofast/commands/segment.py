"""What a ViT looks at and what its patches mean: attention of the CLS token, the part of the image
that most of it lies on, and principal components of patch features, as pictures; where masks of
objects are given also as numbers.

SOURCE is an image or several, a folder, a list, a video file, a folder of numbered frames, or a
folder in PASCAL VOC's layout, whose masks are taken, too.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ..config import option
from .frozen_options import BackboneOptions

SHEET = "segment.png"


@dataclass(frozen=True, kw_only=True)
class Options(BackboneOptions):
    data_path: tuple[str, ...] = option(
        MISSING, "What to look at.", metavar="SOURCE", positional=True, nargs="*"
    )
    sheet: str = option(
        "",
        "A captioned sheet of some images.",
        flags=("-o",),
        metavar="FILE",
        shown=f"{SHEET}, none if `output_dir` or `masks` is given",
    )
    n_images: int = option(12, "Images on the sheet, evenly spaced over all.")
    output_dir: str = option(
        "",
        "Folder of a picture for each image; of a video numbered frames, and an animation of them.",
        metavar="DIR",
        shown="none",
    )
    compare: str = option(
        "",
        "Show and score another backbone as well: untrained, student, teacher, or a checkpoint.",
        metavar="FILE",
        shown="none",
    )
    size: tuple[int, ...] | None = option(
        None,
        "Shorter side in pixels, or height and width; the rest of a patch is cropped. A larger one "
        "gives finer maps. The official code takes 480 480.",
        type=int,
        nargs="+",
        shown="twice the crops of training",
    )
    threshold: float = option(0.6, "Share of the attention that a mask holds.")
    heads: bool = option(False, "Show every head.")
    per_image: bool = option(
        False, "Principal components of each image alone; else colors mean the same in all."
    )
    fps: float = option(12.0, "Frames a second of the animation.")
    masks: str = option(
        "",
        "Folder of PNGs under the images' names, to score by: values above 0 are objects, 255 of a "
        "palette is ignored; black and white: white is the object.",
        metavar="DIR",
        shown="none",
    )
    json: str = option("", "Write the scores into FILE.", metavar="FILE", shown="none")


def run(options: Options) -> None:
    from ..evaluate.segmentation.images import segment
    from ..evaluate.segmentation.object_masks import voc
    from .results import check_json, write_json

    check_json(options.json)
    if options.json and not options.masks and not any(map(voc, options.data_path)):
        raise ValueError("`json` takes the scores, and these need `masks`: give them, too.")
    given = asdict(options)
    given.pop("json")
    if not (options.sheet or options.output_dir or options.masks):
        given["sheet"] = SHEET
    write_json(options, scores=segment(**given))
