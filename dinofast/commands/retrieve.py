"""Draw the nearest neighbors of some images into a PNG: a row each, the query first, the cosine
below each neighbor. Where DIR has class folders a green frame is one of the query's class, a red
one another, and the mean average precision over all images is told.

With --protocol the official evaluation on revisited Oxford and Paris instead, without a picture;
the official numbers of Paris are of --imsize 512 --multiscale true.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..config import option
from .frozen_options import FrozenOptions, of_backbone


@dataclass(frozen=True, kw_only=True)
class Options(FrozenOptions):
    data_path: str = option(
        MISSING,
        "Images, as for pretrain, or train/ and val/ of class folders: then those of val/ look for "
        "those of train/.",
        metavar="DIR",
        positional=True,
    )
    sheet: str = option("neighbors.png", "The picture.", flags=("-o",), metavar="FILE")
    queries: tuple[str, ...] = option(
        (),
        "Image files to look for, in DIR or elsewhere.",
        nargs="+",
        metavar="FILE",
        shown="`n_queries` from all over DIR",
    )
    n_queries: int = option(8, "Rows.")
    n_neighbors: int = option(8, "Neighbors in a row.")
    json: str = option(
        "", "Write the neighbors and the precisions into FILE.", metavar="FILE", shown="none"
    )
    protocol: str | None = option(
        None,
        "DIR is of revisited Oxford or Paris: NAME/gnd_NAME.pkl, of which nothing is run, and "
        "NAME/jpg/.",
        choices=("roxford5k", "rparis6k"),
        aliases={"roxford": "roxford5k", "rparis": "rparis6k"},
        shown="none",
    )
    imsize: int = option(224, "Of `protocol`: the longer side of an image, in pixels.")
    multiscale: bool = option(False, "Of `protocol`: the mean of features at three sizes.")


# what has no part without `protocol`, and with it
_OF_PROTOCOL = ("imsize", "multiscale")
_OF_PICTURE = (
    *("sheet", "queries", "n_queries", "n_neighbors"),
    *("batch_size_per_gpu", "resize", "crop"),
)


def run(options: Options) -> None:
    from .results import check_json, write_json

    check_json(options.json)
    defaults = {field.name: field.default for field in fields(options)}
    for name in _OF_PICTURE if options.protocol else _OF_PROTOCOL:
        if getattr(options, name) != defaults[name]:
            what = "has no part in `protocol`" if options.protocol else "is of `protocol` alone"
            hint = ": give `imsize`" if name in ("resize", "crop") else ": leave it out"
            raise ValueError(f"`{name}` {what}{hint}.")
    write_json(options, **(_revisited(options) if options.protocol else _neighbors(options)))


def _neighbors(options: Options) -> dict[str, Any]:
    from ..evaluate.retrieval.neighbors import retrieve

    return retrieve(
        data_path=options.data_path,
        sheet=options.sheet,
        queries=options.queries,
        n_queries=options.n_queries,
        n_neighbors=options.n_neighbors,
        batch_size_per_gpu=options.batch_size_per_gpu,
        num_workers=options.num_workers,
        **of_backbone(options),
    )


def _revisited(options: Options) -> dict[str, Any]:
    from ..evaluate.retrieval.revisited import revisited

    given = of_backbone(options)
    for name in ("resize", "crop"):
        given.pop(name)
    found = revisited(
        data_path=options.data_path,
        protocol=str(options.protocol),
        imsize=options.imsize,
        multiscale=options.multiscale,
        num_workers=options.num_workers,
        **given,
    )
    return {name: score._asdict() for name, score in found.items()}
