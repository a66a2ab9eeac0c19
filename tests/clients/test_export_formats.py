"""What `dinofast export` writes, loaded by the programs it is for: as they are told to load it, the
features are those of the backbone, at the size of training and at another."""

import json
import warnings

import pytest
import torch

from dinofast import Config, Model, VisionTransformer, load_backbone, vit_base, vit_small, vit_tiny
from dinofast.checkpoint import arguments
from dinofast.evaluate.images import EvalTransform
from dinofast.export import export
from dinofast.nn.vit import vit_nano

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
# arch, patch, side in training; timm has a name for the second to fifth as they are
BACKBONES = {
    "nano": (vit_nano, 4, 32),
    "tiny 16": (vit_tiny, 16, 64),
    "small 16": (vit_small, 16, 96),
    "small 8": (vit_small, 8, 48),
    "tiny 14": (vit_tiny, 14, 56),
    "base 32": (vit_base, 32, 64),
}


@pytest.fixture(autouse=True)
def _offline_and_quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries deprecate parts of themselves
        yield


def timm():
    return pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception)


def transformers():
    return pytest.importorskip(
        "transformers", reason="transformers is not installed", exc_type=Exception
    )


def checkpoint(name):
    """'c.pth', and the backbone in it."""
    make, patch, side = BACKBONES[name]
    torch.manual_seed(0)
    vit = make(patch_size=patch, img_size=(side,)).eval()
    with torch.no_grad():
        for p in vit.parameters():  # biases and norms that matter
            p.add_(torch.randn_like(p) * 0.02)
    args = {"arch": make.__name__, "patch_size": patch, "global_crops_size": side}
    args |= {"image_mean": MEAN, "image_std": STD}
    torch.save(
        {"teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()}, "args": args},
        "c.pth",
    )
    return vit, side, patch


@torch.no_grad()
def same(given, backbone, side, atol=1e-5, spread=0.1):
    images = torch.randn(3, 3, side, side)
    wanted = backbone(images)
    found = given(images)
    assert found.shape == wanted.shape and wanted.std() >= spread
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=atol)


def told_of(size):
    return {"global_crops_size": size, "image_mean": MEAN, "image_std": STD}


def sizes(side, patch):
    """`image_size` options, and the sizes they stand for."""
    return ((None, side), (side + 2 * patch, side + 2 * patch))


@pytest.mark.parametrize("name", BACKBONES)
def test_timm(name):
    vit, side, patch = checkpoint(name)
    for option, size in sizes(side, patch):
        export("c.pth", "timm", "out", image_size=option)
        model = timm().create_model("local-dir:out", pretrained=True).eval()
        same(model, vit, size)
        assert arguments("out") == told_of(size)
        config = json.load(open("out/config.json"))
        by_name = timm().create_model(
            config["architecture"],
            num_classes=0,
            checkpoint_path="out/model.safetensors",
            **config["model_args"],
        )
        same(by_name.eval(), vit, size)
        data = timm().data.resolve_data_config(model=model)
        assert (data["mean"], data["std"]) == (list(MEAN), list(STD))
        assert tuple(data["input_size"]) == (3, size, size) and data["crop_pct"] == 0.875
    if name == "small 16":
        assert config["architecture"] == "vit_small_patch16_224"
        assert config["model_args"] == {"img_size": 128}
        tuned = timm().create_model("local-dir:out", pretrained=True, num_classes=5)
        assert tuned.head.out_features == 5


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_timm_s_own_models(arch):
    timm()
    cfg = Config(
        arch=arch, global_crops_size=64, local_crops_number=0, out_dim=8, head_hidden_dim=8
    )
    model = Model.from_config(cfg)
    torch.save({"teacher": model.teacher.state_dict(), "args": cfg.to_dict()}, "c.pth")
    export("c.pth", "timm", "out")
    loaded = timm().create_model("local-dir:out", pretrained=True).eval()
    same(loaded, model.teacher.backbone.eval(), 64, atol=1e-4)
    with pytest.raises(ValueError, match=f"`format` hf takes dinofast's ViTs, and this is {arch}"):
        export("c.pth", "hf", "other")


def test_timm_lacks_what_torchvision_has():
    pytest.importorskip("torchvision.models", reason="no torchvision", exc_type=Exception)
    timm()
    cfg = Config(arch="shufflenet_v2_x0_5", global_crops_size=64, local_crops_number=0, out_dim=8)
    model = Model.from_config(cfg)
    torch.save({"teacher": model.teacher.state_dict(), "args": cfg.to_dict()}, "c.pth")
    with pytest.raises(ValueError, match="timm has no model shufflenet_v2_x0_5: `format` onnx"):
        export("c.pth", "timm", "out")
    script = export("c.pth", "torchscript")
    same(torch.jit.load(script), model.teacher.backbone.eval(), 64, spread=0)


