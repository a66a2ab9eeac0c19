"""Attention maps on attention made by hand: what is kept, where, how much of it is on the object;
planted components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dinofast.evaluate.attention_maps import (
    attention_maps,
    cls_attention,
    dense_attention_maps,
    keep_mass,
    likeness,
    mass_on_mask,
    patch_features,
    pca_colors,
    principal_components,
)
from dinofast.nn import vit


class Fixed(nn.Module):
    """A backbone whose CLS token attends as told: rows (heads, patches)."""

    def __init__(self, cls_row):
        super().__init__()
        self.cls_row = torch.as_tensor(cls_row)

    def get_last_selfattention(self, x):
        heads, patches = self.cls_row.shape
        # all but the CLS row must be ignored
        attention = torch.full((len(x), heads, patches + 1, patches + 1), 9.0)
        attention[:, :, 0, 1:] = self.cls_row
        return attention


def test_maps_have_the_size_of_the_image():
    """2 x 3 patches of 4 pixels: row-major, every value repeated over its patch."""
    row = torch.arange(12.0).view(2, 6)
    maps = attention_maps(Fixed(row), torch.zeros(3, 3, 8, 12))
    assert maps.shape == (3, 2, 8, 12)
    expected = np.kron(row[1].view(2, 3).numpy(), np.ones((4, 4)))
    for image in maps:
        np.testing.assert_array_equal(image[1], expected)


def test_keep_is_decided_on_patches_for_each_head_alone():
    maps = attention_maps(
        Fixed([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]), torch.zeros(1, 3, 4, 4), keep=0.6
    )
    np.testing.assert_array_equal(maps[0, 0], np.kron([[0, 0], [1, 1]], np.ones((2, 2))))
    np.testing.assert_array_equal(maps[0, 1], np.kron([[1, 0], [0, 0]], np.ones((2, 2))))


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_the_kept_mass(share):
    """At least the share, the largest first, and no entry more than is needed."""
    attention = (
        torch.rand(20, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    )
    kept = keep_mass(attention, share)
    total = attention.sum(-1)
    assert (((attention * kept).sum(-1) / total) >= share - 1e-12).all()
    smallest = attention.where(kept, torch.inf).min(-1).values
    assert (smallest >= attention.where(~kept, -torch.inf).max(-1).values).all()
    assert (((attention * kept).sum(-1) - smallest) / total < share).all()


def test_the_official_rule_by_hand():
    """Official: ascending cumulated share above 1 - 0.6. Of equal entries the later ones stay."""
    assert keep_mass(torch.tensor([5.0, 1.0, 2.0, 2.0])).tolist() == [True, False, False, True]
    assert keep_mass(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])).sum() == 3
    assert keep_mass(torch.tensor([0.0, 3.0]), 1.0).tolist() == [False, True]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ValueError, match=f"keep is {share}"):
        keep_mass(torch.ones(4), share)


def test_mass_on_the_object():
    # one image, two heads; any scale
    maps = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[8.0, 0.0], [2.0, 0.0]]]])
    masks = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]])
    torch.testing.assert_close(mass_on_mask(maps, masks), torch.tensor([[0.375, 0.9]]))


def test_a_backbone_without_attention():
    with pytest.raises(ValueError, match="A Flatten has no attention"):
        attention_maps(nn.Flatten(), torch.zeros(1, 3, 8, 8))


def test_sizes_that_are_not_whole_patches():
    with pytest.raises(ValueError, match="10 x 8 pixels are not whole patches"):
        attention_maps(Fixed(torch.ones(1, 4)), torch.zeros(1, 3, 10, 8))


def test_one_hot_patch_lights_its_place_when_upsampled():
    """Patch (1, 2) of 2 x 4: brightest at its middle, falling to both sides, nothing in the far
    corner."""
    row = torch.zeros(1, 8)
    row[0, 6] = 0.5
    maps = attention_maps(Fixed(row), torch.zeros(1, 3, 8, 16), size=(40, 80))
    assert maps.shape == (1, 1, 40, 80) and maps.dtype == torch.float32
    y, x = divmod(int(maps[0, 0].argmax()), 80)
    assert 20 <= y < 40 and 40 <= x < 60
    assert maps.max() <= 0.5 and maps.min() >= 0  # bicubic alone would go past both
    center_of_mass = (maps[0, 0].sum(0) * (torch.arange(80) + 0.5)).sum() / maps.sum()
    assert abs(center_of_mass - 50) < 0.5
    assert maps[0, 0, :10, :20].max() < 0.02 * maps.max()  # the tail of the bicubic kernel


@pytest.mark.parametrize(("side", "grid"), [(32, 8), (64, 16), (96, 24)])
def test_larger_images_give_finer_maps(side, grid):
    backbone = vit.vit_nano().eval()
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    attention = cls_attention(backbone, images)
    assert attention.shape == (2, 2, grid, grid) and (attention.sum((-2, -1)) < 1).all()
    torch.testing.assert_close(attention_maps(backbone, images)[..., ::4, ::4], attention)
    features = patch_features(backbone, images)
    assert features.shape == (2, grid, grid, 64)
    torch.testing.assert_close(
        features.flatten(1, 2), backbone.get_intermediate_layers(images)[0][:, 1:]
    )


class Brightest(nn.Module):
    """All attention on the brightest patch of 4 pixels."""

    def get_last_selfattention(self, x):
        brightness = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)  # (B, patches)
        attention = torch.zeros(len(x), 1, brightness.shape[1] + 1, brightness.shape[1] + 1)
        attention[:, 0, 0, 1:] = nn.functional.one_hot(brightness.argmax(1), brightness.shape[1])
        return attention


def test_dense_maps_are_finer_than_patches():
    """One bright pixel at (9, 6): a tent of 7 x 7 pixels around it, highest on it, where patches
    alone give a square of 4."""
    images = torch.zeros(1, 3, 16, 16)
    images[..., 9, 6] = 1
    dense = dense_attention_maps(Brightest(), images, patch_size=4)
    assert dense.shape == (1, 1, 16, 16)
    tent = 1 - (torch.arange(16)[:, None] - torch.tensor([9, 6])).abs() / 4
    torch.testing.assert_close(dense[0, 0], tent[:, :1].clamp(min=0) * tent[:, 1].clamp(min=0))


def test_dense_maps_reach_the_borders():
    maps = dense_attention_maps(
        Fixed(torch.full((1, 4), 0.25)), torch.zeros(1, 3, 8, 8), patch_size=4
    )
    torch.testing.assert_close(maps, torch.full((1, 1, 8, 8), 0.25))


def test_patch_features_need_a_vit():
    with pytest.raises(ValueError, match="A Flatten has no patch features"):
        patch_features(nn.Flatten(), torch.zeros(1, 3, 8, 8))


def planted(shift: float = 4.0):
    """Two clusters of 30 and 70 rows in 16 dimensions, `shift` apart."""
    generator = torch.Generator().manual_seed(1)
    features = 0.3 * torch.randn(100, 16, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    return features + shift * direction * (torch.arange(100) < 30)[:, None], direction


def test_the_first_component_separates_planted_clusters():
    features, direction = planted()
    components = principal_components(features)
    assert components.shape == (100, 3) and components.dtype == torch.float32
    first = components[:, 0]
    assert (first[:30].min() > first[30:].max()) or (first[:30].max() < first[30:].min())
    assert abs(abs(first[:30].mean() - first[30:].mean()) - 4.0) < 0.3
    torch.testing.assert_close(components.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    covariance = components.t() @ components
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-3, rtol=0)
    assert covariance[0, 0] > covariance[1, 1] > covariance[2, 2]


def test_signs_of_components_are_fixed():
    """Whatever the order of the rows: the direction's largest entry is positive."""
    features, direction = planted()
    first = principal_components(features)[:, 0]
    torch.testing.assert_close(
        principal_components(features.flip(0))[:, 0].flip(0), first, atol=1e-5, rtol=0
    )
    side = direction[direction.abs().argmax()].sign()
    assert (side * (first[:30].mean() - first[30:].mean())) > 0


