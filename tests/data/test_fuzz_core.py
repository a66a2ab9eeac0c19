"""The C++ core's door, tried with plans and arguments that no program of ours makes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from numpy.random import Generator
from PIL import Image
from test_fuzz import KINDS, N_PLANS, NORM_LUT, hang_ends_the_tests
from test_native import noise, old_pillow, one

from dinofast.data import augmentation
from dinofast.data import backend_native as native
from dinofast.data.backend_pil import render as render_by_pil

pytestmark = pytest.mark.skipif(
    bool(native.unavailable_reason()), reason=native.unavailable_reason() or "here"
)

# ---- plans, straight into C++
GUARD = 64  # bytes before and after a crop, which must stay as they are


INTS = np.iinfo(np.int32)


FLOATS = np.array(
    [np.nan, np.inf, -np.inf, 1e300, -1e300, 1e9, -1e9, 5e-324, -0.0, -1, 999.9, 1000]
)


class Called(NamedTuple):
    """A plan (V,), the image (H, W, 3) it came with, and the crops, uint8 (S, S, 3); None if it was
    refused."""

    drawn: np.ndarray
    image: np.ndarray
    crops: list[np.ndarray] | None


def hostile_plan(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image and one to three views of it, in whose fields one number in some is not what it
    should be."""
    height, width = (
        rng.integers(0, 3, 2) if rng.random() < 0.1 else rng.integers(1, 70, 2)
    ).tolist()
    draw = augmentation.draw(int(rng.integers(2**32)), 0, np.arange(rng.integers(1, 4)), KINDS[:1])
    drawn = np.concatenate(
        [draw.plan(b, max(height, 1), max(width, 1)) for b in range(len(draw.views))]
    )
    drawn["size"] = rng.integers(1, 50, len(drawn))
    for name in rng.permutation(augmentation.VIEW.names)[: rng.integers(3)]:
        field = drawn[name].reshape(-1)  # a copy where it has several numbers
        kind, at = field.dtype.kind, rng.integers(len(field))
        field.view(np.uint8 if kind == "b" else field.dtype)[at] = rng.choice(
            # a switch that is 77, too
            FLOATS
            if kind == "f"
            else range(7)
            if kind == "u"
            else range(256)
            if kind == "b"
            else [
                INTS.min,
                INTS.max,
                -1,
                0,
                2**14 + 1,
                rng.integers(70),
                rng.integers(INTS.min, INTS.max),
            ]
        )
        drawn[name] = field.reshape(drawn[name].shape)
    if rng.random() < 0.05:
        drawn[0] = np.frombuffer(rng.bytes(augmentation.VIEW.itemsize), augmentation.VIEW)[0]
    return drawn, noise(height, width, int(rng.integers(99)))


def legal(view: np.void, image: np.ndarray) -> bool:
    y, x, h, w = view["box"].tolist()
    return (
        0 <= y
        and 0 <= x
        and 0 < h <= len(image) - y
        and 0 < w <= image.shape[1] - x
        and 0 < view["size"] <= 2**14
        and (
            not view["jitter"]
            or ((view["order"] < 4).all() and (np.abs(view["factors"]) < 1000).all())
        )
        and 0 <= view["blur_radius"] < 1000
    )


def call(drawn: np.ndarray, image: np.ndarray) -> Called:
    """The crops as C++ makes them, between guards."""
    allowed = all(legal(view, image) for view in drawn)
    # what is refused needs no memory
    sides = [int(view["size"]) if allowed else 1 for view in drawn]
    memory = [np.full(3 * side * side + 2 * GUARD, 77, np.uint8) for side in sides]
    try:
        native._C.multicrop(image, drawn, [m.ctypes.data + GUARD for m in memory], 0, None)
    except ValueError as refusal:
        assert not allowed, f"{refusal}: {drawn}"
        return Called(drawn, image, None)
    assert allowed, drawn
    assert all((m[:GUARD] == 77).all() and (m[-GUARD:] == 77).all() for m in memory), drawn
    crops = [m[GUARD:-GUARD].reshape(3, side, side) for m, side in zip(memory, sides, strict=True)]
    return Called(drawn, image, [crop.transpose(1, 2, 0) for crop in crops])


@pytest.fixture(scope="module")
def calls() -> list[Called]:
    with hang_ends_the_tests():
        return [call(*hostile_plan(np.random.default_rng(i))) for i in range(N_PLANS)]


