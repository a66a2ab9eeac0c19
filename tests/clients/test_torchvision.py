"""torchvision's real models as backbones, without their weights."""

import copy

import pytest
import torch

from dinofast.checkpoint import load_backbone
from dinofast.config import Config
from dinofast.nn.backbones import build_backbone
from dinofast.nn.dino import Model
from dinofast.nn.features import features

models = pytest.importorskip(
    "torchvision.models",
    reason="torchvision is not installed, or does not import beside this torch",
    exc_type=Exception,
)

any_size = pytest.importorskip("dinofast.nn.torchvision_sizes").any_size

SMALL = dict(
    out_dim=32,
    head_hidden_dim=16,
    head_bottleneck_dim=8,
    local_crops_number=1,
    batch_size_per_gpu=2,
    global_crops_size=96,
    local_crops_size=64,
)
# a family each, the smallest; features and what was at fault with it
WIDTHS = {
    "convnext_tiny": 768,  # its norm and Flatten are part of the classifier
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,  # auxiliary classifiers
    "maxvit_t": 512,  # windows of one size
    "mnasnet0_5": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_y_400mf": 440,
    "resnet18": 512,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,  # its classifier is a convolution
    "swin_t": 768,
    "vit_b_32": 768,  # positions of one size
}


@pytest.mark.parametrize("arch", WIDTHS)
def test_names_train_at_two_sizes(arch):
    model = Model.from_config(Config(**SMALL, arch=arch))
    assert model.student.head.mlp[0].in_features == WIDTHS[arch]
    assert model.notes == [f"{arch} is torchvision's"] and model.all_trained
    model([torch.rand(4, 3, 96, 96), torch.rand(2, 3, 64, 64)], 0.04).total.backward()
    grads = [p.grad for p in model.student.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    with torch.no_grad():
        images = torch.rand(2, 3, 64, 64)
        assert features(model.teacher.backbone.eval(), images).shape == (2, WIDTHS[arch])


def test_inception_is_refused_for_crops_it_is_too_large_for():
    words = "`arch` inception_v3 of torchvision does not take crops of 64 x 64 .*Kernel size"
    with pytest.raises(ValueError, match=words):
        Model.from_config(Config(**SMALL, arch="inception_v3"))


@pytest.mark.parametrize("arch", ["get_model", "list_models", "get_weight", "fcn_resnet50", "vgg"])
def test_what_is_no_classifier_is_no_arch(arch):
    with pytest.raises(ValueError, match=f"`arch` '{arch}' is not known"):
        build_backbone(Config(arch=arch), 0.0)


def compare_any_size(theirs, at, other):
    """The same at the size it was built for, and something for another."""
    ours = copy.deepcopy(theirs)
    any_size(ours)
    assert type(ours) is not type(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(at), theirs(at), rtol=1e-5, atol=1e-6)
        return ours(other)


def test_any_size_of_vit_gives_at_its_size_what_torchvision_gives():
    vit = models.VisionTransformer(32, 8, 2, 2, 16, 32).eval()
    torch.nn.init.normal_(vit.heads.head.weight)
    other = compare_any_size(vit, torch.randn(2, 3, 32, 32), torch.randn(1, 3, 24, 40))
    assert other.shape == (1, 1000)


@pytest.mark.parametrize("kind", ["window", "grid"])
def test_any_size_of_maxvit_gives_at_its_size_what_torchvision_gives(kind):
    norm = torch.nn.LayerNorm
    layer = models.maxvit.PartitionAttentionLayer(
        8, 4, 7, kind, (21, 21), 2, torch.nn.GELU, norm, 0.0, 0.0, 0.0
    ).eval()
    other = compare_any_size(layer, torch.randn(2, 8, 21, 21), torch.randn(1, 8, 6, 10))
    assert other.shape == (1, 8, 6, 10)


def test_a_checkpoint_is_loaded_by_its_name(tmp_path):
    cfg = Config(**SMALL, arch="resnet18")
    model = Model.from_config(cfg)
    torch.save({"teacher": model.teacher.state_dict(), "args": cfg.to_dict()}, tmp_path / "c.pth")
    images = torch.rand(2, 3, 64, 64)
    loaded = load_backbone(tmp_path / "c.pth")
    with torch.no_grad():
        assert torch.equal(loaded(images), model.teacher.backbone.eval()(images))


@pytest.mark.parametrize(
    "name, meant",
    [
        ("resnet_18", "resnet18"),
        ("ResNet18", "resnet18"),
        ("torchvision.models.resnet50", "resnet50"),
        ("dino_resnet50", "resnet50"),
        ("resnet", "resnet18"),
        ("ViT-L/16", "vit_l_16"),
        ("convnext-tiny", "convnext_tiny"),
    ],
)
def test_a_name_that_is_nearly_one_is_suggested(name, meant):
    with pytest.raises(ValueError, match=rf"Did you mean {meant}\?"):
        Model.from_config(Config(arch=name))


def test_what_is_no_classifier_is_not_suggested_as_a_vit():
    with pytest.raises(ValueError, match="'raft_small' is not known") as refusal:
        Model.from_config(Config(arch="raft_small"))
    assert "Did you mean" not in str(refusal.value)
