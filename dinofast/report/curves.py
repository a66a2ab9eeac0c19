"""Line charts as SVG, in the colors of the page around them. No script, no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 250  # pixels
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 34, 34
MOST = 300  # points of a line; of more, means are drawn
COLORS = ("#2f6fdb", "#d9622b", "#2a9d6f", "#a34fb8", "#b8952b", "#c43d5c")


@dataclass(frozen=True)
class Line:
    """name: in the legend, "" for none. xs, ys: equally many; what of ys is None is left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    color: str = COLORS[0]


def chart(title: str, lines: Sequence[Line], x_name: str = "step") -> str:
    """An SVG of lines over one axis; "" where there is nothing to draw. A point alone is a dot."""
    drawn = [(line, _points(line)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_axis, y_axis = _Axis.over(xs, LEFT, WIDTH - RIGHT), _Axis.over(ys, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
    ]
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts += [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{y_axis.told(value)}</text>",
        ]
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{x_axis.told(value)}</text>"
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">'
        f"{escape(x_name)}</text>"
    )
    for line, points in drawn:
        places = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in points)
        told = escape(f"{line.name or title}: {y_axis.told(points[-1][1])} at the end")
        if len(points) == 1:
            where = places.split(",")
            parts.append(f'<circle cx="{where[0]}" cy="{where[1]}" r="3" fill="{line.color}"/>')
        parts.append(
            f'<polyline points="{places}" stroke="{line.color}"><title>{told}</title></polyline>'
        )
    parts += _legend([line for line, _ in drawn if line.name])
    return "\n".join([*parts, "</svg>"])


def _legend(lines: Sequence[Line]) -> list[str]:
    """Names from the right, above the lines."""
    parts, x = [], float(WIDTH - RIGHT)
    for line in reversed(lines):
        name = line.name if len(line.name) <= 18 else line.name[:17] + "…"
        parts.append(
            f'<text class="tick" x="{x:.0f}" y="16" text-anchor="end" style="fill:{line.color}">'
            f"{escape(name)}</text>"
        )
        x -= 6.3 * len(name) + 14
    return parts


@dataclass(frozen=True)
class _Axis:
    """From `low` to `high`, at these pixels."""

    low: float
    high: float
    first: float
    last: float

    @classmethod
    def over(cls, values: Sequence[float], first: float, last: float) -> _Axis:
        low, high = min(values), max(values)
        if high - low < 1e-12 * max(abs(high), 1e-300):  # one value
            low, high = low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9
        return cls(low, high, first, last)

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)

    @property
    def step(self) -> float:
        """Between ticks: 1, 2 or 5 times a power of ten, for about four of them."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.99)

    def ticks(self) -> list[float]:
        first, step = math.ceil(self.low / self.step - 1e-9), self.step
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + i) * step for i in range(count)]

    def told(self, value: float) -> str:
        """With as many digits as tell ticks apart."""
        if not value:
            return "0"
        if abs(value) < 1e-3 or abs(value) >= 1e6:
            return f"{value:.1e}"
        digits = max(0, -math.floor(math.log10(self.step)))
        return f"{value:,.{digits}f}"


def _points(line: Line) -> list[tuple[float, float]]:
    """Those that can be drawn, in order; of more than MOST the means of as many groups."""
    pairs = zip(line.xs, line.ys, strict=True)
    points = sorted((x, y) for x, y in pairs if y is not None and math.isfinite(y))
    if len(points) <= MOST:
        return points
    ends = [round(i * len(points) / MOST) for i in range(MOST + 1)]
    groups = [points[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
