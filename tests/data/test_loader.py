"""The loader: which images and crops come out, whatever the workers, the processes and the files
do."""

import multiprocessing
import os
import threading
import time
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from test_dataset import bad_images, odd_images, photograph
from test_shards import pack

from dinofast import ops
from dinofast.config import Config
from dinofast.data import backend_dali, backend_native, decode, make_loader, select_backend
from dinofast.data.augmentation import View, draw
from dinofast.data.backend_pil import render
from dinofast.data.loader import views
from dinofast.data.reader import ImageReader
from dinofast.data.sampler import batch_indices, epoch_order

SMALL = dict(
    global_crops_size=16,
    local_crops_size=8,
    local_crops_number=2,
    batch_size_per_gpu=4,
    num_workers=0,
    patch_size=8,
)
N = 19
# two levels, normalized: dali's cut rounds otherwise, and color makes more of that
NEAR = 2 / 255 / 0.225


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for i in range(N):
        photograph(folder / f"{i:02}.png", seed=i)
    return folder


@pytest.fixture(params=["pil", "native", "dali"])
def config(request, photographs, tmp_path):
    """A small run on N photographs with each backend; its output folder is of this test alone."""
    reasons = {
        "native": backend_native.unavailable_reason(),
        "dali": backend_dali.unavailable_reason("cpu"),
    }
    if reason := reasons.get(request.param):
        pytest.skip(reason)
    options = {
        **SMALL,
        "data_path": str(photographs),
        "output_dir": str(tmp_path / "run"),
        "data_backend": request.param,
    }
    return lambda **changes: Config(**{**options, **changes})


def take(cfg, steps, **where):
    """The micro-batches of so many calls, as lists of tensors."""
    loader = make_loader(cfg, **where)
    batches = [next(loader) for _ in range(steps)]
    loader.close()
    return batches


def crop_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("dinofast-crops")]


