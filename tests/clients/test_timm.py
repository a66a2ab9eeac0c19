"""timm's real models as backbones, without their weights."""

import sys

import pytest
import torch
from PIL import Image

from dinofast.checkpoint import load_backbone
from dinofast.config import Config
from dinofast.evaluate.knn import knn
from dinofast.nn.dino import Model

timm = pytest.importorskip(
    "timm", reason="timm is not installed, or does not import beside this torch", exc_type=Exception
)

SMALL = dict(
    out_dim=32,
    head_hidden_dim=16,
    head_bottleneck_dim=8,
    local_crops_number=1,
    batch_size_per_gpu=2,
    global_crops_size=64,
    local_crops_size=48,
)
WIDTHS = {
    "convnext_atto": 320,
    "edgenext_xx_small": 168,
    "efficientnet_lite0": 1280,
    "mobilevit_xxs": 320,
    "regnetx_002": 368,
    "resnet10t": 512,
    "test_mambaout": 256,
    "vit_tiny_patch16_224": 192,  # dynamic_img_size
    "xcit_nano_12_p16_224": 128,
}


@pytest.mark.parametrize("arch", WIDTHS)
def test_names_train_at_two_sizes(arch):
    model = Model.from_config(Config(**SMALL, arch=arch))
    assert model.student.head.mlp[0].in_features == WIDTHS[arch]
    assert model.notes == [f"{arch} is timm's"] and model.all_trained
    model([torch.rand(4, 3, 64, 64), torch.rand(2, 3, 48, 48)], 0.04).total.backward()
    grads = [p.grad for p in model.student.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


def test_swin_takes_crops_that_it_would_refuse_as_built():
    sizes = {"global_crops_size": 224, "local_crops_size": 96}
    arch = "swin_tiny_patch4_window7_224"
    model = Model.from_config(Config(**SMALL | sizes, arch=arch))
    assert model.student.head.mlp[0].in_features == 768


@pytest.mark.parametrize(
    ("arch", "sizes", "words"),
    [
        ("levit_128s", (224, 96), "does not take crops of 96 x 96 .*`local_crops_size` to 224"),
        ("pit_ti_224", (224, 96), "does not take crops of 96 x 96 .*`local_crops_number` 0"),
        ("test_vit", (64, 41), "does not take crops of 41 x 41 .*divisible by patch size"),
        ("mixer_s32_224", (64, 32), "does not take crops of 64 x 64 .*set `global_crops_size`"),
    ],
)
def test_fixed_sizes_are_refused_in_one_sentence(arch, sizes, words):
    options = SMALL | dict(zip(("global_crops_size", "local_crops_size"), sizes, strict=True))
    with pytest.raises(ValueError, match=f"`arch` {arch} of timm {words}"):
        Model.from_config(Config(**options, arch=arch))


def test_timm_serves_where_torchvision_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert Model.from_config(Config(**SMALL, arch="resnet18")).notes == ["resnet18 is timm's"]


@pytest.mark.parametrize("arch", ["convnext_atto", "vit_tiny_patch16_224"])
def test_knn_of_a_checkpoint(arch, tmp_path, capsys):
    cfg = Config(**SMALL, arch=arch)
    model = Model.from_config(cfg)
    torch.save({"teacher": model.teacher.state_dict(), "args": cfg.to_dict()}, tmp_path / "c.pth")
    images = torch.rand(2, 3, 64, 64)
    loaded = load_backbone(tmp_path / "c.pth")
    with torch.no_grad():
        assert torch.equal(loaded(images), model.teacher.backbone.eval()(images))
    for name, color in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            image = Image.new("RGB", (70, 70), tuple(abs(c - 9 * i) for c in color))
            image.save(tmp_path / "images" / name / f"{i}.png")
    results = knn(tmp_path / "c.pth", tmp_path / "images", nb_knn=[3], num_workers=0, device="cpu")
    assert set(results) == {3} and "3-NN classifier result" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, meant",
    [
        ("timm/resnet10t", "resnet10t"),
        ("dino_xcit_small_12_p16", "xcit_small_12_p16_224"),
        ("vit_large", "vit_large_patch16_224"),
        ("vit_smal", "vit_small"),
    ],
)
def test_a_name_that_is_nearly_one_is_suggested(name, meant):
    with pytest.raises(ValueError, match=rf"Did you mean {meant}\?"):
        Model.from_config(Config(**SMALL, arch=name))
