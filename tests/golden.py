"""Outputs of the official code (tests/official/README.md), as torch tensors."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parent / "official"


def load(name: str, prefix: str = "") -> dict[str, Tensor]:
    """The arrays of a golden file whose names begin with `prefix`, without it."""
    with np.load(DATA / name) as arrays:
        return {
            key.removeprefix(prefix): torch.from_numpy(arrays[key])
            for key in arrays.files
            if key.startswith(prefix)
        }
