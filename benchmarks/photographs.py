"""Pictures that cost a decoder what photographs do, for benchmarks on machines without a data set.

What a JPEG costs is bytes (entropy decoding) and pixels (transform, color). These have both of
ImageNet's on average: 93 KB, 0.19 megapixels, sides of 300 to 640 pixels, color at half resolution.
As in photographs amplitudes fall as 1 / frequency, shades change slowly on things with edges, the
channels go together, and a little sensor noise lies over all: so the bytes lie in many small
coefficients of every block, neither in the few blocks of a drawing nor in the large ones of pure
noise.

    python benchmarks/photographs.py FOLDER 512
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((500, 375), (500, 333), (375, 500), (500, 500), (640, 480), (400, 300))  # width, height
SHARES = (0.4, 0.2, 0.15, 0.1, 0.05, 0.1)
TEXTURE = 1024  # side, pixels
QUALITY = 90


def write(folder: Path, n: int, seed: int = 0) -> None:
    """n JPEGs, 0000.jpg and so on, the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    texture = pink(rng)
    for i in range(n):
        Image.fromarray(photograph(rng, texture)).save(
            folder / f"{i:04}.jpg", quality=QUALITY, subsampling="4:2:0"
        )


def pink(rng: np.random.Generator) -> np.ndarray:
    """Noise of amplitude 1 / frequency, the channels alike: float32 (TEXTURE, TEXTURE, 3), mean 0,
    variance 1."""
    frequency = np.hypot(np.fft.fftfreq(TEXTURE)[:, None], np.fft.rfftfreq(TEXTURE))
    frequency[0, 0] = np.inf
    white = rng.standard_normal((4, TEXTURE, TEXTURE))
    gray, *colors = np.fft.irfft2(np.fft.rfft2(white) / frequency, (TEXTURE, TEXTURE))
    channels = np.stack([gray + 0.35 * color for color in colors], -1)
    return (channels / channels.std()).astype(np.float32)


def photograph(rng: np.random.Generator, texture: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): a shaded ground, things of other colors and textures on it, sensor noise."""
    width, height = SIZES[rng.choice(len(SIZES), p=SHARES)]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    image = surface(rng, texture, y, x)
    for _ in range(rng.integers(3, 9)):
        center_y, center_x = rng.uniform(0, height), rng.uniform(0, width)
        radius_y, radius_x = rng.uniform(0.05, 0.35, 2) * min(height, width)
        power = rng.choice((1, 2, 6))  # a rhombus, an ellipse, nearly a rectangle
        inside = (
            np.abs((y - center_y) / radius_y) ** power + np.abs((x - center_x) / radius_x) ** power
            < 1
        )
        image[inside] = surface(rng, texture, y[inside], x[inside])
    image += rng.normal(0, 7.5, image.shape).astype(np.float32)
    return image.clip(0, 255).astype(np.uint8)


def surface(
    rng: np.random.Generator, texture: np.ndarray, y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """A color, shaded in one direction and textured, at pixels (y, x) of any shape: float32, shape
    + (3,)."""
    color, slope = rng.uniform(40, 215, 3), rng.uniform(-0.15, 0.15, 2)
    shade = slope[0] * (y - y.mean()) + slope[1] * (x - x.mean())
    at_y, at_x = ((axis.astype(np.int64) + rng.integers(TEXTURE)) % TEXTURE for axis in (y, x))
    return (color + shade[..., None] + rng.uniform(8, 45) * texture[at_y, at_x]).astype(np.float32)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
