"""Training on a caller's own data set and augmentation: the same loop, resumed exactly."""

import multiprocessing
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining import assert_same_run
from tiny import TINY

from dinofast import Callback, train
from dinofast.data import make_loader

RUN = replace(
    TINY,
    batch_size_per_gpu=6,
    epochs=3,
    warmup_epochs=1,
    lr=0.1,
    num_workers=2,
    device="cpu",
    eval_every=0,
)


class Colors(torch.utils.data.Dataset):
    """PIL images; one of them is broken."""

    def __init__(self, n=26, broken=()):
        self.n, self.broken = n, broken

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i in self.broken:
            raise RuntimeError("a page is missing")
        pixels = np.random.default_rng(i).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((40, 33)), i % 3


class Channels(Colors):
    def __getitem__(self, i):
        return np.random.default_rng(i).integers(0, 65536, (30, 32, 5), dtype=np.uint16)


def first_crops(cfg, items, augment=None, n=1):
    loader = make_loader(cfg, items=items, augment=augment)
    try:
        return [next(loader) for _ in range(n)][-1]
    finally:
        loader.close()


def test_crops_are_those_of_the_same_images_in_files(tmp_path):
    """Bit for bit."""
    items = Colors()
    for i in range(len(items)):
        items[i][0].save(tmp_path / f"{i:03}.png")
    ours = first_crops(RUN, items, n=5)
    theirs = first_crops(replace(RUN, data_path=str(tmp_path)), None, n=5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers):
    many = first_crops(replace(RUN, num_workers=workers), Colors(), n=3)
    one = first_crops(replace(RUN, num_workers=1), Colors(), n=3)
    assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("make, channels", [(Colors, 3), (Channels, 5)])
def test_a_run_that_was_ended_goes_on_exactly(make, channels, tmp_path):
    class Stop(Callback):
        def on_step(self, training, step, metrics):
            if step == 6:
                raise InterruptedError

    cfg = replace(RUN, in_channels=channels, eval_every=1, saveckp_steps=2)
    if channels != 3:
        cfg = replace(cfg, image_mean=(0.5,) * channels, image_std=(0.3,) * channels)
    whole = train(replace(cfg, output_dir=str(tmp_path / "whole")), dataset=make())
    cfg = replace(cfg, output_dir=str(tmp_path / "parts"))
    with pytest.raises(InterruptedError):
        train(cfg, dataset=make(), callbacks=[Stop()])
    assert_same_run(whole.path, train(cfg, dataset=make()).path)
    assert whole.teacher(torch.rand(2, channels, 16, 16)).shape == (2, 64)
    assert {"eval_rankme", "eval_patch_matching"} <= whole.metrics[-1].keys()


def test_a_broken_item_is_replaced_and_listed(tmp_path):
    run = train(replace(RUN, output_dir=str(tmp_path), epochs=1), dataset=Colors(broken=(4,)))
    assert (tmp_path / "bad_files.txt").read_text() == "item 4\ta page is missing\n"
    assert len(run.metrics) == 1


def test_a_data_set_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets of Hugging Face is not installed")
    images = [Colors()[i][0] for i in range(26)]
    items = datasets.Dataset.from_dict({"label": [0] * 26, "image": images})
    ours = first_crops(RUN, items.cast_column("image", datasets.Image()))
    theirs = first_crops(RUN, Colors())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class OneFile(Colors):
    """Opens its file when first needed, as those over HDF5, zip or LMDB do: processes that inherit
    it open would move each other's position. In one thread of a process."""

    def __init__(self, path):
        super().__init__()
        self.path, self.file = path, None
        path.write_bytes(b"".join(bytes([i]) * 900 for i in range(self.n)))

    def __getitem__(self, i):
        if self.file is None:
            self.file, self.thread = open(self.path, "rb", buffering=0), threading.get_ident()  # noqa: SIM115
        assert self.thread == threading.get_ident()
        self.file.seek(900 * i)
        time.sleep(0.0005)
        pixels = np.frombuffer(self.file.read(900), np.uint8).reshape(30, 30)
        assert (pixels == i).all()
        return pixels


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_is_opened_by_the_processes_that_read_it(workers, tmp_path):
    cfg = replace(RUN, output_dir=str(tmp_path / "run"), num_workers=workers, eval_every=1)
    run = train(cfg, dataset=OneFile(tmp_path / "all"))
    assert not (tmp_path / "run" / "bad_files.txt").exists()
    assert all("eval_rankme" in line for line in run.metrics)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_first_item_is_listed_too(workers, tmp_path):
    cfg = replace(RUN, output_dir=str(tmp_path), num_workers=workers)
    train(cfg, dataset=Colors(broken=(0,)))
    assert (tmp_path / "bad_files.txt").read_text() == "item 0\ta page is missing\n"


