"""Stochastic depth: what is drawn, and that the ViT drops just that."""

from __future__ import annotations

import pytest
import torch

from dinofast import VisionTransformer
from dinofast.nn.drop_path import draw_scales
from dinofast.nn.packing import layout

CPU = torch.device("cpu")
RATES = (0.0, 0.1, 0.25, 0.6)
RUNS = ((8, 5), (20, 2))
WHERE = layout(RUNS, CPU)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(rate=0.5):
    return VisionTransformer(
        img_size=[16], patch_size=8, embed_dim=24, depth=3, num_heads=3, drop_path_rate=rate
    ).double()


def crops():
    return [torch.randn(n, 3, size, size, dtype=torch.float64) for n, size in ((8, 16), (20, 8))]


def test_scales_are_0_or_make_up_for_it_by_whole_sequences():
    scales = draw_scales(RATES, WHERE)
    assert scales[0] is None and len(scales) == 4 and draw_scales([0.0, 0.0], WHERE) == [None] * 2
    for scale, rate in zip(scales[1:], RATES[1:], strict=True):
        assert scale.shape == (2, 28) and scale.dtype == torch.float32 and not scale.requires_grad
        assert torch.isclose(scale, torch.tensor([[0.0], [1 / (1 - rate)]])[:, None]).any(0).all()


def test_scales_have_mean_1_and_both_branches_and_all_blocks_are_independent():
    """6 standard errors of 100,000 draws."""
    drawn = torch.stack(draw_scales(RATES, layout(((100_000, 1),), CPU))[1:])  # (3, 2, S)
    spread = torch.tensor([(rate / (1 - rate)) ** 0.5 for rate in RATES[1:]])  # of one draw
    assert ((drawn.mean(-1) - 1).abs() <= 6 * spread[:, None] / 100_000**0.5).all()
    correlation = torch.corrcoef(drawn.flatten(0, 1)) - torch.eye(6)
    assert correlation.abs().max() <= 6 / 100_000**0.5


def test_mask_multiplies_branches_by_what_was_drawn():
    """Every block and branch by hand, with the branches themselves taken from the block."""
    model = build()
    patches = model.patchify(crops())
    drawn, where = model.draw(patches.layout), patches.layout
    assert drawn[0] is None and all((scale == 0).any() and (scale > 0).any() for scale in drawn[1:])
    x = model.embed(patches)
    for block, scale in zip(model.blocks, [torch.ones(2, 28), *drawn[1:]], strict=True):
        attend, mlp = scale[:, where.sequence, None]
        x = x + block.attn(block.norm1(x), where) * attend
        x = x + block.mlp(block.norm2(x)) * mlp
    torch.testing.assert_close(
        model(patches._replace(drop_path=drawn)), model.norm(x[where.cls]), rtol=1e-6, atol=1e-6
    )


# ---- in the whole model
def test_mean_over_many_draws_is_the_whole_branch():
    """One block with a constant branch, which LayerNorm cannot bend: 6 standard errors of 500
    draws."""
    block, x = build().blocks[-1], torch.zeros(80, 24, dtype=torch.float64)
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.attn.proj.weight)
    torch.nn.init.ones_(block.attn.proj.bias)
    with torch.no_grad():
        drawn = draw_scales([0.5] * 500, WHERE)
        outputs = torch.stack([block(x, WHERE, one, cls_only=True)[:, 0] for one in drawn])
    assert set(outputs.unique().tolist()) == {0.0, 2.0}
    assert ((outputs.mean(0) - 1).abs() <= 6 / 500**0.5).all()


def test_same_seed_same_draws_and_evaluation_draws_nothing():
    model, batch = build(), crops()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(batch))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    state = torch.get_rng_state()
    evaluated = model.eval()(batch)
    assert (
        torch.equal(torch.get_rng_state(), state)
        and model.draw(model.patchify(batch).layout) == (None,) * 3
    )
    model.train().drop_path_rates = [0.0] * 3
    assert torch.equal(model(batch), evaluated) and torch.equal(torch.get_rng_state(), state)


def test_every_parameter_learns_and_another_draw_gives_another_output():
    model, batch = build(), crops()
    patches = model.patchify(batch)
    drawn = [model.draw(patches.layout) for _ in range(2)]
    first, second = (patches._replace(drop_path=one) for one in drawn)
    out = model(first)
    assert torch.equal(out, model(first)) and not torch.allclose(out, model(second))
    out[:, 0].sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())
