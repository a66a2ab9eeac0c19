"""Weights of other projects: loaded where it is clear which, else named."""

import argparse
import collections
import decimal
import enum
import fractions
import pathlib
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch

from dinofast import load_backbone, vit_nano, vit_tiny
from dinofast.checkpoint import arguments, read

VIT = vit_tiny(patch_size=16, img_size=[32]).state_dict()
HEAD = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
DECODER = {name: torch.zeros(1) for name in ("mask_token", "decoder_embed.weight")}
DINOV2 = {**VIT, "mask_token": torch.zeros(1, 192), "blocks.0.ls1.gamma": torch.zeros(192)}
DISTILLED = {**VIT, "dist_token": torch.zeros(1, 1, 192), "pos_embed": torch.zeros(1, 6, 192)}
PROBE = {"module.linear.weight": torch.zeros(10, 192), "module.linear.bias": torch.zeros(10)}
HF = ("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight")
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}


def below(prefix, state=VIT):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": VIT, "optimizer": OPTIMIZER, "epoch": 3},
        {"model": VIT, "optimizer": OPTIMIZER, "args": argparse.Namespace(model="deit_tiny")},
        {"state_dict": below("model."), "hyper_parameters": {"lr": 1}},
        {"state_dict": below("teacher.backbone.") | below("student.backbone.")},
        {"state_dict": below("teacher_backbone.") | below("student_backbone.")},
        {"teacher": below("backbone.") | {"dino_head.mlp.0.weight": torch.zeros(1)}},
        below("_orig_mod.module."),
    ],
)
def test_the_one_backbone_in_a_file_is_found(state, tmp_path, recwarn):
    torch.save(state, tmp_path / "other.pth.tar")
    loaded = load_backbone(tmp_path / "other.pth.tar")
    assert not recwarn.list
    torch.testing.assert_close(loaded.state_dict(), VIT, rtol=0, atol=0)


@pytest.mark.parametrize("beside", [HEAD, DECODER])
def test_what_is_no_backbone_is_left_out_and_told(beside, tmp_path):
    torch.save({"model": {**VIT, **beside}}, tmp_path / "other.pth")
    with pytest.warns(UserWarning, match="more than a backbone .*: that is left out"):
        loaded = load_backbone(tmp_path / "other.pth")
    torch.testing.assert_close(loaded.state_dict(), VIT, rtol=0, atol=0)


@pytest.mark.parametrize(
    "state, words",
    [
        ({"epoch": 1, "state_dict": PROBE, "best_acc": 3.0}, "linear classifier alone"),
        ({**DINOV2, "blocks.0.mlp.w12.bias": torch.zeros(1)}, "weights of DINOv2 with SwiGLU"),
        ({"teacher": below("backbone.", {**VIT, "rope_embed.periods": torch.zeros(1)})}, "DINOv3"),
        ({**VIT, "reg_token": torch.zeros(1, 4, 192)}, "a ViT with registers ('reg_token')"),
        (
            {**VIT, "register_tokens": torch.zeros(1, 4, 192)},
            "a ViT with registers ('register_tokens')",
        ),
        ({"model": DISTILLED}, "a distilled ViT (DeiT, with a second class token) ('dist_token')"),
        ({f"vit.{name}": torch.zeros(1) for name in HF}, "weights of a Hugging Face model"),
        ({"visual.conv1.weight": torch.zeros(1)}, "weights of CLIP"),
        ({"state_dict": VIT, "state_dict_ema": VIT}, "under 'state_dict', 'state_dict_ema'"),
        (below("encoder_q.") | below("encoder_k."), "several backbones, under encoder_k., enc"),
        ({"optimizer": OPTIMIZER}, "holds no weights, only optimizer"),
        ({}, "holds no weights:"),
        ({"a.weight": torch.zeros(2)}, "does not tell its architecture"),
    ],
)
def test_what_does_not_fit_is_named(state, words, tmp_path):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_backbone(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "state, key",
    [
        ({"state_dict": VIT, "state_dict_ema": VIT}, "state_dict_ema"),
        (below("encoder_q.") | below("encoder_k."), "encoder_k"),
    ],
)
def test_of_several_the_key_chooses(state, key, tmp_path):
    torch.save(state, tmp_path / "other.pth")
    load_backbone(tmp_path / "other.pth", key=key)


