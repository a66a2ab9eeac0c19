"""The dali backend on DALI's CPU operators: what goes to DALI and what to PIL, how near its crops
are, and what its failures cost. tests/data/test_loader.py runs its tests with this backend too."""

from __future__ import annotations

import gc
import io
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image
from test_pil import GOLDEN, golden_view

from dinofast.config import Config
from dinofast.data import backend_dali as dali
from dinofast.data import make_loader
from dinofast.data.augmentation import VIEW, Draw

pytestmark = pytest.mark.skipif(
    bool(dali.unavailable_reason("cpu")), reason=dali.unavailable_reason("cpu") or "here"
)
LEVELS = torch.arange(256.0).repeat(3, 1)


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **options
    )
    return file.getvalue()


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )


class Given(Draw):
    """A plan with its boxes."""

    def plan(self, b: int, height: int, width: int) -> np.ndarray:
        return self.views[b]


def crops_of(files: list[bytes], views: np.ndarray) -> list[torch.Tensor]:
    """The crops of a micro-batch of these files by the plan (B, V), whose views are all of one
    size: (V, B, 3, S, S)."""

    def decode(index: int, bad_files: list) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(files[index])).convert("RGB"), index

    resolutions = [(views.shape[1], int(views["size"].flat[0]))]
    batches = dali.Batches(
        iter([(0, np.arange(len(files)))] * 10),
        lambda epoch, indices: Given(views[indices], None),
        lambda index: files[index],
        decode,
        resolutions,
        LEVELS,
        torch.float32,
        torch.device("cpu"),
        len(files),
        1,
        0.0,
    )
    (crops,), bad_files, _ = next(batches)
    batches.close()
    assert not bad_files
    return crops.unflatten(0, (views.shape[1], len(files)))


@pytest.mark.parametrize("i", range(8))
def test_fidelity_to_the_official_results(i: int) -> None:
    """Mean difference in levels: of the cut at most 0.25, of the whole chain 2; and what DALI gives
    is mirrored exactly."""
    view = golden_view(i).reshape(1, 1)
    file = encoded(GOLDEN["image"], "PNG")
    whole = crops_of([file], view)[0, 0].permute(1, 2, 0).numpy()
    assert np.abs(whole - GOLDEN[f"{i}.final_u8"].astype(float)).mean() < 2
    for name in ("jitter", "gray", "blur_radius", "solarize"):
        view[name] = 0
    cut = crops_of([file], view)[0, 0].permute(1, 2, 0).numpy()
    official = GOLDEN[f"{i}.crop"][:, ::-1] if view["flip"] else GOLDEN[f"{i}.crop"]
    assert np.abs(cut - official.astype(float)).mean() < 0.25
    view["flip"] = not view["flip"]
    assert (crops_of([file], view)[0, 0].permute(1, 2, 0).numpy() == cut[:, ::-1]).all()


def test_a_jpeg_is_decoded_as_by_pil() -> None:
    files = [
        encoded(smooth(48, 64), quality=90),
        encoded(smooth(40, 40), quality=80, progressive=True, subsampling=0),
        encoded(smooth(48, 64).convert("L"), quality=70),
    ]
    assert all(dali.plain_jpeg_size(file) for file in files)
    views = np.zeros((3, 1), VIEW)
    views["size"] = 32
    views["box"][:, 0] = [(3, 5, 32, 32), (0, 8, 32, 32), (16, 32, 32, 32)]  # nothing is resampled
    crops = crops_of(files, views)
    for file, crop, (y, x, h, w) in zip(files, crops[0], views["box"][:, 0].tolist(), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))[y : y + h, x : x + w]
        assert (crop.permute(1, 2, 0).numpy() == decoded).all()


