"""Files and plans that nobody should send: each is refused in a line or makes the right crops; none
ends or holds up a run.

DINOFAST_FUZZ=20000 python -m pytest tests/data/test_fuzz.py tries so many files instead of 3,000.
"""

from __future__ import annotations

import faulthandler
import io
import os
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.random import Generator
from PIL import Image
from test_native import noise, old_pillow

from dinofast.config import Config
from dinofast.data import augmentation, backend_dali, make_loader
from dinofast.data import backend_native as native
from dinofast.data.backend_pil import render as render_by_pil
from dinofast.data.dataset import ImageDataset, scan
from dinofast.data.decode import UnreadableImage, decode, read_file
from dinofast.data.loader import views
from dinofast.data.reader import ImageReader

pytestmark = pytest.mark.skipif(
    bool(native.unavailable_reason()), reason=native.unavailable_reason() or "here"
)
N_FILES, N_PLANS = int(os.environ.get("DINOFAST_FUZZ", 3000)), 1500
SLOWEST_S, HUNG_S = 10, 600  # a file, which takes a millisecond; all of them
KINDS = views(Config(global_crops_size=40, local_crops_size=17, local_crops_number=2))
NORM_LUT = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)


@contextmanager
def hang_ends_the_tests() -> Iterator[None]:
    """With the place where it hangs: no signal handler of Python runs inside a C function."""
    faulthandler.dump_traceback_later(HUNG_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# ---- mutated files
def originals() -> list[bytes]:
    """Small JPEGs and PNGs of every mode."""
    rgb = Image.fromarray(noise(6, 8)).resize((48, 36), Image.Resampling.BICUBIC)
    deep = Image.fromarray(np.arange(36 * 48, dtype=np.uint16).reshape(36, 48) * 37)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "long " * 5000  # headers of several segments
    gray = rgb.convert("L")
    cmyk = rgb.convert("CMYK")
    palette = rgb.quantize(16)
    pixel = rgb.resize((1, 1))
    jpegs = [
        (rgb, {}),
        (rgb, {"progressive": True}),
        (rgb, {"subsampling": 0, "restart_marker_blocks": 2}),
        (rgb, {"exif": exif}),
        (gray, {}),
        (cmyk, {}),
        (cmyk, {"progressive": True}),
        (pixel, {}),
    ]
    pngs = [
        (rgb, {}),
        (rgb.convert("RGBA"), {}),
        (gray, {}),
        (rgb.convert("LA"), {}),
        (rgb.convert("1"), {}),
        (palette, {}),
        (palette, {"transparency": bytes(range(0, 256, 16))}),
        (deep, {}),
        (pixel, {}),
    ]
    return [
        encoded(image, kind, options)
        for kind, images in (("JPEG", jpegs), ("PNG", pngs))
        for image, options in images
    ]


def encoded(image: Image.Image, kind: str, options: dict) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def parts(data: bytes) -> list[bytes]:
    """Signature, segments or chunks, and what follows the start of a JPEG's scan; their sum is the
    file."""
    png = data.startswith(b"\x89PNG")
    at = [0, 8 if png else 2]
    while at[-1] + 4 <= len(data):
        length = (
            struct.unpack_from(">I", data, at[-1])[0] + 12
            if png
            else struct.unpack_from(">H", data, at[-1] + 2)[0] + 2
        )
        at.append(at[-1] + length)
        if not png and data[at[-2] + 1] == 0xDA:
            break
    return [data[a:b] for a, b in zip(at, at[1:] + [len(data)], strict=True)]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def flip_bits(rng: Generator, data: bytes, other: bytes) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, len(data), rng.integers(1, 9)):
        changed[at] ^= 1 << rng.integers(8)
    return bytes(changed)


def overwrite(rng: Generator, data: bytes, other: bytes) -> bytes:
    at, n = rng.integers(len(data)), rng.integers(1, 30)
    run = rng.bytes(n) if rng.random() < 0.5 else rng.bytes(1) * int(n)
    return data[:at] + run + data[at + n :]


