"""One file a command: its description, `Options` and `run(options)`."""

from __future__ import annotations

import importlib
from types import ModuleType

COMMANDS = {
    "pretrain": "train a backbone on a folder of images without labels",
    "knn": "k-NN accuracy of a checkpoint on labeled folders",
    "linear": "accuracy of a linear classifier on the features of a checkpoint",
    "embed": "write the features of every image into a file",
    "retrieve": "a picture of nearest neighbors, and the mean average precision of classes",
    "segment": "pictures of what a ViT looks at, and how well that segments objects",
    "export": "a checkpoint for timm, transformers, ONNX, safetensors, TorchScript",
    "report": "a page about runs: curves, scores, pictures, options",
    "compare": "a table of runs: what they came to, and how they differ",
    "davis": "video object segmentation on DAVIS 2017 by a checkpoint's patches",
    "copydetect": "copy detection on Copydays",
    "show-crops": "a picture of what the network sees",
    "check-data": "which images of a folder do not decode",
    "bench-data": "whether the data keeps up with a GPU",
    "bench-step": "images/s of a training step here, and the official loop beside it",
    "sample-data": "write a small labeled data set to try things on",
    "demo": "pretrain a small ViT on the sample data and show what it learned",
    "doctor": "what is installed, and which path each part takes",
    "completion": "completion of commands and flags for a shell",
}


def module_of(command: str) -> ModuleType:
    """Its file."""
    return importlib.import_module(f"dinofast.commands.{command.replace('-', '_')}")