def test_which_files_go_to_dali() -> None:
    image = smooth(30, 40)
    plain = encoded(image)
    assert (
        dali.plain_jpeg_size(plain)
        == (30, 40)
        == dali.plain_jpeg_size(encoded(image, progressive=True))
    )
    assert dali.plain_jpeg_size(encoded(image, exif=b"Exif\0\0" + b"x" * 5000)) == (30, 40)
    others = {
        "cmyk": encoded(image.convert("CMYK")),
        "png": encoded(image, "PNG"),
        "truncated": plain[:-200],
        "empty": b"",
        "start alone": plain[:2],
        "no frame": plain[:20] + b"\xff\xd9",
        "rgb": encoded(image, keep_rgb=True),
        "twelve bits": plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
        "arithmetic coding": plain.replace(b"\xff\xc0\0\x11", b"\xff\xc9\0\x11"),
    }
    for name, data in others.items():
        assert data != plain and dali.plain_jpeg_size(data) is None, name
    for end in range(len(plain)):  # never a crash
        dali.plain_jpeg_size(plain[:end]), dali.plain_jpeg_size(plain[:end] + b"\xff\xd9")


def spoilt(jpeg: bytes) -> bytes:
    """Its size and its end are as before, and no decoder takes it: the scan names Huffman tables
    that are not there."""
    data = bytearray(jpeg)
    data[data.index(b"\xff\xda") + 6] = 0x33
    return bytes(data)


@pytest.fixture
def jpegs(tmp_path):
    """A run's options on ten JPEGs."""
    (tmp_path / "data").mkdir()
    for i in range(10):
        smooth(60 + i, 80, i).save(tmp_path / "data" / f"{i}.jpg", quality=90)
    options = dict(
        data_path=str(tmp_path / "data"),
        output_dir=str(tmp_path / "run"),
        batch_size_per_gpu=5,
        num_workers=1,
        global_crops_size=16,
        local_crops_size=8,
        local_crops_number=2,
        patch_size=8,
    )
    return lambda **changes: Config(**{**options, "data_backend": "dali", **changes})


def take(cfg: Config, steps: int, **where: object) -> tuple[list, list]:
    loader = make_loader(cfg, **where)
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches, loader.bad_files


def test_crops_are_near_those_of_pil(jpegs) -> None:
    plain = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    ours, _ = take(jpegs(**plain), 6)
    theirs, _ = take(jpegs(data_backend="pil", num_workers=0, **plain), 6)
    for a, b in zip(
        (t for batch in ours for t in batch), (t for batch in theirs for t in batch), strict=True
    ):
        assert a.shape == b.shape and a.dtype == b.dtype and (a - b).abs().mean() * 255 < 2


