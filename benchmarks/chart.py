"""The bar chart of images/s, as SVG with a background of its own: readable on dark pages too."""

from __future__ import annotations

from html import escape

CAREFUL = "official + SDPA + compile"
SHOWN = {  # row -> fill
    "official": "#9aa4b2",
    CAREFUL: "#9aa4b2",
    "dinofast": "#2f6fdb",
    "dinofast, compiled, bf16": "#2f6fdb",
}
PRECISION = {"cpu": "fp32 unless a bar says bf16", "cuda": "official in fp16, the others in bf16"}
WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 760, 214, 132, 92, 44, 28  # pixels
FONT = "-apple-system, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"


def images_per_s(result: dict, case: dict) -> str:
    """Bars of the rows in SHOWN, as long as their images/s; below them device, batch and date."""
    rates = {
        row["candidate"]: row["images_per_s"] for row in case["rows"] if row["candidate"] in SHOWN
    }
    longest, base = max(rates.values()), rates.get("official")
    height = TOP + STEP * len(rates) + 42
    threads = f", {result['threads']} threads" if result["device_type"] == "cpu" else ""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 '
        f'{WIDTH} {height}" role="img" aria-label="Images per second of a DINO training step" '
        f'font-family="{FONT}">',
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" fill="#ffffff" '
        'stroke="#d0d7de"/>',
        _text(24, 36, "Images per second of a DINO training step", 18, "#1f2328", weight=600),
        _text(24, 60, case["case"], 13, "#59636e"),
    ]
    for i, (name, rate) in enumerate(rates.items()):
        y, length = TOP + STEP * i, (WIDTH - LEFT - RIGHT) * rate / longest
        ours = name.startswith("dinofast")
        times = f" ({rate / base:.2f} x)" if base and name != "official" else ""
        lines += [
            _text(
                LEFT - 12, y + 19, name, 13.5, "#1f2328", anchor="end", weight=600 if ours else 400
            ),
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3" '
            f'fill="{SHOWN[name]}"/>',
            _text(
                LEFT + length + 10,
                y + 19,
                f"{_digits(rate)}{times}",
                13.5,
                "#1f2328",
                weight=600 if ours else 400,
            ),
        ]
    where = f"{result['device']}{threads}; {PRECISION[result['device_type']]}; {result['date']}"
    return "\n".join([*lines, _text(24, height - 20, where, 12, "#59636e"), "</svg>", ""])


def _text(
    x: float, y: float, words: str, size: float, fill: str, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
    )


def _digits(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
