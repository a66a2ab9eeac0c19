"""J and F of shapes whose values are known, and the dilation against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dinofast.evaluate.segmentation.davis_measures import (
    boundary,
    contour_accuracy,
    dilate,
    measure,
    region_similarity,
    statistics,
)


def square(top, left, side, size=100):
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_region_similarity_of_squares():
    """Two of 20 x 20, shifted by 5: 15 x 20 in common."""
    assert region_similarity(square(10, 10, 20), square(10, 15, 20)) == 300 / 500
    assert region_similarity(square(10, 10, 20), square(60, 60, 20)) == 0
    empty = np.zeros((100, 100), bool)
    assert region_similarity(empty, empty) == 1 and region_similarity(empty, ~empty) == 0


def test_boundary_is_one_pixel_wide_up_and_left():
    """Of a square of n pixels: a ring of n + 1, that is 4 n pixels."""
    found = boundary(square(10, 20, 8))
    ring = square(9, 19, 9) & ~square(10, 20, 7)
    np.testing.assert_array_equal(found, ring)
    assert found.sum() == 4 * 8


def test_boundary_at_the_edge_of_the_image():
    """A half plane: a line through all rows; a full image has none, as nothing lies beyond."""
    half = np.zeros((6, 8), bool)
    half[:, :3] = True
    expected = np.zeros((6, 8), bool)
    expected[:, 2] = True
    np.testing.assert_array_equal(boundary(half), expected)
    np.testing.assert_array_equal(boundary(half.T), expected.T)
    assert not boundary(np.ones((5, 5), bool)).any()
    corner = np.zeros((4, 4), bool)
    corner[3, 3] = True
    np.testing.assert_array_equal(np.argwhere(boundary(corner)), [[2, 2], [2, 3], [3, 2]])


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 30])
@pytest.mark.parametrize("shape", [(1, 1), (7, 19), (20, 9)])
def test_dilation_is_by_distance(radius, shape):
    mask = np.random.default_rng(0).random(shape) < 0.03
    slow = np.zeros(shape, bool)
    for y, x in np.ndindex(shape):
        slow[y, x] = any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in np.argwhere(mask))
    np.testing.assert_array_equal(dilate(mask, radius), slow)


def test_contours_within_the_bound_match():
    """0.008 of the diagonal of 100 x 100 is 1.13, so 2 pixels: a shift by 2 is right, one by 3 is
    not for the sides that moved."""
    assert math.ceil(0.008 * math.hypot(100, 100)) == 2
    own = square(30, 30, 40)
    assert contour_accuracy(own, own) == 1
    assert contour_accuracy(own, square(30, 32, 40)) == 1
    # of 160 pixels the 41 of the left side are out of reach, and 35 of the right one: its 6 others
    # are within 2 of the other's upper and lower sides
    assert contour_accuracy(own, square(30, 33, 40)) == pytest.approx(84 / 160)
    assert contour_accuracy(own, square(30, 33, 40), bound=0.03) == 1
    assert contour_accuracy(square(2, 2, 5), square(80, 80, 5)) == 0


def test_contours_that_are_empty():
    empty, own = np.zeros((50, 50), bool), square(10, 10, 9, 50)
    assert contour_accuracy(empty, empty) == 1
    assert contour_accuracy(empty, own) == contour_accuracy(own, empty) == 0


def test_precision_and_recall_are_not_the_same():
    """Two squares where one is right: precision 1/2, recall 1, F 2/3."""
    truth = square(10, 10, 20)
    assert contour_accuracy(truth | square(60, 60, 20), truth) == pytest.approx(2 / 3)
    assert contour_accuracy(truth, truth | square(60, 60, 20)) == pytest.approx(2 / 3)


def test_statistics_by_hand():
    """Of 9 frames the quarters are 1-3, 3-5, 5-7 and 7-9: their borders count twice."""
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    found = statistics(values)
    assert found.mean == pytest.approx(0.5) and found.recall == pytest.approx(4 / 9)
    assert found.decay == pytest.approx(0.8 - 0.2)


def test_measure_leaves_out_the_first_and_the_last_frame():
    truth = np.zeros((5, 40, 40), np.uint8)
    truth[:, 5:15, 5:15], truth[:, 20:30, 20:30] = 1, 3
    truth[1, 0, 0] = 255
    wrong = truth.copy()
    wrong[[0, -1]] = 0
    found = measure(wrong, truth)
    assert len(found) == 3  # number 2 is nowhere: right, as nothing claims to be it
    assert all(j.mean == f.mean == 1 for j, f in found)
    wrong[2][wrong[2] == 3] = 1
    found = measure(wrong, truth)
    assert [round(j.mean, 3) for j, _ in found] == [round((1 + 0.5 + 1) / 3, 3), 1, 0.667]
