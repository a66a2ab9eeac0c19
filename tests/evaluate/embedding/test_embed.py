"""Features in a file: what is in it, that an interrupted run ends with the same bytes, and that
parts of anything else are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinofast import cli, vit_nano
from dinofast.config import Config
from dinofast.evaluate import frozen as frozen_module
from dinofast.evaluate.embedding import embed as embed_module
from dinofast.evaluate.embedding import feature_parts
from dinofast.evaluate.embedding.embed import embed, weights_fingerprint
from dinofast.evaluate.embedding.feature_file import FeatureTable, write_features

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


class MeanPixel(torch.nn.Module):
    """Its features tell which image it was. signum: sent to this process by the n-th batch."""

    def __init__(self, at: int = 0, signum: int = 0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.at, self.signum, self.seen = at, signum, 0

    def forward(self, x):
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), self.signum)
        return x.mean((2, 3)) * self.scale


@pytest.fixture
def mean_pixel(monkeypatch):
    """A function: the options of `embed` with this backbone."""

    def given(module=None, **more):
        module = module or MeanPixel()
        monkeypatch.setattr(frozen_module, "load_backbone", lambda *args: module)
        monkeypatch.setattr(frozen_module, "arguments", lambda path: {"global_crops_size": 14})
        usual = {"num_workers": 0, "device": "cpu", "batch_size_per_gpu": 2}
        return {"pretrained_weights": "none.pth", **usual, **more}

    return given


def images(root: Path, *classes: str, n: int = 5) -> Path:
    """The color of an image tells its class and its number."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (20, 20), (10 * c, 7 * i, 99)).save(root / name / f"{i:03}.png")
    return root


def colors(features: np.ndarray) -> list[list[int]]:
    return ((features * STD + MEAN) * 255).round().astype(int).tolist()


def test_the_arrays_of_an_npz(tmp_path, mean_pixel, capsys):
    data = images(tmp_path / "data", "cat", "dog")
    (data / "cat" / "001.png").write_bytes(b"")
    out = tmp_path / "out.npz"
    found = embed(data_path=data, features=out, **mean_pixel())
    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    expected = [(c, i) for c in range(2) for i in range(5) if (c, i) != (0, 1)]
    names = [str(data / ("cat", "dog")[c] / f"{i:03}.png") for c, i in expected]
    assert arrays["path"].tolist() == names
    assert arrays["feature"].dtype == np.float32
    assert colors(arrays["feature"]) == [[10 * c, 7 * i, 99] for c, i in expected]
    assert arrays["class"].tolist() == ["cat", "dog"]
    assert arrays["label"].tolist() == [c for c, _ in expected]
    metadata = json.loads(str(arrays["metadata"]))
    assert metadata["left_out"] == [[str(data / "cat" / "001.png"), "empty file"]]
    assert metadata["features_of"] == "the teacher's backbone in 'none.pth'"
    assert metadata["crop"] == "14" and metadata["weights"] == weights_fingerprint(MeanPixel())
    assert found[:3] == (out, 9, 3) and found.images_per_s > 0
    said = capsys.readouterr().out
    assert "left out, cannot be read: " in said and "001.png (empty file)" in said
    assert "9 features of 3 numbers in '" in said and ", 1 image left out; " in said
    assert sorted(os.listdir(tmp_path)) == ["data", "out.npz"]


def test_the_columns_of_a_parquet_file(tmp_path, mean_pixel):
    data = images(tmp_path / "data", "cat", "dog")
    os.rename(data / "dog" / "000.png", os.fsencode(data / "dog") + b"/\xe9.png")
    out = tmp_path / "out.parquet"
    embed(data_path=data, features=out, dtype="float16", **mean_pixel())
    table = pq.read_table(out)
    assert table.column_names == ["path", "feature", "label", "class"]
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: halffloat>[3]"
    assert colors(np.stack(table["feature"].to_numpy()).astype(float))[4] == [0, 28, 99]
    assert table["class"].to_pylist() == ["cat"] * 5 + ["dog"] * 5
    assert table["path"].to_pylist()[-1] == f"{data}/dog/\\xe9.png"
    assert json.loads(table.schema.metadata[b"dinofast"])["dtype"] == "float16"


def test_sources_without_classes(tmp_path, mean_pixel):
    """A flat folder, halves of an evaluation, and shards, whose members are read in their place."""
    flat = images(tmp_path / "data", "train", "val", n=2)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(flat / "train" / "001.png", "a/x.png")
    for source, n in ((flat / "train", 2), (flat, 4), (tmp_path / "s.tar", 1)):
        embed(data_path=source, features=tmp_path / "o.npz", **mean_pixel())
        with np.load(tmp_path / "o.npz") as file:
            assert sorted(file) == ["feature", "metadata", "path"] and len(file["path"]) == n
    with np.load(tmp_path / "o.npz") as file:
        assert file["path"].tolist() == [f"{tmp_path}/s.tar/a/x.png"]
        assert colors(file["feature"]) == [[0, 7, 99]]


