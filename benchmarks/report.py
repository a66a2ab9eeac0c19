"""Renders tables and the chart from the committed results: `python benchmarks/report.py` rewrites
them in place.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` in one of `PAGES`; a test checks that
pages and results agree.
"""

from __future__ import annotations

import functools
import re

import chart
import tables
import tables_on_gpu

PAGES = ("README.md", "docs/benchmarks.md", "docs/training.md")
TABLES = {
    "headline": tables.headline,
    "demo": tables.demo,
    "first_batch": tables.first_batch,
    "small_data": tables.small_data,
    "gpu": tables_on_gpu.gpu,
    "step-cpu": functools.partial(tables.step, "cpu"),
    "data-cpu": functools.partial(tables.data, "cpu"),
    "dino_loss-cpu": functools.partial(tables.speed, "dino_loss", "cpu"),
    "adamw_ema-cpu": functools.partial(tables.speed, "adamw_ema", "cpu"),
}


def bars() -> str:
    """The chart of images/s, of a GPU as soon as a step was measured there."""
    result = tables.load("step", "cuda") or tables.load("step", "cpu")
    return chart.images_per_s(result, max(result["cases"], key=lambda case: len(case["rows"])))


def render(pages: dict[str, str]) -> dict[str, str]:
    """The texts of PAGES with every marked table made anew. Each table stands in one of them,
    once."""
    pages = dict(pages)
    for name, make in TABLES.items():
        place, found = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", flags=re.S), 0
        for page, text in pages.items():
            pages[page], n = place.subn(lambda m, make=make: m[1] + make() + "\n" + m[2], text)
            found += n
        if found != 1:
            raise ValueError(
                f"{' and '.join(pages)} have {found} places for the table '{name}': expected one."
            )
    return pages


def main() -> None:
    for page, text in render({page: (tables.ROOT / page).read_text() for page in PAGES}).items():
        (tables.ROOT / page).write_text(text)
    (tables.RESULTS / "images_per_s.svg").write_text(bars())


if __name__ == "__main__":
    main()
