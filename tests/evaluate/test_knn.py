"""k-NN: the official numbers exactly, the cases in which the official code fails, and folders of
images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinofast import cli, vit_nano
from dinofast.config import Config
from dinofast.evaluate import frozen as frozen_module
from dinofast.evaluate import knn as knn_module
from dinofast.evaluate.frozen import extract_features
from dinofast.evaluate.images import EvalTransform, labeled_folder, to_tensor, train_and_val
from dinofast.evaluate.knn import knn, knn_classify


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "official" / "knn.npz") as data:
        return {name: torch.from_numpy(data[name]) for name in data.files}


def four(golden, n_test=None):
    return (
        golden["train_features"],
        golden["train_labels"],
        golden["test_features"][:n_test],
        golden["test_labels"][:n_test],
    )


@pytest.mark.parametrize("k", [5, 10, 20])
@pytest.mark.parametrize("elements", [2**26, 1000])
def test_agrees_with_the_official_code(golden, k, elements, monkeypatch):
    monkeypatch.setattr(knn_module, "CHUNK_ELEMENTS", elements)  # 1000: two images of 200 at a time
    assert knn_classify(*four(golden), k=k) == tuple(golden[f"k{k}"].tolist())


def test_lengths_of_the_features_do_not_matter(golden):
    train, train_labels, test, test_labels = four(golden)
    scaled = knn_classify(
        train * torch.rand(len(train), 1).add(0.1), train_labels, test * 7, test_labels, k=10
    )
    assert scaled == tuple(golden["k10"].tolist())


def test_fewer_than_100_test_images(golden):
    train, labels, test, truth = four(golden, n_test=7)
    alone = [knn_classify(train, labels, test[i : i + 1], truth[i : i + 1], k=10) for i in range(7)]
    assert knn_classify(train, labels, test, truth, k=10) == tuple(
        sum(percent) / 7 for percent in zip(*alone, strict=True)
    )


def test_votes_by_hand():
    """One neighbor at cosine 1 beats two at cosine 0.9, exp(1/T) > 2 exp(0.9/T), below T = 0.1 /
    log 2 = 0.144."""
    side = (1 - 0.9**2) ** 0.5
    train = torch.tensor([[1.0, 0.0], [0.9, side], [0.9, -side], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2])
    test, truth = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_classify(train, labels, test, truth, k=3, temperature=0.14)[0] == 100
    assert knn_classify(train, labels, test, truth, k=3, temperature=0.15)[0] == 0
    assert knn_classify(train, labels, test, truth, k=1, temperature=0.15)[0] == 100
    # one neighbor names one class, not five
    assert knn_classify(train, labels, test, truth + 1, k=1) == (0, 0)


def test_one_class_and_fewer_than_five():
    features, labels = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    assert knn_classify(features, labels, features[:2], labels[:2], k=6) == (100.0, 100.0)
    assert (
        knn_classify(features, labels + 2, features[:2], labels[:2] + 1, k=6, n_classes=3)[0] == 0.0
    )
    three = torch.arange(6) % 3
    # top-5 of three is all of them
    assert knn_classify(features, three, features, (three + 1) % 3, k=6)[1] == 100.0


def test_ties_go_to_the_first_class():
    """Twins of classes 1 and 3 with equal votes, whichever row comes first."""
    features, test = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for labels in ([1, 3], [3, 1]):
        assert knn_classify(features, torch.tensor(labels), test, torch.tensor([1]), k=2)[0] == 100
        assert knn_classify(features, torch.tensor(labels), test, torch.tensor([3]), k=2) == (
            0,
            100,
        )


@pytest.mark.parametrize("k", [0, 401])
def test_k_that_cannot_be(golden, k):
    with pytest.raises(ValueError, match=f"k is {k} but there are 400 training images"):
        knn_classify(*four(golden), k=k)


def test_nothing_to_classify(golden):
    with pytest.raises(ValueError, match="no images to classify"):
        knn_classify(*four(golden, n_test=0), k=5)


# ---- images


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((100, 75), (341, 256)),
        ((75, 100), (256, 341)),
        ((256, 256), (256, 256)),
        ((60, 100), (256, 426)),
    ],
)
def test_transform_rounds_as_torchvision(size, resized):
    """torchvision: the long side is int(256 * long / short), the crop starts at int(round((side -
    224) / 2)), half to even."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    # 341.3 -> 341, 58.5 -> 58; 426.7 -> 426
    left, top = ({256: 16, 341: 58, 426: 101}[side] for side in resized)
    expected = (
        np.asarray(image.resize(resized, Image.Resampling.BICUBIC))[
            top : top + 224, left : left + 224
        ]
        / 255
    )
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    result = EvalTransform()(image)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.permute(1, 2, 0), expected, atol=1e-5)


def test_crop_larger_than_the_image():
    with pytest.raises(ValueError, match="224 pixels does not fit.*32"):
        EvalTransform(resize=32)
    with pytest.raises(ValueError, match="choose a `crop` from 1 to `resize`"):
        EvalTransform(crop=0)


def folder(root: Path, counts: dict[str, int]) -> None:
    """Images whose red channel tells the class, so that the mean pixel classifies them
    perfectly."""
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20, 20), (200 if c else 10, 10 if c else 200, i)).save(
                root / name / f"{i:03}.png"
            )


