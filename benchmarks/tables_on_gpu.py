"""The tables of docs/benchmarks.md that only a GPU has, and all of a GPU together."""

from __future__ import annotations

import functools
import json
from collections import Counter

import tables
from cells import digits, once, rate, table
from tables import data, load, provenance, speed, step

NO_GPU = (
    "GPU: nothing has been measured on one yet, and no number is claimed; `make gpu` "
    "measures all of the above there."
)
# kind: what is in a kernel's name; the first that fits, the last is of all others
KINDS = {
    "matrix products": ("nvjet", "gemm", "splitk", "cutlass"),
    "attention": ("cudnn", "flash", "fmha"),
    "GELU": ("gelu",),
    "norms and residual": ("layer_norm", "gammabeta"),
    "loss and optimizer": ("_adamw", "_gradient", "_statistics", "_square_sums", "weight_norm"),
    "sums": ("triton_red", "reduce_kernel"),
    "other": ("",),
}


def gpu() -> str:
    """All that was measured on a GPU; one line if nothing was."""
    makers = {
        "step": step,
        "options": options,
        "probe": probe,
        "dino_loss": functools.partial(speed, "dino_loss"),
        "adamw_ema": functools.partial(speed, "adamw_ema"),
        "data": data,
    }
    blocks = [make("cuda") for name, make in makers.items() if load(name, "cuda")]
    blocks += filter(None, [tests("cuda")])
    return "\n\n".join(blocks) or NO_GPU


def probe(device_type: str) -> str:
    """What the device can do: ceilings, products, attention; and the kernels of a step, in a
    sentence each."""
    result = load("probe", device_type)
    if not result:
        return "The probe: no measurement has been committed yet."
    rows = [
        (
            case["case"],
            row["candidate"],
            digits(row["median_ms"]),
            "" if row.get("gbps") is None else f"{row['gbps']:,.0f}",
            "" if row.get("tflops") is None else digits(row["tflops"]),
        )
        for case in result["cases"]
        for row in case["rows"]
    ]
    kernels = [
        f"{case['case']}: {case['n_kernels']:,.0f} kernels, {case['kernels_us'] / 1e3:,.1f} ms "
        f"({by_kind(case['kernels'])}); the GPU idles for {case['gaps_us'] / 1e3:,.1f} ms."
        for case in result["cases"]
        if "kernels" in case
    ]
    head = ("", "", "ms", "GB/s", "TFLOP/s")
    return "\n\n".join(
        ["What the device does:", table(head, once(rows)), *kernels, provenance(result)]
    )


def by_kind(kernels: list[dict]) -> str:
    """Milliseconds of each kind, of the kernels that the file has."""
    spent = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        name = kernel["kernel"].lower()
        kind = next(kind for kind, words in KINDS.items() if any(word in name for word in words))
        spent[kind] += kernel["total_us"] / 1e3
    return ", ".join(f"{kind} {ms:.1f}" for kind, ms in spent.items() if ms >= 0.05)


def options(device_type: str) -> str:
    """Options one at a time on top of the best before, and which were kept."""
    result = load("options", device_type)
    if not result:
        return "Candidates: no measurement has been committed yet."
    rows = []
    for case in result["cases"]:
        before, after = case["rows"]
        on_top = " ".join(f"--{name} {value}" for name, value in case["on_top_of"].items())
        rows.append(
            (
                case["case"],
                on_top,
                rate(before["images_per_s"]),
                rate(after["images_per_s"]),
                f"{case['gain']:.3f}",
                "yes" if case["kept"] else "",
            )
        )
    head = ("", "on top of", "images/s before", "images/s with it", "with it / before", "1 % more")
    return "\n\n".join(
        [
            "Options of the step, each on top of what was kept before:",
            table(head, rows),
            provenance(result),
        ]
    )


def tests(device_type: str) -> str:
    """How the GPU tests ended, from results/tests-DEVICE.json; empty if there is no file."""
    path = tables.RESULTS / f"tests-{device_type}.json"
    if not path.is_file():
        return ""
    result = json.loads(path.read_text())
    found = Counter(test.get("outcome", "interrupted") for test in result["tests"].values())
    why = Counter(
        reason_in_short(test["reason"])
        for test in result["tests"].values()
        if test.get("outcome") == "skipped"
    )
    skipped = "".join(f"; skipped {n}: {reason}" for reason, n in why.most_common())
    counts = ", ".join(f"{n} {outcome}" for outcome, n in found.most_common())
    return f"GPU tests: {counts}{skipped}. {provenance(result | {'cases': [{}]})}"


def reason_in_short(reason: str) -> str:
    """The first clause of what pytest keeps: ('FILE', LINE, 'Skipped: REASON')."""
    return reason.split("Skipped: ")[-1].strip("'\") ").split(" (")[0]
