"""Write the features of every image into a file, .npz or .parquet. A run that was ended goes on
where it stopped when the same command is given again.

Of an .npz: numpy.load(FILE)["feature"] and ["path"]; of a .parquet: pandas.read_parquet(FILE).
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ..config import option
from .frozen_options import FrozenOptions


@dataclass(frozen=True, kw_only=True)
class Options(FrozenOptions):
    data_path: str = option(
        MISSING,
        "Images, as for pretrain: a folder, shards or a list. Of a folder of class folders labels "
        "are written too.",
        metavar="DIR",
        positional=True,
    )
    features: str = option(
        "features.npz",
        "The file. A name that ends in .parquet needs pyarrow.",
        flags=("-o",),
        metavar="FILE",
    )
    dtype: str = option("float32", "Of the numbers in the file.", choices=("float32", "float16"))
    precision: str = option(
        "fp32",
        "bf16 computes under autocast, faster on a GPU and less exact.",
        choices=("fp32", "bf16"),
    )


def run(options: Options) -> None:
    from ..evaluate.embedding.embed import embed

    embed(**asdict(options))