def truncate(rng: Generator, data: bytes, other: bytes) -> bytes:
    """Half of them with the end marker, so that only decoding finds out."""
    end = (
        b""
        if rng.random() < 0.5
        else b"\xff\xd9"
        if data.startswith(b"\xff")
        else chunk(b"IEND", b"")
    )
    return data[: rng.integers(len(data))] + end


def splice(rng: Generator, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]


def repeat(rng: Generator, data: bytes, other: bytes) -> bytes:
    (at, first), n = rng.integers(0, len(data), 2), rng.integers(1, 300)
    return data[:at] + data[first : first + n] * int(rng.integers(1, 4)) + data[at:]


def swap_parts(rng: Generator, data: bytes, other: bytes) -> bytes:
    """Some of the other file's among them, once in a while."""
    pieces = parts(data) + (parts(other)[1:] if rng.random() < 0.3 else [])
    a, b = rng.integers(1, len(pieces), 2)
    pieces[a], pieces[b] = pieces[b], pieces[a]
    return b"".join(pieces)


def change_part(rng: Generator, data: bytes, other: bytes) -> bytes:
    """A JPEG's segment of another length or content; a PNG's chunk of another content with the
    right checksum, pixels too."""
    pieces = parts(data)
    at = int(rng.integers(1, len(pieces)))
    piece = pieces[at]
    if data.startswith(b"\xff") and rng.random() < 0.5:
        pieces[at] = piece[:2] + rng.bytes(2) + piece[4:]
    elif data.startswith(b"\xff"):
        pieces[at] = piece[:4] + flip_bits(rng, piece[4:] + b"\0", b"")
    elif piece[4:8] == b"IDAT" and rng.random() < 0.7:
        lines = zlib.decompress(piece[8:-4])
        pieces[at] = chunk(
            b"IDAT", zlib.compress((flip_bits if rng.random() < 0.5 else truncate)(rng, lines, b""))
        )
    elif piece[4:8] == b"IHDR":
        # depth, color, method, interlace
        pieces[at] = chunk(b"IHDR", piece[8:16] + flip_bits(rng, piece[16:-4], b""))
    else:
        pieces[at] = chunk(piece[4:8], flip_bits(rng, piece[8:-4] + b"\0", b""))
    return b"".join(pieces)


def change_size(rng: Generator, data: bytes, other: bytes) -> bytes:
    """Another size in the header, now and then an enormous one."""
    huge = rng.random() < 0.2
    width, height = (
        rng.choice(HUGE) if huge else rng.choice((0, 1, 2, 7, 35, 36, 37, 47, 48, 49, 300, 2000), 2)
    )
    return resized(data, int(width), int(height))


HUGE = (
    (65500, 65500),
    (2**31 - 1, 1),
    (1, 2**31 - 1),
    (2**31 - 1, 2**31 - 1),
    (13400, 13400),
    (2**32 - 1, 40),
)


def resized(data: bytes, width: int, height: int) -> bytes:
    pieces = parts(data)
    for i, piece in enumerate(pieces):
        if piece[4:8] == b"IHDR":
            pieces[i] = chunk(b"IHDR", struct.pack(">II", width, height) + piece[16:-4])
        elif piece[:2] in (b"\xff\xc0", b"\xff\xc2"):
            pieces[i] = (
                piece[:5] + struct.pack(">HH", min(height, 65535), min(width, 65535)) + piece[9:]
            )
    return b"".join(pieces)


MUTATIONS = (flip_bits, overwrite, truncate, splice, repeat, swap_parts, change_part, change_size)


