"""Revisited Oxford and Paris: the official numbers, and a made-up data set in their layout."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast import cli
from dinofast.evaluate import frozen as frozen_module
from dinofast.evaluate.retrieval.revisited import (
    Thumbnail,
    _multiscale,
    average_precision,
    read_truth,
    revisited,
    score,
)


def test_agrees_with_the_official_code():
    """Expected: utils.compute_map of the official code at commit 7c446df on the same numbers."""
    rng, n = np.random.default_rng(0), 60
    order = np.stack([rng.permutation(n) for _ in range(12)])
    truth = []
    for q in range(12):  # the first has nothing to find
        p = rng.permutation(n)
        e, h, j = rng.integers(0, 7, 3) if q else (0, 0, 3)
        truth.append((p[:e], p[10 : 10 + h], p[20 : 20 + j]))
    easy, hard, junk = map(list, zip(*truth, strict=True))
    both, more = (
        [np.concatenate(pair) for pair in zip(a, b, strict=True)]
        for a, b in ((easy, hard), (junk, easy))
    )
    mean, at = score(order, both, junk)
    assert mean == pytest.approx(14.267361640386797, rel=1e-12)
    assert list(at.values()) == pytest.approx([9.09090909, 14.54545455, 12.72727273])
    mean, at = score(order, hard, more)
    assert mean == pytest.approx(11.201863553984804, rel=1e-12)
    assert list(at.values()) == pytest.approx([10, 6, 7])


def test_average_precision_by_hand():
    assert average_precision([0, 1, 2], 3) == 1
    assert average_precision([1], 1) == (0 + 1 / 2) / 2
    assert average_precision([0, 2], 4) == ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 4
    assert average_precision([], 2) == 0


def test_junk_is_taken_out_before_ranks_are_counted():
    order = np.array([[3, 1, 0, 2]])
    found = score(order, [np.array([0])], [np.array([3, 1])])
    assert found == (100.0, {1: 100.0, 5: 100.0, 10: 100.0})
    with pytest.raises(ValueError, match="no query has an image to find"):
        score(order, [np.array([], int)], [np.array([3])])


def test_a_thumbnail_keeps_its_shape():
    shown = Thumbnail(40)
    assert shown(Image.new("RGB", (100, 60))).shape == (3, 24, 40)
    assert shown(Image.new("RGB", (30, 20))).shape == (3, 20, 30)  # none is enlarged
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), np.uint8))
    before = image.copy()
    shown(image)
    assert image == before


def test_multiscale_is_the_mean_of_three_sizes():
    seen = []

    class Sees(torch.nn.Module):
        def forward(self, x):
            seen.append(x.shape[-2:])
            return torch.full((len(x), 2), float(len(seen)))

    found = _multiscale(Sees(), torch.zeros(1, 3, 64, 96))
    assert seen == [(64, 96), (45, 67), (32, 48)]
    torch.testing.assert_close(found, torch.full((1, 2), 0.5**0.5))


# ---- a data set
class MeanPixel(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def mean_pixel(monkeypatch):
    monkeypatch.setattr(frozen_module, "load_backbone", lambda *args: MeanPixel())
    monkeypatch.setattr(frozen_module, "arguments", lambda path: {})
    return {"pretrained_weights": "none.pth", "num_workers": 0, "device": "cpu"}


COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def made_up(root: Path, change=lambda truth: None, protocol: str = "roxford5k") -> Path:
    """Four images of each color and size, of which two are easy, one is hard and one junk."""
    folder = root / protocol
    (folder / "jpg").mkdir(parents=True)
    names, answers = [], []
    for c, (color, rgb) in enumerate(COLORS.items()):
        for i in range(5):
            shade = tuple(max(0, value - 9 * i) for value in rgb)
            name = f"{color}_{i}"
            Image.new("RGB", (50 + 10 * i, 40), shade).save(folder / "jpg" / f"{name}.jpg")
            names.append(name)
        own = np.arange(4) + 4 * c
        answers.append({"easy": own[:2], "hard": own[2:3].tolist(), "junk": own[3:], "bbx": [1.0]})
    truth = {
        "imlist": [name for name in names if not name.endswith("4")],
        "qimlist": [name for name in names if name.endswith("4")],
        "gnd": answers,
    }
    change(truth)
    (folder / f"gnd_{protocol}.pkl").write_bytes(pickle.dumps(truth))
    return root


def test_the_command(tmp_path, mean_pixel, capsys):
    made_up(tmp_path / "data", protocol="rparis6k")
    line = ["retrieve", str(tmp_path / "data"), "--pretrained_weights", "none.pth", "--protocol"]
    line += ["rparis", "--imsize", "32", "--num_workers", "2", "--device", "cpu"]
    assert cli.main([*line, "--multiscale", "true", "--json", str(tmp_path / "o.json")]) == 0
    said = capsys.readouterr().out
    assert "rparis6k: 3 queries among 12 images, longer side at most 32; features of" in said
    assert "medium: mean average precision 100.00 %, mean precision 100.00 at 1, 100.00 at" in said
    assert "hard: mean average precision 100.00 %" in said
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["hard"]["mean_average_precision"] == 100 and found["multiscale"] is True
    assert not (tmp_path / "neighbors.png").exists()


def test_wrong_colors_are_worse(tmp_path, mean_pixel):
    """The folder itself is taken too; every query's answers are the next color's."""

    def turned(truth):
        truth["gnd"] = truth["gnd"][1:] + truth["gnd"][:1]

    data = made_up(tmp_path / "data", turned) / "roxford5k"
    found = revisited(data_path=data, **mean_pixel)
    assert 0 < found["medium"].mean_average_precision < 50
    assert found["medium"].precision_at[1] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda truth: truth.pop("imlist"), "no ground truth of revisited .*needs imlist"),
        (lambda truth: truth["imlist"].append("../x"), "called '../x'"),
        (lambda truth: truth["gnd"].pop(), "3 queries and 2 answers"),
        (lambda truth: truth["gnd"][0].update(hard=[99]), "a number of no image"),
        (lambda truth: truth["gnd"][0].update(hard=[0.5]), "a number of no image"),
        (lambda truth: truth["imlist"].append("gone"), "1 image of 16 missing, such as '.*gone"),
        (lambda truth: truth.update(more=print), "it names builtins.print|__builtin__.print"),
    ],
)
def test_a_ground_truth_that_cannot_be(tmp_path, mean_pixel, change, words):
    data = made_up(tmp_path / "data", change)
    with pytest.raises(ValueError, match=words):
        revisited(data_path=data, **mean_pixel)


def test_an_image_that_cannot_be_read(tmp_path, mean_pixel):
    data = made_up(tmp_path / "data")
    (data / "roxford5k" / "jpg" / "red_0.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="1 image of 12 cannot be read, which the protocol needs"):
        revisited(data_path=data, **mean_pixel)
    assert len(read_truth(data / "roxford5k" / "gnd_roxford5k.pkl").images) == 12
