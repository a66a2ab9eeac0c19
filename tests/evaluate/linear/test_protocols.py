"""The command linear end to end, its three protocols, and what it refuses."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast import cli, linear, vit_nano
from dinofast.config import Config
from dinofast.evaluate.linear import logistic
from dinofast.evaluate.linear.features import Choice
from dinofast.evaluate.linear.protocols import _report


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train/ and val/ with three classes that differ by color, and a run of vit_nano."""
    root, rng = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    for half, n in (("train", 9), ("val", 4)):
        for c, color in enumerate(((160, 40, 40), (40, 160, 40), (40, 40, 160))):
            folder = root / "data" / half / f"c{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                noise = rng.integers(0, 60, (20, 20, 3)) + np.array(color)
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    cfg = Config(arch="vit_nano", patch_size=8, out_dim=8, global_crops_size=16)
    torch.manual_seed(0)
    state = vit_nano(patch_size=8, img_size=(16,)).state_dict()
    weights = {f"backbone.{name}": value for name, value in state.items()}
    (root / "run").mkdir()
    torch.save({"teacher": weights, "args": cfg.to_dict()}, root / "run" / "checkpoint.pth")
    return root


@pytest.fixture
def line(data):
    words = ["linear", str(data / "data"), "--pretrained_weights", str(data / "run")]
    return [*words, "--num_workers", "0", "--device", "cpu"]


