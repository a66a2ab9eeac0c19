"""Video object segmentation on DAVIS 2017: the first frame's masks are carried on from patch to
patch by likeness alone, as in the official eval_video_segmentation.py (after arXiv 2006.14613,
appendix F)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...data.decode import UnreadableImage, read_file
from ...runtime.progress import counting
from ...runtime.terminal import say
from ...runtime.words import counted
from ...validation import check_output
from ..attention_maps import patch_features
from ..frozen import FrozenBackbone, load_frozen
from ..images import IMAGENET_MEAN, IMAGENET_STD
from .davis_measures import Statistics, measure

MULTIPLE = 64  # of the longer side, in pixels
# of the official script, whose first number is not ImageNet's 0.229
OFFICIAL_STD = (0.228, 0.224, 0.225)
CHUNK_ELEMENTS = 2**25  # of the affinities held at a time: 128 MiB in fp32
LAYOUT = "JPEGImages/480p, Annotations/480p and ImageSets/2017"


@dataclass(frozen=True)
class Propagation:
    """n_last_frames: frames before this one that are looked at, beside the first. size_mask_
    neighborhood: patches up, down, left and right that are, 0: all. topk: most similar patches that
    vote. temperature: they do so with exp(cosine / temperature)."""

    n_last_frames: int = 7
    size_mask_neighborhood: int = 12
    topk: int = 5
    temperature: float = 0.1

    def check(self) -> Propagation:
        for name, least in (("n_last_frames", 0), ("size_mask_neighborhood", 0), ("topk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}: give {least} or more.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature}: give a number above 0.")
        return self


def propagate(
    target: Tensor, sources: Sequence[Tensor], labels: Sequence[Tensor], how: Propagation
) -> Tensor:
    """Labels of a frame's patches from those of other frames.

        for each patch: a = exp(cosine / temperature) with every patch of every source in its
        neighborhood; of these the topk largest, and those equal to the last of them, are kept
        and divided by their sum; the labels' mean by these weights

    target and each of sources (rows, columns, D); each of labels (C, rows, columns) fp32, on one
    device. Returns (C, rows, columns) fp32.
    """
    rows, columns, _ = target.shape
    queries = F.normalize(target.float(), dim=-1)
    keys = F.normalize(torch.stack(list(sources)).float(), dim=-1)  # (S, rows, columns, D)
    values = torch.stack(list(labels), dim=-1)  # (C, rows, columns, S)
    out = torch.empty(values.shape[:-1], device=target.device)
    reach = how.size_mask_neighborhood
    side = _tile(rows, columns, len(sources), reach)
    # a tile of queries at a time, and the keys that some of them reach: of 60 x 104 patches (patch
    # size 8) and 8 sources a fifth of all pairs
    for y, x in product(range(0, rows, side), range(0, columns, side)):
        ys, xs = (_reached(*given, reach) for given in ((y, side, rows), (x, side, columns)))
        tile = queries[y : y + side, x : x + side]  # (h, w, D)
        affinity = torch.einsum("hwd,syxd->hwyxs", tile, keys[:, ys, xs])
        affinity = affinity.div_(how.temperature).exp_()
        if reach:
            near_y, near_x = (
                (torch.arange(start, min(start + side, n))[:, None] - torch.arange(n)[window]).abs()
                <= reach
                for n, start, window in ((rows, y, ys), (columns, x, xs))
            )
            near = near_y[:, None, :, None] & near_x[None, :, None, :]  # (h, w, ys, xs)
            affinity *= near[..., None].to(affinity.device)
        weights = affinity.flatten(2)  # (h, w, ys xs S)
        least = weights.topk(min(how.topk, weights.shape[-1]), dim=-1).values[..., -1:]
        weights = weights.masked_fill(weights < least, 0)
        votes = weights @ values[:, ys, xs].flatten(1).t()  # (h, w, C)
        out[:, y : y + side, x : x + side] = (votes / weights.sum(-1, keepdim=True)).movedim(-1, 0)
    return out


def _tile(rows: int, columns: int, n_sources: int, reach: int) -> int:
    """Side of a tile of queries whose affinities are at most CHUNK_ELEMENTS."""
    side = reach or max(rows, columns)

    def elements(side: int) -> int:
        h, w = (min(side + 2 * reach, n) if reach else n for n in (rows, columns))
        return side * side * h * w * n_sources

    while side > 1 and elements(side) > CHUNK_ELEMENTS:
        side //= 2
    return side


def _reached(start: int, side: int, n: int, reach: int) -> slice:
    """Of n rows or columns those that a tile's reach."""
    return slice(max(0, start - reach), start + side + reach) if reach else slice(0, n)


def segment_video(features: Iterator[Tensor], first: Tensor, how: Propagation) -> Iterator[Tensor]:
    """Labels (C, rows, columns) fp32 of each frame after the first.

    features: (rows, columns, D) of all frames; first: (C, rows, columns), labels of the first.
    """
    start = next(features)
    last: deque[tuple[Tensor, Tensor]] = deque(maxlen=how.n_last_frames)
    for target in features:
        sources = [start, *(frame for frame, _ in last)]
        found = propagate(target, sources, [first, *(labels for _, labels in last)], how)
        last.append((target, found))
        yield found