def test_components_past_the_rank_are_zero():
    flat = principal_components(torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))
    torch.testing.assert_close(flat.abs(), torch.tensor([[2**0.5, 0.0], [0.0, 0.0], [2**0.5, 0.0]]))
    assert (principal_components(torch.ones(5, 4)) == 0).all()


def test_likeness_to_what_is_attended():
    """One attended patch of a planted cluster finds the others of it."""
    features, _ = planted()
    attention = torch.zeros(1, 10, 10)
    attention[0, 0, 3] = 0.2
    like = likeness(features.view(1, 10, 10, 16), attention).flatten()
    assert like.shape == (100,) and like[3] == like.max() and abs(like[3] - 1) < 1e-5
    assert like[:30].min() > 0.5 > 0 > like[30:].max()


def test_pca_colors():
    features, _ = planted()
    grid = features.view(1, 10, 10, 16)
    colors = pca_colors(grid)
    assert colors.shape == (1, 3, 10, 10) and colors.min() == 0 and colors.max() == 1
    red = colors[0, 0].flatten()
    assert (red[:30].mean() - red[30:].mean()).abs() > 0.7
    foreground = (torch.arange(100) < 30).view(1, 10, 10)
    kept = pca_colors(grid, foreground)
    assert (kept.movedim(1, -1)[~foreground] == 0).all() and kept.movedim(1, -1)[
        foreground
    ].mean() > 0.2