# ---- ended and resumed
@pytest.mark.parametrize("ending", ["npz", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_ended_goes_on_and_ends_with_the_same_file(
    tmp_path, mean_pixel, capsys, monkeypatch, ending, workers
):
    data, whole = images(tmp_path / "data", "cat", "dog"), tmp_path / f"whole.{ending}"
    (data / "cat" / "002.png").write_bytes(b"")
    embed(data_path=data, features=whole, **mean_pixel())
    out = tmp_path / f"out.{ending}"
    line = ["embed", str(data), "--pretrained_weights", "none.pth", "-o", str(out)]
    line += ["--device", "cpu", "--batch_size_per_gpu", "2", "--num_workers", str(workers)]
    for signum, at, done in ((signal.SIGINT, 2, 4), (signal.SIGTERM, 1, 6)):
        mean_pixel(MeanPixel(at, signum))
        assert cli.main(line) == 128 + signum
        said = capsys.readouterr()
        assert f"stopped after {done} of 10 images; the same command goes on" in said.err
        assert not out.exists()
    last = MeanPixel()
    mean_pixel(last)
    assert cli.main(line) == 0
    assert last.seen == 2 and "6 of them are in '" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / f"{out.name}.parts").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import pytest, test_embed
from dinofast.evaluate.embedding import feature_parts
from dinofast.evaluate.embedding import embed
from dinofast.evaluate import frozen

feature_parts.PART_IMAGES = embed.PART_IMAGES = 4
frozen.load_backbone = lambda *args: test_embed.MeanPixel(4, signal.SIGKILL)
frozen.arguments = lambda path: {"global_crops_size": 14}
embed.embed("none.pth", sys.argv[2], sys.argv[3], num_workers=0, device="cpu", batch_size_per_gpu=2)
"""


def test_a_run_that_was_killed_goes_on(tmp_path, mean_pixel):
    data, whole = images(tmp_path / "data", "cat", "dog"), tmp_path / "whole.npz"
    embed(data_path=data, features=whole, **mean_pixel())
    out, here = tmp_path / "out.npz", str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, here, str(data), str(out)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    parts = tmp_path / "out.npz.parts"
    assert [p.name for p in parts.glob("*.npz")] == ["0000000000-0000000004.npz"]
    (parts / "0000000004-0000000008.npz.tmp").write_bytes(b"half a part")
    last = MeanPixel()
    embed(data_path=data, features=out, **mean_pixel(last))
    assert last.seen == 3 and out.read_bytes() == whole.read_bytes()


def ended(tmp_path, mean_pixel, monkeypatch, **more) -> tuple[Path, Path]:
    """The images, and the output of a run that was ended after 4 of 10, in parts of 2."""
    monkeypatch.setattr(embed_module, "PART_IMAGES", 2)
    data, out = images(tmp_path / "data", "cat", "dog"), tmp_path / "out.npz"
    with pytest.raises(KeyboardInterrupt):
        embed(data_path=data, features=out, **mean_pixel(MeanPixel(2, signal.SIGINT), **more))
    return data, out


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"crop": 12}, "resize and crop"),
        ({"dtype": "float16"}, "dtype"),
        ({"precision": "bf16"}, "precision"),
        ("weights", "weights"),
        ("images", "images"),
        ("data_path", "data_path"),
    ],
)
def test_parts_of_anything_else_are_refused(tmp_path, mean_pixel, monkeypatch, change, word):
    data, out = ended(tmp_path, mean_pixel, monkeypatch)
    module, more = MeanPixel(), change if isinstance(change, dict) else {}
    if change == "weights":
        module.scale.data += 1e-6
    if change == "images":
        (data / "dog" / "004.png").unlink()
    if change == "data_path":
        (tmp_path / "other").symlink_to(data)
        data = tmp_path / "other"
    with pytest.raises(ValueError, match=f"an earlier run with other {word}: remove that folder"):
        embed(data_path=data, features=out, **mean_pixel(module, **more))
    assert len(list((tmp_path / "out.npz.parts").glob("*.npz"))) == 2


def test_a_damaged_part_is_made_anew_with_those_behind_it(tmp_path, mean_pixel, monkeypatch):
    data, out = ended(tmp_path, mean_pixel, monkeypatch)
    first = tmp_path / "out.npz.parts" / "0000000000-0000000002.npz"
    first.write_bytes(first.read_bytes()[:200])
    last = MeanPixel()
    embed(data_path=data, features=out, **mean_pixel(last))
    assert last.seen == 5
    embed(data_path=data, features=tmp_path / "whole.npz", **mean_pixel())
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_part_damaged_inside_is_told(tmp_path, mean_pixel, monkeypatch):
    data, out = ended(tmp_path, mean_pixel, monkeypatch)
    first = tmp_path / "out.npz.parts" / "0000000000-0000000002.npz"
    with np.load(first) as arrays:
        inside = arrays["features"].tobytes()
    first.write_bytes(first.read_bytes().replace(inside, b"\1" * len(inside)))
    with pytest.raises(ValueError, match="0000000002.npz' is damaged .*remove it"):
        embed(data_path=data, features=out, **mean_pixel())


def test_a_folder_of_somebody_else_and_another_run(tmp_path, mean_pixel):
    data, parts = images(tmp_path / "data", "cat"), tmp_path / "out.npz.parts"
    parts.mkdir()
    (parts / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds no parts of features: remove it, or name another"):
        embed(data_path=data, features=tmp_path / "out.npz", **mean_pixel())
    assert (parts / "mine.txt").exists()
    (parts / "mine.txt").unlink()
    code = "import fcntl,sys;f=open(sys.argv[1],'w');fcntl.lockf(f,2);print(1,flush=True);input()"
    command = [sys.executable, "-c", code, str(parts / feature_parts.LOCK)]
    with subprocess.Popen(command, stdin=-1, stdout=-1) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another run is writing to '.*out.npz.parts'"):
            embed(data_path=data, features=tmp_path / "out.npz", **mean_pixel())
        other.communicate(b"\n")
    embed(data_path=data, features=tmp_path / "out.npz", **mean_pixel())


# ---- files
@pytest.mark.parametrize("ending", ["npz", "parquet"])
def test_a_file_is_written_in_pieces(tmp_path, ending):
    """26 MB of features in 2."""
    n, width = 100_000, 64

    def pieces():
        return (np.full((1000, width), start, np.float32) for start in range(0, n, 1000))

    labels = np.zeros(n, np.int64)
    table = FeatureTable(n, width, np.dtype("f4"), "{:09}.jpg".format, pieces, labels, (), {})
    tracemalloc.start()
    write_features(tmp_path / f"out.{ending}", table)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    if ending == "npz":
        with np.load(tmp_path / "out.npz") as file:
            assert file["feature"][:, 5].tolist() == [i // 1000 * 1000 for i in range(n)]
            assert file["path"][[0, 99_999]].tolist() == ["000000000.jpg", "000099999.jpg"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"features": "x.csv"}, "let its name end in .npz or .parquet"),
        ({"features": "none/x.npz"}, "but there is no folder"),
        ({"features": "x.parquet"}, "for which pyarrow is needed .*let the name end in .npz"),
        ({"dtype": "float64"}, "`dtype` is 'float64'"),
        ({"precision": "fp16"}, "`precision` is 'fp16'"),
        ({"batch_size_per_gpu": 0}, "`batch_size_per_gpu` is 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, mean_pixel, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    data = images(tmp_path / "data", "cat")
    with pytest.raises(ValueError, match=words):
        embed(data_path=data, **mean_pixel(**more))
    assert os.listdir(tmp_path) == ["data"]


def test_a_file_of_another_kind_stays(tmp_path, mean_pixel):
    (tmp_path / "out.npz").write_text("a letter")
    with pytest.raises(ValueError, match="not of features and would be lost"):
        embed(data_path=tmp_path, features=tmp_path / "out.npz", **mean_pixel())


def test_features_too_large_for_float16(tmp_path, mean_pixel):
    data, module = images(tmp_path / "data", "cat"), MeanPixel()
    module.scale.data *= 1e6
    with pytest.raises(ValueError, match="ends at 65504, and features reach 2.12e[+]06"):
        embed(
            data_path=data,
            features=tmp_path / "out.npz",
            dtype="float16",
            **mean_pixel(module),
        )


def test_nothing_readable(tmp_path, mean_pixel):
    data = images(tmp_path / "data", "cat", n=1)
    (data / "cat" / "000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 image, and none can be read"):
        embed(data_path=data, features=tmp_path / "out.npz", **mean_pixel())
    assert os.listdir(tmp_path) == ["data"]


def test_a_vit_in_bf16_is_near(tmp_path):
    data = images(tmp_path / "data", "cat", "dog")
    cfg = Config(arch="vit_nano", patch_size=8, out_dim=8, global_crops_size=16)
    state = vit_nano(patch_size=8, img_size=(16,)).state_dict()
    weights = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"teacher": weights, "args": cfg.to_dict()}, tmp_path / "checkpoint.pth")
    found = {}
    for precision in ("fp32", "bf16"):
        more = {"precision": precision, "num_workers": 0, "device": "cpu"}
        embed(tmp_path / "checkpoint.pth", data, tmp_path / "o.npz", **more)
        with np.load(tmp_path / "o.npz") as file:
            found[precision] = file["feature"]
    assert 0 < np.abs(found["bf16"] - found["fp32"]).max() < 0.1
