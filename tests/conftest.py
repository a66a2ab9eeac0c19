import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """48 small JPEGs of smooth noise in a flat folder."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(48):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((50 + i % 7, 40 + i % 5), Image.BICUBIC).save(folder / f"{i:03}.jpg")
    return folder