@pytest.mark.parametrize("name", ["nano", "small 16", "tiny 14"])
def test_transformers(name):
    vit, side, patch = checkpoint(name)
    library = transformers()
    for option, size in sizes(side, patch):
        export("c.pth", "hf", "out", image_size=option)
        model, told = library.ViTModel.from_pretrained(
            "out", add_pooling_layer=False, output_loading_info=True
        )
        assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.layer_norm_eps == 1e-6
        same(lambda x, m=model: m(x).last_hidden_state[:, 0], vit, size)
        auto = library.AutoModel.from_pretrained("out", add_pooling_layer=False)
        assert type(auto) is library.ViTModel
        assert arguments("out") == told_of(size)
        assert load_backbone("out").grid == size // patch
        same(load_backbone("out"), vit, size)


@pytest.mark.parametrize("name", ["nano", "tiny 16"])
def test_transformers_backbone(name):
    vit, side, patch = checkpoint(name)
    library = transformers()
    for option, size in sizes(side, patch):
        export("c.pth", "hf-dinov2", "out", image_size=option)
        model, told = library.Dinov2Backbone.from_pretrained("out", output_loading_info=True)
        assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        config = library.AutoConfig.from_pretrained("out")
        assert type(library.AutoBackbone.from_config(config)) is library.Dinov2Backbone

        def patches(images, vit=vit, rows=size // patch):
            tokens = vit.get_intermediate_layers(images)[0][:, 1:]
            return tokens.mT.unflatten(2, (rows, rows))

        same(lambda x, m=model: m(x).feature_maps[-1], patches, size)
        all_of_it = library.AutoModel.from_pretrained("out").eval()
        same(lambda x, m=all_of_it: m(x).last_hidden_state[:, 0], vit, size)
        same(load_backbone("out"), vit, size)


@pytest.mark.parametrize("format", ["hf", "hf-dinov2"])
def test_images_are_prepared_as_in_evaluation(format):
    """But for the rounding of another resize; with a center that needs none."""
    from PIL import Image

    checkpoint("nano")
    export("c.pth", format, "out")
    library = transformers()
    ramp = torch.linspace(0, 255, 91).to(torch.uint8)
    pixels = torch.stack((ramp.expand(60, 91), ramp[:60, None].expand(60, 91), ramp.expand(60, 91)))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    wanted = EvalTransform(37, 32, MEAN, STD)(image)
    for make in (library.AutoImageProcessor, library.ViTImageProcessor):
        given = make.from_pretrained("out")(image, return_tensors="pt")["pixel_values"][0]
        assert (given - wanted).abs().max() < 3 / 255 / min(STD)


@pytest.mark.parametrize("name", ["nano", "tiny 14"])
def test_onnx(name):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    vit, side, patch = checkpoint(name)
    out = export("c.pth", "onnx")
    session = onnxruntime.InferenceSession(out)
    about = json.loads(session.get_modelmeta().custom_metadata_map["dinofast"])
    assert about["mean"] == list(MEAN) and about["side"] == side

    def run(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    for size in (side, side + 2 * patch, patch):
        same(run, vit, size)
    with torch.no_grad():
        one = torch.randn(1, 3, side, 2 * side)
        torch.testing.assert_close(run(one), vit(one), rtol=1e-4, atol=1e-5)


def test_onnx_of_another_backbone():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    timm()
    cfg = Config(arch="resnet18", global_crops_size=64, local_crops_number=0, out_dim=8)
    model = Model.from_config(cfg)
    torch.save({"teacher": model.teacher.state_dict(), "args": cfg.to_dict()}, "c.pth")
    session = onnxruntime.InferenceSession(export("c.pth", "onnx"))

    def run(images):
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    for size in (64, 96):
        same(run, model.teacher.backbone.eval(), size, atol=1e-4)


@pytest.mark.parametrize("name", ["nano", "tiny 16"])
def test_torchscript_and_safetensors(name):
    vit, side, patch = checkpoint(name)
    script, weights = export("c.pth", "torchscript"), export("c.pth", "safetensors")
    for size in (side, side + patch):
        same(torch.jit.load(script), vit, size)
        same(load_backbone(weights), vit, size)
    with safetensors.safe_open(weights, "pt") as file:
        assert set(file.keys()) == set(vit.state_dict())
        assert json.loads(file.metadata()["dinofast"])["image_std"] == list(STD)
    assert isinstance(load_backbone(weights), VisionTransformer)
