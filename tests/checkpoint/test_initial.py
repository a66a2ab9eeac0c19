"""Fresh models that begin with somebody's weights: same features, and a sentence for the rest."""

import json
import re

import golden
import pytest
import torch
from foreign_layouts import dinov2, hugging_face, random_scales
from tiny import TINY, parts

from dinofast import VisionTransformer, load_backbone, vit_nano
from dinofast.checkpoint import initialize
from dinofast.checkpoint.saving import TrainState, save
from dinofast.nn.dino import Model
from dinofast.nn.packing import resampling

SIDE = TINY.global_crops_size
IMAGES = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def source(**options):
    torch.manual_seed(3)
    return vit_nano(**{"patch_size": 4, "img_size": (SIDE,), **options}).eval()


def fresh(**options):
    return Model.from_config(type(TINY)(**{**TINY.to_dict(), **options}))


def of(model, images=IMAGES):
    """Features of the student, and the teacher's are the same."""
    with torch.no_grad():
        student, teacher = (m.backbone.eval()(images) for m in (model.student, model.teacher))
    assert torch.equal(student, teacher)
    return student


def scaled(vit, scales, images=IMAGES):
    """Features with layer scales, in plain torch."""
    x = vit.embed(vit.patchify(images)).unflatten(0, (len(images), -1))
    for i, block in enumerate(vit.blocks):
        q, k, v = vit._heads(block.attn, block.norm1(x))
        attended = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + scales[i, 1] * block.attn.proj(attended.transpose(1, 2).flatten(2))
        x = x + scales[i, 2] * block.mlp(block.norm2(x))
    return vit.norm(x)[:, 0].detach()