def test_a_backbone_of_your_own_may_hold_names_that_repeat(tmp_path):
    def make():
        return torch.nn.Sequential(
            torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 3))
        )

    own = make()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    loaded = load_backbone(tmp_path / "own.pth", backbone=make())
    torch.testing.assert_close(loaded.state_dict(), own.state_dict(), rtol=0, atol=0)


def test_a_folder_stands_for_its_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is a folder without checkpoint.pth: name a file"):
        load_backbone(tmp_path)
    torch.save(VIT, tmp_path / "best.pth")
    assert load_backbone(tmp_path)  # the only one
    torch.save(VIT, tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"name one of its files \(best.pth, last.pth\)"):
        load_backbone(tmp_path)
    torch.save({"teacher": below("backbone."), "args": {"n": 3}}, tmp_path / "checkpoint0003.pth")
    torch.save({"teacher": below("backbone."), "args": {"n": 20}}, tmp_path / "checkpoint0020.pth")
    assert arguments(tmp_path) == {"n": 20} and load_backbone(tmp_path)
    torch.save({"teacher": below("backbone."), "args": {"n": 1}}, tmp_path / "checkpoint.pth")
    assert arguments(tmp_path) == {"n": 1}


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("kind", ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"])
def test_paths_of_slurm_are_read(kind, module, tmp_path, monkeypatch):
    """By the name of their class, which Python 3.13 moved; Windows paths on Linux too."""

    class Fake:
        def __reduce__(self):
            return Fake, ("run", "1")

    Fake.__module__, Fake.__qualname__ = module, kind
    args = argparse.Namespace(arch="vit_tiny", output_dir=Fake(), lr=np.float64(0.5))
    with monkeypatch.context() as patch:
        home = sys.modules.get(module) or types.ModuleType(module)
        patch.setitem(sys.modules, module, home)
        patch.setattr(home, kind, Fake, raising=False)
        torch.save({"teacher": below("backbone."), "args": args}, str(tmp_path / "c.pth"))
    load_backbone(tmp_path / "c.pth")
    told = arguments(tmp_path / "c.pth")
    assert told.output_dir.replace("\\", "/") == "run/1" and type(told["lr"]) is float
    saved = read(tmp_path / "c.pth")["args"]
    assert saved.arch == saved["arch"] == "vit_tiny"


def by_value(self, protocol):  # how most Pythons pickle an enum, and how 3.11.2 does
    return type(self), (self.value,)


def by_name(self, protocol):
    return getattr, (type(self), self.name)


class Mode(enum.Enum):
    MULTI = "multi"
    __reduce_ex__ = by_value


class Named(enum.Enum):
    MULTI = "multi"
    __reduce_ex__ = by_name


class Text(str, enum.Enum):
    A = "a"
    __reduce_ex__ = by_value


class Settings:
    def __init__(self):
        self.depth = 3


@pytest.mark.parametrize(
    "value, told",
    [
        (Mode.MULTI, "multi"),
        (Named.MULTI, "MULTI"),
        ([Text.A, {"k": Mode.MULTI}], ("a", {"k": "multi"})),
        (
            signal.SIGTERM,
            (15, "<signal.SIGTERM>")[isinstance(signal.SIGTERM.__reduce_ex__(2), str)],
        ),
        (np.float32(0.5), 0.5),
        (np.str_("a"), "a"),
        (torch.device("cuda:1"), "cuda:1"),
        (torch.bfloat16, "bfloat16"),
        (np.float32, "<numpy.float32>"),
        (torch.nn.GELU, "<torch.nn.modules.activation.GELU>"),
        (print, "<builtins.print>"),
        (Settings(), {"depth": 3}),
        (types.SimpleNamespace(a=Mode.MULTI), {"a": "multi"}),
        (argparse.Namespace(a=argparse.Namespace(p=pathlib.Path("x"))), {"a": {"p": "x"}}),
        (collections.defaultdict(int, a=1), {"a": 1}),
        (collections.deque([1, 2]), (1, 2)),
        (decimal.Decimal("0.5"), "0.5"),
        (fractions.Fraction(1, 2), "<fractions.Fraction>"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_options_of_any_kind_are_read_and_nothing_is_run(value, told, tmp_path, monkeypatch):
    args = argparse.Namespace(arch="vit_tiny", patch_size=16, other=value)
    torch.save({"teacher": below("backbone."), "args": args}, tmp_path / "c.pth")
    monkeypatch.setattr(Settings, "__setstate__", lambda *_: pytest.fail("run"), raising=False)
    load_backbone(tmp_path / "c.pth")
    options = arguments(tmp_path / "c.pth")
    assert options["other"] == told and options.other == told and options.arch == "vit_tiny"
    saved = read(tmp_path / "c.pth", mmap=True)["args"]
    assert saved.arch == saved["arch"] == "vit_tiny"


@pytest.mark.parametrize("new", [True, False])
def test_options_of_any_kind_are_read_from_files_of_torch_before_1_6_too(new, tmp_path):
    args = argparse.Namespace(arch="vit_tiny", patch_size=16, mode=Mode.MULTI, kind=int, f=print)
    state = {"teacher": below("backbone."), "args": args}
    torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
    load_backbone(tmp_path / "c.pth")
    told = arguments(tmp_path / "c.pth")
    assert (told.mode, told.kind, told.f) == ("multi", "<builtins.int>", "<builtins.print>")
    torch.save(state | {"x": Mode.MULTI}, tmp_path / "c.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"and text \([\w.]*Mode\), which would run"):
        read(tmp_path / "c.pth")


def test_options_within_options_answer_both_ways(tmp_path):
    args = argparse.Namespace(inner=argparse.Namespace(a=1))
    torch.save({"args": args}, tmp_path / "c.pth")
    inner = arguments(tmp_path / "c.pth").inner
    assert inner.a == inner["a"] == 1


def test_an_option_called_as_a_method_of_a_dict_breaks_nothing(tmp_path):
    torch.save({"args": {"items": 3, "keys": 1, "arch": "x"}}, tmp_path / "c.pth")
    options = arguments(tmp_path / "c.pth")
    assert dict(options.items()) == {"items": 3, "keys": 1, "arch": "x"} and options.arch == "x"


@pytest.mark.parametrize("where", ["teacher", "epoch", "note"])
def test_beside_the_options_nothing_of_an_unknown_class_is_read(where, tmp_path):
    state = {"teacher": below("backbone."), "args": {"arch": "vit_tiny"}, where: Mode.MULTI}
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"and text \([\w.]*Mode\), which would run"):
        read(tmp_path / "c.pth")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"arch": "vit_small"}, ": it was saved with `arch` vit_tiny, name that or nothing."),
        ({"arch": "deit_tiny", "backbone": vit_tiny(8)}, ": name the `arch` and `patch_size` of"),
    ],
)
def test_a_misfit_tells_what_was_given_otherwise(given, words, tmp_path):
    torch.save({"teacher": below("backbone."), "args": {"arch": "vit_tiny"}}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        load_backbone(tmp_path / "c.pth", **given)
    assert "output_dir" not in str(refusal.value)


def test_the_same_network_untrained(tmp_path):
    """To compare with: its shapes are the file's, its weights are not."""
    trained = vit_nano(patch_size=8, img_size=(16,)).state_dict()
    torch.save(
        {"teacher": {f"backbone.{name}": x for name, x in trained.items()}}, tmp_path / "x.pth"
    )
    fresh = load_backbone(tmp_path / "x.pth", "untrained").state_dict()
    assert {name: x.shape for name, x in fresh.items()} == {n: x.shape for n, x in trained.items()}
    assert not torch.equal(fresh["pos_embed"], trained["pos_embed"])
