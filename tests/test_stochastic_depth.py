"""Stochastic depth: what is drawn, and that the ViT leaves out just that."""

from __future__ import annotations

import pytest
import torch

from dinofast import VisionTransformer
from dinofast.nn import drop_path as stochastic_depth
from dinofast.nn import vit as vit_module
from dinofast.nn.drop_path import draw_scales, draw_stretches
from dinofast.nn.packing import layout

CPU, MODES = torch.device("cpu"), ("mask", "leave_out")
RATES = (0.0, 0.1, 0.25, 0.6)
RUNS = ((8, 5), (20, 2))
WHERE = layout(RUNS, CPU)


@pytest.fixture(autouse=True)
def seeded_and_nothing_too_little(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(vit_module, "LEAST", 0)


def build(mode, rate=0.5):
    model = VisionTransformer(img_size=[16], patch_size=8, embed_dim=24, depth=3, num_heads=3, drop_path_rate=rate).double()
    model.leave_out = mode == "leave_out"
    return model


def crops():
    return [torch.randn(n, 3, size, size, dtype=torch.float64) for n, size in ((8, 16), (20, 8))]


# ---- mask: the official way
def test_scales_are_0_or_make_up_for_it_by_whole_sequences():
    scales = draw_scales(RATES, WHERE)
    assert scales[0] is None and len(scales) == 4 and draw_scales([0.0, 0.0], WHERE) == [None] * 2
    for scale, rate in zip(scales[1:], RATES[1:], strict=True):
        assert scale.shape == (2, 28) and scale.dtype == torch.float32 and not scale.requires_grad
        assert torch.isclose(scale, torch.tensor([[0.0], [1 / (1 - rate)]])[:, None]).any(0).all()


def test_scales_have_mean_1_and_both_branches_and_all_blocks_are_independent():
    """6 standard errors of 100,000 draws."""
    drawn = torch.stack(draw_scales(RATES, layout(((100_000, 1),), CPU))[1:])                 # (3, 2, S)
    spread = torch.tensor([(rate / (1 - rate)) ** 0.5 for rate in RATES[1:]])                 # of one draw
    assert ((drawn.mean(-1) - 1).abs() <= 6 * spread[:, None] / 100_000**0.5).all()
    correlation = torch.corrcoef(drawn.flatten(0, 1)) - torch.eye(6)
    assert correlation.abs().max() <= 6 / 100_000**0.5


def test_mask_multiplies_branches_by_what_was_drawn():
    """Every block and branch by hand, with the branches themselves taken from the block."""
    model = build("mask")
    patches = model.patchify(crops())
    drawn, where = model.draw(patches.layout), patches.layout
    assert drawn[0] is None and all((scale == 0).any() and (scale > 0).any() for scale in drawn[1:])
    x = model.embed(patches)
    for block, scale in zip(model.blocks, [torch.ones(2, 28), *drawn[1:]], strict=True):
        attend, mlp = scale[:, where.sequence, None]
        x = x + block.attn(block.norm1(x), where) * attend
        x = x + block.mlp(block.norm2(x)) * mlp
    torch.testing.assert_close(model(patches._replace(drop_path=drawn)), model.norm(x[where.cls]), rtol=1e-6, atol=1e-6)


# ---- leave_out: the official draw, computed for those that stay
def scales_of_stretches(stretches):
    scales = torch.zeros(len(WHERE.cls))
    for i, part in enumerate(scales.split(stretches.sequences)):
        part.fill_(0.0 if i % 2 else stretches.factor)
    return scales


def test_what_is_left_out_is_what_the_mask_would_drop():
    states = []
    for draw in (draw_scales, draw_stretches):
        torch.manual_seed(5)
        states.append((draw(RATES, WHERE), torch.get_rng_state()))
    (masks, state), (pairs, other_state) = states
    assert torch.equal(state, other_state) and masks[0] is pairs[0] is None
    for scales, pair in zip(masks[1:], pairs[1:], strict=True):
        for scale, stretches in zip(scales, pair, strict=True):
            assert torch.equal(scales_of_stretches(stretches), scale) and (scale == 0).any()
            assert sum(stretches.tokens) == 80 and len(stretches.tokens) == len(stretches.sequences)
            assert (sum(stretches.tokens[::2]) + stretches.blank) % stochastic_depth.ROUND == 0
            lengths = [tokens for n, tokens in stretches.where.runs for _ in range(n)]
            assert lengths[:len(lengths) - bool(stretches.blank)] == [5] * (scale[:8] > 0).sum() + [2] * (scale[8:] > 0).sum()


NAMED = {"all stay": [2.0] * 28, "none stays": [0.0] * 28, "first goes": [0.0] + [1.5] * 27, "last goes": [1.5] * 27 + [0.0],
         "a size goes": [0.0] * 8 + [2.0] * 20, "the other goes": [2.0] * 8 + [0.0] * 20, "every second": [0.0, 2.0] * 14}


@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("scale", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("whole", [1, 7, 64])
def test_leaving_out_is_the_mask(scale, cls_only, whole, monkeypatch):
    """Values and gradients, of the input too; a branch that nothing goes through has gradients of 0, not none."""
    monkeypatch.setattr(stochastic_depth, "ROUND", whole)
    block, x = build("leave_out").blocks[-1], torch.randn(80, 24, dtype=torch.float64, requires_grad=True)
    scales = torch.tensor([scale, scale[::-1]], dtype=torch.float64)
    pair = tuple(stochastic_depth._stretches(one, WHERE) for one in scales.tolist())
    left_out, masked = block(x, WHERE, pair, cls_only), block(x, WHERE, scales, cls_only)
    torch.testing.assert_close(left_out, masked, rtol=1e-12, atol=1e-13)
    leaves, upstream = [x, *block.parameters()], torch.randn_like(masked)
    for a, b in zip(*[torch.autograd.grad(y, leaves, upstream) for y in (left_out, masked)], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_small_work_is_masked(monkeypatch):
    model = build("leave_out")
    monkeypatch.setattr(vit_module, "LEAST", 2 * 24**2 + 1)                                    # local crops: CLS and a patch
    assert isinstance(model.draw(WHERE)[1], torch.Tensor)
    monkeypatch.setattr(vit_module, "LEAST", 2 * 24**2)
    assert isinstance(model.draw(WHERE)[1], tuple)
    assert isinstance(model.draw(layout(RUNS, torch.device("meta")))[1], torch.Tensor)         # any device but a CPU


def test_what_is_small():
    """Local crops of 96 pixels are left out for a ViT-Ti and all above it, those of 8 for a ViT of 64 channels are not."""
    assert 2 * 37 * 192**2 > stochastic_depth.LEAST > 37 * 128**2 > 17 * 64**2


# ---- both, in the whole model
@pytest.mark.parametrize("mode", MODES)
def test_mean_over_many_draws_is_the_whole_branch(mode):
    """One block with a constant branch, which LayerNorm cannot bend: 6 standard errors of 500 draws."""
    block, x = build(mode).blocks[-1], torch.zeros(80, 24, dtype=torch.float64)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.attn.proj.weight)
    torch.nn.init.ones_(block.attn.proj.bias)
    with torch.no_grad():
        drawn = {"leave_out": draw_stretches, "mask": draw_scales}[mode]([0.5] * 500, WHERE)
        outputs = torch.stack([block(x, WHERE, one, cls_only=True)[:, 0] for one in drawn])
    assert set(outputs.unique().tolist()) == {0.0, 2.0}
    assert ((outputs.mean(0) - 1).abs() <= 6 / 500**0.5).all()


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_draws_and_evaluation_draws_nothing(mode):
    model, batch = build(mode), crops()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(batch))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    state = torch.get_rng_state()
    evaluated = model.eval()(batch)
    assert torch.equal(torch.get_rng_state(), state) and model.draw(model.patchify(batch).layout) == (None,) * 3
    model.train().drop_path_rates = [0.0] * 3
    assert torch.equal(model(batch), evaluated) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_learns_and_another_draw_gives_another_output(mode):
    model, batch = build(mode), crops()
    patches = model.patchify(batch)
    drawn = [model.draw(patches.layout) for _ in range(2)]
    first, second = (patches._replace(drop_path=one) for one in drawn)
    out = model(first)
    assert torch.equal(out, model(first)) and not torch.allclose(out, model(second))
    out[:, 0].sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
