"""One ONNX file, for any number of images and, where the backbone takes them, of any size."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .source import Source, traceable

SUFFIX, FILES, NEEDS = ".onnx", (), ("onnx", "onnxscript")
ANY_SIZE = True
INPUT, OUTPUT = "images", "features"
MOST = 8192  # pixels of a side


def check(source: Source) -> None:
    """All backbones are taken."""


def is_kind(path: Path) -> bool:
    """By its first field, the version (1, varint), and a name of who made it soon after."""
    with open(path, "rb") as file:
        head = file.read(64)
    return head[:1] == b"\x08" and (b"pytorch" in head or path.suffix == SUFFIX)


def write(source: Source, path: Path) -> None:
    least = source.patch if source.vit else 32
    batch = {0: torch.export.Dim("batch", min=1)}
    sides = {
        i: torch.export.Dim(name, min=least, max=MOST) for i, name in ((2, "height"), (3, "width"))
    }
    try:
        program = _exported(source, {**batch, **sides})
    except Exception:  # a model of one size, or one that cannot be followed with sizes left open
        if source.vit:
            raise
        program = _exported(source, batch)
    about = {"arch": source.arch, "side": source.side, "mean": source.mean, "std": source.std}
    program.model.metadata_props["dinofast"] = json.dumps(about)
    program.save(str(path))


def _exported(source: Source, dynamic: dict[int, Any]) -> Any:
    with _quiet(), torch.no_grad():
        return torch.onnx.export(
            traceable(source),
            (torch.randn(2, 3, source.side, source.side),),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(dynamic,),
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell of their own insides, on either stream."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def load(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def usage(path: Path) -> list[str]:
    return [
        f"load it: import onnxruntime; session = onnxruntime.InferenceSession({str(path)!r})",
        f"features: session.run(None, {{{INPUT!r}: images}})[0]",
    ]
