"""Runs as one page of HTML that needs nothing beside it: no script, no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .. import __version__
from ..run_folder import RunFolder
from ..runtime.distributed import pick_device
from ..runtime.words import counted, one_line, spelled
from . import compare
from .curves import COLORS, Line, chart
from .pictures import figures

_MOST_BAD = 200  # bad files listed
_STEPS = (  # title, key of metrics.jsonl
    ("loss", "loss"),
    ("teacher's entropy", "teacher_entropy"),
    ("KL divergence of student from teacher", "kl"),
    ("gradient norm", "grad_norm"),
    ("norm of the center", "center_norm"),
    ("learning rate", "lr"),
    ("images/s", "images_per_s"),
    ("share of the time spent waiting for data", "data_wait"),
)
_EPOCHS = (  # title, key of log.txt
    ("k-NN accuracy, %", "eval_knn"),
    ("RankMe", "eval_rankme"),
    ("LiDAR", "eval_lidar"),
    ("patch matching", "eval_patch_matching"),
)
_STYLE = """
:root { color-scheme: light dark; --fg: #1f2328; --dim: #59636e; --bg: #ffffff; --card: #f6f8fa;
  --edge: #d0d7de; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6edf3; --dim: #9198a1; --bg: #0d1117;
  --card: #151b23; --edge: #3d444d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1460px; padding: 24px 20px 60px; background: var(--bg);
  color: var(--fg); font: 15px/1.5 -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans",
  Arial, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 12px; }
p { margin: 4px 0; color: var(--dim); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 10px; }
svg { width: 100%; height: auto; display: block; font: 11px inherit; }
svg text { fill: var(--dim); font-size: 11px; } svg .title { fill: var(--fg); font-size: 13px;
  font-weight: 600; }
svg .grid { stroke: var(--edge); stroke-width: 1; } svg polyline { fill: none; stroke-width: 1.8; }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: 4px 14px 4px 0;
  text-align: left; border-bottom: 1px solid var(--edge); vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; }
.scroll { overflow-x: auto; } figure { margin: 0 0 20px; }
figure img { max-width: 100%; height: auto;
  border: 1px solid var(--edge); border-radius: 8px; background: #ffffff; }
figcaption { color: var(--dim); font-size: 14px; max-width: 75ch; } code { font-size: 13px; }
summary { cursor: pointer; color: var(--dim); } .dot { display: inline-block; width: 10px;
  height: 10px; border-radius: 5px; margin-right: 6px; }
"""


def page(
    runs: Sequence[RunFolder],
    with_pictures: bool = True,
    device: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> str:
    """The HTML. with_pictures: also of the runs' own images, where they are. log: told of what
    cannot be shown."""
    pick_device(device)  # tells at once where there is none such
    names = compare.names_of(runs)
    title = ", ".join(names)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>dinofast {__version__}, {time.strftime('%Y-%m-%d %H:%M')}</p>",
        _section("Results", _table(compare.results(runs), colored=len(runs) > 1)),
        _section("Scores", _charts(runs, names, _EPOCHS, "epoch", "metrics")),
        _section("Training", _charts(runs, names, _STEPS, "step", "steps")),
    ]
    if with_pictures:
        body += [
            _pictures(run, name, device, len(runs) > 1, log)
            for run, name in zip(runs, names, strict=True)
        ]
    if len(runs) > 1:
        other = compare.differences(runs)
        text = _table(other) if other.rows else "<p>All options are alike.</p>"
        body.append(_section("Options that differ", text))
    for run, name in zip(runs, names, strict=True):
        whose = f" of {name}" if len(runs) > 1 else ""
        body += [
            _section(f"Options{whose}", _options(run)),
            _section(f"Environment{whose}", _environment(run)),
            _section(f"Bad files{whose}", _bad_files(run)),
        ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · dinofast</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(filter(None, body))
        + "\n</body></html>\n"
    )


def _section(title: str, text: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{text}</section>" if text else ""


def _charts(
    runs: Sequence[RunFolder],
    names: Sequence[str],
    about: Sequence[tuple[str, str]],
    x_name: str,
    lines_of: str,
) -> str:
    cards = []
    for title, key in about:
        lines = [
            Line(
                name if len(runs) > 1 else "",
                [line[x_name] for line in getattr(run, lines_of) if key in line],
                [line[key] for line in getattr(run, lines_of) if key in line],
                COLORS[i % len(COLORS)],
            )
            for i, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        if svg := chart(title, lines, x_name):
            cards.append(f'<div class="card">{svg}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def _table(table: compare.Table, colored: bool = False) -> str:
    heads = "".join(
        f'<th class="number">{_dot(i) if colored else ""}{escape(name)}</th>'
        for i, name in enumerate(table.columns)
    )
    rows = "".join(
        f"<tr><th>{escape(name)}</th>"
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for name, cells in table.rows
    )
    return f'<div class="scroll"><table><tr><th></th>{heads}</tr>{rows}</table></div>'


def _dot(i: int) -> str:
    return f'<span class="dot" style="background:{COLORS[i % len(COLORS)]}"></span>'


def _pictures(
    run: RunFolder, name: str, device: str | None, several: bool, log: Callable[[str], None]
) -> str:
    title = f"What it learned{f': {name}' if several else ''}"
    try:
        return _section(title, "".join(figure.as_html() for figure in figures(run, device)))
    except (ValueError, OSError) as error:  # the images may be on another machine
        reason = spelled(one_line(error))
        log(f"no pictures of '{run.path}': {reason}")
        return _section(title, f"<p>No pictures: {escape(reason)}</p>")


def _options(run: RunFolder) -> str:
    if not run.options:
        return "<p>config.yaml is missing.</p>"
    rows = [(name, compare.in_words(value)) for name, value in run.options.items()]
    changes = [
        (f"after step {c['step']}", f"{c['option']}: {c['from']} became {c['to']}")
        for c in run.changes
    ]
    count = counted(len(rows), "option")
    more = f"<h3>Changed on resuming</h3>{_pairs(changes)}" if changes else ""
    return f"<details><summary>{count}</summary>{_pairs(rows)}</details>{more}"


def _environment(run: RunFolder) -> str:
    return _pairs([(name, str(value)) for name, value in run.environment.items()])


def _bad_files(run: RunFolder) -> str:
    path = Path(run.path) / "bad_files.txt"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if not lines:
        return "<p>None was met.</p>"
    more = f"<p>and {len(lines) - _MOST_BAD:,} more</p>" if len(lines) > _MOST_BAD else ""
    listed = "<br>".join(escape(line) for line in lines[:_MOST_BAD])
    count = counted(len(lines), "bad file")
    return f"<details><summary>{count}</summary><code>{listed}</code>{more}</details>"


def _pairs(rows: Sequence[tuple[str, Any]]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><th>{escape(str(name))}</th><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in rows
    )
    return f'<div class="scroll"><table>{cells}</table></div>'
