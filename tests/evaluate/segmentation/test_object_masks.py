"""The paper's Jaccard similarity on masks made by hand, and which values of which PNG are
objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast.evaluate.segmentation.object_masks import (
    Objects,
    jaccard,
    objects_of,
    read_mask,
    scores,
    voc,
)


def rectangle(top, left, bottom, right, size=8):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_jaccard_by_hand():
    kept = torch.stack([rectangle(0, 0, 4, 4), rectangle(0, 0, 8, 8), rectangle(0, 0, 0, 0)])
    objects = torch.stack([rectangle(0, 2, 4, 6), rectangle(6, 6, 8, 8)])
    expected = torch.tensor([[8 / 24, 0], [16 / 64, 4 / 64], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(jaccard(kept, objects), expected)
    # without the right half: 8 of 16 and 8 of 32
    found = jaccard(kept[:2], objects[:1], rectangle(0, 4, 8, 8))
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 0.25], dtype=torch.float64))
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert jaccard(nothing, nothing).item() == 1


def test_scores_are_of_the_best_head_of_each_object():
    """2 x 2 patches of 4 pixels: head 0 looks at the upper left patch, head 1 at the lower right,
    head 2 everywhere."""
    attention = torch.tensor(
        [[[0.9, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.5]], [[0.2, 0.2], [0.2, 0.2]]]
    )
    masks = torch.stack([rectangle(0, 0, 4, 4), rectangle(4, 4, 8, 6)])
    found = scores(attention, Objects(masks, torch.zeros(8, 8, dtype=torch.bool)), 4)
    assert found["jaccard"] == pytest.approx((1 + 0.5) / 2)
    # all objects are 24 pixels: head 0 holds 16 of them, head 1 8 of 32
    assert found["jaccard_foreground"] == pytest.approx(16 / 24)
    assert found["attention_on_object"] == pytest.approx((1 + 0.5 + 24 / 64) / 3)
    assert found["attention_best_head"] == 1
    assert found["object_area"] == pytest.approx(24 / 64)


def test_void_counts_nowhere():
    attention = torch.tensor([[[0.5, 0.5], [0.0, 0.0]]])
    objects = Objects(rectangle(0, 0, 4, 4)[None], rectangle(0, 4, 4, 8))
    found = scores(attention, objects, 4)
    assert found["jaccard"] == 1 and found["attention_on_object"] == 1
    assert found["object_area"] == pytest.approx(16 / 48)


def test_threshold_decides_what_a_head_holds():
    attention = torch.tensor([[[0.55, 0.25], [0.1, 0.1]]])
    objects = Objects(rectangle(0, 0, 4, 8)[None], torch.zeros(8, 8, dtype=torch.bool))
    assert scores(attention, objects, 4, 0.5)["jaccard"] == 0.5
    assert scores(attention, objects, 4, 0.6)["jaccard"] == 1
    assert scores(attention, objects, 4, 1.0)["jaccard"] == 0.5


VALUES = np.zeros((4, 6), np.uint8)
VALUES[0, :2], VALUES[1, 2:4], VALUES[2, :] = 3, 7, 255


def test_objects_of_a_palette():
    image = Image.fromarray(VALUES)
    image.putpalette([level for level in range(256) for _ in range(3)])
    found = objects_of(image)
    np.testing.assert_array_equal(found.masks, np.stack([VALUES == 3, VALUES == 7]))
    np.testing.assert_array_equal(found.void, VALUES == 255)
    same = objects_of(Image.fromarray(VALUES))  # gray, with numbers
    assert torch.equal(same.masks, found.masks) and torch.equal(same.void, found.void)


def test_objects_in_black_and_white():
    for image in (
        Image.fromarray((VALUES == 255) * np.uint8(255)),
        Image.fromarray(VALUES == 255),
        Image.fromarray((VALUES == 255).astype(np.uint8)),
    ):
        found = objects_of(image)
        np.testing.assert_array_equal(found.masks, (VALUES == 255)[None])
        assert not found.void.any()
    assert len(objects_of(Image.new("L", (4, 4))).masks) == 0


def test_objects_with_soft_edges_and_in_color():
    ramp = np.tile(np.arange(200, dtype=np.uint8), (3, 1))
    np.testing.assert_array_equal(objects_of(Image.fromarray(ramp)).masks, (ramp >= 128)[None])
    color = np.zeros((4, 4, 3), np.uint8)
    color[0], color[1, :2] = (1, 0, 0), (0, 0, 9)
    found = objects_of(Image.fromarray(color)).masks
    assert found.sum((1, 2)).tolist() == [2, 4]  # by value: blue before red


def test_a_mask_lies_under_the_image_s_own_path(tmp_path):
    for path, value in (("val/cat/1.png", 1), ("1.png", 2), ("dog/2.png", 3)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1), value).save(tmp_path / path)

    def value(path):
        mask = read_mask(tmp_path, path)
        return mask and mask.getpixel((0, 0))

    assert value("/data/val/cat/1.jpg") == value("cat/../val/cat/1.jpg") == 1
    assert value("1.jpeg") == value("/elsewhere/cat/1.jpg") == 2
    assert read_mask(tmp_path, str(tmp_path / "1.png")) is None  # the image itself
    assert value("train/dog/2.webp") == 3 and value("train/dog/3.webp") is None


def test_voc_by_its_layout(tmp_path):
    assert voc(tmp_path) is None
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000033\n2007_000042\n")
    images, masks = voc(tmp_path)
    assert images == [str(tmp_path / "JPEGImages" / f"2007_0000{n}.jpg") for n in (33, 42)]
    assert masks == str(tmp_path / "SegmentationClass")