def test_jpegs_that_exif_turns_are_left_to_pil(jpegs, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(60, 80).save(tmp_path / "data" / "3.jpg", exif=exif)
    for asked in (False, True):
        loader = make_loader(jpegs(exif=asked))
        next(loader)
        encoded, _ = loader._batches._encoded(3)
        assert encoded.size == ((80, 60) if asked else (60, 80))
        assert (encoded.data[:2].tobytes() == b"P6") == asked  # PNM from PIL, or the JPEG itself
        assert loader._batches._encoded(4)[0].data[:2].tobytes() == b"\xff\xd8"
        loader.close()


def test_a_decompression_bomb_does_not_reach_dali(jpegs, tmp_path) -> None:
    """Its decoder would take 12 GB for what the header claims."""
    path = tmp_path / "data" / "3.jpg"
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = b"\xff\xdc\xff\xdc"
    path.write_bytes(data)
    assert dali.plain_jpeg_size(bytes(data)) == (65500, 65500)
    loader = make_loader(jpegs())
    next(loader), next(loader)
    assert (
        len(loader.bad_files) == 1
        and "decompression bomb" in loader.bad_files[0][1]
        and not loader._batches._by_pil
    )
    loader.close()


def test_a_failure_in_the_graph_costs_one_image(jpegs, tmp_path) -> None:
    """Files whose headers are whole and which stop DALI's decoder: bad and replaced as with PIL, at
    the same step."""
    loader = make_loader(jpegs())
    for path in (tmp_path / "data" / "3.jpg", tmp_path / "data" / "8.jpg"):
        path.write_bytes(spoilt(path.read_bytes()))
    ours = [next(loader) for _ in range(4)]
    loader.close()
    # the headers are whole
    assert all(dali.plain_jpeg_size(path.read_bytes()) for path in (tmp_path / "data").iterdir())
    other = jpegs(data_backend="pil", num_workers=0, output_dir=str(tmp_path / "other"))
    theirs, bad_files = take(other, 4)
    assert sorted(loader.bad_files) == sorted(bad_files) and len(bad_files) == 2
    for a, b in zip(
        (t for batch in ours for t in batch), (t for batch in theirs for t in batch), strict=True
    ):
        assert (a - b).abs().mean() < 0.05
    again, _ = take(jpegs(), 2, start_step=2)
    assert all(
        torch.equal(a, b)
        for x, y in zip(again, ours[2:], strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_what_dali_alone_cannot_decode_is_left_to_pil(jpegs) -> None:
    """Nothing is refused, and the crops are the same."""
    whole, _ = take(jpegs(), 4)
    loader = make_loader(jpegs())
    loader._start()
    read = loader._batches._read
    # PIL reads for itself
    loader._batches._read = lambda index: spoilt(read(index)) if index == 4 else read(index)
    got = [next(loader) for _ in range(4)]
    assert loader._batches._by_pil == {4} and not loader.bad_files
    loader.close()
    for a, b in zip(
        (t for batch in got for t in batch), (t for batch in whole for t in batch), strict=True
    ):
        assert torch.equal(a, b)


def test_another_fault_is_not_blamed_on_an_image(jpegs, monkeypatch) -> None:
    loader = make_loader(jpegs())
    next(loader)

    def fail(**stream: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loader._batches._graph, "outputs", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        next(loader)
    loader.close()
    assert not loader.bad_files


def test_a_fault_gives_no_batch_twice_and_ends_nothing(jpegs) -> None:
    whole, _ = take(jpegs(), 4)
    loader = make_loader(jpegs())
    got = [next(loader)]
    draw = loader._batches._draw
    loader._batches._draw = lambda epoch, indices: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(loader)
    loader._batches._draw = draw
    loader.seek(1)  # where the run stands
    got += [next(loader) for _ in range(3)]
    loader.close()
    assert all(
        torch.equal(a, b)
        for x, y in zip(got, whole, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def test_a_forked_process_has_no_graph_to_collect(jpegs) -> None:
    """It would wait without end for the graph's threads: workers of the PIL backend and of knn
    after a run with DALI did."""
    gc.disable()
    try:
        next(loader := make_loader(jpegs()))
        cycle = [loader]
        cycle.append(cycle)
        del loader, cycle  # nobody has closed it
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(30)
        child.kill()  # if it hangs
        child.join()
        assert child.exitcode == 0
    finally:
        gc.enable()


def test_memory_goes_back_to_dali_after_the_kernels_have_read_it() -> None:
    events = []

    class Cut:
        def __del__(self) -> None:
            events.append("memory")

    class Event:
        def synchronize(self) -> None:
            events.append("waited")

    batches = dali.Batches.__new__(dali.Batches)
    batches._in_use = [Cut()], Event()
    batches._release()
    assert events == ["waited", "memory"]


def test_on_a_gpu(gpu, jpegs) -> None:
    ours, _ = take(jpegs(precision="fp32"), 6, device="cuda")
    theirs, _ = take(jpegs(data_backend="pil", num_workers=0), 6)
    for a, b in zip(
        (t for batch in ours for t in batch), (t for batch in theirs for t in batch), strict=True
    ):
        assert a.is_cuda and (a.cpu() - b).abs().mean() < 0.05
    again, _ = take(jpegs(precision="fp32"), 2, start_step=4, device="cuda")
    assert all(
        torch.equal(a, b)
        for x, y in zip(again, ours[4:], strict=True)
        for a, b in zip(x, y, strict=True)
    )
