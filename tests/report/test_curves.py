"""Line charts: every point where its numbers say, and nothing that a browser cannot read."""

import math
import re
from xml.etree import ElementTree

import pytest

from dinofast.report.curves import BOTTOM, HEIGHT, LEFT, MOST, RIGHT, TOP, WIDTH, Line, chart


def points(svg: str) -> list[list[tuple[float, float]]]:
    found = []
    for line in ElementTree.fromstring(svg).iter("polyline"):
        pairs = (pair.split(",") for pair in line.get("points").split())
        found.append([(float(x), float(y)) for x, y in pairs])
    return found


def ticks(svg: str) -> list[str]:
    return re.findall(r'class="tick"[^>]*>([^<]*)<', svg)


def test_lines_span_the_axes():
    (line,) = points(chart("loss", [Line("", [0, 5, 10], [1.0, 3.0, 2.0])]))
    low, high, right = HEIGHT - BOTTOM, TOP, WIDTH - RIGHT
    middle = (LEFT + right) / 2
    assert line == [(LEFT, low), (middle, high), (right, (low + high) / 2)]


def test_two_lines_share_the_axes_and_have_a_legend():
    svg = chart("loss & more", [Line("a<b", [0, 1], [0, 1]), Line("c", [0, 2], [0, 2], "#ff0000")])
    first, second = points(svg)
    assert first[1][0] == (LEFT + WIDTH - RIGHT) / 2 and second[1][0] == WIDTH - RIGHT
    assert "a&lt;b" in svg and "loss &amp; more" in svg and "#ff0000" in svg


@pytest.mark.parametrize(
    "ys, told",
    [
        ([0, 4], ["0", "1", "2", "3", "4"]),
        ([0.501, 0.549], ["0.52", "0.54"]),
        ([0, 1e-5], ["0", "5.0e-06", "1.0e-05"]),
        ([3.0, 3.0], ["2", "3", "4"]),
        ([0.0, 0.0], []),
        ([1e7, 4e7], ["1.0e+07", "2.0e+07"]),
    ],
)
def test_ticks_are_round_numbers(ys, told):
    found = ticks(chart("x", [Line("", [0, 1], ys)]))
    assert set(told) <= set(found), found


def test_what_is_no_number_is_left_out():
    svg = chart("x", [Line("", [0, 1, 2, 3], [1.0, None, math.nan, 2.0])])
    assert len(points(svg)[0]) == 2
    assert chart("x", [Line("", [0], [None])]) == chart("x", []) == ""


def test_a_point_alone_is_a_dot():
    svg = chart("x", [Line("", [3], [1.0])])
    assert "<circle" in svg and len(points(svg)[0]) == 1


def test_long_lines_are_thinned_to_means():
    n = 10 * MOST
    (line,) = points(chart("x", [Line("", range(n), [float(i % 2) for i in range(n)])]))
    assert len(line) == MOST
    assert {y for _, y in line} == {line[0][1]}  # all means are a half
