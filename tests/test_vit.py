import golden
import pytest
import torch

from dinofast import VisionTransformer, vit_base, vit_small, vit_tiny

TINY = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3)


@pytest.fixture(scope="module")
def official():
    model = VisionTransformer(img_size=[32], **TINY)
    model.load_state_dict(golden.load("vit.npz", "state."))
    return model.eval()


@pytest.mark.parametrize("size", ["native", "local", "large", "wide"])
def test_official_outputs(official, size):
    case = golden.load("vit.npz", f"{size}.")
    with torch.no_grad():
        torch.testing.assert_close(official(case["x"]), case["cls"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(official.get_last_selfattention(case["x"]), case["attention"], rtol=1e-5, atol=1e-6)
        layers = torch.stack(official.get_intermediate_layers(case["x"], n=2))
        torch.testing.assert_close(layers, case["layers"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make, millions", [(vit_tiny, 5.52), (vit_small, 21.67), (vit_base, 85.80)])
def test_published_sizes(make, millions):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = vit_tiny()
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.blocks[0].mlp.fc1.bias.any() and (model.norm.weight == 1).all() and model.norm.eps == 1e-6


def test_stochastic_depth_grows_over_the_depth():
    model = VisionTransformer(img_size=[32], drop_path_rate=0.2, **TINY)
    assert model.drop_path_rates == pytest.approx([0.0, 0.1, 0.2])


def test_positions_receive_gradient_through_interpolation():
    model = VisionTransformer(img_size=[32], **TINY)
    model(torch.randn(2, 3, 16, 16))[:, 0].sum().backward()
    assert model.pos_embed.grad[:, 1:].abs().sum() > 0


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="embed_dim 50 .* num_heads 3"):
        VisionTransformer(embed_dim=50, num_heads=3)
