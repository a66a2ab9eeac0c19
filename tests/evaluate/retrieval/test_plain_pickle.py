"""Pickles of any protocol are read as plain values; those that name anything else run nothing."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest

from dinofast.evaluate.retrieval.plain_pickle import PickledArray, load_plain

ARRAYS = [
    np.arange(6, dtype=np.int64).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.array([1, 2, 3], ">i4"),
    np.array(["all_souls_000013", "b"]),
    np.array([b"x", b"yz"]),
    np.array([], np.int64),
    np.array([[True], [False]]),
    np.array([["a", 3]], dtype=object),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: str(a.dtype))
def test_arrays_come_back(tmp_path, protocol, array):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": [array, 3, "text", (None, 2.5)]}, protocol))
    found, *rest = load_plain(path)["a"]
    assert isinstance(found, PickledArray) and rest == [3, "text", (None, 2.5)]
    if array.dtype == object:
        assert found.array().ravel().tolist() == ["a", "3"]
    else:
        np.testing.assert_array_equal(found.array(), array)


@pytest.mark.parametrize("protocol", range(6))
def test_single_numbers_of_numpy(tmp_path, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps([np.int64(7), np.float32(0.5)], protocol))
    assert load_plain(path) == [7, 0.5]


PYTHON_2 = b"""(dp0
S'gnd'
p1
cnumpy.core.multiarray
_reconstruct
p2
(cnumpy
ndarray
p3
(I0
tp4
S'b'
p5
tp6
Rp7
(I1
(I2
tp8
cnumpy
dtype
p9
(S'i4'
p10
I0
I1
tp11
Rp12
(I3
S'<'
p13
NNNI-1
I-1
I0
tp14
bI00
S'\\x05\\x00\\x00\\x00\\xff\\x00\\x00\\x00'
p15
tp16
bs."""


def test_an_array_of_python_2(tmp_path):
    (tmp_path / "x.pkl").write_bytes(PYTHON_2)
    assert load_plain(tmp_path / "x.pkl")["gnd"].array().tolist() == [5, 255]


class Touches:
    """Unpickled as usual, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_run(tmp_path, protocol):
    path, made = tmp_path / "x.pkl", tmp_path / "made"
    data = pickle.dumps({"gnd": Touches(made)}, protocol)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x.pkl' cannot be read as plain values \(it names \w*"):
        load_plain(path)
    assert not made.exists()
    pickle.loads(data)["gnd"].close()
    assert made.exists()  # or the test would show nothing


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(OrderedDict(a=1)),
        pickle.dumps(np.zeros(2, [("a", "i4")])),
        pickle.dumps(np.zeros(2, "M8[s]")),
        pickle.dumps(np.random.default_rng),
        b"cnumpy\nf2py\n.",
        b"cnumpy\nndarray.tofile\n.",
        b"no pickle",
        pickle.dumps([1, 2, 3])[:-4],
        b"",
    ],
)
def test_what_is_not_plain_is_refused(tmp_path, data):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as plain values"):
        load_plain(tmp_path / "x.pkl")


def test_an_array_that_is_none(tmp_path):
    """Its bytes are too few, or it was never filled."""
    whole = pickle.dumps(np.arange(4), 4)
    (tmp_path / "x.pkl").write_bytes(whole.replace(b"K\x04\x85", b"K\x09\x85"))
    with pytest.raises(ValueError, match="cannot reshape"):
        load_plain(tmp_path / "x.pkl").array()
    (tmp_path / "x.pkl").write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR."
    )
    with pytest.raises(ValueError, match="without numbers"):
        load_plain(tmp_path / "x.pkl").array()
