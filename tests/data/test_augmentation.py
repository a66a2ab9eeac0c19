"""The plan: the generator against published answers, the box rule against a scalar one, every
probability and range."""

import math

import numpy as np
import pytest

from dinofast.data.augmentation import TRIES, VIEW, View, boxes, uniforms
from dinofast.data.augmentation import draw as draw_all_but_boxes
from dinofast.data.philox import philox
from dinofast.data.sampler import epoch_order

BLUR = (0.1, 2.0)
VIEWS = (
    View(224, (0.4, 1.0), blur_p=1.0, solarize_p=0.0, blur_radius=BLUR),
    View(224, (0.4, 1.0), blur_p=0.1, solarize_p=0.2, blur_radius=BLUR),
    *[View(96, (0.05, 0.4), blur_p=0.5, solarize_p=0.0, blur_radius=BLUR)] * 8,
)
N = 2000  # images; with ten views each, 20,000 views
SIZE = (375, 500)


def draw(seed, epoch, samples, sizes, views):
    """The plan of a batch, VIEW (B, V), of images of these sizes."""
    drawn = draw_all_but_boxes(seed, epoch, samples, views)
    return np.stack([drawn.plan(b, *size) for b, size in enumerate(np.asarray(sizes).tolist())])


@pytest.fixture(scope="module")
def drawn():
    return draw(0, 0, np.arange(N), np.tile(SIZE, (N, 1)), VIEWS)


@pytest.mark.parametrize(
    "counter, key, answer",
    [  # Random123, kat_vectors, philox4x32 10
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert " ".join(f"{word:08x}" for word in philox(*counter, key)) == answer


def test_philox_is_the_same_one_by_one_and_in_bulk():
    bulk = philox(np.arange(5)[:, None], 7, np.arange(3), 9, 2**40 + 1)
    assert bulk.shape == (5, 3, 4) and bulk.dtype == np.uint32
    for i in range(5):
        for j in range(3):
            assert (bulk[i, j] == philox(i, 7, j, 9, 2**40 + 1)).all()


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_epoch_order_is_a_permutation(n):
    order = epoch_order(3, 5, n)
    assert order.dtype == np.int64 and (np.sort(order) == np.arange(n)).all()


def test_epoch_order_changes_with_epoch_and_seed_and_leaves_no_trace_of_the_index():
    first = epoch_order(0, 0, 1000)
    for other in (
        epoch_order(0, 1, 1000),
        epoch_order(1, 0, 1000),
        epoch_order(2**32, 0, 1000),
        np.arange(1000),
    ):
        assert (first == other).sum() < 10  # 1 expected
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / math.sqrt(1000)


def test_draw_depends_on_nothing_but_its_key(drawn):
    samples = np.array([1234, 5, 77])
    sizes = np.tile(SIZE, (3, 1))
    assert (draw(0, 0, samples, sizes, VIEWS) == drawn[samples]).all()
    assert (draw(0, 0, samples[:1], sizes[:1], VIEWS[:4])[0] == drawn[1234, :4]).all()
    for seed, epoch in ((1, 0), (0, 1), (2**32, 0), (2**62, 0)):
        other = draw(seed, epoch, samples, sizes, VIEWS)
        assert (other["factors"] != drawn[samples]["factors"]).all()


def test_numbers_are_uniform_and_unrelated():
    u = uniforms(0, 0, np.arange(N), 10)  # (N, V, blocks, 4)
    # 0.3 chance pairs
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u[:100])) > u[:100].size - 5
    columns = u[:, :2].reshape(N, -1)
    assert np.abs(columns.mean(0) - 0.5).max() < 5 * math.sqrt(1 / 12 / N)
    related = np.corrcoef(
        np.concatenate([columns, uniforms(0, 1, np.arange(N), 1).reshape(N, -1)], 1).T
    )
    assert np.abs(related - np.eye(len(related))).max() < 6 / math.sqrt(N)
    # neighboring samples
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 5 / math.sqrt(u.size)


