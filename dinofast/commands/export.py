"""Write a trained backbone for timm, Hugging Face transformers, ONNX, safetensors or TorchScript,
and compare what that program makes of it.

formats:
  timm         a folder: timm.create_model("local-dir:OUT", pretrained=True)
  hf           a folder: transformers.ViTModel.from_pretrained("OUT", add_pooling_layer=False)
  hf-dinov2    a folder: transformers.Dinov2Backbone.from_pretrained("OUT")
  onnx         a file, for any number of images of any size
  safetensors  a file: dinofast.load_backbone("OUT")
  torchscript  a file: torch.jit.load("OUT")

dinofast's ViTs go into all of them, timm's models into all but hf and hf-dinov2, torchvision's into
onnx, safetensors and torchscript.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass

from ..config import option
from .frozen_options import WEIGHTS

FORMATS = ("timm", "hf", "hf-dinov2", "onnx", "safetensors", "torchscript")


@dataclass(frozen=True, kw_only=True)
class Options:
    pretrained_weights: str = option(
        MISSING,
        WEIGHTS,
        metavar="RUN",
        positional=True,
    )
    format: str = option(MISSING, "What to write.", metavar="FORMAT", choices=FORMATS)
    output: str | None = option(
        None,
        "The file, or folder, to write.",
        flags=("-o",),
        metavar="OUT",
        shown="beside the checkpoint, named like it",
    )
    checkpoint_key: str = option("teacher", "Whose weights.", choices=("teacher", "student"))
    arch: str | None = option(
        None,
        "Only where the checkpoint does not tell its architecture.",
        shown="from the checkpoint",
    )
    patch_size: int | None = option(
        None, "Side of a patch, likewise.", type=int, shown="from the checkpoint"
    )
    image_size: int | None = option(
        None,
        "Side of the images that it is for, in pixels. Other programs resample a ViT's positions "
        "for other sizes in ways of their own; here it is done as in training.",
        type=int,
        shown="that of training",
    )
    verify: bool = option(True, "Read it back with the program it is for, and compare features.")


def run(options: Options) -> None:
    from ..export import export

    given = asdict(options)
    export(given.pop("pretrained_weights"), **given)
