"""Models of other libraries as the beginning of a run: the features are theirs."""

from contextlib import nullcontext

import pytest
import torch

from dinofast import Config, Model, load_backbone
from dinofast.checkpoint import initialize

OPTIONS = {
    "out_dim": 8,
    "head_hidden_dim": 8,
    "head_bottleneck_dim": 8,
    "local_crops_number": 0,
    "global_crops_size": 64,
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=Exception)


@torch.no_grad()
def perturbed(model):
    """Biases, norms and scales that matter."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        p.add_(torch.randn_like(p) * (0.3 if "lambda1" in name or "gamma" in name else 0.02))
    return model.eval()


@torch.no_grad()
def begins_with(theirs, path, side=64, loads=True, **options):
    """A model begun with this file gives `theirs(images)`."""
    model = Model.from_config(Config(**{**OPTIONS, "global_crops_size": side, **options}))
    said = initialize(model, path)
    images = torch.randn(2, 3, side, side)
    wanted = theirs(images)
    for each in (model.student, model.teacher):
        torch.testing.assert_close(each.backbone.eval()(images), wanted, rtol=1e-5, atol=1e-5)
    if loads:
        torch.testing.assert_close(load_backbone(path)(images), wanted, rtol=1e-5, atol=1e-5)
    return said


def left_out(said):
    begin = "left out, no part of a backbone: "
    return {name for s in said if s.startswith(begin) for name in s[len(begin) :].split(", ")}


@pytest.mark.parametrize("end", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore:.*holds more than a backbone")
def test_timm_vit(end, tmp_path):
    timm = library("timm")
    model = perturbed(timm.create_model("vit_small_patch16_224", img_size=64, num_classes=10))
    path = tmp_path / f"w{end}"
    if end == ".pth":
        torch.save(model.state_dict(), path)
    else:
        library("safetensors.torch").save_file(model.state_dict(), path)
    model.reset_classifier(0)
    said = begins_with(model, path)
    assert left_out(said) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("init_values", [None, 0.5])
def test_timm_vit_with_layer_scale(init_values, tmp_path):
    timm = library("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, num_classes=0, init_values=init_values
    )
    torch.save(perturbed(model).state_dict(), tmp_path / "w.pth")
    said = begins_with(model, tmp_path / "w.pth", side=48, arch="vit_tiny")
    assert any("layer scales" in sentence for sentence in said) == (init_values is not None)


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "vit_small_patch16_224"])
def test_timm_by_name(arch, tmp_path):
    timm = library("timm")
    model = perturbed(timm.create_model(arch, num_classes=10))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    model.reset_classifier(0)
    side = 224 if "vit" in arch else 64
    begins_with(model, tmp_path / "w.pth", side=side, loads=False, arch=arch)


def test_torchvision_by_name(tmp_path):
    models = library("torchvision.models")
    model = perturbed(models.resnet18(weights=None))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    model.fc = torch.nn.Identity()
    said = begins_with(model, tmp_path / "w.pth", loads=False, arch="resnet18")
    assert left_out(said) == {"fc.weight", "fc.bias"}


SIZES = {"hidden_size": 192, "num_attention_heads": 3, "image_size": 64, "layer_norm_eps": 1e-6}


def vit_model(pooler=False, **options):
    transformers = library("transformers")
    config = transformers.ViTConfig(**SIZES, intermediate_size=768, **options)
    model = perturbed(transformers.ViTModel(config, add_pooling_layer=pooler))
    return model, lambda images: model(images).last_hidden_state[:, 0]


def dinov2_model(name="Dinov2"):
    transformers = library("transformers")
    config = getattr(transformers, f"{name}Config")(**SIZES, patch_size=16)
    model = perturbed(getattr(transformers, f"{name}Model")(config))
    return model, lambda images: model(images).last_hidden_state[:, 0]


@pytest.mark.parametrize("make", [vit_model, dinov2_model], ids=["ViT", "DINOv2"])
@pytest.mark.parametrize("how", ["folder", "file", "state_dict"])
def test_transformers(make, how, tmp_path):
    model, theirs = make()
    path = tmp_path
    if how == "state_dict":  # by the names of the modules, which differ from those of files
        path = tmp_path / "w.pth"
        torch.save(model.state_dict(), path)
    else:
        model.save_pretrained(tmp_path)
        path = path if how == "folder" else path / "model.safetensors"
    warns = pytest.warns(match="more than a backbone") if make is dinov2_model else nullcontext()
    with warns:
        said = begins_with(theirs, path, arch="vit_tiny")
    assert any("layer scales" in sentence for sentence in said) == (make is dinov2_model)
    if make is dinov2_model:
        assert left_out(said) == {"mask_token"}


def test_a_classifier_of_transformers(tmp_path):
    transformers = library("transformers")
    config = transformers.ViTConfig(**SIZES, intermediate_size=768, qkv_bias=False)
    model = perturbed(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    begins_with(lambda x: model.vit(x).last_hidden_state[:, 0], tmp_path, arch="vit_tiny")


@pytest.mark.filterwarnings("ignore:.*holds more than a backbone")
def test_a_pooler_is_left_out(tmp_path):
    model, theirs = vit_model(pooler=True)
    model.save_pretrained(tmp_path)
    said = begins_with(theirs, tmp_path, arch="vit_tiny")
    assert left_out(said) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_registers_and_dinov3(tmp_path):
    model, _ = dinov2_model("Dinov2WithRegisters")
    model.save_pretrained(tmp_path / "v2")
    fresh = Model.from_config(Config(**OPTIONS, arch="vit_tiny"))
    assert any("its registers" in said for said in initialize(fresh, tmp_path / "v2"))
    with pytest.raises(ValueError, match="weights of a ViT with registers"):
        load_backbone(tmp_path / "v2")
    transformers = library("transformers")
    if not hasattr(transformers, "DINOv3ViTModel"):
        pytest.skip("this transformers has no DINOv3")
    config = transformers.DINOv3ViTConfig(
        hidden_size=192, num_attention_heads=3, num_hidden_layers=1, intermediate_size=768
    )
    transformers.DINOv3ViTModel(config).save_pretrained(tmp_path / "v3")
    with pytest.raises(ValueError, match="holds weights of DINOv3 .* choose an `arch` of timm"):
        initialize(fresh, tmp_path / "v3")
