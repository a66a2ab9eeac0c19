"""Copy detection: features and whitening by hand, and a made-up data set in the layout of
Copydays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast import cli, vit_nano
from dinofast.config import Config
from dinofast.evaluate.retrieval.copy_detection import (
    Square,
    cls_and_gem,
    copy_detection,
    copy_map,
    whitening,
)


class Tokens(torch.nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def get_intermediate_layers(self, images, n):
        return [self.tokens]


def test_cls_beside_the_generalized_mean():
    """Of 1 and 2: ((1 + 16) / 2) ** (1/4). What is negative counts as nearly 0."""
    tokens = torch.tensor([[[-5.0, 7.0], [1.0, -3.0], [2.0, -4.0]]])
    found = cls_and_gem(Tokens(tokens), torch.zeros(1, 3, 8, 16))
    expected = torch.tensor([[-5.0, 7.0, 8.5**0.25, 1e-6]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_whitening_makes_second_moments_one():
    """About 0, from which the mean is not taken, as in the official code."""
    torch.manual_seed(0)
    features = torch.randn(500, 6) @ torch.randn(6, 6) + 3
    white = whitening(features)(features + features.mean(0))
    torch.testing.assert_close(white.t() @ white / 500, torch.eye(6), rtol=1e-3, atol=1e-3)
    assert whitening(features)(features.mean(0, keepdim=True)).abs().max() < 1e-5


def test_whitening_from_few_images_is_finite():
    """Of directions that no image takes the variance is 1e-5 of the largest."""
    features = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    white = whitening(features)(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    torch.testing.assert_close(white.norm(dim=1), torch.tensor([0.5, 0.5 / 1e-5**0.5]))


def test_only_the_first_twenty_count():
    gallery = torch.eye(30)
    queries = torch.zeros(1, 30)
    queries[0] = torch.arange(30, 0, -1.0)  # finds 0, 1, 2, ...
    assert copy_map(queries, gallery, [[0]]) == 100
    assert copy_map(queries, gallery, [[1]]) == 25  # (0 + 1 / 2) / 2
    assert copy_map(queries, gallery, [[20]]) == 0
    assert copy_map(queries, gallery, [[0, 20]]) == 50


def test_squares():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    found = Square(16)(image)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found.permute(1, 2, 0), expected, atol=1e-5)


# ---- a data set
def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def copydays(tmp_path_factory) -> Path:
    """Six originals; of each a rotated and a cropped copy, and one saved at low quality."""
    root = tmp_path_factory.mktemp("copydays")
    for name in ("original", "strong", "jpegqual/5"):
        (root / name).mkdir(parents=True)
    for i in range(6):
        image, stem = picture(i), f"{2000 + i}"
        image.save(root / "original" / f"{stem}00.jpg")
        image.save(root / "jpegqual" / "5" / f"{stem}00.jpg", quality=5)
        for j, copy in enumerate((image.rotate(90), image.crop((12, 9, 31, 27)))):
            copy.save(root / "strong" / f"{stem}0{j + 1}.jpg")
    (root / "strong" / "readme.txt").touch()
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth"
    torch.manual_seed(0)
    cfg = Config(arch="vit_nano", patch_size=8, out_dim=8, global_crops_size=32)
    state = vit_nano(patch_size=8, img_size=(32,)).state_dict()
    named = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"teacher": named, "args": cfg.to_dict()}, path)
    return path


def test_the_command(tmp_path, copydays, weights, capsys):
    (tmp_path / "others").mkdir()
    for i in range(12):
        picture(100 + i).save(tmp_path / "others" / f"{i}.png")
    out, others = tmp_path / "found.json", str(tmp_path / "others")
    line = ["copydetect", str(copydays), "--pretrained_weights", str(weights), "--imsize", "32"]
    line += ["--num_workers", "0", "--device", "cpu", "--json", str(out)]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "6 originals, 12 copies in strong/; squares of 32, features of the teacher's" in said
    assert "eval on original mAP=1.000" in said and "eval on jpegqual/5 mAP=" in said
    plain = json.loads(out.read_text())["mean_average_precision"]
    assert list(plain) == ["original", "strong", "jpegqual/5"]
    assert 0 < plain["strong"] < 100 and f"mAP={plain['strong'] / 100:.3f}" in said
    assert cli.main([*line, "--whitening_path", others, "--distractors_path", others]) == 0
    found = json.loads(out.read_text())
    assert found["mean_average_precision"]["original"] == 100
    assert found["mean_average_precision"]["strong"] != plain["strong"]
    assert "copies in strong/, 12 for whitening, 12 for distractors;" in capsys.readouterr().out


def test_distractors_are_searched_too(tmp_path, copydays, weights):
    """Copies of the copies come before the originals."""
    more = {"imsize": 32, "num_workers": 0, "device": "cpu"}
    found = copy_detection(weights, copydays, distractors_path=copydays / "strong", **more)
    assert found["original"] == 100 and 0 < found["strong"] <= 25  # (0 + 1 / 2) / 2 at most


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "holds no .jpg files in original/"),
        (("original/200000.jpg",), "holds no .jpg files in strong/"),
        (("original/200000.jpg", "strong/200101.jpg"), "has no original .* begins with 2001"),
        (
            ("original/200000.jpg", "strong/200001.jpg", "crops/50/1.jpg", "crops/50/2.jpg"),
            "crops/50/ has 2 images for 1 original: it needs one for each",
        ),
        (("original/200000.jpg", "strong/200001.jpg"), "1 image, and none can be read"),
    ],
)
def test_data_that_is_not_complete(tmp_path, weights, names, words):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xd8 no jpeg")
    with pytest.raises(ValueError, match=words):
        copy_detection(weights, tmp_path, imsize=32, num_workers=0, device="cpu")


def test_backbones_and_options_that_cannot_be(tmp_path, copydays, weights, capsys):
    conv = torch.nn.Conv2d(3, 5, 4, 4)
    torch.save({f"backbone.{k}": v for k, v in conv.state_dict().items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="Conv2d has no patch tokens to pool: choose a ViT"):
        copy_detection(tmp_path / "w.pth", copydays, backbone=conv, device="cpu")
    line = ["copydetect", str(copydays), "--pretrained_weights", str(weights), "--device", "cpu"]
    for more, words in (
        (["--imsize", "7"], "--imsize is 7: it must be at least 8, a patch"),
        (["--crop", "32"], "--crop has no part in copy detection: give --imsize"),
        (["--whitening_path", "none"], "--whitening_path 'none' does not exist"),
    ):
        assert cli.main([*line, *more]) == 2
        assert words in capsys.readouterr().err
