"""Files that are no checkpoints: the same true cause for who loads a backbone, evaluates one, or
resumes a run, and for each the way out."""

import argparse
import enum
import gzip
import io
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from tiny import TINY, parts

from dinofast import Config, checkpoint, knn, load_backbone, resume

SAFETENSORS = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + b"\0\0\x80\x3f"


class Choice(enum.Enum):
    FAST = "fast"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "checkpoint.pth"
    checkpoint.save(path, *parts(), None, TINY, checkpoint.TrainState())
    return path.read_bytes()


def saved(state, **options):
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def zipped(content, name="models/checkpoint.pth"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "")
        archive.writestr(name, content)
    return file.getvalue()


def tarred(content, mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        about = tarfile.TarInfo("checkpoint.pth")
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def numpy_file(save, value):
    file = io.BytesIO()
    save(file, value)
    return file.getvalue()


def old(content):
    return saved(torch.load(io.BytesIO(content)), _use_new_zipfile_serialization=False)


FILES = {
    "nothing": (lambda g: b"", "it is empty: copy"),
    "a byte": (lambda g: g[:1], "truncated at 1 bytes"),
    "half": (lambda g: g[: len(g) // 2], "it is truncated at"),
    "without its last bytes": (lambda g: g[:-7], "it is truncated at"),
    "half in zeros": (lambda g: g[: len(g) // 2].ljust(len(g), b"\0"), "its end is missing"),
    "zeros": (lambda g: bytes(len(g)), "it begins with zeros"),
    "old, half": (lambda g: old(g)[: len(g) // 2], "it is truncated at"),
    "a zip around it": (zipped, "it is a zip archive around 'models/checkpoint.pth': unpack"),
    "a tar.gz": (lambda g: tarred(g, "w:gz"), "it is a .tar.gz archive: unpack"),
    "a tar": (lambda g: tarred(g, "w"), "it is a tar archive: unpack"),
    "gzip": (gzip.compress, "compressed with gzip: unpack"),
    "a page": (lambda g: "<!DOCTYPE html><title>Süß</title>".encode(), "it is a web page"),
    "a page with a mark": (lambda g: b"\xef\xbb\xbf<html>", "it is a web page"),
    "a page that begins otherwise": (lambda g: b"<!-- x --><html>", "it is a web page"),
    "git-lfs": (lambda g: b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
    "text": (lambda g: '{"message": "né"}'.encode(), "it is a text"),
    "npz": (lambda g: numpy_file(np.savez, np.eye(2)), "an archive of NumPy arrays: save"),
    "npy of a dict": (lambda g: numpy_file(np.save, np.array({"a": 1})), "it is a NumPy array"),
    "pickled NumPy": (lambda g: pickle.dumps({"a": np.eye(2)}), "a pickle that torch.save has not"),
    "safetensors, cut": (
        lambda g: len(SAFETENSORS[:64]).to_bytes(8, "little") + SAFETENSORS[:-1],
        "a .safetensors file that is truncated at 75 bytes",
    ),
    "7z": (lambda g: b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack"),
    "noise": (lambda g: bytes(range(1, 256)) * 4, "no file of torch.save and no .safetensors"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_the_cause_is_the_same_everywhere(name, good, tmp_path):
    make, words = FILES[name]
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(make(good))
    content = path.read_bytes()
    words = f"'{path}' cannot be read as a checkpoint, .*{re.escape(words)}"
    for load in (load_backbone, checkpoint.arguments, lambda path: knn(path, tmp_path)):
        with pytest.raises(ValueError, match=words) as refusal:
            load(path)
        assert "output_dir" not in str(refusal.value) and "move" not in str(refusal.value)
    with pytest.raises(ValueError, match=words + ".*move it away, or choose another `output_dir`"):
        resume.go_on(path, *parts(), None, TINY)
    assert path.read_bytes() == content


def weights(rows=10):
    return {"weight": torch.zeros(rows, 64), "bias": torch.zeros(rows)}


@pytest.mark.parametrize(
    "state, loading, resuming",
    [
        (weights(), "a linear classifier alone ('weight')", "a linear classifier alone"),
        ({"state_dict": weights()}, "a linear classifier alone", "a linear classifier alone"),
        (
            {"fc." + k: v for k, v in weights().items()},
            "a linear classifier alone ('fc.weight')",
            "a linear classifier alone",
        ),
        (
            {"mlp.0.weight": torch.zeros(8, 64), "last_layer.weight_v": torch.zeros(8, 8)},
            "a projection head alone",
            "the weights of a model alone",
        ),
        (
            {"model": {"cls_token": np.zeros(3)}},
            "holds NumPy arrays ('cls_token') where tensors should be",
            "is no DINO training checkpoint",
        ),
        ({"teacher": 3}, "an int under 'teacher', where weights", "holds teacher alone"),
        ({"teacher": {}}, "an empty dict under 'teacher'", "holds teacher alone"),
        ([1], "holds a list, not a checkpoint", "holds a list"),
    ],
)
def test_weights_of_something_else_are_named(state, loading, resuming, tmp_path):
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=re.escape(loading)) as refusal:
        load_backbone(tmp_path)
    assert "output_dir" not in str(refusal.value)
    with pytest.raises(ValueError, match=f"{re.escape(resuming)}.*move it away"):
        resume.go_on(tmp_path / "checkpoint.pth", *parts(), None, TINY)


def test_a_backbone_alone_is_loaded_and_not_resumed(tmp_path):
    torch.save(parts()[0].teacher.backbone.state_dict(), tmp_path / "checkpoint.pth")
    load_backbone(tmp_path)
    with pytest.raises(ValueError, match="holds the weights of a model alone, it is no DINO train"):
        resume.go_on(tmp_path / "checkpoint.pth", *parts(), None, TINY)


def test_the_contents_count_not_the_name(good, tmp_path):
    (tmp_path / "c.safetensors").write_bytes(good)
    load_backbone(tmp_path / "c.safetensors")
    (tmp_path / "w.pth").write_bytes((64).to_bytes(8, "little") + SAFETENSORS)
    assert checkpoint.read(tmp_path / "w.pth")["a"].tolist() == [1.0]
    (tmp_path / "t.safetensors").write_bytes(good[:-7])
    with pytest.raises(ValueError, match="it is truncated at"):
        load_backbone(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    "other, told",
    [
        ({"out_dim": 33}, "saved with `out_dim` 32 (now 33); resume with that"),
        ({"head_hidden_dim": 24}, "saved with `head_hidden_dim` 16 (now 24); resume with that"),
        ({"patch_size": 8, "out_dim": 33}, "saved with `patch_size` 4 (now 8), `out_dim` 32 (now"),
        ({"lr": 0.5, "seed": 3, "arch": "vit_nano"}, ""),
    ],
)
def test_only_options_that_differ_are_told(other, told, good, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes(good)
    cfg = Config(**TINY.to_dict() | other)
    if not told:
        return resume.go_on(tmp_path / "checkpoint.pth", *parts(cfg), None, cfg)
    with pytest.raises(ValueError, match=re.escape(told)) as refusal:
        resume.go_on(tmp_path / "checkpoint.pth", *parts(cfg), None, cfg)
    named = set(re.findall(r"`(\w+)`", str(refusal.value))) - {"output_dir"}
    assert named == set(other)


def test_without_options_that_differ_none_is_told(good, tmp_path):
    """Another backbone of one's own, say."""
    (tmp_path / "checkpoint.pth").write_bytes(good)
    with pytest.raises(ValueError, match=r"absent in the file and \(1,\) here\. It was left") as e:
        model, optimizer = parts()
        model.student.backbone.register_buffer("more", torch.zeros(1))
        resume.go_on(tmp_path / "checkpoint.pth", model, optimizer, None, TINY)
    assert "saved with" not in str(e.value)


def test_a_loss_scaler_of_something_else_is_named_before_anything_is_loaded(good, tmp_path):
    state = torch.load(io.BytesIO(good)) | {"fp16_scaler": {"a": 1}}
    torch.save(state, tmp_path / "checkpoint.pth")
    scaler = torch.amp.GradScaler("cpu")
    model, optimizer = parts(Config(**TINY.to_dict() | {"seed": 3}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="no state of a loss scaler under 'fp16_scaler'"):
        resume.go_on(tmp_path / "checkpoint.pth", model, optimizer, scaler, TINY)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_options_that_hold_themselves_or_the_same_often(tmp_path):
    """Each is looked at once: else the first has no end, and the second takes 2**40 looks."""
    cycle = {"arch": "vit_tiny"}
    cycle["again"] = argparse.Namespace(options=cycle)
    often, unknown = {"a": 1}, [Choice.FAST]
    for _ in range(40):
        often, unknown = {"x": often, "y": often}, {"x": unknown, "y": unknown}
    for args in (cycle, {"o": often}):
        torch.save({"args": args}, tmp_path / "a.pth")
        options = checkpoint.arguments_in(checkpoint.read(tmp_path / "a.pth"))
        assert options.keys() == args.keys()
        assert args is not cycle or options.again.options.again.options.arch == "vit_tiny"
    torch.save({"args": {"u": unknown, "one": Choice.FAST}}, tmp_path / "a.pth")
    # Python 3.11.2 pickles the name alone
    assert checkpoint.read(tmp_path / "a.pth")["args"]["one"] in ("fast", "FAST")
