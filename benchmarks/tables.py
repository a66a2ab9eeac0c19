"""A table of docs/benchmarks.md or of the front page for each kind of committed result, in
Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from cells import bandwidth, different, digits, faster, gib, memory, once, rate, ratio, share, table
from chart import CAREFUL

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")  # of a step
OFFICIAL, OURS = "official", "dinofast"
PRECISION = {
    "cuda": "Steps: official in fp16, as published, the others in bf16",
    "cpu": "Steps in fp32",
}
STEP = "training step, ViT-S/16, batch of {images}"
LOSS = "loss, forward and backward, batch of {images}, {dtype}"
# by device: benchmark, what the row is of, theirs, ours
HEADLINE: dict[str, tuple[tuple[str, str, str | None, str], ...]] = {
    "cuda": (
        ("step", STEP, OFFICIAL, OURS),
        ("step", "the same, official with SDPA and torch.compile", CAREFUL, OURS),
        ("step", "the same, from JPEG files decoded by 16 CPU cores", None, "dinofast, from files"),
        ("dino_loss", LOSS, OFFICIAL, OURS),
        ("adamw_ema", "clip, AdamW and EMA", OFFICIAL, OURS),
    ),
    "cpu": (
        ("step", STEP, OFFICIAL, OURS),
        ("dino_loss", LOSS, OFFICIAL, OURS),
        ("adamw_ema", "clip, AdamW and EMA", OFFICIAL, OURS),
        ("data", "decoding and crops, one core", OFFICIAL, OURS),
    ),
}


def load(benchmark: str, device_type: str) -> dict | None:
    """results/BENCHMARK-DEVICE.json with the rows that have times; None if there is no file, or
    nothing in it."""
    path = RESULTS / f"{benchmark}-{device_type}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    # whose measurement has come to its end
    result["cases"] = [case for case in result["cases"] if "begun" not in case]
    where: dict[str, list[str]] = {}
    for case in result["cases"]:
        for flag in flagged(case):
            where.setdefault(flag, []).append(case["case"])
    result["flagged"] = [
        f"{names[0] if len(names) == 1 else f'{len(names)} cases'}, {flag.rstrip('.')}"
        for flag, names in where.items()
    ]
    cases = [
        case | {"rows": [row for row in case["rows"] if "median_ms" in row]}
        for case in result["cases"]
    ]
    result["cases"] = [case for case in cases if case["rows"]]
    return result if result["cases"] else None


def flagged(case: dict) -> list[str]:
    """What went wrong in a case and in its rows."""
    whole = [case["failed"]] if "failed" in case else []
    return whole + [
        f"{row['candidate']}: {row[what]}"
        for row in case["rows"]
        for what in ("failed", "differs")
        if what in row
    ]


def provenance(result: dict) -> str:
    """Where and how a result was measured, and what was left out."""
    commit, _, dirty = result["commit"].partition("-")
    named = result["versions"] | result["cases"][0].get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in named.items() if version)
    threads = "" if result["device_type"] == "cuda" else f", {result['threads']} threads"
    notes = [*reasons(result), *(f"Flagged: {flag}." for flag in result.get("flagged", ()))]
    return (
        f"{result['device']}{threads}; {versions}; commit "
        f"{commit[:10]}{' with changes' if dirty else ''}, {result['date']}; "
        f"`{result['command']}`. {' '.join(notes)}"
    ).strip()


def reasons(result: dict) -> list[str]:
    """Why candidates are absent, each said once."""
    return sorted(
        {f"Left out: {reason}." for case in result["cases"] for reason in case.get("left_out", ())}
    )


def headline() -> str:
    """The front page's: five rows, of the GPU as soon as there is one; then how many times faster a
    CPU is, in a sentence. From the fullest case of each result. A row that failed, or whose results
    are not the official ones, is left out."""
    (full, (rows, where)), *others = (
        (device_type, found) for device_type in HEADLINE if (found := headline_rows(device_type))
    )
    made = f"{PRECISION[full]}; torch {where['versions']['torch']}, {where['date']}."
    parts = [table((where["device"], OFFICIAL, OURS, " "), rows), made]
    for _, (rows, where) in others:
        ratios = "; ".join(f"{what}: {times}" for what, _, _, times in rows)
        parts.append(f"{where['device']}, {where['threads']} threads, {where['date']}: {ratios}.")
    return "\n\n".join(parts)


def headline_rows(device_type: str) -> tuple[list[tuple[str, ...]], dict] | None:
    """Rows, and the result of the first of them; None without any."""
    rows, where = [], []
    for benchmark, what, official, ours in HEADLINE[device_type]:
        result = load(benchmark, device_type)
        case = max(result["cases"], key=lambda case: len(case["rows"])) if result else {"rows": []}
        good = {row["candidate"]: row for row in case["rows"] if "differs" not in row}
        if ours not in good or (official and official not in good):
            continue
        both = [good[name] if name else None for name in (official, ours)]
        times = both[0] and f"**{both[0]['median_ms'] / both[1]['median_ms']:.1f} x**"
        rows.append((what.format(**case), *map(speed_of, both), times or ""))
        where.append(result)
    return (rows, where[0]) if rows else None


def speed_of(row: dict | None) -> str:
    if row is None:
        return ""
    if "images_per_s" in row:
        return f"{rate(row['images_per_s'])} images/s"
    return f"{digits(row['median_ms'])} ms"


def demo() -> str:
    """k-NN accuracy and attention of `make demo` for every seed in results/demo-seed*.json."""
    runs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("demo-seed*.json"))]
    head = (
        "seed",
        "raw pixels",
        "untrained",
        "**trained**",
        "within palette pairs: raw, untrained, **trained**",
        "attention on the object: untrained, **trained** (area)",
        "training",
    )
    rows = []
    for run in runs:
        raw, before, after = run["raw_pixels"], run["untrained"], run["trained"]

        def one_digit(value: float) -> str:
            return f"{value:.1%}"

        def mean(values: list[float]) -> str:
            return f"{sum(values) / len(values):.0%}"

        rows.append(
            (
                str(run["seed"]),
                one_digit(raw["knn"]),
                one_digit(before["knn"]),
                f"**{one_digit(after['knn'])}**",
                f"{one_digit(raw['knn_within_palette'])}, "
                f"{one_digit(before['knn_within_palette'])}, "
                f"**{one_digit(after['knn_within_palette'])}**",
                f"{mean(before['attention_on_object'])}, **{mean(after['attention_on_object'])}** "
                f"({run['object_area']:.0%})",
                f"{run['steps']} steps, {run['train_seconds']:.0f} s",
            )
        )
    devices = sorted(
        {f"{run['device']}, torch {run['versions']['torch']}, {run['date']}" for run in runs}
    )
    how = (
        f"`dinofast demo --seed N` (`make demo` is seed 0), k = {runs[0]['k']}, "
        f"{runs[0]['n_val']} unseen images"
    )
    return f"{table(head, rows)}\n\n{how}; {'; '.join(devices)}."


def first_batch() -> str:
    """Time to the first batch, from results/first_batch-cpu.json; a sentence if there is no
    file."""
    path = RESULTS / "first_batch-cpu.json"
    if not path.is_file():
        return "Time to the first batch: no measurement has been committed yet."
    result = json.loads(path.read_text())
    (case,) = result["cases"]
    rows = [
        (
            name,
            *(
                f"{case[f'{when}_{column}']:,.1f}"
                for column in ("list_s", "first_batch_s", "cpu_s")
            ),
            f"{case[f'{when}_peak_mib']:,.0f} MiB",
        )
        for name, when in (
            ("cold caches" if case["is_cold"] else "page cache", "first"),
            ("again", "again"),
        )
    ]
    head = ("", "files listed, s", "first batch, s", "CPU time of both, s", "peak memory")
    title = f"Time to the first batch of {case['batch']} over {case['files']:,} JPEGs:"
    kept = (
        f"The list keeps {case['list_bytes_an_image']:.0f} bytes an image, once for all "
        "processes of a machine."
    )
    return "\n\n".join([title, table(head, rows), f"{kept} {provenance(result)}"])


def small_data() -> str:
    """What one changed option does on three small data sets, from results/small_data-cpu.json; a
    sentence if there is no file."""
    path = RESULTS / "small_data-cpu.json"
    if not path.is_file():
        return "Small data: no measurement has been committed yet."
    result = json.loads(path.read_text())
    before, *cases = result["cases"]
    names = [row["data"] for row in before["rows"]]
    head = ("", *(f"{name}: entropy" for name in names), *(f"{name}: 10-NN, %" for name in names))
    rows = [(before["name"], *[""] * len(names), *(f"{row['knn']:.1f}" for row in before["rows"]))]
    for case in sorted(cases, key=lambda case: sum(row["entropies"][-1] for row in case["rows"])):
        ends = [f"{row['entropies'][-1]:.2f}" for row in case["rows"]]
        rows.append((case["name"], *ends, *(f"{row['knn']:.1f}" for row in case["rows"])))
    return "\n\n".join([table(head, rows), provenance(result)])


def speed(benchmark: str, device_type: str) -> str:
    """The first case of results/BENCHMARK-DEVICE.json in full, a line for each other; a sentence if
    there is no file."""
    result = load(benchmark, device_type)
    if not result:
        return f"`{benchmark}`: no measurement has been committed yet."
    first, *others = result["cases"]
    parts = [f"`{benchmark}` ({first['implementation']}), {first['case']}:", full_table(first)]
    if others:
        parts += ["Other cases, by what differs:", brief_table(others, first["case"])]
    return "\n\n".join([*parts, provenance(result)])


def data(device_type: str) -> str:
    """Every candidate of the data path, from results/data-DEVICE.json; a sentence if there is no
    file."""
    result = load("data", device_type)
    if not result:
        return "`data`: no measurement has been committed yet."
    (case,) = result["cases"]
    head = (
        "",
        "images/s",
        "ms an image: median [quartiles]",
        "CPU ms an image",
        "official / this",
        "crops",
        "device memory",
    )
    rows = []
    for row in case["rows"]:
        low, high = row["quartiles_ms"]
        faster, gib = row["times_faster_than_official"], row.get("device_gib")
        cells = (
            row["candidate"],
            f"{row['images_per_s']:,.0f}",
            f"{digits(row['median_ms'])} [{digits(low)}, {digits(high)}]",
            digits(row["cpu_ms"]),
            "" if faster is None else f"{faster:.1f}",
            ""
            if faster is None
            else "official, bit for bit"
            if row["same_crops"]
            else "its own, as many",
            "" if gib is None else f"{gib:.1f} GiB",
        )
        rows.append(
            tuple(
                f"**{cell}**" if cell and row["candidate"] == "dinofast" else cell for cell in cells
            )
        )
    return "\n\n".join(
        [
            f"`data` ({case['implementation']}), {case['case']}:",
            table(head, rows),
            provenance(result),
        ]
    )


def step(device_type: str) -> str:
    """The whole step, from results/step-DEVICE.json: the case with most rows in full, a line for
    each other."""
    result = load("step", device_type)
    if not result:
        return "The step: no measurement has been committed yet."
    first, *others = sorted(result["cases"], key=lambda case: -len(case["rows"]))
    rows, parts = [], []
    for row in first["rows"]:
        low, high = row["quartiles_ms"]
        cells = (
            row["candidate"],
            rate(row["images_per_s"]),
            f"{digits(row['median_ms'])} [{digits(low)}, {digits(high)}]",
            faster(row),
            share(row["mfu"]),
            gib(row),
        )
        spent = (
            row["candidate"],
            *(f"{row['parts_ms'][part]:,.1f}" if part in row["parts_ms"] else "" for part in PARTS),
        )
        bold = row["candidate"] == "dinofast"
        rows.append(tuple(f"**{cell}**" if cell and bold else cell for cell in cells))
        parts += (
            [tuple(f"**{cell}**" if cell and bold else cell for cell in spent)]
            if any(spent[1:])
            else []
        )
    title = (
        f"The whole step, {first['case']}; {first['gflop_an_image']:,.1f} GFLOP an image, MFU "
        f"of {first['peak']}:"
    )
    blocks = [
        title,
        table(
            ("", "images/s", "ms a step: median [quartiles]", "this / official", "MFU", "memory"),
            rows,
        ),
    ]
    if parts:
        blocks += ["Milliseconds of each part:", table(("", *PARTS), parts)]
    brief = [
        (
            different(case["case"], first["case"]),
            row["candidate"],
            rate(row["images_per_s"]),
            faster(row),
            share(row["mfu"]),
            gib(row),
        )
        for case in others
        for row in case["rows"]
    ]
    if brief:
        blocks += [
            "Other cases, by what differs:",
            table(("case", "", "images/s", "this / official", "MFU", "memory"), once(brief)),
        ]
    return "\n\n".join([*blocks, provenance(result)])


def full_table(case: dict) -> str:
    """Every candidate of one case."""
    head = (
        "",
        "ms: median [quartiles]",
        "official / this",
        "this / copy",
        "GB/s (of the copy's)",
        "extra memory",
        "ms on the host",
    )
    rows = []
    for row in case["rows"]:
        low, high = row["quartiles_ms"]
        cells = (
            row["candidate"],
            f"{digits(row['median_ms'])} [{digits(low)}, {digits(high)}]",
            ratio(row["times_faster_than_official"], 1),
            ratio(row["times_the_copy"], 2),
            bandwidth(row),
            memory(case, row),
            "" if row["launch_ms"] is None else digits(row["launch_ms"]),
        )
        rows.append(
            tuple(
                f"**{cell}**" if cell and row["candidate"] == "dinofast" else cell for cell in cells
            )
        )
    return table(head, rows)


def brief_table(cases: list[dict], first: str) -> str:
    """dinofast in every case."""
    head = (
        "case",
        "dinofast, ms",
        "official / dinofast",
        "compiled reference / dinofast",
        "dinofast / copy",
        "GB/s (of the copy's)",
    )
    rows = []
    for case in cases:
        row = {row["candidate"]: row for row in case["rows"]}
        if "dinofast" not in row:
            continue
        ours, compiled = row["dinofast"], row.get("reference, compiled")
        rows.append(
            (
                different(case["case"], first),
                digits(ours["median_ms"]),
                ratio(ours["times_faster_than_official"], 1),
                f"{compiled['median_ms'] / ours['median_ms']:.1f}" if compiled else "",
                ratio(ours["times_the_copy"], 2) if ours["gbps"] else "",
                bandwidth(ours),
            )
        )
    return table(head, rows)