class MeanPixel(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def mean_pixel(monkeypatch):
    monkeypatch.setattr(frozen_module, "load_backbone", lambda *args: MeanPixel())
    monkeypatch.setattr(frozen_module, "arguments", lambda path: {"global_crops_size": 14})
    return {"pretrained_weights": "none.pth", "num_workers": 0, "device": "cpu"}


def test_official_folders(tmp_path, capsys, mean_pixel):
    folder(tmp_path / "train", {"cat": 9, "dog": 12})
    folder(tmp_path / "val", {"cat": 2, "dog": 3})
    (tmp_path / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no jpeg")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    assert knn(data_path=tmp_path, **mean_pixel) == {10: (100.0, 100.0), 20: (100.0, 100.0)}
    said = capsys.readouterr().out
    assert "10-NN classifier result: Top1: 100.0, Top5: 100.0" in said
    assert "Shorter side 16, center crop 14." in said  # as the checkpoint was trained
    assert "Left out: k = 100, 200, more than the 21 training images" in said
    assert "broken.jpg" in said and "notes.txt" not in said
    with pytest.raises(ValueError, match="`nb_knn` is 50 but there are only 22 training images"):
        knn(data_path=tmp_path, nb_knn=[50], **mean_pixel)


def test_classes_go_by_name_and_not_by_number(tmp_path, mean_pixel):
    folder(tmp_path / "train", {"cat": 4, "dog": 4})
    folder(tmp_path / "val", {"cat": 1, "dog": 3})
    shutil.rmtree(tmp_path / "val" / "cat")  # dog is class 1 of train and class 0 of val
    assert knn(data_path=tmp_path, nb_knn=[3], **mean_pixel)[3][0] == 100
    (tmp_path / "val" / "fish").mkdir()
    with pytest.raises(ValueError, match="has the class 'fish'"):
        knn(data_path=tmp_path, **mean_pixel)


def test_hold_out_of_every_fourth_image(tmp_path):
    folder(tmp_path, {"cat": 9, "dog": 3, "eel": 4})
    train, val, sentence = train_and_val(tmp_path, to_tensor)
    assert [f"{p.parent.name}/{p.stem}" for p in val.paths] == ["cat/003", "cat/007", "eel/003"]
    assert len(train) == 13 and not set(train.paths) & set(val.paths)
    assert val.labels == (0, 0, 2) and "every 4th image of each class is held out; 13" in sentence


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "is not a folder"),
        (lambda root: (root / "cat").mkdir(parents=True), "holds no labeled images"),
        (lambda root: folder(root, {"cat": 9}), "one class only, 'cat'"),
        (lambda root: folder(root / "train", {"cat": 9, "dog": 9}), "has train/ but not val/"),
        (lambda root: folder(root, {"cat": 3, "dog": 3}), "fewer than 4 images in each class"),
    ],
)
def test_folders_that_cannot_be_evaluated(tmp_path, make, words):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=words):
        train_and_val(tmp_path / "data", to_tensor)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_in_the_order_of_the_files(tmp_path, capsys, num_workers):
    folder(tmp_path, {"cat": 3, "dog": 4})
    images = labeled_folder(tmp_path, to_tensor)
    (tmp_path / "dog" / "000.png").write_bytes(b"")
    features, labels = extract_features(MeanPixel(), images, batch_size=2, num_workers=num_workers)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and features.dtype == torch.float32
    blue = (features[:, 2] * 0.225 + 0.406) * 255
    np.testing.assert_allclose(blue, [0, 1, 2, 1, 2, 3], atol=1e-4)
    assert "000.png" in capsys.readouterr().out


def test_nothing_readable(tmp_path):
    folder(tmp_path, {"cat": 1})
    (tmp_path / "cat" / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 image, and none can be read"):
        extract_features(MeanPixel(), labeled_folder(tmp_path, to_tensor))


def test_the_command_writes_rounded_accuracies(tmp_path, capsys):
    folder(tmp_path / "data", {"cat": 8, "dog": 8})
    cfg = Config(arch="vit_nano", patch_size=8, out_dim=8, global_crops_size=16)
    state = vit_nano(patch_size=8, img_size=(16,)).state_dict()
    weights = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"teacher": weights, "args": cfg.to_dict()}, tmp_path / "checkpoint.pth")
    line = ["knn", str(tmp_path / "data"), "--pretrained_weights", str(tmp_path)]
    line += ["--nb_knn", "1", "3", "--num_workers", "0", "--device", "cpu"]
    out = tmp_path / "found.json"
    assert cli.main([*line, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["nb_knn"] == [1, 3] and found["accuracy_percent"].keys() == {"1", "3"}
    said = capsys.readouterr().out
    whose = f"features of the teacher's vit_nano with patches of 8 x 8 in '{tmp_path}'\n"
    assert said.count(whose) == 1
    printed = re.findall(r"(\d+)-NN classifier result: Top1: ([\d.]+)", said)
    for k, top1 in printed:
        assert found["accuracy_percent"][k]["top1"] == pytest.approx(float(top1), abs=0.05)
    assert len(printed) == 2
    assert cli.main([*line, "--checkpoint_key", "untrained"]) == 0
    said = capsys.readouterr().out
    assert f"features of an untrained vit_nano with patches of 8 x 8, as in '{tmp_path}'" in said
    assert cli.main([*line, "--json", str(tmp_path / "none" / "x.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_backbone_of_one_s_own(tmp_path):
    """Its maps are pooled as in training."""
    folder(tmp_path / "data", {"cat": 8, "dog": 8})
    backbone = torch.nn.Conv2d(3, 5, 4, 4)
    torch.save({f"backbone.{k}": v for k, v in backbone.state_dict().items()}, tmp_path / "w.pth")
    given = {"backbone": torch.nn.Conv2d(3, 5, 4, 4), "crop": 16, "nb_knn": 1}
    found = knn(tmp_path / "w.pth", tmp_path / "data", num_workers=0, device="cpu", **given)
    assert 0 <= found[1][0] <= 100