def test_hostile_plans_are_refused_or_carried_out(calls: list[Called]) -> None:
    refused = [called.crops is None for called in calls]
    assert 0.2 < np.mean(refused) < 0.8


@old_pillow
def test_what_is_carried_out_is_what_pil_makes_of_it(calls: list[Called]) -> None:
    for drawn, image, crops in calls:
        for view, crop in zip(drawn, crops, strict=True) if crops else ():
            assert (crop == render_by_pil(Image.fromarray(image), view)).all(), view


VIEWS = np.concatenate([one(noise(9, 9), size=4)] * 2)


BAD_VIEWS = {
    "packed": VIEWS.astype(np.dtype([(name, VIEWS.dtype[name]) for name in VIEWS.dtype.names])),
    "floats": np.zeros((2, 9)),
    "bytes": np.zeros(2 * VIEWS.itemsize, np.uint8),
    "stride": np.repeat(VIEWS, 2)[::2],
    "backwards": VIEWS[::-1],
    "columns": VIEWS[:, None],
    "one": VIEWS[:1],
    "three": np.repeat(VIEWS, 2)[:3],
    "scalar": VIEWS[0],
    "none": None,
    "misaligned": np.frombuffer(b"\0" + VIEWS.tobytes(), VIEWS.dtype, offset=1),
    "empty": VIEWS[:0],
}


BAD_IMAGES = {
    "floats": np.zeros((9, 9, 3), np.float32),
    "signed": np.zeros((9, 9, 3), np.int8),
    "gray": noise(9, 9)[..., 0],
    "five": np.zeros((9, 9, 5), np.uint8),
    "fortran": np.asfortranarray(noise(9, 9)),
    "stride": noise(18, 9)[::2],
    "planes": noise(9, 9).transpose(2, 0, 1),
    "empty": noise(0, 9),
    "no columns": noise(9, 0),
    "none": None,
    "text": "rgb",
    "small": noise(8, 9),
    "nothing": np.zeros(0, np.uint8),
    "scalar": np.uint8(3),
}


BAD_NORM_LUTS = {
    "none": None,
    "turned": NORM_LUT.T.copy(),
    "short": NORM_LUT[:, :255].copy(),
    "flat": NORM_LUT.ravel(),
    "doubles": NORM_LUT.astype(float),
    "stride": np.repeat(NORM_LUT, 2, 1)[:, ::2],
    "two": NORM_LUT[:2],
    "empty": NORM_LUT[:0],
    "number": 1.0,
}


PLACES = np.zeros((2, 3 * 4 * 4), np.float32)


ADDRESSES = [place.ctypes.data for place in PLACES]


GOOD = {"image": noise(9, 9), "views": VIEWS, "crops": ADDRESSES, "kind": 1, "norm_lut": NORM_LUT}


BAD = [
    (name, word, value)
    for name, values in (
        ("views", BAD_VIEWS),
        ("image", BAD_IMAGES),
        ("norm_lut", BAD_NORM_LUTS),
        (
            "crops",
            {
                "null": [ADDRESSES[0], 0],
                "negative": [-1, -1],
                "few": ADDRESSES[:1],
                "none": None,
                "text": "crops",
                "floats": [0.5, 0.5],
                "beyond": [2**64, 2**64],
            },
        ),
        ("kind", {"below": -1, "above": 3, "beyond": 2**40, "none": None, "float": 1.5}),
    )
    for word, value in values.items()
]


def test_right_arguments_are_taken() -> None:
    native._C.multicrop(**GOOD)
    assert np.isin(PLACES, NORM_LUT).all()
    made = PLACES.copy()
    # a byte to spare
    native._C.multicrop(
        **GOOD | {"image": np.concatenate([GOOD["image"], noise(9, 9)[..., :1]], 2)}
    )
    assert (PLACES == made).all()


@pytest.mark.parametrize(
    ("name", "value"), [pytest.param(name, value, id=f"{name} {word}") for name, word, value in BAD]
)
def test_arguments_of_the_wrong_kind_are_refused(name: str, value: object) -> None:
    PLACES.fill(7)
    with pytest.raises((ValueError, TypeError)):
        native._C.multicrop(**GOOD | {name: value})
    assert (PLACES == 7).all()  # before anything was written
