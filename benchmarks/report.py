"""Renders the tables of README.md from the committed results: `python benchmarks/report.py` rewrites them in place.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test checks that README and results agree.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def demo() -> str:
    """k-NN accuracy and attention of `make demo` for every seed in results/demo-seed*.json."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo-seed*.json"))]
    head = ("seed", "raw pixels", "untrained", "**trained**", "within palette pairs: raw, untrained, **trained**",
            "attention on the object: untrained, **trained** (area)", "training")
    rows = []
    for run in runs:
        raw, before, after = run["raw_pixels"], run["untrained"], run["trained"]

        def share(value: float) -> str:
            return f"{value:.1%}"

        def mean(values: list[float]) -> str:
            return f"{sum(values) / len(values):.0%}"

        rows.append((str(run["seed"]), share(raw["knn"]), share(before["knn"]), f"**{share(after['knn'])}**",
                     f"{share(raw['knn_within_palette'])}, {share(before['knn_within_palette'])}, "
                     f"**{share(after['knn_within_palette'])}**",
                     f"{mean(before['attention_on_object'])}, **{mean(after['attention_on_object'])}** "
                     f"({run['object_area']:.0%})",
                     f"{run['steps']} steps, {run['train_seconds']:.0f} s"))
    devices = sorted({f"{run['device']}, torch {run['versions']['torch']}, {run['date']}" for run in runs})
    how = f"`dinofast demo --seed N` (`make demo` is seed 0), k = {runs[0]['k']}, {runs[0]['n_val']} unseen images"
    return f"{table(head, rows)}\n\n{how}; {'; '.join(devices)}."


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES = {"demo": demo}


def render(text: str) -> str:
    """The text with every marked table made anew."""
    for name, make in TABLES.items():
        place = f"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, n = re.subn(place, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.S)
        if n != 1:
            raise ValueError(f"README.md has {n} places for the table '{name}': expected one.")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
