"""Budgets of the Triton kernels' machine code: instructions and barriers an element, and warps on a
multiprocessor.

A row holds the most instructions and barriers and the fewest warps that Triton 3.6.0 and 3.7.1
give, or 3.9.0 where that differs (26 November 2026); `over` lets 5 % more instructions pass. What a
kernel costs is told by its longest inner loop, or by the whole of it where it has none, with what
it does for the ends of tensors and rare numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ROOM = 1.05
LOADS = {
    f"16 bytes of {dtype}": 16 // size
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("float16", 2))
}


class Budget(NamedTuple):
    kernel: str
    where: dict[str, object]  # labels of the configurations that it holds for
    elements: int | str  # of a thread in the code; or what load of the loop brings how many
    # instructions and barriers an element, warps on a multiprocessor
    sm_80: tuple[float, float, int]
    sm_90: tuple[float, float, int]
    # Triton's version: the latest row that is no later than it counts
    since: tuple[int, int] = (0, 0)


FP32, BF16, FP16 = (
    {"dtype": f"torch.{name}", "whole": True} for name in ("float32", "bfloat16", "float16")
)
GRAD_FP32, GRAD_BF16, GRAD_FP16 = (
    {"grad": f"torch.{name}", "aligned": True} for name in ("float32", "bfloat16", "float16")
)
NO_COPY, COPY_BF16, COPY_FP16 = (
    {"copy": name, "aligned": True} for name in ("None", "torch.bfloat16", "torch.float16")
)
# fmt: off
BUDGETS = (
    # ---- dino_loss, an element of the logits; of _join and _finish a number that they load
    Budget("_sum_columns", FP32, "16 bytes of float32",  (8.50, 0.125, 24), (8.50, 0.125, 32)),
    Budget("_sum_columns", BF16, "16 bytes of bfloat16", (7.07, 0.125, 40), (7.07, 0.125, 40)),
    Budget("_sum_columns", FP16, "16 bytes of float16",  (6.57, 0.125, 40), (6.57, 0.125, 40)),
    Budget("_statistics", FP32, "16 bytes of float32",   (13.5, 0, 28),     (13.4, 0, 28)),
    Budget("_statistics", BF16, "16 bytes of bfloat16",  (14.3, 0, 32),     (14.2, 0, 32)),
    Budget("_statistics", FP16, "16 bytes of float16",   (14.0, 0, 32),     (14.0, 0, 32)),
    Budget("_statistics", FP32, "16 bytes of float32",   (14.8, 0, 25),     (14.8, 0, 25), (3, 9)),
    Budget("_statistics", BF16, "16 bytes of bfloat16",  (15.4, 0, 28),     (15.3, 0, 28), (3, 9)),
    Budget("_statistics", FP16, "16 bytes of float16",   (15.0, 0, 28),     (14.9, 0, 32), (3, 9)),
    Budget("_join", {}, "a load",                        (6.5, 0, 32),      (9.5, 0, 32)),
    Budget("_finish", {}, "a load",                      (7.9, 0, 48),      (7.9, 0, 48)),
    Budget("_gradient", FP32, "16 bytes of float32",     (10.2, 0, 40),     (10.2, 0, 32)),
    Budget("_gradient", BF16, "16 bytes of bfloat16",    (9.5, 0, 40),      (10.5, 0, 48)),
    Budget("_gradient", FP16, "16 bytes of float16",     (9.2, 0, 40),      (9.7, 0, 40)),
    # ---- adamw_ema_, ema_, grad_norms, an element of the tensors; _prepare: a tensor
    Budget("_square_sums", GRAD_FP32, 16, (17.5, 0.25, 64), (18.0, 0.25, 64)),
    Budget("_square_sums", GRAD_BF16, 16, (19.5, 0.25, 64), (20.0, 0.25, 64)),
    Budget("_square_sums", GRAD_FP16, 16, (19.0, 0.25, 64), (19.5, 0.25, 64)),
    Budget("_norms", {}, "a load",        (9.4, 0, 48),     (9.2, 0, 48)),
    Budget("_norms", {}, "a load",        (9.3, 0, 48),     (11.7, 0, 48), (3, 9)),
    Budget("_prepare", {}, 1,             (368, 0, 64),     (408, 0, 64)),
    Budget("_adamw_ema", NO_COPY, 8,      (148, 0, 20),     (149, 0, 20)),
    Budget("_adamw_ema", COPY_BF16, 8,    (166, 0, 20),     (168, 0, 20)),
    Budget("_adamw_ema", COPY_FP16, 8,    (165, 0, 20),     (168, 0, 20)),
    Budget("_ema", NO_COPY, 8,            (25, 0, 64),      (26, 0, 64)),
    Budget("_ema", COPY_BF16, 8,          (39, 0, 48),      (39, 0, 48)),
    Budget("_ema", COPY_FP16, 8,          (39, 0, 48),      (39, 0, 48)),
    # ---- color, a pixel, of _means and _color for all four operations; _blur: a level
    Budget("_means", {}, 4,       (244, 0, 32),  (243, 0, 32)),
    Budget("_color", {}, 4,       (247, 0, 32),  (246, 0, 32)),
    Budget("_blur", {}, "a load", (16.8, 0, 64), (16.0, 0, 64)),
    # ---- normalize, a level
    Budget("_normalize", FP32 | {"interleaved": False}, 12, (10.7, 0, 64), (10.7, 0, 64)),
    Budget("_normalize", FP32 | {"interleaved": True}, 12,  (13.4, 0, 64), (13.4, 0, 64)),
    Budget("_normalize", BF16 | {"interleaved": False}, 24, (8.0, 0, 48),  (8.0, 0, 48)),
    Budget("_normalize", BF16 | {"interleaved": True}, 24,  (10.7, 0, 48), (11.0, 0, 48)),
)
# fmt: on


def over(kernels: Iterable[dict]) -> list[str]:
    """What is over budget in the entries of ahead_of_time.py, a line each; every entry that is
    `whole` and `aligned`, or knows neither word, must have its budget."""
    found = []
    for k in kernels:
        version = tuple(map(int, k["triton"].split(".")[:2]))
        budgets = [
            b
            for b in BUDGETS
            if b.kernel == k["kernel"] and b.where.items() <= k.items() and b.since <= version
        ]
        if not budgets:
            found += [f"no budget: {k}"] if k.get("whole", True) and k.get("aligned", True) else []
            continue
        budget, code = max(budgets, key=lambda b: b.since), k["loop"] or k
        elements = (
            budget.elements
            if isinstance(budget.elements, int)
            else (
                code["loads"]
                if budget.elements == "a load"
                else code["loads_16"] * LOADS[budget.elements]
            )
        )
        now = (
            code["instructions"] / elements,
            code["barriers"] / elements,
            k["programs"] * k["warps"],
        )
        limit = getattr(budget, f"sm_{k['architecture']}")
        if now[0] > ROOM * limit[0] or now[1] > limit[1] or now[2] < limit[2]:
            found.append(
                f"{k['kernel']} {budget.where} sm_{k['architecture']}: {now[0]:.2f} instructions "
                f"and {now[1]:.3f} barriers an element, {now[2]} warps on a multiprocessor; budget "
                f"{limit}"
            )
    return found
