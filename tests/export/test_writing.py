"""What an export refuses, keeps and replaces; that each format is right is in
clients/test_export_formats.py."""

import json
import os
import shlex

import pytest
import torch

from dinofast import cli, load_backbone, vit_nano
from dinofast.checkpoint import arguments
from dinofast.export import TARGETS, export, writing
from dinofast.export import torchscript as target
from dinofast.export.source import load_source

SIDE = 16
OPTIONS = {
    "arch": "vit_nano",
    "patch_size": 4,
    "global_crops_size": SIDE,
    "image_mean": (0.1, 0.2, 0.3),
    "image_std": (0.5, 0.25, 0.5),
    "exif": True,
    "lr": 0.1,
}


@pytest.fixture(autouse=True)
def _checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vits = {whose: vit_nano(img_size=(SIDE,)).state_dict() for whose in ("teacher", "student")}
    state = {w: {f"backbone.{k}": v for k, v in vit.items()} for w, vit in vits.items()}
    (tmp_path / "run").mkdir()
    torch.save({**state, "args": OPTIONS}, tmp_path / "run" / "checkpoint.pth")


def wanted(images, key="teacher"):
    with torch.no_grad():
        return load_backbone("run", key)(images)


@pytest.mark.parametrize("format", ["torchscript", "safetensors"])
def test_the_command_writes_beside_the_checkpoint_and_tells_how_to_load(format, capsys):
    if format == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    assert cli.main(["export", "run", "--format", format]) == 0
    out = f"run/checkpoint{'.torchscript.pt' if format == 'torchscript' else '.safetensors'}"
    said = capsys.readouterr().out
    assert f"the teacher's vit_nano with patches of 4 x 4 for images of {SIDE} x {SIDE}" in said
    assert f"written: {out}, read back: its features differ by at most " in said
    assert "minus (0.1, 0.2, 0.3), over (0.5, 0.25, 0.5)" in said
    import dinofast

    names = {"dinofast": dinofast, "torch": torch, "images": torch.randn(3, 3, SIDE, 20)}
    load, features = (
        line.partition(": ")[2] for line in said.splitlines() if line.startswith(("load", "feat"))
    )
    exec(load, names)
    given = eval(features, names)
    torch.testing.assert_close(given, wanted(names["images"]), rtol=0, atol=1e-5)
    assert sorted(os.listdir("run")) == sorted(["checkpoint.pth", os.path.basename(out)])


def test_a_file_of_ours_tells_what_it_was_trained_with():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    out = export("run", "safetensors", "x.safetensors", checkpoint_key="student", image_size=24)
    assert arguments(out) == {
        "arch": "vit_nano",
        "patch_size": 4,
        "global_crops_size": 24,
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.5, 0.25, 0.5),
        "value_range": (0, 0),
        "exif": True,
    }
    loaded, images = load_backbone(out), torch.randn(2, 3, 24, 24)
    assert loaded.grid == 6
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), wanted(images, "student"), rtol=0, atol=1e-5)
    assert oct(out.stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("key, end", [("teacher", ""), ("student", "-student")])
def test_it_is_named_like_the_checkpoint(key, end):
    out = export("run/checkpoint.pth", "torchscript", checkpoint_key=key)
    assert str(out) == f"run/checkpoint{end}.torchscript.pt"


def test_its_own_kind_is_replaced_and_nothing_else(capsys):
    for _ in range(2):
        out = export("run", "torchscript", "x.pt")
    before = out.read_bytes()
    with pytest.raises(ValueError, match="'x.pt', a file that is not ONNX and would be lost"):
        export("run", "onnx", out)
    with pytest.raises(ValueError, match="'run/checkpoint.pth', a file that is not TorchScript"):
        export("run", "torchscript", "run/checkpoint.pth")
    with pytest.raises(ValueError, match=r"'x.pt', and 'x.pt' is a file: give a folder"):
        export("run", "timm", out)
    with pytest.raises(ValueError, match="'run', a folder that is not a folder of timm and would"):
        export("run", "timm", "run")
    with pytest.raises(ValueError, match="there is no folder 'none': make it"):
        export("run", "torchscript", "none/x.pt")
    assert out.read_bytes() == before


def test_the_source_is_not_written_over():
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    out = export("run", "safetensors", "x.safetensors")
    with pytest.raises(ValueError, match="'x.safetensors' is what is to be exported"):
        export(out, "safetensors")


def test_folders_are_replaced_as_a_whole(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    export("run", "hf", "made")
    assert json.loads((tmp_path / "made/config.json").read_text())["image_size"] == SIDE
    export("run", "hf", "made", image_size=24)
    assert json.loads((tmp_path / "made/config.json").read_text())["image_size"] == 24
    assert sorted(os.listdir("made")) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    (tmp_path / "made" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="'made', a folder that is not a folder of transformers"):
        export("run", "hf", "made")
    assert sorted(os.listdir(tmp_path)) == ["made", "run"]


def test_features_that_differ_are_an_error_and_leave_what_was_there(monkeypatch, tmp_path):
    out = export("run", "torchscript", "x.pt")
    before, load = out.read_bytes(), target.load
    monkeypatch.setattr(target, "load", lambda path: lambda x: load(path)(x) * 1.01)
    with pytest.raises(ValueError, match="`format` torchscript gives other features, by up to"):
        export("run", "torchscript", "x.pt")
    assert out.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["run", "x.pt"]
    export("run", "torchscript", "x.pt", verify=False)


def test_a_program_that_is_missing_is_told(monkeypatch, capsys):
    def missing(path):
        raise ImportError("No module named 'timm'")

    monkeypatch.setattr(target, "load", missing)
    export("run", "torchscript")
    assert ", not compared: ImportError: No module named 'timm'" in capsys.readouterr().out


def test_a_package_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    for format in ("timm", "hf", "hf-dinov2", "safetensors"):
        with pytest.raises(ValueError, match=f"`format` {format} needs safetensors, not installed"):
            export("run", format)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript.*'dinofast\[export\]'"):
        export("run", "onnx")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "tf"}, "`format` is 'tf': choose from timm, hf, hf-dinov2, onnx"),
        ({"image_size": 18}, "`image_size` 18 is not a multiple of the patch size 4: take 16."),
        ({"image_size": 0}, "`image_size` is 0: it must be at least 1."),
        ({"checkpoint_key": "ema"}, "has no 'ema': choose from teacher, student"),
        ({"arch": "vit_tiny"}, "it was saved with `arch` vit_nano"),
    ],
)
def test_what_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        export("run", **{"format": "torchscript", **options})
    assert os.listdir("run") == ["checkpoint.pth"]


def test_a_missing_source_is_what_is_told():
    with pytest.raises(ValueError, match="there is no checkpoint at 'none/x.pth'"):
        export("none/x.pth", "torchscript")


def test_positions_of_another_size_are_those_of_training():
    images = torch.randn(2, 3, 28, 28)
    source = load_source("run", image_size=28)
    assert source.vit.pos_embed.shape == (1, 50, 64)
    torch.testing.assert_close(source.features(images), wanted(images), rtol=0, atol=1e-5)


def test_the_command_knows_all_targets():
    from dinofast.commands.export import FORMATS

    assert FORMATS == tuple(TARGETS)


def test_a_path_with_a_quote(capsys):
    assert cli.main(shlex.split("""export run --format torchscript -o "it's.pt" """)) == 0
    assert """torch.jit.load("it's.pt")""" in capsys.readouterr().out