class Made(NamedTuple):
    """What became of a file: its pixels (H, W, 3), the plan (V,) and the crops, levels by NORM_LUT;
    or the reason alone."""

    reason: str = ""
    image: np.ndarray | None = None
    drawn: np.ndarray | None = None
    crops: list[torch.Tensor] = []
    seconds: float = 0.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """N_FILES mutated files."""
    folder, whole = tmp_path_factory.mktemp("fuzz"), originals()
    for i in range(N_FILES):
        rng = np.random.default_rng(i)
        mutation = MUTATIONS[i % len(MUTATIONS)]
        data = mutation(rng, whole[rng.integers(len(whole))], whole[rng.integers(len(whole))])
        # names may lie
        (folder / f"{i:06}_{mutation.__name__}.{'jpg' if i % 3 else 'png'}").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Made]:
    """The files, by name, through the parts of the data path: decoding, plan, crops in C++."""
    with hang_ends_the_tests(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks, as in a run
        images = scan(str(folder))
        return {Path(images.path(i)).name: through(images, i) for i in range(len(images))}


def through(images: ImageDataset, i: int) -> Made:
    start = time.perf_counter()
    try:
        image = ImageReader(images).decode(i)
    except UnreadableImage as reason:
        return Made(str(reason), seconds=time.perf_counter() - start)
    drawn = augmentation.draw(0, 0, np.array([i]), KINDS).plan(0, image.height, image.width)
    crops = [torch.full((3, side, side), torch.nan) for side in drawn["size"].tolist()]
    native.render(native.pixels(image), drawn, crops, NORM_LUT)
    return Made("", np.asarray(image), drawn, crops, time.perf_counter() - start)


def test_mutated_files_are_refused_in_a_line_or_make_crops(outcomes: dict[str, Made]) -> None:
    assert len(outcomes) == N_FILES
    for name, made in outcomes.items():
        assert bool(made.reason) == (not made.crops), name
        assert made.reason.isprintable() and len(made.reason) < 500, (name, made.reason)
        # each pixel was written
        assert all(torch.isfinite(crop).all() for crop in made.crops), name
        assert made.seconds < SLOWEST_S, name


def test_each_mutation_is_refused_and_gets_through_at_times(outcomes: dict[str, Made]) -> None:
    """Or the files would try little."""
    for mutation in MUTATIONS:
        ended = [
            bool(made.reason)
            for name, made in outcomes.items()
            if name[7:].startswith(mutation.__name__)
        ]
        assert 0.05 < np.mean(ended) < 0.98, mutation.__name__


@pytest.mark.parametrize("backend", ["native", "dali"])
def test_a_run_over_all_of_them_refuses_the_same_files(
    folder: Path, outcomes: dict[str, Made], tmp_path: Path, backend: str
) -> None:
    if backend == "dali" and backend_dali.unavailable_reason("cpu"):
        pytest.skip(backend_dali.unavailable_reason("cpu"))
    cfg = Config(
        data_path=str(folder),
        output_dir=str(tmp_path),
        data_backend=backend,
        num_workers=2,
        batch_size_per_gpu=1,
        global_crops_size=40,
        local_crops_size=17,
        local_crops_number=2,
        max_bad_files=1.0,
    )
    with hang_ends_the_tests(), closing(make_loader(cfg)) as loader:
        for _ in range(loader.steps_per_epoch):
            assert all(torch.isfinite(crops).all() for crops in next(loader))
    bad = {Path(path).name: reason for path, reason in loader.bad_files}
    assert bad.keys() == {name for name, made in outcomes.items() if made.reason}
    lines = (tmp_path / "bad_files.txt").read_text().splitlines()
    assert dict(line.split("\t") for line in lines) == dict(loader.bad_files)


@old_pillow
def test_crops_of_mutated_files_are_those_of_pil(outcomes: dict[str, Made]) -> None:
    for name, made in list(outcomes.items())[::2]:
        for crop, view in zip(made.crops, made.drawn if made.crops else [], strict=True):
            expected = render_by_pil(Image.fromarray(made.image), view).transpose(2, 0, 1)
            assert (crop.numpy() == NORM_LUT[np.arange(3)[:, None, None], expected]).all(), name


@pytest.mark.parametrize("size", HUGE, ids=str)
def test_a_huge_claimed_size_is_refused_before_memory_is_taken(
    size: tuple[int, int], tmp_path: Path
) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, data in enumerate(originals()):
        if data.startswith(b"\xff") and max(size) > 65535:
            continue  # more than a JPEG can claim
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(resized(data, *size))
        with pytest.raises(UnreadableImage):
            decode(read_file(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024  # KiB
