"""Names of architectures that do not exist, and the one that was meant."""

import sys
import types

import pytest
import torch

from dinofast.checkpoint import load_backbone
from dinofast.config import Config
from dinofast.nn.arch_names import nearest_arch
from dinofast.nn.backbones import make_backbones


@pytest.fixture
def alone(monkeypatch):
    """Neither torchvision nor timm is imported."""
    for name in ("torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("vit_smal", "vit_small"),
        ("VIT-Small", "vit_small"),
        ("vit", "vit_small"),
        ("small", "vit_small"),
        ("DeiT-S", "vit_small"),
        ("vits16", "vit_small with `patch_size` 16"),
        ("ViT-S/16", "vit_small with `patch_size` 16"),
        ("vit_small_16", "vit_small with `patch_size` 16"),
        ("dino_vits16", "vit_small with `patch_size` 16"),
        ("dino_deits8", "vit_small with `patch_size` 8"),
        ("facebook/dino-vitb8", "vit_base with `patch_size` 8"),
        ("facebook/dinov2-base", "vit_base"),
        ("dinov2_vits14", "vit_small with `patch_size` 14"),
        ("dinov2_vitb14_reg", "vit_base with `patch_size` 14"),
        ("timm/vit_tiny_patch16_224.augreg", "vit_tiny with `patch_size` 16"),
        ("raft_small", None),
        ("resnet18", None),
        ("dinov2_vitg14", None),
        ("own", None),
        ("", None),
    ],
)
def test_our_vits_by_what_others_call_them(alone, name, meant):
    assert nearest_arch(name) == (f" Did you mean {meant}?" if meant else "")


def test_the_refusal_says_it(monkeypatch, tmp_path):
    known = types.SimpleNamespace(list_models=lambda module: ["resnet18", "resnet50"])
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", known)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="`arch` 'resnet_18' is not known.*Did you mean resnet18?"):
        make_backbones(Config(arch="resnet_18"), None)
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="no name that can be built here. Did you mean resnet18?"):
        load_backbone(tmp_path / "c.pth", arch="resnet_18")


def test_a_package_that_cannot_list_is_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "torchvision.models", types.ModuleType("models"))
    assert nearest_arch("vits16")
