"""Labeled folders as people have them, and images of any shape, in bounded memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast.data.dataset import scan
from dinofast.data.decode import decode
from dinofast.evaluate import frozen as frozen_module
from dinofast.evaluate import images as images_module
from dinofast.evaluate.frozen import extract_features
from dinofast.evaluate.images import (
    EvalTransform,
    labeled_folder,
    listed_images,
    to_tensor,
    train_and_val,
)
from dinofast.evaluate.knn import knn


def picture(path: Path, color: tuple[int, int, int] = (200, 100, 50)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), color).save(path)
    return path


def pictures(root: Path, *classes: str, n: int = 8, ending: str = "png") -> None:
    for name in classes:
        for i in range(n):
            picture(root / name / f"{i}.{ending}", (len(name) * 30, 0, i))


class MeanPixel(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("a", "val"), ("train", "z", "val")])
def test_classes_named_train_and_val(tmp_path, classes):
    pictures(tmp_path, *classes)
    train, val, sentence = train_and_val(tmp_path, to_tensor)
    assert train.classes == val.classes == tuple(sorted(classes)) and "every 4th" in sentence
    assert {p.parent.name for p in val.paths} == set(classes)


def test_train_and_val_with_class_folders_are_halves(tmp_path):
    for half in ("train", "val", "test"):
        pictures(tmp_path / half, "bus", "train", n=3)
    train, val, _ = train_and_val(tmp_path, to_tensor)
    assert train.classes == ("bus", "train") and len(train) == len(val) == 6
    assert all("/train/" in str(p) for p in train.paths)


def test_a_val_folder_without_classes_is_told(tmp_path):
    pictures(tmp_path / "train", "bus", "car")
    picture(tmp_path / "val" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(ValueError, match="/val' holds no class folders: sort its images"):
        train_and_val(tmp_path, to_tensor)


def test_the_files_of_k_nn_are_those_of_training(tmp_path):
    """Linked folders and files, .gif, names in capitals, any depth, hidden folders, companions."""
    root = tmp_path / "data"
    pictures(root, "a", ending="gif", n=2)
    pictures(root, "b", n=2)
    pictures(tmp_path / "more", "deep", ending="JPG", n=2)
    (root / "a" / "linked").symlink_to(tmp_path / "more")
    (root / "b" / "one.png").symlink_to(root / "b" / "0.png")
    (root / "b" / "itself").symlink_to(root / "b")
    pictures(root / "b", ".thumbnails", "@eaDir", n=1)
    pictures(root, ".git", "__MACOSX", n=1)
    (root / "a" / "._0.gif").write_bytes(b"\0\5")
    (root / "a" / "notes.txt").touch()
    images, trained = labeled_folder(root, to_tensor), scan(str(root))
    assert [str(p) for p in images.paths] == [trained.path(i) for i in range(len(trained))]
    assert images.classes == ("a", "b") and images.labels == (0,) * 4 + (1,) * 3
    assert images.ignored == trained.ignored and "1 .txt" in images.ignored


def test_what_cannot_be_labeled_is_told(tmp_path):
    pictures(tmp_path, "a-b", "a", n=2)
    picture(tmp_path / "outside.png"), (tmp_path / "a" / "s.tar").touch()
    (tmp_path / "empty").mkdir(), (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.heics").touch()
    images = labeled_folder(tmp_path, to_tensor)
    assert images.classes == ("a", "a-b", "empty", "texts") and images.labels == (0, 0, 1, 1)
    for words in ("1 outside of class folders", "1 .tar", "1 .heics"):
        assert words in images.ignored
    assert "2 class folders without images: empty, texts" in images.ignored
    for name in ("a", "a-b"):
        for path in (tmp_path / name).glob("*.png"):
            path.unlink()
    with pytest.raises(ValueError, match="no labeled images .*1 .heics.*: give a folder"):
        labeled_folder(tmp_path, to_tensor)


def test_k_nn_scales_and_turns_as_the_checkpoint_was_trained(tmp_path, monkeypatch, capsys):
    pictures(tmp_path, "a", "b", n=4)
    (tmp_path / "a" / "x.nef").touch()
    seen = []
    monkeypatch.setattr(frozen_module, "load_backbone", lambda *args: MeanPixel())
    trained_with = {"global_crops_size": 14, "exif": True, "value_range": (0.0, 4095.0)}
    monkeypatch.setattr(frozen_module, "arguments", lambda path: trained_with)

    def watched(data, **how):
        seen.append(how)
        return decode(data, **how)

    monkeypatch.setattr(frozen_module, "decode", watched)
    knn("none.pth", tmp_path, nb_knn=[1], num_workers=0, device="cpu")
    assert seen == [{"value_range": (0.0, 4095.0), "exif": True}] * 8
    assert capsys.readouterr().out.count("1 file ignored: 1 .nef\n") == 1
    trained_with.clear()  # an official checkpoint
    knn("none.pth", tmp_path, nb_knn=[1], num_workers=0, device="cpu")
    assert seen[8:] == [{"value_range": None, "exif": False}] * 8


# ---- batches
@pytest.mark.parametrize(
    ("batch_size", "num_workers"), [(1, 0), (7, 0), (8, 0), (20, 0), (64, 0), (7, 2), (20, 2)]
)
def test_batches_are_put_together_from_shares(tmp_path, batch_size, num_workers):
    pictures(tmp_path, "a", n=30)
    for i in (3, 4, 5, 29):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    images = labeled_folder(tmp_path, to_tensor)
    batches = list(images.batches(batch_size, num_workers))
    assert len(batches) == -(-30 // batch_size)
    rows = [i for _, own, _ in batches for i in own.tolist()]
    bad = {path.name for _, _, own in batches for path, _ in own}
    assert bad == {"3.png", "4.png", "5.png", "29.png"}
    assert rows == [i for i in range(30) if images.paths[i].name not in bad]
    for pixels, own, bad_files in batches[:-1]:
        assert len(own) + len(bad_files) == batch_size and len(pixels) == len(own)
    blue = torch.cat([pixels for pixels, own, _ in batches if len(own)])[:, 2, 0, 0]
    named = [int(images.paths[i].stem) / 255 for i in rows]
    np.testing.assert_allclose(blue * 0.225 + 0.406, named, atol=1e-6)


def test_a_worker_passes_on_one_tensor_a_share_and_none_is_kept(tmp_path, monkeypatch):
    """1,024 open files are enough for any number of workers, and 64 MiB of shared memory for
    some."""
    pictures(tmp_path, "a", n=64)
    images = labeled_folder(tmp_path, to_tensor)
    parts, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: parts.extend(tensors) or cat(tensors))
    for pixels, _, _ in images.batches(64, 2):
        assert pixels.shape == (64, 3, 20, 20)
    assert [len(part) for part in parts] == [8] * 8  # 64 files were open when it was a list
    assert not any(part.is_shared() for part in parts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_any_source_go_through_the_same_batches(tmp_path, num_workers):
    """A folder, and a shard that holds the same files; from an image in the middle on."""
    pictures(tmp_path / "data", "a", "bb", n=6)
    (tmp_path / "data" / "a" / "3.png").write_bytes(b"")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "data", ".", filter=lambda m: m if m.isfile() or m.isdir() else None)
    for source, classes in ((tmp_path / "data", ("a", "bb")), (tmp_path / "s.tar", ())):
        images = listed_images(source, to_tensor)
        order = [images.path(i)[-8:] for i in range(12)]
        assert images.classes == classes and len(images) == 12
        assert list(images.labels) == ([0] * 6 + [1] * 6 if classes else [-1] * 12)
        first = 2 if classes else 0
        batches = list(images.batches(5, num_workers, first))
        assert len(batches) == -(-(12 - first) // 5)
        rows = torch.cat([own for _, own, _ in batches]).tolist()
        left_out = [path for _, _, bad in batches for path, _ in bad]
        assert len(left_out) == 1 and left_out[0].endswith("a/3.png")
        assert rows == [i for i in range(first, 12) if not order[i].endswith("a/3.png")]
        blue = torch.cat([pixels for pixels, *_ in batches])[:, 2, 0, 0] * 0.225 + 0.406
        named = [int(order[i][-5]) / 255 for i in rows]
        np.testing.assert_allclose(blue, named, atol=1e-6)
        features, labels = extract_features(MeanPixel(), images, num_workers=num_workers)
        bad = next(i for i in range(12) if order[i].endswith("a/3.png"))
        assert len(features) == 11 and labels.tolist() == np.delete(images.labels, bad).tolist()


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (("a/0.png", "b/x/0.png"), ("a", "b")),
        (("a/0.png", "b/0.png", "0.png"), ()),  # one outside
        (("a/0.png",), ()),
        (("train/0.png", "val/0.png"), ()),
        (("0.png", "1.png"), ()),
        (("train/0.png", "plane/0.png"), ("plane", "train")),
    ],
)
def test_which_folders_are_classes(tmp_path, files, classes):
    for name in files:
        picture(tmp_path / name)
    images = listed_images(tmp_path, to_tensor)
    assert images.classes == classes
    own = [Path(images.path(i)).relative_to(tmp_path).parts[0] for i in range(len(files))]
    expected = [classes.index(name) if classes else -1 for name in own]
    assert list(images.labels) == expected


def dies(image: Image.Image) -> torch.Tensor:
    if torch.utils.data.get_worker_info():
        os.kill(os.getpid(), signal.SIGKILL)
    return to_tensor(image)


def test_a_worker_that_was_killed_ends_it_with_a_sentence(tmp_path):
    pictures(tmp_path, "a", n=3)
    with pytest.raises(OSError, match="a data worker was killed.*lower `num_workers`"):
        list(labeled_folder(tmp_path, dies).batches(2, 1))


def test_small_shared_memory_is_told_once_and_enough(tmp_path, monkeypatch, capsys):
    pictures(tmp_path, "a", n=6)
    images = labeled_folder(tmp_path, to_tensor)
    asked = []

    def fewer(wanted, each):
        asked.append((wanted, each))
        return 0, "too small for 4 workers."

    monkeypatch.setattr(images_module, "fewer_workers", fewer)
    for _ in range(2):
        features, _ = extract_features(MeanPixel(), images, num_workers=4)
        assert len(features) == 6
    assert asked == [(4, 2 * 8 * 3 * 8 * 8 * 4)] * 2  # ahead, a share of images of 8 x 8 pixels
    assert capsys.readouterr().out == "too small for 4 workers.\n"


# ---- extreme shapes
@pytest.mark.parametrize("size", [(20, 1000), (1000, 20), (20, 20), (5, 300)])
@pytest.mark.parametrize("crop", [224, 256])
def test_the_part_that_is_seen_is_resized_alike(size, crop, monkeypatch):
    """But for the order of the two passes, each of which rounds to 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    transform = EvalTransform(256, crop, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    whole = transform(image)
    monkeypatch.setattr(images_module, "LONGEST", 0)
    off = (transform(image) - whole).abs() * 255
    assert off.max() <= 4 and off.mean() < 0.5


SHAPES = """
import resource, sys
from functools import partial
import numpy as np
from PIL import Image
from dinofast.config import Config
from dinofast.data.augmentation import Augmentation
from dinofast.data.backend_pil import render
from dinofast.data import backend_native
from dinofast.data.loader import views
from dinofast.evaluate.images import EvalTransform
import torch

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = Augmentation(0, views(Config())).draw(0, np.array([0]))
for size in ((60000, 1), (1, 60000), (1, 1), (30000, 7), (2, 9000)):
    image = Image.new("RGB", size, (10, 200, 30))
    assert EvalTransform()(image).shape == (3, 224, 224)
    drawn = plan.plan(0, image.height, image.width)
    crops = [render(image, view) for view in drawn]
    assert {crop.shape for crop in crops} == {(224, 224, 3), (96, 96, 3)}
    if not backend_native.unavailable_reason():
        out = [torch.empty(3, s, s, dtype=torch.uint8) for s in drawn["size"].tolist()]
        backend_native.render(backend_native.pixels(image), drawn, out)
        for crop, own in zip(crops, out):
            assert np.abs(own.permute(1, 2, 0).numpy().astype(int) - crop).max() <= 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_extreme_shapes_take_bounded_memory():
    """Resized as a whole, 60,000 x 1 is 11 GB."""
    command = [sys.executable, "-c", SHAPES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 1024  # KiB


def test_a_dataset_with_its_decoder_can_be_pickled(tmp_path):
    """As workers that are not forked get it."""
    import pickle
    from dataclasses import replace

    pictures(tmp_path, "a", n=1)
    images = labeled_folder(tmp_path, EvalTransform(16, 14))
    images = replace(images, decode=partial(decode, value_range=None, exif=True))
    assert torch.equal(pickle.loads(pickle.dumps(images))[0][1], images[0][1])