def same(a, b):
    return len(a) == len(b) and all(
        len(x) == len(y) and all(torch.equal(s, t) for s, t in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def images_of(micro_batch, crops):
    """The micro-batch's tensors as one (crops, B, ...) tensor per resolution, so that images can be
    picked."""
    return [tensor.unflatten(0, (n, -1)) for tensor, n in zip(micro_batch, crops, strict=True)]


def spoil(path):
    """Break a PNG's pixels and leave its header and end as they are, so that only decoding finds
    out."""
    data = bytearray(path.read_bytes())
    middle = data.index(b"IDAT") + 4
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)


def test_crops_are_the_plan_executed_and_normalized(config, photographs):
    cfg = config()
    loader = make_loader(cfg, start_step=5)  # epoch 1, step 1
    assert (loader.n_images, loader.steps_per_epoch, loader.bad_files) == (N, 4, [])
    big, small = next(loader)
    assert big.shape == (2 * 4, 3, 16, 16) and small.shape == (2 * 4, 3, 8, 8)
    assert (
        big.dtype == small.dtype == torch.float32 and big.is_contiguous() and small.is_contiguous()
    )
    assert loader.wait_s > 0
    samples = epoch_order(cfg.seed, 1, N)[4:8]
    drawn = draw(cfg.seed, 1, samples, views(cfg))
    for b, sample in enumerate(samples):
        image = decode.decode((photographs / f"{sample:02}.png").read_bytes())
        plan = drawn.plan(b, 30, 40)
        for v in range(4):
            crop = render(image, plan[v]).transpose(2, 0, 1)
            for c, (mean, std) in enumerate(
                zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
            ):
                want = (torch.from_numpy(crop[c].copy()).float() / 255 - mean) / std
                got = (big, small)[v // 2][v % 2 * 4 + b, c]
                assert (
                    torch.equal(got, want)
                    if cfg.data_backend != "dali"
                    else (got - want).abs().mean() < NEAR
                ), (v, b, c)


def test_views_are_the_official_ones():
    first, second, *rest = views(Config())
    assert first == View(224, (0.4, 1.0), blur_p=1.0, solarize_p=0.0, blur_radius=(0.1, 2.0))
    assert second == View(224, (0.4, 1.0), blur_p=0.1, solarize_p=0.2, blur_radius=(0.1, 2.0))
    assert len(rest) == 8 and set(rest) == {View(96, (0.05, 0.4), 0.5, 0.0, (0.1, 2.0))}


def test_without_local_crops_there_is_one_tensor(config):
    [(big,)] = take(
        config(local_crops_number=0, image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0)), 1
    )
    assert big.shape == (8, 3, 16, 16) and big.min() >= 0 and big.max() <= 1


def test_an_epoch_sees_each_image_once_and_the_next_differs(config):
    # 8 of 19 images a step, 2 steps an epoch
    stream = batch_indices(config().seed, N, 2, batch_size=4, accumulate=2)
    epochs = [[next(stream) for _ in range(4)] for _ in range(3)]
    seen = [np.concatenate([samples for _, samples in epoch]) for epoch in epochs]
    assert all(len(set(s.tolist())) == 16 and 0 <= s.min() and s.max() < N for s in seen)
    # others are left out in turn
    assert (seen[0] != seen[1]).any() and len(set(np.concatenate(seen).tolist())) > 16
    assert [[epoch for epoch, _ in e] for e in epochs] == [[0] * 4, [1] * 4, [2] * 4]


def test_an_image_is_drawn_anew_in_each_epoch(config, tmp_path):
    photograph(tmp_path / "data" / "only.png")
    first, second = take(config(data_path=str(tmp_path / "data"), batch_size_per_gpu=1), 2)
    assert not torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


def test_workers_change_nothing_and_none_is_left(config):
    alone = take(config(), 10)
    assert same(take(config(num_workers=8), 10), alone)
    assert not multiprocessing.active_children() and not crop_threads()


def test_backends_make_the_same_crops(config):
    """Whatever the threads; the same seed, images and step. pil and native to the bit, dali to
    rounding."""
    if config().data_backend == "native" and tuple(map(int, PIL.__version__.split(".")[:1])) < (
        13,
    ):
        pytest.skip("Pillow before 13 resizes some boxes in another order")
    whole = take(config(num_workers=2, global_crops_size=24, local_crops_number=3), 7)
    by_pil = take(config(data_backend="pil", global_crops_size=24, local_crops_number=3), 7)
    if config().data_backend == "dali":
        assert all(
            (a - b).abs().mean() < NEAR
            for x, y in zip(whole, by_pil, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    else:
        assert same(whole, by_pil)


def test_exif_and_value_range_hold_in_each_backend(config, tmp_path):
    """The crops are near those of the same images, written upright and in 8 bits."""
    for name in ("raw", "made"):
        (tmp_path / name).mkdir()
    for i in range(4):
        upright = photograph(tmp_path / "x.png", (40 + i, 30), seed=i)
        image, exif = Image.open(upright).convert("RGB"), Image.Exif()
        exif[0x0112] = 8  # made upright by a quarter turn to the left
        turned = image.transpose(Image.Transpose.ROTATE_270)
        turned.save(tmp_path / "raw" / f"{i}.jpg", exif=exif, quality=98, subsampling=0)
        image.save(tmp_path / "made" / f"{i}.jpg", quality=98, subsampling=0)
        gray = np.asarray(image.convert("L"))
        deep = Image.frombytes("I;16", image.size, (gray.astype("<u2") * 16).tobytes())
        deep.save(tmp_path / "raw" / f"deep{i}.png")
        Image.fromarray(gray).save(tmp_path / "made" / f"deep{i}.png")
    kept = config(data_path=str(tmp_path / "made"), image_std=(1.0, 1.0, 1.0))
    raw = replace(kept, data_path=str(tmp_path / "raw"))
    expected = take(kept, 4)
    for options, is_near in (
        ({"exif": True, "value_range": (0.0, 4080.0)}, True),
        ({"value_range": (0.0, 4080.0)}, False),
        ({"exif": True}, False),
    ):
        got = take(replace(raw, **options), 4)
        off = [
            (a - b).abs().mean().item() * 255
            for x, y in zip(got, expected, strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        assert (max(off) < 3) == is_near, (options, off)


def test_what_lies_beside_the_images_and_darkness_are_told(config, tmp_path):
    for i in range(4):
        deep = np.random.default_rng(i).integers(0, 4096, (30, 40)).astype("<u2")
        (tmp_path / "data").mkdir(exist_ok=True)
        image = Image.frombytes("I;16", (40, 30), deep.tobytes())
        image.save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "notes.txt").touch()
    cfg = config(data_path=str(tmp_path / "data"))
    ignored, dark = make_loader(cfg).remarks()
    assert ignored == "1 file ignored: 1 .txt"
    assert dark.startswith("warning: 4 of 4 images looked at come out nearly black: ")
    assert make_loader(cfg, rank=1).remarks() == [ignored]  # one process looks
    assert make_loader(replace(cfg, value_range=(0.0, 4095.0))).remarks() == [ignored]
    assert make_loader(config()).remarks() == []


def test_looking_at_images_is_bounded_and_ends_nothing(spoilt, monkeypatch):
    reader = make_loader(spoilt()).reader
    assert reader.remark() == ""  # three of them do not decode
    monkeypatch.setattr(ImageReader, "_decode_once", None)  # no retries either
    reads = []
    monkeypatch.setattr(type(reader.dataset), "read", lambda self, i: reads.append(i) or b"")
    monkeypatch.setattr("dinofast.data.reader.SAMPLE_S", -1.0)
    assert reader.remark() == "" and not reads


def test_batches_in_bf16_are_those_in_fp32_rounded(config):
    for exact, rounded in zip(take(config(), 3), take(config(precision="bf16"), 3), strict=True):
        for a, b in zip(exact, rounded, strict=True):
            assert b.dtype == torch.bfloat16 and torch.equal(a.to(torch.bfloat16), b)
    assert take(config(precision="bf16", arch="resnet50"), 1)[0][0].dtype == torch.float32


def test_the_global_generator_is_left_alone(config):
    before = torch.random.get_rng_state()
    take(config(num_workers=1), 2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_resume_continues_bit_for_bit(config):
    whole = take(config(accumulate=2), 10)  # 2 steps an epoch: 5 steps
    assert same(take(config(accumulate=2), 4, start_step=3), whole[6:])


def test_seek_is_starting_there(config):
    whole = take(config(), 8)
    loader = make_loader(config(num_workers=1))
    for step in (5, 2):  # before the first batch, and while the workers run
        loader.seek(step)
        assert same([next(loader), next(loader)], whole[step : step + 2])
    loader.close()
    assert not multiprocessing.active_children() and not crop_threads()


def test_starting_deep_costs_nothing(config):
    start = time.perf_counter()
    take(config(), 1, start_step=10**9)  # a loop over the steps before would take days
    assert time.perf_counter() - start < 5


def test_other_divisions_of_the_global_batch_give_the_same_crops(config):
    whole = take(config(batch_size_per_gpu=8), 5)  # crosses into the third epoch
    halves = [take(config(batch_size_per_gpu=4), 5, rank=r, world=2) for r in (0, 1)]
    turns = take(config(batch_size_per_gpu=4, accumulate=2), 10)
    quarters = [
        take(config(batch_size_per_gpu=2, accumulate=2), 10, rank=r, world=2) for r in (0, 1)
    ]
    for step in range(5):
        for division in (
            [halves[0][step], halves[1][step]],
            turns[2 * step : 2 * step + 2],
            [quarters[r][2 * step + m] for m in (0, 1) for r in (0, 1)],
        ):
            parts = [images_of(batch, (2, 2)) for batch in division]
            joined = [torch.cat(p, 1) for p in zip(*parts, strict=True)]
            assert same([joined], [images_of(whole[step], (2, 2))])


def test_an_epoch_over_odd_and_bad_files(config, tmp_path):
    (tmp_path / "data").mkdir()
    odd, bad = odd_images(tmp_path / "data"), bad_images(tmp_path / "data")
    cfg = config(data_path=str(tmp_path / "data"), batch_size_per_gpu=1)
    calls = []
    loader = make_loader(cfg, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(len(odd) + len(bad),) * 2]
    assert loader.n_images == loader.steps_per_epoch == len(odd) + len(bad) and not loader.bad_files
    for _ in range(loader.n_images):
        assert all(torch.isfinite(t).all() for t in next(loader))
    assert {path for path, _ in loader.bad_files} == set(bad)
    for path, reason in loader.bad_files:
        assert bad[path] in reason and "\n" not in reason and "\t" not in reason, (path, reason)
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert [tuple(line.split("\t")) for line in lines] == loader.bad_files


@pytest.fixture
def spoilt(config, tmp_path):
    """Twelve photographs of which 03, 04 and 11 do not decode."""
    for i in range(12):
        photograph(tmp_path / "data" / f"{i:02}.png", (40 + i, 30), seed=i)
    for i in (3, 4, 11):
        spoil(tmp_path / "data" / f"{i:02}.png")
    return lambda **options: config(data_path=str(tmp_path / "data"), **options)


@pytest.fixture
def sharded(photographs, tmp_path):
    """The photographs in three shards and a single file, in the order of the folder."""
    files = {path.name: path.read_bytes() for path in sorted(photographs.iterdir())}
    names = list(files)
    (tmp_path / "shards").mkdir()
    for i, part in enumerate((names[:7], names[7:8], names[8:18])):
        pack(
            tmp_path / "shards" / f"{i}.tar",
            {"notes.txt": b"text"} | {name: files[name] for name in part},
        )
    (tmp_path / "shards" / "3.png").write_bytes(files[names[18]])
    return tmp_path / "shards"


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_the_crops_of_single_files(config, sharded, workers):
    assert same(take(config(data_path=str(sharded), num_workers=workers), 10), take(config(), 10))


def test_shards_resume_at_any_step_with_any_number_of_processes(config, sharded):
    """Three shards, two processes: whose they are plays no part."""
    # crosses into the third epoch
    whole = take(config(data_path=str(sharded), batch_size_per_gpu=8), 5)
    pairs = [take(config(data_path=str(sharded)), 2, rank=r, world=2, start_step=3) for r in (0, 1)]
    for step in (0, 1):
        parts = [images_of(pairs[r][step], (2, 2)) for r in (0, 1)]
        joined = [torch.cat(p, 1) for p in zip(*parts, strict=True)]
        assert same([joined], [images_of(whole[3 + step], (2, 2))])


def test_bad_members_are_named_and_replaced(spoilt, tmp_path):
    from_files = make_loader(spoilt())
    crops = [next(from_files) for _ in range(6)]
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "data").iterdir())}
    shard = pack(tmp_path / "spoilt.tar", files)
    loader = make_loader(replace(spoilt(), data_path=str(shard)))
    assert same([next(loader) for _ in range(6)], crops)
    assert sorted(path for path, _ in loader.bad_files) == [
        f"{shard}/{i:02}.png" for i in (3, 4, 11)
    ]


def test_a_damaged_shard_is_listed_and_the_rest_of_it_trained_on(config, sharded, tmp_path):
    with open(sharded / "2.tar", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) // 2)
    loader = make_loader(config(data_path=str(sharded), batch_size_per_gpu=1))
    assert 9 < loader.n_images < N
    for _ in range(loader.n_images):
        next(loader)
    loader.close()
    listed = [
        line.split("\t") for line in (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    ]
    assert [str(sharded / "2.tar"), "damaged tar archive"] in [
        [path, reason.split(":")[0]] for path, reason in listed
    ]


def test_dali_needs_a_kernel_for_its_colors(monkeypatch):
    monkeypatch.setattr(backend_dali.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ops._choice, "NO_TRITON", "")
    assert select_backend(None, "cuda").name == "dali"
    monkeypatch.setattr(ops._choice, "NO_TRITON", "Triton is not installed")
    name, why = select_backend(None, "cuda")
    assert (
        name != "dali"
        and "not dali: ops.color, which it needs, cannot run on cuda: Triton is not installed"
        in why
    )
    with pytest.raises(
        ValueError,
        match="dali was asked for, but ops.color, which it needs, cannot run on cuda: Triton",
    ):
        select_backend("dali", "cuda")
    assert backend_dali.unavailable_reason("cpu") == (
        ops._choice.NO_CPP
        and "ops.color, which it needs, cannot run on cpu: " + ops._choice.NO_CPP
        or None
    )


def test_fewer_images_than_a_step_takes(config):
    with pytest.raises(
        ValueError,
        match=r"has 19 images but one step takes 24 \(`batch_size_per_gpu` 4 x 3 processes x "
        r"`accumulate` 2\): lower `batch_size_per_gpu`",
    ):
        make_loader(config(accumulate=2), world=3)
