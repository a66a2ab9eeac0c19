"""Attention maps on attention made by hand: what is kept, where it lies, and how much of it is on the object."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dinofast.evaluate.attention_maps import attention_maps, keep_mass, mass_on_mask, picture


class Fixed(nn.Module):
    """A backbone whose CLS token attends as told: rows (heads, patches)."""

    def __init__(self, cls_row):
        super().__init__()
        self.cls_row = torch.as_tensor(cls_row)

    def get_last_selfattention(self, x):
        heads, patches = self.cls_row.shape
        attention = torch.full((len(x), heads, patches + 1, patches + 1), 9.0)          # all but the CLS row must be ignored
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
    maps = attention_maps(Fixed([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]), torch.zeros(1, 3, 4, 4), keep=0.6)
    np.testing.assert_array_equal(maps[0, 0], np.kron([[0, 0], [1, 1]], np.ones((2, 2))))
    np.testing.assert_array_equal(maps[0, 1], np.kron([[1, 0], [0, 0]], np.ones((2, 2))))


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_the_kept_mass(share):
    """At least the share, the largest first, and no entry more than is needed."""
    attention = torch.rand(20, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
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
    maps = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]], [[8.0, 0.0], [2.0, 0.0]]]])          # one image, two heads; any scale
    masks = torch.tensor([[[1.0, 0.0], [0.5, 0.0]]])
    torch.testing.assert_close(mass_on_mask(maps, masks), torch.tensor([[0.375, 0.9]]))


def test_a_backbone_without_attention():
    with pytest.raises(ValueError, match="A Flatten has no attention"):
        attention_maps(nn.Flatten(), torch.zeros(1, 3, 8, 8))


def test_sizes_that_are_not_whole_patches():
    with pytest.raises(ValueError, match="10 x 8 pixels are not whole patches"):
        attention_maps(Fixed(torch.ones(1, 4)), torch.zeros(1, 3, 10, 8))


def test_picture():
    image = torch.zeros(2, 3, 4, 4)
    image[1, 0] = 1.0                                                                    # second row red
    heat = torch.zeros(2, 4, 4)
    heat[:, 2:] = torch.tensor([0.001, 7.0])[:, None, None]                              # each map to its own largest value
    sheet = np.asarray(picture([("image", image), ("map", heat)], scale=5, gap=6))
    assert sheet.shape == (2 * 26 + 6 + 22, 2 * 26 + 6, 3)
    first, second = sheet[28:48], sheet[54:74]
    assert (first[:, 6:26] == 0).all() and (second[:, 6:26] == (255, 0, 0)).all()
    assert (first[:, 32:52] == second[:, 32:52]).all()
    assert first[:10, 32:52].sum() < first[10:, 32:52].sum() / 50