def as_mask(labels: Tensor, patch: int, size: tuple[int, int]) -> np.ndarray:
    """Labels (C, rows, columns) -> numbers of objects (h, w) uint8 at size (w, h): bilinear to
    pixels, each label stretched to 0 to 1, the largest wins, nearest neighbor to `size`."""
    large = F.interpolate(labels[None], scale_factor=patch, mode="bilinear", align_corners=False)[0]
    low = large.amin((1, 2), keepdim=True)
    high = (large - low).amax((1, 2), keepdim=True)
    stretched = torch.where(large.amax((1, 2), keepdim=True) > 0, (large - low) / high, large)
    winner = stretched.argmax(0).to(torch.uint8).cpu().numpy()
    return np.asarray(Image.fromarray(winner).resize(size, Image.Resampling.NEAREST))


def network_size(width: int, height: int, short: int, patch: int) -> tuple[int, int]:
    """(w, h) that a frame is resized to: the shorter side to `short`, the longer to a multiple of
    64 pixels, or of the patch size where 64 is none."""
    multiple = MULTIPLE if MULTIPLE % patch == 0 else patch
    longer = max(short * max(width, height) / min(width, height), multiple)
    longer = int(longer // multiple) * multiple
    return (short, longer) if height > width else (longer, short)


@dataclass(frozen=True)
class Video:
    """name: of its folder. frames: paths. masks: paths of the same names that are there."""

    name: str
    frames: tuple[Path, ...]
    masks: dict[str, Path]


def videos(root: str | Path, split: str = "val") -> list[Video]:
    """The videos of DAVIS's folder that ImageSets/2017/<split>.txt names. Raises `ValueError` for
    what is missing."""
    root = Path(root)
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    if not listed.is_file():
        raise ValueError(f"'{listed}' does not exist: give DAVIS's folder, with {LAYOUT}.")
    found = []
    for name in listed.read_text().split():
        own, annotated = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
        frames = tuple(sorted(own.glob("*.jpg")))
        masks = {path.stem: path for path in annotated.glob("*.png")}
        if not frames:
            raise ValueError(f"'{own}' holds no .jpg, and '{listed}' names it.")
        if frames[0].stem not in masks:
            raise ValueError(f"'{annotated}' lacks {frames[0].stem}.png, the first frame's masks.")
        found.append(Video(name, frames, masks))
    if not found:
        raise ValueError(f"'{listed}' names no video.")
    return found


def davis(
    pretrained_weights: str | Path,
    data_path: str | Path,
    output_dir: str | Path,
    *,
    split: str = "val",
    size: int = 480,
    n_last_frames: int = 7,
    size_mask_neighborhood: int = 12,
    topk: int = 5,
    temperature: float = 0.1,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> dict[str, Any]:
    """Segment the videos of DAVIS's folder into `output_dir`/<video>/<frame>.png, which the
    challenge's evaluation takes, and measure J and F where all frames have masks.

    size: shorter side of the frames in pixels; the rest: see `Propagation`. Returns means over
    objects and the values of each, shares of 1, as `summary` does; empty where there is nothing to
    compare with. Raises `ValueError` for what cannot be.
    """
    how = Propagation(n_last_frames, size_mask_neighborhood, topk, temperature).check()
    check_output("output_dir", str(output_dir), is_folder=True)
    if Path(output_dir).resolve() == (Path(data_path) / "Annotations" / "480p").resolve():
        raise ValueError(f"`output_dir` is '{output_dir}', where the masks are: name another.")
    found = videos(data_path, split)
    frozen = load_frozen(
        pretrained_weights,
        checkpoint_key=checkpoint_key,
        arch=arch,
        patch_size=patch_size,
        device=device,
        backbone=backbone,
    )
    if not hasattr(frozen.module, "get_intermediate_layers"):
        raise ValueError(f"a {frozen.name} has no patch features: choose a ViT.")
    if size < 1 or size % frozen.patch_size:
        raise ValueError(
            f"`size` {size} is not a multiple of the patch size {frozen.patch_size}: take "
            f"{max(size // frozen.patch_size, 1) * frozen.patch_size}."
        )
    say(f"patches of {frozen.told}; {counted(len(found), 'video')}, shorter side {size}")
    measured: dict[str, tuple[Statistics, Statistics]] = {}
    start, n_frames = time.perf_counter(), 0
    for video in found:
        masks = _segmented(video, frozen, Path(output_dir) / video.name, size, how)
        n_frames += len(video.frames)
        rate = n_frames / (time.perf_counter() - start)
        own = _measured(video, masks)
        measured |= own
        say(f"{video.name}: {counted(len(masks), 'frame')}{_told(own)}; {rate:.3g} frames/s so far")
    say(f"masks in '{output_dir}'")
    return _report(measured)


def _segmented(
    video: Video, frozen: FrozenBackbone, folder: Path, size: int, how: Propagation
) -> np.ndarray:
    """Masks (frames, h, w) uint8 of a video, each written into `folder` as soon as it is made."""
    given = _image(video.masks[video.frames[0].stem])
    palette = given.getpalette() or _palette()
    w, h = network_size(*given.size, size, frozen.patch_size)
    small = given.resize((w // frozen.patch_size, h // frozen.patch_size), Image.Resampling.NEAREST)
    numbers = torch.from_numpy(np.array(small)).long()
    numbers[numbers == 255] = 0
    first = F.one_hot(numbers).permute(2, 0, 1).float().to(frozen.device)
    folder.mkdir(parents=True, exist_ok=True)
    masks, tell = [np.asarray(given)], counting(f"frames of {video.name}", True)
    _write(masks[0], folder / f"{video.frames[0].stem}.png", palette)
    features = (_features(path, frozen, (w, h)) for path in video.frames)
    for path, labels in zip(video.frames[1:], segment_video(features, first, how), strict=True):
        masks.append(as_mask(labels, frozen.patch_size, given.size))
        _write(masks[-1], folder / f"{path.stem}.png", palette)
        tell(len(masks), len(video.frames))
    return np.stack(masks)


def _features(path: Path, frozen: FrozenBackbone, size: tuple[int, int]) -> Tensor:
    """Of a frame's patches (rows, columns, D), after a bilinear resize of 8-bit values without
    antialiasing, as OpenCV does it."""
    try:
        pixels = np.asarray(frozen.decode(read_file(path)))
    except UnreadableImage as error:
        raise ValueError(f"'{path}' cannot be read ({error}): a video needs all frames.") from error
    image = torch.from_numpy(pixels.copy()).to(frozen.device).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size[::-1], mode="bilinear", align_corners=False).round() / 255
    transform = frozen.transform
    is_official = (transform.mean, transform.std) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (
        torch.tensor(values, device=frozen.device).view(3, 1, 1)
        for values in (transform.mean, OFFICIAL_STD if is_official else transform.std)
    )
    return patch_features(frozen.module, (image - mean) / std)[0]


def _image(path: Path) -> Image.Image:
    """A mask of numbers. Raises `ValueError` for a file that is none."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"'{path}' cannot be read as masks: {error}.") from error
    if image.mode not in ("P", "L"):
        raise ValueError(f"'{path}' has colors ({image.mode}), not a palette of objects.")
    return image


def _palette() -> list[int]:
    """Of DAVIS and VOC: the bits of a number, from the lowest, are the highest bits of red, green
    and blue in turn."""
    colors = []
    for number in range(256):
        rgb = [0, 0, 0]
        for i in range(8):
            for channel in range(3):
                rgb[channel] |= (number >> (3 * i + channel) & 1) << (7 - i)
        colors += rgb
    return colors


def _write(mask: np.ndarray, path: Path, palette: list[int]) -> None:
    image = Image.fromarray(mask)
    image.putpalette(palette)
    image.save(path, "PNG")


def _measured(video: Video, masks: np.ndarray) -> dict[str, tuple[Statistics, Statistics]]:
    """J and F of each object, video_1 and so on; nothing where frames have no masks, or there are
    fewer than three."""
    if len(masks) < 3 or any(path.stem not in video.masks for path in video.frames):
        return {}
    truth = np.stack([np.asarray(_image(video.masks[path.stem])) for path in video.frames])
    return {f"{video.name}_{i + 1}": own for i, own in enumerate(measure(masks, truth))}


def _told(own: dict[str, tuple[Statistics, Statistics]]) -> str:
    if not own:
        return ", not measured: masks of the other frames are not there"
    j, f = (100 * np.mean([both[k].mean for both in own.values()]) for k in range(2))
    return f", {counted(len(own), 'object')}, J {j:.1f}, F {f:.1f}"


def summary(measured: dict[str, tuple[Statistics, Statistics]]) -> dict[str, Any]:
    """Means over all objects under the names of DAVIS's own table, shares of 1, and `objects`."""
    table: dict[str, Any] = {"J&F-Mean": 0.0}
    for k, name in enumerate("JF"):
        for field in ("mean", "recall", "decay"):
            values = [getattr(both[k], field) for both in measured.values()]
            table[f"{name}-{field.capitalize()}"] = float(np.mean(values))
    table["J&F-Mean"] = (table["J-Mean"] + table["F-Mean"]) / 2
    table["objects"] = {name: {"J": asdict(j), "F": asdict(f)} for name, (j, f) in measured.items()}
    return table


def _report(measured: dict[str, tuple[Statistics, Statistics]]) -> dict[str, Any]:
    if not measured:
        return {}
    table = summary(measured)
    names = [name for name in table if name != "objects"]
    say(f"{counted(len(measured), 'object')}, percent")
    say("  ".join(name.rjust(8) for name in names))
    say("  ".join(f"{100 * table[name]:.1f}".rjust(max(8, len(name))) for name in names))
    return table