SCALES = random_scales(2, 64)
VIT = source()
PLAIN, SCALED = VIT(IMAGES).detach(), scaled(VIT, SCALES)
LAYOUTS = {
    "bare": (VIT.state_dict(), PLAIN),
    "timm": ({**VIT.state_dict(), "head.weight": torch.zeros(10, 64)}, PLAIN),
    "lightning": ({"state_dict": {f"model.{k}": v for k, v in VIT.state_dict().items()}}, PLAIN),
    "transformers 4": (hugging_face(VIT.state_dict()), PLAIN),
    "transformers 5": (hugging_face(VIT.state_dict(), version=5), PLAIN),
    "below vit.": (
        {f"vit.{k}": v for k, v in hugging_face(VIT.state_dict()).items()}
        | {"classifier.weight": torch.zeros(10, 64)},
        PLAIN,
    ),
    "Dinov2Model 4": (hugging_face(VIT.state_dict(), SCALES), SCALED),
    "Dinov2Model 5": (hugging_face(VIT.state_dict(), SCALES, version=5), SCALED),
    "dinov2": (dinov2(VIT.state_dict(), SCALES), SCALED),
    "dinov2 in training": (
        {
            "teacher": {
                f"backbone.{k}": v for k, v in dinov2(VIT.state_dict(), SCALES, chunks=True).items()
            }
            | {"dino_head.mlp.0.weight": torch.zeros(1)}
        },
        SCALED,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*holds more than a backbone")
def test_features_are_the_source_s(layout, tmp_path):
    state, wanted = LAYOUTS[layout]
    torch.save(state, tmp_path / "w.pth")
    model = fresh()
    said = initialize(model, tmp_path / "w.pth")
    torch.testing.assert_close(of(model), wanted, rtol=0, atol=1e-5)
    assert "student and teacher begin with " in said[0]
    assert said[-1] == "it has no projection head for DINO: the head begins at random"
    assert any("layer scales are multiplied" in s for s in said) == (wanted is SCALED)
    with torch.no_grad():
        loaded = load_backbone(tmp_path / "w.pth")(IMAGES)
    torch.testing.assert_close(loaded, wanted, rtol=0, atol=1e-5)


def test_scales_matter():
    assert (PLAIN - SCALED).abs().max() > 0.1


def test_the_parts_of_a_run_come_along(tmp_path):
    model, optimizer = parts(TINY)
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        model.teacher.head.last_layer.weight_g.fill_(1)
        model.dino_loss.center.normal_()
    save(tmp_path / "checkpoint.pth", model, optimizer, None, TINY, TrainState())
    new = fresh()
    said = initialize(new, tmp_path)
    assert said[-1] == "its projection head and center are loaded, too"
    assert torch.equal(new.dino_loss.center, model.dino_loss.center)
    for each in (new.student, new.teacher):
        torch.testing.assert_close(each.state_dict(), model.teacher.state_dict(), rtol=0, atol=0)
    other = fresh()
    initialize(other, tmp_path, "student")
    torch.testing.assert_close(
        other.student.state_dict(), model.student.state_dict(), rtol=0, atol=0
    )
    narrow = fresh(out_dim=16)
    told = initialize(narrow, tmp_path)[-1]
    assert "'last_layer.weight_g' is (32, 1) in the file and (16, 1) here" in told
    assert "the head begins at random" in told


def test_an_official_run_comes_along():
    """Of which the backbone is 48 wide, by its own weights."""
    path = golden.DATA / "official_checkpoint.pth"
    state = torch.load(path, weights_only=False)["teacher"]
    sizes = {n: state[f"head.{n}"].shape for n in ("last_layer.weight_v", "mlp.0.weight")}
    (k, bottleneck), (hidden, width) = sizes["last_layer.weight_v"], sizes["mlp.0.weight"]
    depth = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("backbone.blocks."))
    patch = state["backbone.patch_embed.proj.weight"].shape[-1]
    side = patch * round((state["backbone.pos_embed"].shape[1] - 1) ** 0.5)
    options = {"out_dim": k, "head_hidden_dim": hidden, "head_bottleneck_dim": bottleneck}
    options["norm_last_layer"] = False
    model = Model.from_config(
        type(TINY)(**{**TINY.to_dict(), **options}),
        lambda: VisionTransformer((side,), patch, embed_dim=width, depth=depth, num_heads=2),
    )
    assert initialize(model, path)[-1] == "its projection head and center are loaded, too"
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_held_norms_stay_held(tmp_path):
    free = fresh(norm_last_layer=False)
    with torch.no_grad():
        free.teacher.head.last_layer.weight_g.fill_(2)
    torch.save({"teacher": free.teacher.state_dict()}, tmp_path / "c.pth")
    model = fresh()
    said = initialize(model, tmp_path / "c.pth")[-1]
    assert "held at 1 (`norm_last_layer`)" in said and "the center begins at 0" in said
    assert (model.student.head.last_layer.weight_g == 1).all()
    other = fresh(norm_last_layer=False)
    initialize(other, tmp_path / "c.pth")
    assert (other.student.head.last_layer.weight_g == 2).all()


def test_positions_of_another_grid_are_resampled_as_officially(tmp_path):
    """A table that gives at 16 pixels what the file's gives there."""
    large = source(img_size=(32,))
    torch.save(large.state_dict(), tmp_path / "w.pth")
    model = fresh()
    said = initialize(model, tmp_path / "w.pth")
    assert "its positions of 8 x 8 patches are resampled to 4 x 4, bicubically" in said
    torch.testing.assert_close(of(model), large(IMAGES).detach(), rtol=0, atol=1e-5)
    matrix = resampling(8, 4, 4, torch.device("cpu"))
    wanted = matrix @ large.pos_embed[0, 1:]
    torch.testing.assert_close(model.student.backbone.pos_embed[0, 1:], wanted, rtol=0, atol=1e-6)


def test_registers_are_left_out_and_told(tmp_path):
    state = {**dinov2(VIT.state_dict(), SCALES), "register_tokens": torch.zeros(1, 4, 64)}
    torch.save(state, tmp_path / "w.pth")
    model = fresh()
    said = " ".join(initialize(model, tmp_path / "w.pth"))
    assert "its registers (register_tokens) are left out: features differ until" in said
    torch.testing.assert_close(of(model), SCALED, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a ViT with registers"):
        load_backbone(tmp_path / "w.pth")


def drop(name):
    return {k: v for k, v in VIT.state_dict().items() if k != name}


@pytest.mark.parametrize(
    "state, words",
    [
        (source(patch_size=8).state_dict(), "these are of `arch` vit_nano with `patch_size` 8."),
        (drop("norm.bias"), "'norm.bias' is absent in the file and (64,) here"),
        ({**VIT.state_dict(), "blocks.0.gate": torch.ones(3)}, "(3,) in the file and absent here"),
        ({**drop(""), "rope_embed.periods": torch.ones(3)}, "holds weights of DINOv3 ('rope_embed"),
        ({**drop(""), "embeddings.patch_embeddings.weight": torch.ones(3)}, "weights of DINOv3"),
        ({**drop(""), "blocks.0.mlp.w12.weight": torch.ones(3)}, "DINOv2 with SwiGLU"),
        ({**drop(""), "norm.bias": torch.full((64,), torch.nan)}, "are not finite, in 'norm.bias'"),
        ({"epoch": 3}, "holds no weights, only epoch"),
    ],
)
def test_what_does_not_fit_is_an_error(state, words, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=re.escape(words)):
        initialize(fresh(), tmp_path / "w.pth")


def test_all_that_differs_is_counted(tmp_path):
    torch.save({k: v.repeat_interleave(2, 0) for k, v in VIT.state_dict().items()}, tmp_path / "w")
    n = len(VIT.state_dict())
    with pytest.raises(ValueError, match=f"'cls_token' is .* and {n - 4} more: these are of a ViT"):
        initialize(fresh(), tmp_path / "w")


@pytest.mark.parametrize(
    "config, words",
    [
        ({"num_attention_heads": 4}, "a ViT with 4 heads by its config.json, and ours"),
        ({"hidden_act": "gelu_new"}, "computes gelu_new by its config.json"),
    ],
)
def test_a_config_that_says_otherwise_is_an_error(config, words, tmp_path):
    torch.save(hugging_face(VIT.state_dict()), tmp_path / "pytorch_model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **config}))
    with pytest.raises(ValueError, match=words):
        initialize(fresh(), tmp_path)
    with pytest.raises(ValueError, match=words):
        load_backbone(tmp_path)


def test_norms_that_differ_by_a_hair_are_told(tmp_path):
    torch.save(hugging_face(VIT.state_dict()), tmp_path / "pytorch_model.pt")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "layer_norm_eps": 1e-12}')
    said = initialize(fresh(), tmp_path)
    assert "its layer norms add 1e-12 to the variance, ours 1e-06" in said
