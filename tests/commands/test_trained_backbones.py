"""Commands that take a trained backbone: what one of them refuses all refuse, in one sentence."""

import json
import os

import pytest
import torch
from PIL import Image

import dinofast
from dinofast import cli
from dinofast.commands import results
from dinofast.evaluate.frozen import finite

COMMANDS = {
    "knn": [],
    "linear": [],
    "embed": ["-o", "features.npz"],
    "retrieve": ["-o", "sheet.png"],
    "segment": ["-o", "sheet.png"],
}
FORMATS = ("timm", "hf", "hf-dinov2", "onnx", "safetensors", "torchscript")


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 9, 9)).save(tmp_path / "data" / name / f"{i}.png")


def saved(channels=3, **more):
    torch.manual_seed(0)
    module = dinofast.vit_nano(patch_size=8, img_size=[16], in_chans=channels)
    torch.save({**module.state_dict(), **more}, "weights.pth")


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("command", COMMANDS)
def test_channels_that_are_not_rgb(images, capsys, command, channels):
    saved(channels)
    words = [command, "data", "--pretrained_weights", "weights.pth", *COMMANDS[command]]
    assert cli.main([*words, "--device", "cpu"]) == 2
    assert f"takes images of {channels} channel" in capsys.readouterr().err


@pytest.mark.parametrize("format", FORMATS)
def test_channels_that_are_not_rgb_are_not_exported(images, capsys, format):
    saved(5)
    assert cli.main(["export", "weights.pth", "--format", format, "-o", "out"]) == 2
    assert "takes images of 5 channels" in capsys.readouterr().err


def test_a_warning_is_a_line_without_the_code_it_comes_from(images, capsys):
    saved(**{"head.weight": torch.zeros(3, 64), "head.bias": torch.zeros(3)})
    words = ["knn", "data", "--pretrained_weights", "weights.pth", "--nb_knn", "2"]
    assert cli.main([*words, "--crop", "16", "--num_workers", "0", "--device", "cpu"]) == 0
    told = capsys.readouterr()
    assert "warning: 'weights.pth' holds more than a backbone" in told.err
    assert "UserWarning" not in told.err and "vit_nano with patches of 8 x 8" in told.out


def test_features_that_are_not_finite_are_refused():
    assert finite(torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="not finite"):
        finite(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize(
    "words, said",
    [
        (["retrieve", "data", "--imsize", "64"], "--imsize is of --protocol alone"),
        (["retrieve", "data", "--protocol", "roxford5k", "--n_queries", "3"], "--n_queries has no"),
        (["segment", "nothing", "-o", "weights.pth"], "--data_path 'nothing' does not exist"),
        (
            ["segment", "data", "--json", "x.json"],
            "--json takes the scores, and",
        ),
        (["segment", "data", "--masks", "empty"], "--masks 'empty' holds no .png"),
    ],
)
def test_options_that_would_have_no_effect(images, tmp_path, capsys, words, said):
    saved()
    (tmp_path / "empty").mkdir()
    assert cli.main([*words, "--pretrained_weights", "weights.pth", "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_a_place_with_choices_that_is_empty(capsys):
    assert cli.main(["completion"]) == 2
    assert "SHELL is missing" in capsys.readouterr().err


def test_report_on_a_gpu_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "log.txt").write_text("")
    assert cli.main(["report", str(tmp_path), "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_runs_of_other_versions_are_compared(tmp_path, capsys):
    for name, text in (("old", "gone: 1\narch: vit_nano\n"), ("new", "arch: vit_nano\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert cli.main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert "gone" in capsys.readouterr().out


def test_json_is_written_in_one_piece_and_is_json(tmp_path, monkeypatch):
    from dinofast.commands.davis import Options

    path = tmp_path / "found.json"
    options = Options(data_path="d", pretrained_weights="w", json=str(path))
    results.write_json(options, measures={"J": float("nan"), "F": [0.5]})
    found = json.loads(path.read_text())
    assert found["measures"] == {"J": None, "F": [0.5]} and found["data_path"] == "d"
    assert "json" not in found and "arch" not in found

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "_fill", full)
    with pytest.raises(OSError, match=r"found.json' could not be written \(No space left"):
        results.write_json(options, measures={})
    assert json.loads(path.read_text()) == found and list(tmp_path.iterdir()) == [path]


def test_json_into_a_pipe():
    reads, writes = os.pipe()
    results.write_text(f"/dev/fd/{writes}", "{}")
    assert os.read(reads, 9) == b"{}"
    os.close(reads)
    os.close(writes)