def test_sweep(line, data, tmp_path, capsys):
    out = tmp_path / "found.json"
    words = ["--epochs", "30", "--learning_rates", "1e-6", "0.5", "1"]
    assert cli.main([*line, *words, "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "12 classifiers together, twice" in said and "30 steps each (--epochs 30)" in said
    assert "linear classifier result: Top1: 100.0 (CLS" in said
    assert "3 held-out training images, trained on all)" in said
    assert "best on val: Top1: 100.0" in said and "20-NN classifier result: Top1: 100.0" in said
    accuracy = found["accuracy_percent"]
    assert found["protocol"] == "sweep" and found["epochs"] == 30
    assert accuracy["top1"] == 100 and accuracy["learning_rate"] in (0.5, 1)
    assert len(accuracy["grid"]) == 12 and "top5" not in accuracy  # of three classes
    assert accuracy["best_on_val"]["top1"] == max(g["val"]["top1"] for g in accuracy["grid"])
    chosen = {name: accuracy[name] for name in ("features", "learning_rate")}
    of_chosen = next(g for g in accuracy["grid"] if chosen.items() <= g.items())
    assert of_chosen["held_out_top1"] == max(g["held_out_top1"] for g in accuracy["grid"])
    again = linear(
        data / "run", data / "data", epochs=30, learning_rates=(1e-6, 0.5, 1), num_workers=0
    )
    top1 = [g["val"]["top1"] for g in accuracy["grid"]]
    assert [g["val"]["top1"] for g in again["grid"]] == pytest.approx(top1, abs=0.01)


def test_held_out_images_choose_and_val_does_not(capsys):
    """Of two choices and two rates; of equals the first."""
    found = types.SimpleNamespace(
        choices=[Choice("CLS", slice(0, 2)), Choice("all", slice(0, 4))],
        val_y=torch.zeros(10),
        classes=5,
    )
    judged = torch.tensor([[[1, 4], [2, 4]], [[3, 4], [3, 4]]])
    final = torch.tensor([[[2, 9], [8, 10]], [[5, 9], [6, 9]]])
    result = _report(found, (0.1, 0.2), judged, final, 4)
    assert (result["features"], result["learning_rate"]) == ("all", 0.1)
    assert (result["top1"], result["top5"]) == (50, 90)
    lucky = {"features": "CLS", "learning_rate": 0.2, "top1": 80, "top5": 100}
    assert result["best_on_val"] == lucky
    assert [g["held_out_top1"] for g in result["grid"]] == [25, 50, 75, 75]
    said = capsys.readouterr().out
    assert "linear classifier result: Top1: 50.0, Top5: 90.0 (all, learning rate 0.1" in said
    assert "best on val: Top1: 80.0, Top5: 100.0 (CLS, learning rate 0.2; DINOv2 reports" in said
    assert "largest" not in said
    _report(found, (0.1, 0.2), judged.flip(1) * torch.tensor([[1], [2]]), final, 8)
    assert "larger `learning_rates` may do more" in capsys.readouterr().out


def test_sweep_of_few_images_and_of_an_untrained_backbone(line, capsys):
    words = ["--per_class", "2", "--epochs", "5", "--checkpoint_key", "untrained"]
    assert cli.main([*line, *words]) == 0
    said = capsys.readouterr().out
    assert "few-shot: 6 training images, 2 of each class" in said
    assert (
        "training 52 classifiers together" in said and "features of an untrained vit_nano" in said
    )
    assert cli.main([*line, "--per_class", "1"]) == 2
    assert "no class has two training images" in capsys.readouterr().err


def test_official(line, data, tmp_path, capsys):
    out = tmp_path / "out"
    official = ["--protocol", "official", "--output_dir", str(out)]
    assert cli.main([*line, *official, "--epochs", "2", "--lr", "1", "--num_labels", "4"]) == 0
    said = capsys.readouterr().out
    assert "one layer for 4 classes on CLS of the last 2 blocks: 2 epochs" in said
    assert "best Top1: " in said and (out / "log.txt").read_text().count("\n") == 2
    result = said.partition("linear classifier result: ")[2].partition(" after")[0]
    # as people type the official command
    words = [*official, "--evaluate", "--num_labels", "4", "--dist_url", "env://"]
    assert cli.main([*line, *words]) == 0
    assert f"linear classifier result: {result} (CLS" in capsys.readouterr().out
    words = ["--pretrained_linear", str(out / "checkpoint.pth.tar"), "--json", str(tmp_path / "j")]
    assert cli.main([*line, *official, "--evaluate", *words]) == 2
    assert "or --num_labels 4 if these are the first" in capsys.readouterr().err
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "val").symlink_to(data / "data" / "val")
    line[1] = str(tmp_path / "alone")
    assert cli.main([*line, *official, "--evaluate", "true", "--num_labels", "4"]) == 0
    assert f"linear classifier result: {result} (CLS" in capsys.readouterr().out


def test_logistic(line, tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(logistic, "STRENGTHS", (1e-6, 1.0, 100.0))
    out = tmp_path / "found.json"
    assert cli.main([*line, "--protocol", "logistic", "--json", str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())["accuracy_percent"]
    assert "logistic regression result: Top1: 100.0 (CLS, C " in said
    assert found["top1"] == 100 and [g["C"] for g in found["grid"]] == [1e-6, 1, 100]


def test_logistic_regression_has_no_gradient_left():
    """Of log-loss + |w|^2 / (2 C), which scikit-learn minimizes; of a missing class nothing is
    known."""
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 3, generator=generator), torch.arange(40) % 3 * 2  # 0, 2, 4
    model = logistic.fit(x, y, 0.5)
    scores = logistic.scores(model, x, 6)
    assert (scores[:, [1, 3, 5]] == -1).all()
    error = scores[:, [0, 2, 4]] - torch.nn.functional.one_hot(y // 2)
    gradient = error.t() @ x.double() + torch.from_numpy(model.coef_) / 0.5
    assert gradient.abs().max() < 1e-2 and error.sum(0).abs().max() < 1e-2


def test_without_scikit_learn(line, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert cli.main([*line, "--protocol", "logistic"]) == 2
    said = capsys.readouterr().err
    assert "--protocol logistic: scikit-learn cannot be imported" in said
    assert "pip install scikit-learn" in said and said.count("\n") == 1


def test_a_backbone_of_one_s_own(data, tmp_path):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 4, 4)
    torch.save({f"backbone.{k}": v for k, v in conv.state_dict().items()}, tmp_path / "w.pth")
    given = {"backbone": conv, "crop": 16, "num_workers": 0, "device": "cpu"}
    found = linear(tmp_path / "w.pth", data / "data", epochs=20, **given)
    assert found["features"] == "pooled output" and len(found["grid"]) == 13
    given |= {"output_dir": tmp_path / "out", "epochs": 1, "protocol": "official"}
    found = linear(tmp_path / "w.pth", data / "data", **given)
    assert found["features"] == "pooled output" and 0 <= found["top1"] <= 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr 0.1", "--lr is of --protocol official, not of sweep"),
        ("--protocol logistic --epochs 3", "--epochs is of --protocol sweep and official, not of"),
        ("--protocol official --learning_rates 1", "--learning_rates is of --protocol sweep, not"),
        ("--evaluate", "--evaluate is of --protocol official"),
        ("--protocol official --epochs 0", "--epochs is 0: it must be at least 1"),
        ("--protocol official --lr 0", "--lr is 0.0: it must be a number above 0"),
        ("--learning_rates 0.1 -1", "--learning_rates is -1.0: it must be"),
        ("--per_class 0", "--per_class is 0"),
        ("--seed -1", "--seed is -1"),
        ("--batch_size_per_gpu 0", "--batch_size_per_gpu is 0"),
        ("--protocol official --num_labels 2 --output_dir D", "but there are 3 classes"),
        ("--protocol official --n_last_blocks 9 --output_dir D", "the backbone has 2 blocks"),
        ("--protocol official --evaluate --output_dir D", "there is no classifier at '"),
        ("--protocol official --pretrained_linear D", "measured, not trained: add --evaluate"),
        ("--protocol liblinear", "invalid choice: 'liblinear'"),
        ("--avgpool_patchtokens maybe", "'maybe' is not a boolean"),
    ],
)
def test_options_that_cannot_be(line, words, said, capsys, tmp_path):
    given = [str(tmp_path / "D") if word == "D" else word for word in words.split()]
    assert cli.main([*line, *given]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1 and not (tmp_path / "D").exists()


def test_several_processes(line, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(line) == 2
    assert "linear runs in one process" in capsys.readouterr().err


def test_words_of_others(capsys):
    assert cli.main(["eval_linear", "D"]) == 2
    assert "dinofast linear DIR --pretrained_weights FILE" in capsys.readouterr().err