def test_images_of_8_bits_and_deeper_ones_may_be_mixed():
    class Mixed(Colors):
        def __getitem__(self, i):
            pixels = np.full((20, 20, 3), 100, np.uint8)
            return pixels if i % 2 else pixels.astype(np.uint16) * 257

    crops = first_crops(RUN, Mixed(), n=2)[0]
    plain = first_crops(RUN, [np.full((20, 20, 3), 100, np.uint8)] * 26, n=2)[0]
    assert 0.5 < crops.std() / plain.std() < 2 and (crops.amax() - plain.amax()).abs() < 0.5
    loader = make_loader(RUN, items=Mixed())
    held_out, _ = loader.held_out_crops(range(26), 2)
    assert held_out.dtype == torch.float32 and held_out.abs().max() < 3
    loader.close()


def test_what_cannot_be_sent_to_a_process_is_told():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(ValueError, match="cannot be sent to worker processes"):
            make_loader(RUN, items=Colors(), augment=lambda image, view, rng: image)
    finally:
        multiprocessing.set_start_method(before, force=True)


def corner(image, view, rng):
    side = 16 if view < 2 else 8
    y, x = rng.integers(0, 10, 2)
    return image.crop((x, y, x + side, y + side))


def test_an_augmentation_of_one_s_own_makes_the_crops():
    """With a generator of its own for each crop: the same whatever came before."""
    big, small = first_crops(RUN, Colors(), corner, n=2)
    again, _ = first_crops(replace(RUN, num_workers=0), Colors(), corner, n=2)
    assert torch.equal(big, again) and big.shape == (12, 3, 16, 16) and small.shape[2:] == (8, 8)
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (RUN.image_mean, RUN.image_std))
    levels = (big * std + mean) * 255
    assert (levels - levels.round()).abs().max() < 1e-3


def test_transforms_that_draw_from_global_generators_repeat():
    """As torchvision's do; and the generators of the program are left as they were."""
    import random

    def draws(image, view, rng):
        side = 16 if view < 2 else 8
        shift = torch.rand(()).item() + random.random() + np.random.random()
        return np.full((side, side, 3), shift / 3, np.float32)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    alone = first_crops(replace(RUN, num_workers=0), Colors(), draws, n=3)
    assert torch.equal(before, torch.get_rng_state())
    again = first_crops(RUN, Colors(), draws, n=3)
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    assert len(alone[0][:, 0, 0, 0].unique()) == len(alone[0])


def test_an_augmentation_for_files_and_in_floats(photographs):
    def noise(image, view, rng):
        side = 16 if view < 2 else 8
        return torch.from_numpy(rng.random((3, side, side), np.float32))

    big, _ = first_crops(replace(RUN, data_path=str(photographs)), None, noise)
    assert 0 <= big.min() and big.max() < 1  # as it was given
    assert not torch.equal(big[0], big[1])


@pytest.mark.parametrize(
    "augment, words",
    [
        (lambda image, view, rng: image, "gives a crop of shape (3, 33, 40) for view 0"),
        (lambda image, view, rng: None, "returns None: give a PIL image"),
        (lambda image, view: image, "fails on image 0, view 0: TypeError: "),
        (
            lambda image, view, rng: (
                np.zeros((16, 16, 3), np.uint8) if view < 2 else np.zeros((8, 8, 3), np.float32)
            ),
            "uint8 for some crops and floats for others",
        ),
        (lambda image, view, rng: int("x"), "fails on image 0, view 0: ValueError: invalid"),
    ],
)
def test_an_augmentation_that_does_not_fit_is_told_before_training(augment, words):
    with pytest.raises(ValueError) as caught:
        make_loader(RUN, items=Colors(), augment=augment)
    assert words in str(caught.value)


def test_gray_files_of_16_bits_train_with_one_channel(tmp_path):
    for i in range(12):
        values = np.random.default_rng(i).integers(0, 65536, (20, 20), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    cfg = replace(RUN, in_channels=1, image_mean=(0.5,), image_std=(0.25,), epochs=1)
    big, _ = first_crops(replace(cfg, data_path=str(tmp_path)), None)
    assert big.shape == (12, 1, 16, 16) and len(big.unique()) > 1000
    run = train(replace(cfg, data_path=str(tmp_path), output_dir=str(tmp_path / "run")))
    assert run.teacher(torch.rand(1, 1, 16, 16)).shape == (1, 64)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"in_channels": 17}, "`in_channels` is 17: it must be 1 to 16"),
        ({"in_channels": 5, "image_mean": (0.1, 0.2)}, "it must be 5 numbers, one a channel"),
        ({"in_channels": 0}, "`in_channels` is 0"),
    ],
)
def test_channels_that_cannot_be(changes, words):
    with pytest.raises(ValueError) as caught:
        replace(RUN, **changes).check()
    assert words in str(caught.value)


def test_a_backend_for_files_is_refused():
    with pytest.raises(ValueError, match="`data_backend` native is for files of three channels"):
        make_loader(replace(RUN, data_backend="native"), items=Channels(), augment=None)


def test_statistics_of_other_channels_have_a_default():
    cfg = replace(TINY, in_channels=4)
    assert cfg.image_mean == (0.5,) * 4 and cfg.image_std == (0.25,) * 4
    assert cfg.check() is cfg
