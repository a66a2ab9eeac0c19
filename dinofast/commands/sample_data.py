"""Write a small labeled data set of drawn objects: ordinary JPEGs in class folders, so that nothing
need be downloaded.

A class is a texture and a silhouette. Its object lies at a random place on a ground of colored
cells, in two tones of a palette that it shares with one other class: color alone names the class in
at most half of the cases.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

import numpy as np
from numpy import abs, cos, hypot, maximum, minimum, pi, sin
from PIL import Image

from ..config import option
from ..runtime.terminal import say
from ..runtime.words import counted
from ..validation import check_output

TEXTURES = (
    "stripes",
    "checks",
    "dots",
    "rings",
    "spokes",
    "blobs",
    "waves",
    "grid",
    "bricks",
    "scales",
)
SILHOUETTES = (
    "slab",
    "square",
    "peanut",
    "disc",
    "star",
    "blob",
    "triangle",
    "diamond",
    "cross",
    "half_disc",
)
CLASSES = tuple(f"{t}_{s}" for t, s in zip(TEXTURES, SILHOUETTES, strict=True))
PALETTES = ("red", "green", "yellow", "blue", "violet")
# the two tones, in turns of the circle
PALETTE_HUES = ((0.96, 0.08), (0.30, 0.42), (0.10, 0.22), (0.52, 0.64), (0.74, 0.86))
PALETTE_OF = tuple(c % len(PALETTES) for c in range(len(CLASSES)))
CELLS = 18
# Brightness of the cells; an object's light tone has 0.85 to 1. With cells of 0.5 to 1, attention
# can settle on one hue and find it in the ground: 0.41 of it was on the object (seed 0). 0.45 to
# 0.8: 0.34 (seed 1). 0.35 to 0.7: 0.75 or more (seeds 0 to 2). 0.2 to 0.5: 0.75 (seed 0), but an
# untrained ViT already has a k-NN accuracy of 0.65 there.
GROUND_VALUE = (0.35, 0.7)
# images 4, 8, 12 ... of a class are for validation: three quarters are left to train
VALIDATION_EVERY = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    folder: str = option(
        MISSING, "Folder to write, made if need be.", metavar="DIR", positional=True
    )
    n_images: int = option(4000, "Of ten classes, three quarters to train")
    size: int = option(48, "Side in pixels")
    seed: int = option(0, "Of what is drawn.")


# for so few and small images; docs/training.md says what it learns
RECIPE = """\
      --arch vit_nano --patch_size 4 --out_dim 64 --head_hidden_dim 256 \\
      --head_bottleneck_dim 64 --epochs 12 --warmup_epochs 1 --batch_size_per_gpu 48 --lr 0.02 \\
      --momentum_teacher 0.98 --local_crops_number 2 --global_crops_size 32 \\
      --local_crops_size 16 --global_crops_scale 0.5 1 --local_crops_scale 0.2 0.5 \\
      --blur_radius 0.02 0.5"""


def run(options: Options) -> None:
    check_output("folder", options.folder, is_folder=True)
    write(**asdict(options))
    say(
        f"{counted(options.n_images, 'image')} in '{options.folder}': train/ and val/ with class "
        "folders, masks/ of the objects\n"
        "try, a minute or two on 2 cores:\n"
        f"  dinofast pretrain {shlex.quote(str(Path(options.folder) / 'train'))} "
        f"--output_dir runs/small \\\n{RECIPE}"
    )


def write(
    folder: str | Path,
    n_images: int = 4000,
    size: int = 48,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the data set: `folder/{train,val}/<class>/<class>_0001.jpg`, masks in
    `folder/masks/...png`, and `README.txt`.

    n_images: all images, spread evenly over the ten classes, three quarters to train. size: side in
    pixels. Image i depends on (seed, size, i) alone. on_progress(done, n_images) is called after
    each image. Masks: 8 bit, 255 on the object. A folder that holds this very data set is left
    alone, one that was interrupted is completed. Raises ValueError for fewer than 40 images, for a
    size below 16, and if the folder holds anything else.
    """
    root = Path(folder)
    if n_images < VALIDATION_EVERY * len(CLASSES):
        raise ValueError(
            f"`n_images` is {n_images}: take at least {VALIDATION_EVERY * len(CLASSES)}, so that "
            "each class has an image to train and one to validate."
        )
    if size < 16:
        raise ValueError(
            f"`size` is {size} pixels: take at least 16, smaller objects cannot be recognized."
        )
    readme, text = root / "README.txt", _readme(n_images, size, seed)
    if (
        root.exists()
        and (not root.is_dir() or any(root.iterdir()))
        and not (readme.is_file() and readme.read_text() == text)
    ):
        raise ValueError(
            f"'{root}' already holds something other than this data set (`n_images` {n_images}, "
            f"`size` {size}, `seed` {seed}): remove it or name another folder."
        )
    root.mkdir(parents=True, exist_ok=True)
    # before the images: an interrupted data set is known as such and completed
    readme.write_text(text)
    for i in range(n_images):
        image_path, mask_path = paths(root, i)
        if not (image_path.is_file() and mask_path.is_file()):
            image, mask = draw(i, size, seed)
            _save(image, image_path, "JPEG", quality=92, subsampling=0)
            _save(mask, mask_path, "PNG")
        if on_progress is not None:
            on_progress(i + 1, n_images)


