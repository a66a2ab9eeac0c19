"""Files that are no checkpoints are named; .safetensors are read."""

import gzip
import io
import re
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

from dinofast import load_backbone, vit_tiny
from dinofast.checkpoint import read

VIT = vit_tiny(patch_size=16, img_size=[32]).state_dict()


def saved_by(save, *args):
    file = io.BytesIO()
    save(*args, file)
    return file.getvalue()


def scripted():
    return saved_by(torch.jit.save, torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)))


def exported():
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    return saved_by(torch.export.save, program)


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


def npy(save):
    file = io.BytesIO()
    save(file, np.eye(2))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (lambda: b"\n<!DOCTYPE html><html>Not found</html>", "a web page"),
        (lambda: b"<HTML>Not found", "a web page"),
        (lambda: b'{"message": "Not Found"}', "it is a text"),
        (lambda: b"\x89PNG\r\n\x1a\n\0\0", "it is an image"),
        (lambda: gzip.compress(b"x" * 99), "compressed with gzip"),
        (lambda: b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (lambda: b"PK\x05\x06" + b"\0" * 18, "a zip archive without weights"),
        (lambda: b"\x08\x0a\x12\x07pytorch\x1a", "an ONNX model"),
        (lambda: npy(np.save), "a NumPy array"),
        (lambda: npy(np.savez), "an archive of NumPy arrays"),
        (tar, "a tar archive"),
        (scripted, "a TorchScript archive"),
        (exported, "a program of torch.export"),
        (lambda: saved_by(torch.save, nn.Linear(2, 2)), "whole model (torch.nn.modules.linear.L"),
        (lambda: saved_by(torch.save, {"model": vit_tiny()}), "whole model (dinofast.nn.vit.V"),
        (lambda: saved_by(torch.save, {"a": np.array([{}], object)}), "something other than"),
        (lambda: saved_by(torch.save, {"a": tarfile.TarInfo("x")}), "text (tarfile.TarInfo), wh"),
        (lambda: saved_by(torch.save, VIT)[:-5000], "truncated"),
    ],
)
def test_a_file_of_another_kind_is_named(make, words, tmp_path):
    path = tmp_path / "download.pth"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=f"cannot be read as a checkpoint.*{re.escape(words)}"):
        load_backbone(path)


def test_a_file_of_torch_before_1_6_is_read(tmp_path):
    torch.save({"teacher": VIT}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for mmap in (False, True):
        torch.testing.assert_close(read(tmp_path / "old", mmap)["teacher"], VIT, rtol=0, atol=0)


def test_numbers_and_arrays_of_numpy_are_read(tmp_path):
    kinds = "?bBhHiIlLefdgFDSU"
    values = {k: np.ones(2, k) for k in kinds} | {f"{k}0": np.ones(2, k)[0] for k in kinds}
    torch.save({"epoch": values}, tmp_path / "n.pth")
    back = read(tmp_path / "n.pth")["epoch"]
    for name, value in values.items():
        assert type(back[name]) is type(value) and np.array_equal(back[name], value), name


def test_a_link_to_nowhere_is_named(tmp_path):
    (tmp_path / "c.pth").symlink_to(tmp_path / "gone.pth")
    with pytest.raises(ValueError, match="is a link to '.*gone.pth', which is not there"):
        read(tmp_path / "c.pth")


SAFETENSORS = (
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},'
    b'"b":{"dtype":"I64","shape":[],"data_offsets":[4,12]},'
    b'"c":{"dtype":"BOOL","shape":[0,3],"data_offsets":[12,12]}}'
)


def safetensors(header=SAFETENSORS):
    return len(header).to_bytes(8, "little") + header + b"\0\x3c\0\xbc" + b"\7" + b"\0" * 7


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin"])
def test_safetensors_are_read(name, tmp_path):
    (tmp_path / name).write_bytes(safetensors())
    back = read(tmp_path / name)
    assert back["a"].dtype == torch.half and back["a"].tolist() == [[1.0], [-1.0]]
    assert back["b"].item() == 7 and back["c"].shape == (0, 3) and back["c"].dtype == torch.bool


@pytest.mark.parametrize(
    "content",
    [
        b"junk\0",
        safetensors()[:40],
        safetensors()[:-1],
        safetensors(SAFETENSORS.replace(b"[0,4]", b"[0,2]")),
        safetensors(SAFETENSORS.replace(b"[0,4]", b"[9,-4]")),
        safetensors(SAFETENSORS.replace(b"F16", b"F17")),
        safetensors(b"[]"),
    ],
)
def test_damaged_safetensors_are_named(content, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"cannot be read .*, it is (a|named) \.safetensors .*(truncated|damaged)",
    ):
        read(tmp_path / "m.safetensors")


def test_safetensors_of_the_library_are_read(tmp_path):
    library = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    kinds = [torch.float64, torch.bfloat16, torch.uint8, torch.int32, torch.float8_e4m3fn]
    weights = {**VIT, **{str(kind): torch.ones(3).to(kind) for kind in kinds}}
    library.save_file(weights, tmp_path / "m.safetensors")
    back = read(tmp_path / "m.safetensors")
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name].float(), value.float())