def official_box(numbers, height, width, scale):
    """The rule of torchvision's get_params for one image, written out."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for area_u, ratio_u, y_u, x_u in numbers.tolist():
        target_area = height * width * (scale[0] + area_u * (scale[1] - scale[0]))
        aspect_ratio = math.exp(low + ratio_u * (high - low))
        w = int(round(math.sqrt(target_area * aspect_ratio)))
        h = int(round(math.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            return [int(y_u * (height - h + 1)), int(x_u * (width - w + 1)), h, w]
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, int(round(width / (3 / 4)))
    elif ratio > 4 / 3:
        h, w = height, int(round(height * (4 / 3)))
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


def test_boxes_follow_the_official_rule():
    sizes = np.array(
        [
            (375, 500),
            (500, 375),
            (1, 1),
            (1, 2),
            (2, 1),
            (1, 900),
            (900, 1),
            (30, 300),
            (300, 31),
            (224, 224),
            (9, 7),
            (4000, 5),
        ]
        * 60
    )
    u = uniforms(1, 2, np.arange(len(sizes)), len(VIEWS))[:, :, :TRIES]
    tries = draw_all_but_boxes(1, 2, np.arange(len(sizes)), VIEWS).tries
    fallbacks = 0
    for b, (height, width) in enumerate(sizes.tolist()):
        got = boxes(tries[b], height, width)
        for v, view in enumerate(VIEWS):
            want = official_box(u[b, v], height, width, view.scale)
            assert list(got[v]) == want, (height, width, v)
            y, x, h, w = want
            assert 0 <= y and y + h <= height and 0 <= x and x + w <= width and h >= 1 and w >= 1
            fallbacks += want == official_box(u[b, v, :0], height, width, view.scale)
    assert fallbacks > 100  # the long images do reach the central box


def test_boxes_are_those_drawn_for_a_whole_batch():
    """The same numbers by NumPy, as they were drawn when sizes were known beforehand: a resumed run
    sees the same crops."""
    sizes = np.random.default_rng(0).integers(1, 900, (300, 2))
    u = uniforms(7, 3, np.arange(300), len(VIEWS))[:, :, :TRIES]
    height, width = sizes.T[:, :, None, None]
    low, high = np.array([v.scale for v in VIEWS]).T[:, :, None]
    area = height * width * (low + u[..., 0] * (high - low))
    ratio = np.exp(math.log(3 / 4) + u[..., 1] * (math.log(4 / 3) - math.log(3 / 4)))
    w, h = (np.rint(np.sqrt(x)).astype(np.int64) for x in (area * ratio, area / ratio))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.argmax(-1)[..., None]
    w, h, y, x = (np.take_along_axis(a, first, -1)[..., 0] for a in (w, h, u[..., 2], u[..., 3]))
    want = np.stack(
        [
            (y * (height[..., 0] - h + 1)).astype(int),
            (x * (width[..., 0] - w + 1)).astype(int),
            h,
            w,
        ],
        -1,
    )
    got = draw(7, 3, np.arange(300), sizes, VIEWS)["box"]
    assert (got == want)[fits.any(-1)].all() and 0.5 < fits.any(-1).mean() < 1


def close(hits, p):
    """The share of hits lies within four standard errors of p (exactly p for 0 and 1)."""
    return abs(hits.mean() - p) <= 4 * math.sqrt(p * (1 - p) / hits.size)


def test_probabilities_are_the_official_ones(drawn):
    assert drawn.shape == (N, 10) and drawn.dtype == VIEW
    assert (drawn["size"] == [224, 224] + [96] * 8).all()
    for views in (drawn[:, 0], drawn[:, 1], drawn[:, 2:].ravel()):
        assert (
            close(views["flip"], 0.5) and close(views["jitter"], 0.8) and close(views["gray"], 0.2)
        )
    for views, blur_p, solarize_p in (
        (drawn[:, 0], 1, 0),
        (drawn[:, 1], 0.1, 0.2),
        (drawn[:, 2:], 0.5, 0),
    ):
        assert close(views["blur_radius"] > 0, blur_p) and close(views["solarize"], solarize_p)
    orders, counts = np.unique(drawn["order"].reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, 1) == range(4)).all()
    assert (counts > 0).all() and np.abs(counts / drawn.size - 1 / 24).max() < 4 * math.sqrt(
        1 / 24 * 23 / 24 / drawn.size
    )


def test_choices_are_unrelated(drawn):
    for views in (drawn[:, 1], drawn[:, 2:].ravel()):
        blurred = views[views["blur_radius"] > 0]
        for group, names in (
            (views, ("flip", "jitter", "gray")),
            (blurred, ("flip", "jitter", "gray", "blur_radius")),
        ):
            chosen = np.column_stack(
                [
                    *(group[name] for name in names),
                    group["factors"],
                    group["order"][:, :3],
                    group["box"],
                ]
            )
            # of all choices; box edges are related to each other
            related = np.corrcoef(chosen.T.astype(float))[:-4, :]
            order = slice(len(names) + 4, len(names) + 7)
            related[order, order] = np.eye(3)  # and so are the places in a permutation
            assert np.abs(related - np.eye(*related.shape)).max() < 5 / math.sqrt(len(group))
    blurred, solarized = drawn[:, 1]["blur_radius"] > 0, drawn[:, 1]["solarize"]
    assert abs(np.corrcoef(blurred, solarized)[0, 1]) < 4 / math.sqrt(N)


def uniform_on(values, low, high, slack=0.0):
    """Within the range, give or take a share of it for whole pixels, and no further from the
    uniform distribution than Kolmogorov's 1.95 / sqrt(n), which chance exceeds once in a
    thousand."""
    spread = np.sort((values.ravel() - low) / (high - low))
    ideal = (np.arange(spread.size) + 0.5) / spread.size
    return (
        spread[0] >= -slack
        and spread[-1] <= 1 + slack
        and np.abs(spread - ideal).max() < 1.95 / math.sqrt(spread.size)
    )


def test_ranges_are_the_official_ones(drawn):
    for i, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert uniform_on(drawn["factors"][..., i], low, high)
    for views in (drawn[:, 0], drawn[:, 1], drawn[:, 2:]):
        radius = views["blur_radius"]
        assert uniform_on(radius[radius > 0], *BLUR)
    y, x, h, w = np.moveaxis(drawn["box"], -1, 0)
    share, ratio = h * w / (SIZE[0] * SIZE[1]), w / h
    # local boxes fit at the first try, so they stay uniform
    assert uniform_on(share[:, 2:], 0.05, 0.4, slack=0.01)
    assert uniform_on(np.log(ratio[:, 2:]), math.log(3 / 4), math.log(4 / 3), slack=0.03)
    assert 0.398 < share[:, :2].min() < 0.41 and share[:, :2].max() > 0.9
    room = SIZE[0] - h[:, 2:] + 1
    assert uniform_on((y[:, 2:] + 0.5) / room, 0, 1) and uniform_on(
        (x[:, 2:] + 0.5) / (SIZE[1] - w[:, 2:] + 1), 0, 1
    )