def paths(root: Path, i: int) -> tuple[Path, Path]:
    """Where image i and its mask lie."""
    name, number = CLASSES[i % len(CLASSES)], i // len(CLASSES) + 1
    split = "val" if number % VALIDATION_EVERY == 0 else "train"
    where = Path(split, name, f"{name}_{number:04d}")
    return (root / where).with_suffix(".jpg"), (root / "masks" / where).with_suffix(".png")


def draw(
    i: int, size: int = 48, seed: int = 0, pixels: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image i (size, size, 3) and the mask of its object (size, size), both uint8; its class is `i
    % 10`.

    pixels: side to draw this same image at instead of `size`, without noise, to show it large and
    crisp.
    """
    rng = np.random.default_rng((seed, size, i))
    noise, size = 0.0 if pixels else 0.02, pixels or size
    label = i % len(CLASSES)
    y, x = np.mgrid[:size, :size].reshape(2, -1) / size + 0.5 / size  # (P,) each, in sides

    radius = rng.uniform(0.26, 0.36)
    cx, cy = rng.uniform(0.9 * radius, 1 - 0.9 * radius, 2)
    turn = np.deg2rad(rng.uniform(-20, 20))
    u = ((x - cx) * cos(turn) + (y - cy) * sin(turn)) / radius  # object coordinates: the unit disc
    v = ((y - cy) * cos(turn) - (x - cx) * sin(turn)) / radius
    sharp = radius * size  # pixels in a unit: edges 1 px wide
    inside = np.clip(_silhouette(SILHOUETTES[label], u, v) * sharp + 0.5, 0, 1)
    second = np.clip(_texture(TEXTURES[label], u, v, rng) * sharp / 6 + 0.5, 0, 1)

    light = rng.permutation([rng.uniform(0.85, 1.0), rng.uniform(0.35, 0.55)])
    hues = np.array(PALETTE_HUES[PALETTE_OF[label]]) + rng.uniform(-0.05, 0.05)
    tones = _rgb(hues, rng.uniform(0.55, 1.0, 2), light)  # (2, 3)
    centers = rng.random((2, CELLS))
    cell = ((x[:, None] - centers[0]) ** 2 + (y[:, None] - centers[1]) ** 2).argmin(1)  # (P,)
    cell_hues = rng.permutation((np.arange(CELLS) + rng.random()) / CELLS)
    # (18, 3)
    ground = _rgb(cell_hues, rng.uniform(0.7, 1.0, CELLS), rng.uniform(*GROUND_VALUE, CELLS))

    color = tones[0] + second[:, None] * (tones[1] - tones[0])
    drawn = ground[cell]
    drawn += inside[:, None] * (color - drawn)
    drawn += rng.normal(0, noise, drawn.shape)
    image = (np.clip(drawn, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(size, size, 3)
    return image, ((inside >= 0.5) * np.uint8(255)).reshape(size, size)


def _silhouette(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the distance from the outline, positive inside, in object coordinates."""
    r = hypot(u, v)
    match name:
        case "slab":
            return minimum(1.0 - abs(u), 0.5 - abs(v))
        case "square":
            return 0.8 - maximum(abs(u), abs(v))
        case "peanut":
            return maximum(0.58 - hypot(u - 0.45, v), 0.58 - hypot(u + 0.45, v))
        case "disc":
            return 0.9 - r
        case "star":
            return 0.68 + 0.32 * cos(5 * np.arctan2(u, -v)) - r
        case "blob":
            angle = np.arctan2(v, u)
            return 0.75 + 0.14 * sin(3 * angle) + 0.12 * cos(2 * angle + 1) - r
        case "triangle":
            return minimum(0.5 - v, 0.5 + 0.5 * v - 0.87 * abs(u))
        case "diamond":
            return (1.05 - abs(u) - abs(v)) * 0.7
        case "cross":
            return maximum(
                minimum(0.36 - abs(u), 0.98 - abs(v)), minimum(0.98 - abs(u), 0.36 - abs(v))
            )
        case "half_disc":
            return minimum(1.0 - hypot(u, v - 0.45), 0.45 - v)
    raise AssertionError(name)


def _texture(name: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sign tells the two tones apart; the slope at zero is about 6 to an object's radius."""
    a, b = rng.uniform(0, 2 * pi, 2)
    match name:
        case "stripes":
            return sin(10 * u + a)
        case "checks":
            return sin(8 * u + a) * sin(8 * v + b) * 1.5
        case "dots":
            return cos(10 * u + a) + cos(10 * v + b) - 0.5
        case "rings":
            return sin(12 * hypot(u, v) + a)
        case "spokes":
            return sin(5 * np.arctan2(v, u) + a)
        case "blobs":
            return sin(5 * u + a) + sin(5 * v + b) + sin(4 * (u + v) + a - b)
        case "waves":
            return sin(10 * v + a + 1.6 * sin(6 * u + b))
        case "grid":
            return maximum(cos(8 * u + a), cos(8 * v + b)) - 0.75
        case "bricks":
            row = np.floor(3.2 * v + a)
            return (
                maximum(
                    abs((3.2 * v + a) % 1 - 0.5), abs((1.6 * u + b + row / 2) % 1 - 0.5) * 2 - 0.5
                )
                * 6
                - 2.0
            )
        case "scales":
            row = np.floor(3.2 * v + a)
            return 5 * (hypot(((2.2 * u + b + row / 2) % 1 - 0.5) * 1.4, (3.2 * v + a) % 1) - 0.75)
    raise AssertionError(name)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV in [0, 1], (n,) each, to RGB (n, 3)."""
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * np.clip(minimum(k, 4 - k), 0, 1))


def _save(pixels: np.ndarray, path: Path, kind: str, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    path.write_bytes(buffer.getvalue())


def _readme(n_images: int, size: int, seed: int) -> str:
    pairs = "\n".join(
        f"  {name}: {', '.join(c for c, p in zip(CLASSES, PALETTE_OF, strict=True) if p == i)}"
        for i, name in enumerate(PALETTES)
    )
    return f"""Drawn objects on colored cells, written by dinofast.commands.sample_data.write.
n_images={n_images} size={size} seed={seed}

train/ and val/ hold one folder for each class, masks/ holds where the object is (255) under the
same names. A class is a texture and a silhouette. The object lies at a random place, its radius is
0.26 to 0.36 of the side, it is turned by up to 20 degrees, and it is drawn in two tones of a
palette; which tone is light is random. The ground is made of {CELLS} cells of evenly spread hues,
of brightness {GROUND_VALUE[0]} to {GROUND_VALUE[1]}.

Color is a designed cue, but two classes share each palette, so that it cannot name more than half
of the images:
{pairs}
"""
