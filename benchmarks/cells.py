"""How numbers, cells and rows of the tables are written."""

from __future__ import annotations

import math


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns in which no row has anything are left out."""
    kept = [c for c in range(len(head)) if any(row[c] for row in rows)]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line[c] for c in kept) + " |" for line in lines)


def once(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Without the first cell where it is that of the row above."""
    firsts = [None, *(row[0] for row in rows)]
    return [
        ("" if row[0] == above else row[0], *row[1:])
        for row, above in zip(rows, firsts, strict=False)
    ]


def different(case: str, first: str) -> str:
    """What sets a case apart from the first one; the whole of it where nothing does."""
    parts = [part for part in case.split(", ") if part not in first.split(", ")]
    return ", ".join(parts) or case


def digits(ms: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{ms:,.{max(0, 2 - math.floor(math.log10(ms)))}f}"


def ratio(value: float | None, digits_after: int) -> str:
    """Empty where the other side was not measured."""
    return "" if value is None else f"{value:.{digits_after}f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def faster(row: dict) -> str:
    return (
        ""
        if row["times_faster_than_official"] is None
        else f"{row['times_faster_than_official']:.2f}"
    )


def gib(row: dict) -> str:
    return "" if row["extra_mib"] is None else f"{row['extra_mib'] / 1024:,.2f} GiB"


def bandwidth(row: dict) -> str:
    return f"{row['gbps']:,.0f} ({row['share_of_copy_bandwidth']:.0%})" if row["gbps"] else ""


def memory(case: dict, row: dict) -> str:
    """Beside inputs and gradient; of the loss also as a share of the student's logits."""
    if row["extra_mib"] is None:
        return "not measured"
    share = f" ({row['extra_mib'] / case['student_mib']:.0%})" if "student_mib" in case else ""
    return f"{row['extra_mib']:,.1f} MiB{share}"
