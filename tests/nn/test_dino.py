import sys
import types

import pytest
import torch
from tiny import TINY
from torch import nn

from dinofast.config import Config
from dinofast.nn.backbones import build_backbone, feature_width
from dinofast.nn.dino import Model, MultiCropWrapper


class Convolutional(nn.Module):
    """A backbone of somebody else's: no embed_dim, batch statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x):
        return self.layers(x)


def crops(n=3):
    return [torch.randn(2 * n, 3, 16, 16), torch.randn(2 * n, 3, 8, 8)]


def test_wrapper_makes_one_pass_per_size_and_keeps_the_order():
    sizes = []

    class Probe(nn.Module):
        def forward(self, x):
            sizes.append(tuple(x.shape))
            return x.mean((1, 2, 3))[:, None]

    images = [torch.full((2, 3, s, s), float(i)) for i, s in enumerate((8, 8, 4, 4, 8))]
    out = MultiCropWrapper(Probe(), nn.Identity())(images)
    assert sizes == [(4, 3, 8, 8), (4, 3, 4, 4), (2, 3, 8, 8)]
    assert out.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_teacher_is_a_frozen_copy_of_the_student():
    model = Model.from_config(TINY)
    for (name, s), t in zip(
        model.student.named_parameters(), model.teacher.parameters(), strict=True
    ):
        assert torch.equal(s, t) and not t.requires_grad, name
    model(crops(), 0.04).total.backward()
    assert all(t.grad is None for t in model.teacher.parameters())
    assert all(s.grad is not None for s in model.student.parameters() if s.requires_grad)


@pytest.mark.parametrize("local_size", [8, 16], ids=["smaller", "as large as the global crops"])
def test_teacher_sees_global_crops_and_student_all(local_size):
    """The loss is that of separate passes, the student's with stochastic depth, the teacher's
    without."""
    model = Model.from_config(
        Config(**{**TINY.to_dict(), "drop_path_rate": 0.5, "local_crops_size": local_size})
    )
    with torch.no_grad():
        model.teacher.head.mlp[0].weight.mul_(2)  # or who sees what could not be told apart
    views, locals_ = torch.randn(6, 3, 16, 16), torch.randn(6, 3, local_size, local_size)
    seen = {}
    for name in ("student", "teacher"):
        getattr(model, name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out})
        )
    torch.manual_seed(5)
    loss = model([views, locals_], 0.04).total
    together = dict(seen)
    backbone = model.student.backbone
    torch.manual_seed(5)
    student = model.student.head(backbone(backbone.pack([views, locals_])))
    torch.testing.assert_close(together["student"], student)
    assert not torch.allclose(student, model.student.head(backbone.eval()([views, locals_])))
    torch.testing.assert_close(together["teacher"], model.teacher(views))
    assert (
        student.shape == (12, 32)
        and together["teacher"].shape == (6, 32)
        and not together["teacher"].requires_grad
    )
    torch.testing.assert_close(
        loss, model.dino_loss.accumulate(student, model.teacher(views), 0.04)
    )


def test_wrapper_makes_one_packed_pass_of_a_vit_and_keeps_the_order():
    student = Model.from_config(TINY).student.double().eval()
    calls = []
    hook = student.backbone.register_forward_pre_hook(
        lambda module, args: calls.append(args[0].grids)
    )
    images = [torch.randn(2, 3, s, s, dtype=torch.float64) for s in (8, 8, 16, 16, 8)]
    out = student(images)
    assert calls == [((4, 2, 2), (4, 4, 4), (2, 2, 2))]
    hook.remove()
    torch.testing.assert_close(out, torch.cat([student(x) for x in images]))
    torch.testing.assert_close(student(student.backbone.pack(images)), out)


def test_last_layer_parameters_follow_norm_last_layer():
    frozen = Model.from_config(TINY)
    free = Model.from_config(Config(**{**TINY.to_dict(), "norm_last_layer": False}))
    assert len(frozen.last_layer_parameters()) == 1 and len(free.last_layer_parameters()) == 2


def test_same_seed_same_weights():
    a, b = Model.from_config(TINY), Model.from_config(TINY)
    c = Model.from_config(Config(**{**TINY.to_dict(), "seed": 1}))
    assert torch.equal(a.student.backbone.pos_embed, b.student.backbone.pos_embed)
    assert not torch.equal(a.student.backbone.pos_embed, c.student.backbone.pos_embed)


def test_any_module_is_a_backbone():
    model = Model.from_config(TINY, backbone=Convolutional)
    assert model.student.head.mlp[0].in_features == 7
    # the trial image left no trace
    assert model.student.backbone.layers[1].num_batches_tracked == 0
    assert torch.isfinite(model(crops(), 0.04).total)


def test_torchvision_names_work_where_the_package_imports(monkeypatch):
    def resnet50(weights=None):
        net = Convolutional()
        net.fc = nn.Linear(7, 1000)
        net.forward = lambda x: net.fc(net.layers(x))
        return net

    models = types.ModuleType("torchvision.models")
    models.resnet50 = resnet50
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    backbone = build_backbone(Config(arch="resnet50"), 0.0)
    assert isinstance(backbone.fc, nn.Identity) and feature_width(backbone, 16) == 7
    with pytest.raises(ValueError, match="'resnet51' is not known"):
        build_backbone(Config(arch="resnet51"), 0.0)


def test_timm_names_work_where_the_package_imports(monkeypatch):
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "convnet"

    def create_model(name, pretrained, num_classes, **options):
        if "dynamic_img_size" in options:
            raise TypeError("unexpected keyword argument")
        return Convolutional()

    timm.create_model = create_model
    for name in ("torchvision", "torchvision.models"):  # the second, where another test imported it
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(build_backbone(Config(arch="convnet"), 0.0), Convolutional)
    with pytest.raises(
        ValueError, match="vit_smal' is not known.*Did you mean vit_small?.*torchvision"
    ):
        build_backbone(Config(arch="vit_smal"), 0.0)


def test_batch_statistics_are_those_of_all_crops_of_a_size():
    """Also where the local crops are as large as the global ones: one pass of another backbone, as
    in the official wrapper."""
    passes = []

    class Backbone(torch.nn.Module):
        def forward(self, x):
            passes.append(x.shape[0])
            return x.mean((2, 3))

    model = Model.from_config(TINY, Backbone)
    passes.clear()
    model([torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)], 0.04)
    assert passes == [4, 8]  # teacher, student
