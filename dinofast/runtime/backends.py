"""One idiom for what a machine may lack: `unavailable_reason() -> str | None` of each backend, and
`select` among them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

# for machines without a GPU
CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


class Selection(NamedTuple):
    """What was chosen, and why nothing better: None if there is nothing better, or if it was asked
    for."""

    name: str
    reason: str | None = None


def select(
    option: str,
    requested: str | None,
    reasons: Mapping[str, str | None],
    defaults: Iterable[str] | None = None,
    way_out: str = "",
) -> Selection:
    """The candidate that was asked for, or the first of `defaults` (None: of all) that is
    available.

    reasons: for each candidate why it is unavailable, None if it is available. option: where it was
    asked for, for the message. way_out: what to do about it, at the end of the message. Raises
    ValueError for a candidate that is unknown or unavailable.
    """
    if requested is None:
        order = list(reasons if defaults is None else defaults)
        chosen = next(name for name in order if reasons[name] is None)
        before = order[: order.index(chosen)]
        return Selection(
            chosen, "; ".join(f"not {name}: {reasons[name]}" for name in before) or None
        )
    if requested not in reasons:
        raise ValueError(f"`{option}` is '{requested}': choose from {', '.join(reasons)}.")
    if (reason := reasons[requested]) is not None:
        raise ValueError(f"`{option}` {requested} was asked for, but {reason}{way_out}.")
    return Selection(requested)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
