"""What a ViT looks at and what its patches mean, in pictures, and where there are masks in numbers:
of images of any size, folders of them and videos."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from ...data.decode import UnreadableImage
from ...runtime.progress import counting
from ...runtime.terminal import say
from ...runtime.words import counted
from ...validation import check_output, check_outside, check_source
from ..frozen import FrozenBackbone, left_out, load_frozen, none_readable
from .frames import Frames, frames_of
from .object_masks import Objects, objects_of, read_mask, scores, voc
from .patch_pictures import (
    Column,
    PatchColors,
    cells,
    contact_sheet,
    cut_out,
    fitted,
    single,
    unit,
)
from .whole_patches import Seen, WholePatches, see

BASIS = 64  # images from which the components of all are taken, evenly spaced
TILE, LARGE = 192, 320  # longer side of a picture, on a sheet and in a file of its own
ANIMATION = "animation.webp"
MASKS = "give a folder of PNGs under the images' own names, such as cat/1.png for cat/1.jpg"


@dataclass(frozen=True)
class Network:
    """A backbone, what it is called, how it takes images, and the colors of its
    patches, None where each image has its own."""

    whose: str
    frozen: FrozenBackbone
    whole: WholePatches
    colors: PatchColors | None = None


@dataclass(frozen=True)
class Look:
    """How it is shown, as in `segment`."""

    threshold: float = 0.6
    heads: bool = False


@dataclass
class Scores:
    """Sums of `object_masks.scores` by backbone, over `n` of `looked_at` images."""

    looked_at: int = 0
    n: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    without: int = 0  # images without a mask
    empty: int = 0  # images whose mask has no object

    def add(self, found: dict[str, dict[str, float]]) -> None:
        self.n += 1
        for whose, own in found.items():
            sums = self.sums.setdefault(whose, dict.fromkeys(own, 0.0))
            for name, value in own.items():
                sums[name] += value

    def means(self) -> dict[str, dict[str, float]]:
        return {
            whose: {name: value / self.n for name, value in own.items()}
            for whose, own in self.sums.items()
        }


def segment(
    pretrained_weights: str | Path,
    data_path: str | Path | Sequence[str | Path],
    *,
    sheet: str = "",
    output_dir: str = "",
    masks: str = "",
    compare: str = "",
    size: int | Sequence[int] | None = None,
    threshold: float = 0.6,
    heads: bool = False,
    per_image: bool = False,
    n_images: int = 12,
    fps: float = 12,
    checkpoint_key: str = "teacher",
    arch: str | None = None,
    patch_size: int | None = None,
    device: str | None = None,
    backbone: nn.Module | None = None,
) -> dict[str, Any]:
    """Pictures and scores of a ViT on images of any size.

    data_path: images, folders, lists, one video (see `frames.frames_of`), or a folder in PASCAL
    VOC's layout, whose validation images and masks are taken. sheet: PNG of n_images evenly spaced
    ones. output_dir: folder of one PNG an image; of a video numbered frames and an animation of
    `fps` frames a second. masks: folder of PNGs under the images' names, for the scores. compare:
    untrained, student, teacher, or another checkpoint, shown and scored as well. size: shorter
    side, or height and width, in pixels; default twice the crops of training. threshold, heads: see
    `patch_pictures.cells`. per_image: components of each image alone.

    Returns {whose: {score: share of 1}} of `object_masks.scores`, with `n_images`; empty without
    masks. Raises `ValueError` for what cannot be.
    """
    _check(threshold, size, n_images, fps)
    sources, masks = _sources(data_path, masks)
    _check_outputs(sheet, output_dir, masks, sources)
    options = {"arch": arch, "patch_size": patch_size, "device": device, "backbone": backbone}
    networks = _networks(pretrained_weights, checkpoint_key, compare, size, options)
    frames = frames_of(sources, networks[0].frozen.decode)
    spaced = _spaced(len(frames), n_images) if sheet else []
    start = time.perf_counter()
    shown, known = None if masks or output_dir else spaced, dict[int, list[Seen]]()
    if (sheet or output_dir) and not per_image:
        basis = _spaced(len(frames), BASIS) if shown is None else spaced
        networks, known = _with_colors(networks, frames, basis)
    writer = _Writer(output_dir, frames, fps) if output_dir else None
    look = Look(threshold, heads)
    columns, total = _looked_at(frames, networks, look, shown, known, masks, spaced, writer)
    rate = total.looked_at / (time.perf_counter() - start)
    say(f"{counted(total.looked_at, 'image')}, {rate:.3g} images/s")
    if columns:
        contact_sheet(columns).save(sheet, "PNG", optimize=True)
        say(f"{len(columns):,} of {counted(len(frames), 'image')} in '{sheet}'")
    if writer:
        writer.end()
    return _report(total, threshold) if masks else {}


def _looked_at(
    frames: Frames,
    networks: Sequence[Network],
    look: Look,
    shown: Sequence[int] | None,
    known: dict[int, list[Seen]],
    masks: str,
    spaced: Sequence[int],
    writer: _Writer | None,
) -> tuple[list[Column], Scores]:
    """The pass over the images, all or those `shown`: columns of the `spaced` ones, and the scores.
    known: what the backbones have seen already."""
    columns, total, tell = list[Column](), Scores(), counting("images", True)
    for i, image in frames.read(shown):
        tell(i, len(frames))
        name = frames.names[i]
        try:
            if isinstance(image, UnreadableImage):
                raise image
            seen = known.pop(i, None) or [see(n.frozen, image, n.whole) for n in networks]
            objects = _objects(masks, frames.paths[i], image, networks[0].whole, total)
        except UnreadableImage as reason:
            say(left_out(frames.paths[i], reason))
            continue
        total.looked_at += 1
        if objects is not None:
            total.add(_scores(networks, seen, objects, look.threshold))
        if i in spaced:
            columns.append(_column(name, image, networks, seen, objects, look, TILE))
        if writer:
            writer.add(i, _column(name, image, networks, seen, objects, look, LARGE))
    if not total.looked_at:
        raise ValueError(none_readable(len(frames)))
    return columns, total


def _sources(
    data_path: str | Path | Sequence[str | Path], masks: str
) -> tuple[list[str | Path], str]:
    """What to look at and the masks to score by; those of VOC where its folder is given."""
    sources = [data_path] if isinstance(data_path, str | Path) else list(data_path)
    if len(sources) == 1 and (found := voc(sources[0])):
        sources, masks = list(found[0]), masks or found[1]
        say(f"PASCAL VOC: {counted(len(sources), 'validation image')}, masks in '{masks}'")
    return sources, masks


def _check(threshold: float, size: int | Sequence[int] | None, n_images: int, fps: float) -> None:
    sides = () if size is None else (size,) if isinstance(size, int) else tuple(size)
    if size is not None and (len(sides) not in (1, 2) or min(sides) < 1):
        given = " ".join(map(str, sides))
        raise ValueError(f"`size` is {given}: give the shorter side, or height and width.")
    if not 0 < threshold <= 1:
        raise ValueError(
            f"`threshold` is {threshold}: give a share of the attention above 0 and up to 1."
        )
    if n_images < 1:
        raise ValueError(f"`n_images` is {n_images}: give 1 or more.")
    if not 0 < fps <= 1000:
        raise ValueError(f"`fps` is {fps}: give frames a second, above 0.")


def _check_outputs(sheet: str, output_dir: str, masks: str, sources: Sequence[str | Path]) -> None:
    for source in sources:
        check_source(str(source))
    if masks and not os.path.isdir(masks):
        raise ValueError(f"`masks` is '{masks}', which is no folder: give the folder of PNGs.")
    if masks and not any(Path(masks).rglob("*.png")):
        raise ValueError(f"`masks` '{masks}' holds no .png: {MASKS}.")
    if sheet:
        check_output("sheet", sheet)
        for source in (*sources, *([masks] if masks else [])):
            check_outside("sheet", sheet, str(source))
            if os.path.exists(sheet) and os.path.samefile(sheet, source):
                raise ValueError(f"`sheet` is '{sheet}', one of the images: name another file.")
    if output_dir:
        check_output("output_dir", output_dir, is_folder=True)
        folders = [s if os.path.isdir(s) else os.path.dirname(s) or "." for s in sources]
        for folder in (*folders, *([masks] if masks else [])):
            if os.path.realpath(folder) == os.path.realpath(output_dir):
                raise ValueError(
                    f"`output_dir` is '{output_dir}', where the images or masks are: name another."
                )


def _networks(
    weights: str | Path,
    checkpoint_key: str,
    compare: str,
    size: int | Sequence[int] | None,
    options: dict[str, Any],
) -> list[Network]:
    """The backbone, and after it the one to compare with."""
    wanted = [(str(weights), checkpoint_key)]
    if compare in ("untrained", "student", "teacher"):
        wanted.append((str(weights), compare))
    elif compare:
        wanted.append((compare, checkpoint_key))
    if len(wanted) > len(set(wanted)):
        raise ValueError(f"`compare` is {compare}, which is what it would be compared with.")
    networks = list[Network]()
    for path, key in wanted:
        frozen = load_frozen(path, checkpoint_key=key, **options)
        if not hasattr(frozen.module, "get_last_selfattention"):
            raise ValueError(f"a {frozen.name} has no attention to show: choose a ViT.")
        say(f"attention and patches of {frozen.told}")
        size = size or 2 * frozen.transform.crop
        sides = (size,) if isinstance(size, int) else tuple(size)
        if min(sides) < frozen.patch_size:
            raise ValueError(
                f"`size` is {min(sides)}, less than a patch of {frozen.patch_size} pixels."
            )
        whole = WholePatches(sides, frozen.patch_size)
        networks.append(Network(_whose(path, key, wanted), frozen, whole))
    return networks


def _whose(path: str, key: str, wanted: Sequence[tuple[str, str]]) -> str:
    """What a backbone is called: trained or untrained, teacher or student, or the end of its path
    by which it differs from the other."""
    paths, keys = [path for path, _ in wanted], [key for _, key in wanted]
    if len(set(paths)) == 2:
        parts = [Path(name).parts for name in paths]
        n = next(n for n in range(1, 99) if parts[0][-n:] != parts[1][-n:])
        return str(Path(*Path(path).parts[-n:]))
    if len(wanted) == 1 or "untrained" in keys:
        return "untrained" if key == "untrained" else "trained"
    return key


def _spaced(n: int, at_most: int) -> list[int]:
    """Numbers from 0 to n - 1, evenly spaced."""
    if n <= at_most:
        return list(range(n))
    return [(2 * i + 1) * n // (2 * at_most) for i in range(at_most)]


def _with_colors(
    networks: Sequence[Network], frames: Frames, chosen: Sequence[int]
) -> tuple[list[Network], dict[int, list[Seen]]]:
    """The backbones with the colors of their patches, from the chosen images, and what they have
    seen of these. Images that cannot be read are told when they are shown."""
    known: dict[int, list[Seen]] = {}
    tell = counting("images for the components", True)
    for i, image in frames.read(chosen):
        tell(len(known), len(chosen))
        if isinstance(image, UnreadableImage):
            continue
        try:
            known[i] = [see(n.frozen, image, n.whole) for n in networks]
        except UnreadableImage:
            continue
    if not known:
        return list(networks), known
    colors = [PatchColors.of([seen[k] for seen in known.values()]) for k in range(len(networks))]
    with_colors = [
        Network(n.whose, n.frozen, n.whole, c) for n, c in zip(networks, colors, strict=True)
    ]
    return with_colors, known


def _objects(
    masks: str, path: str, image: Image.Image, whole: WholePatches, total: Scores
) -> Objects | None:
    """The objects of an image's mask at the size of its whole patches; None if it has none. Raises
    `UnreadableImage`."""
    if not masks:
        return None
    mask = read_mask(masks, path)
    if mask is None:
        total.without += 1
        return None
    if mask.size != image.size:
        raise UnreadableImage(
            f"its mask has {mask.width} x {mask.height} pixels, it has {image.width} x "
            f"{image.height}"
        )
    objects = objects_of(whole.mask(mask))
    if not len(objects.masks):
        total.empty += 1
        return None
    return objects


def _scores(
    networks: Sequence[Network], seen: Sequence[Seen], objects: Objects, threshold: float
) -> dict[str, dict[str, float]]:
    found = {}
    for network, one in zip(networks, seen, strict=True):
        patch = network.whole.patch
        h, w = (side * patch for side in one.attention.shape[-2:])
        # of another patch size: the part that both see
        there = Objects(objects.masks[:, :h, :w], objects.void[:h, :w])
        found[network.whose] = scores(one.attention, there, patch, threshold)
    return found


def _column(
    name: str,
    image: Image.Image,
    networks: Sequence[Network],
    seen: Sequence[Seen],
    objects: Objects | None,
    look: Look,
    longest: int,
) -> Column:
    whole = networks[0].whole
    w, h = fitted(whole.sides(*image.size)[1], longest)
    shown = unit(whole.shown(image, (w, h)))
    given = cut_out(objects.masks.any(0), shown) if objects else None
    rows = []
    for network, one in zip(networks, seen, strict=True):
        colors = network.colors or PatchColors.of([one])
        whose = network.whose if len(networks) > 1 else ""
        rows.append((whose, cells(one, shown, colors, look.threshold, look.heads)))
    return Column(name, shown, given, rows)


class _Writer:
    """A PNG an image in a folder; of a video numbered frames, and an animation of them."""

    def __init__(self, folder: str, frames: Frames, fps: float) -> None:
        self.folder, self.frames, self.fps = Path(folder), frames, fps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written: dict[Path, None] = {}

    def add(self, i: int, column: Column) -> None:
        if self.frames.is_video:
            path = self.folder / f"{len(self.written):05}.png"
        else:
            flat = Path(self.frames.names[i].strip("/").replace("/", "_"))
            path = self.folder / f"{flat.stem}.png"
            if path in self.written:  # a.jpg and a.png
                path = self.folder / f"{flat.name}.png"
        single(column).save(path, "PNG", compress_level=1)  # of 6: most of the time went into it
        self.written[path] = None

    def end(self) -> None:
        paths = list(self.written)
        say(f"{counted(len(paths), 'picture')} in '{self.folder}'")
        if not self.frames.is_video or not paths:
            return
        first, *rest = paths
        Image.open(first).save(
            self.folder / ANIMATION,
            save_all=True,
            append_images=(Image.open(path) for path in rest),
            duration=max(1, round(1000 / self.fps)),
            loop=0,
            quality=80,
        )
        say(
            f"they move in '{self.folder / ANIMATION}'; as a film: ffmpeg -framerate {self.fps:g} "
            f"-i {self.folder}/%05d.png -pix_fmt yuv420p film.mp4"
        )


NAMES = {
    "jaccard": "Jaccard, best head of each object",
    "jaccard_foreground": "Jaccard, best head of all objects",
    "attention_on_object": "attention on objects",
    "attention_best_head": "attention on objects, best head",
    "object_area": "area of objects",
}


def _report(total: Scores, threshold: float) -> dict[str, Any]:
    for n, what in ((total.without, "without a mask"), (total.empty, "without an object")):
        if n:
            say(f"{counted(n, 'image')} {what}, not scored")
    if not total.n:
        raise ValueError(f"no image has a mask with an object: {MASKS}.")
    means = total.means()
    rows = [("percent", list(means))]
    rows += [
        (words, [f"{100 * own[name]:.1f}" for own in means.values()])
        for name, words in NAMES.items()
    ]
    widths = [max(len(values[c]) for _, values in rows) for c in range(len(means))]
    say(f"{counted(total.n, 'image')}, masks that hold {threshold:.0%} of the attention")
    for words, values in rows:
        numbers = (value.rjust(width) for value, width in zip(values, widths, strict=True))
        say(f"{words:34}  {'  '.join(numbers)}")
    return {"n_images": total.n, **means}
