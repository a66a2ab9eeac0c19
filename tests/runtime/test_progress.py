import importlib.util
import json
import math
import re
import signal
import tarfile
from pathlib import Path

import pytest
import torch

from dinofast import checkpoint
from dinofast.commands import pretrain
from dinofast.data import shards
from dinofast.runtime import signals
from dinofast.runtime.metrics import SMALL_DATA, WHAT_HELPS, EpochSums, Trend
from dinofast.runtime.progress import Diverged, Run, in_words, status_line
from dinofast.runtime.signals import Interrupted, StopSignal
from dinofast.runtime.words import spelling

ROOT = Path(__file__).parent.parent.parent
METRICS = ("loss", "teacher_entropy", "kl", "center_norm", "grad_norm")


def sums_of(*values):
    """Of the metrics, the good steps and all steps."""
    return dict(zip((*METRICS, "good_steps", "steps"), map(float, values), strict=True))


def run(folder, **changes):
    return Run(
        folder,
        True,
        **{"steps_per_epoch": 4, "epochs": 3, "images_per_step": 8, "out_dim": 64, **changes},
    )


def test_sums_leave_out_what_is_not_finite_and_go_on_after_a_save():
    def add(to, *values):
        to.add(
            {name: torch.tensor(float(value)) for name, value in zip(METRICS, values, strict=True)}
        )

    sums = EpochSums(torch.device("cpu"))
    add(sums, 1, 2, 3, 4, 5)
    add(sums, 1, 2, math.nan, 4, 5)
    resumed = EpochSums(torch.device("cpu"), sums.read())
    assert resumed.read() == sums.read() == sums_of(1, 2, 3, 4, 5, 1, 2)
    add(resumed, 2, 2, 3, 4, 5)
    assert resumed.read() == sums_of(3, 4, 6, 8, 10, 2, 3)
    resumed.clear()
    assert resumed.read() == sums_of(*[0] * 7) and EpochSums(torch.device("cpu")).read() == {
        "good_steps": 0,
        "steps": 0,
    }


def test_epoch_line(tmp_path, capsys):
    run(tmp_path).end_epoch(1, sums_of(8.0, 4.0, 4.0, 2.0, 6.0, 4, 4), 0.1, 0.2)
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line == {
        "train_loss": 2.0,
        "train_lr": 0.1,
        "train_wd": 0.2,
        "epoch": 1,
        "train_teacher_entropy": 1.0,
        "train_kl": 1.0,
        "train_center_norm": 0.5,
        "train_grad_norm": 1.5,
        "skipped_steps": 0,
    }
    assert "warning" not in capsys.readouterr().out


def test_epoch_without_a_single_good_step(tmp_path):
    run(tmp_path).end_epoch(0, sums_of(*[0] * 6, 4), 0.1, 0.2)
    line = json.loads((tmp_path / "log.txt").read_text())
    assert line["train_loss"] is None and line["skipped_steps"] == 4


def test_a_log_that_cannot_be_written_is_written_later(tmp_path, capsys):
    """A full disk ends no run for the sake of its log."""
    r, path = run(tmp_path), tmp_path / "log.txt"
    path.mkdir()
    r.end_epoch(0, sums_of(*[1] * 7), 0.1, 0.2)
    assert "log.txt' cannot be written (Is a directory)" in capsys.readouterr().out
    path.rmdir()
    r.end_epoch(1, sums_of(*[1] * 7), 0.1, 0.2)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [0, 1]


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    run(tmp_path).go_on(8)
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epoch": 1}\n'


def test_a_log_without_checkpoint_is_set_aside(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n')
    run(tmp_path).go_on(0)
    assert (
        not (tmp_path / "log.txt").exists()
        and (tmp_path / "log.old.txt").read_text() == '{"epoch": 0}\n'
    )
    (tmp_path / "log.txt").write_text('{"epoch": 1}\n')
    run(tmp_path).go_on(0)
    assert (tmp_path / "log.old1.txt").exists() and (
        tmp_path / "log.old.txt"
    ).read_text() == '{"epoch": 0}\n'


def test_replaced_images_are_told_once(tmp_path, capsys):
    r, bad_files = run(tmp_path), [("a.tar", "empty file")]
    r.log_left_out(bad_files, Path("list"))
    more = [*bad_files, ("b.jpg", "text")]
    for files, n_unread, reason, world in (
        (bad_files, 0, "", 1),
        (more, 0, "", 1),
        (more, 3, "no network", 2),
    ):
        for _ in range(2):
            r.log_replaced(files, n_unread, reason, Path("list"), world)
    assert capsys.readouterr().out.splitlines() == [
        "1 bad file left out, listed in 'list'; the last: a.tar (empty file)",
        "1 bad image replaced, listed in 'list'; the last: b.jpg (text)",
        "3 images of this process could not be read this time (no network), replaced",
    ]


LOG_K = math.log(4096)


@pytest.mark.parametrize(
    "loss, entropy, words",
    [
        (LOG_K, LOG_K, "sits at log K = 8.318"),
        (LOG_K, 0.5, None),
        (4.0, 3.0, None),
        (0.01, 0.001, "near 0"),
        (5.0, 0.01, "near 0"),
    ],
)
def test_collapse_is_said_in_words(loss, entropy, words):
    said = Trend(LOG_K).warning(loss, entropy)
    assert (words is None and said is None) or (
        words in said and "If it stays" in said and "`lr`" in said
    )


# of runs on three small data sets, 2026-11-27: loss and teacher entropy as shares of log K
RUNS = {
    "collapses": (
        1024,
        (0.87, 0.86, 0.94, 0.98, 0.99, 1.00),
        (0.63, 0.79, 0.93, 0.97, 0.99, 1.00),
        4,
    ),
    "rises to 89 %": (
        1024,
        (0.85, 0.81, 0.84, 0.86, 0.88, 0.89),
        (0.60, 0.70, 0.76, 0.80, 0.83, 0.84),
        4,
    ),
    "learns after a bad start": (
        64,
        (0.88, 0.97, 0.97, 0.95, 0.93, 0.91, 0.90, 0.90, 0.90, 0.90, 0.89),
        (0.78, 0.95, 0.94, 0.90, 0.85, 0.82, 0.80, 0.79, 0.79, 0.77, 0.76),
        None,
    ),
    "learns while its loss rises": (
        1024,
        (0.77, 0.51, 0.44, 0.48, 0.56, 0.57, 0.58, 0.57),
        (0.38, 0.26, 0.27, 0.34, 0.43, 0.45, 0.46, 0.45),
        None,
    ),
}


# of 5 to 9 epochs, entropy 65 % of log K: the student differs from the teacher, and does not learn
SHORT = {
    "rises above log K from the start": ((1.01, 1.02, 1.03, 1.04, 1.05), 2),
    "rises to log K and above": ((0.97, 0.99, 1.00, 1.01, 1.02), 3),
    "stays above log K": ((1.02, 1.01, 1.02, 1.01, 1.02), 2),
    "rises after a fall": ((1.05, 1.02, 1.01, 1.01, 1.02, 1.03, 1.03, 1.04, 1.04), 4),
    "falls from above log K": ((1.06, 1.04, 1.02, 1.0, 0.98, 0.96), None),
    "is above log K once": ((0.96, 1.02, 0.97, 0.96, 0.94, 0.93), None),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_run_above_log_k_is_told(name):
    losses, first = SHORT[name]
    trend = Trend(8.0)
    told = [i for i, loss in enumerate(losses) if trend.warning(8 * loss, 8 * 0.65)]
    assert told[:1] == ([] if first is None else [first]), told


@pytest.mark.parametrize("name", RUNS)
def test_a_collapse_is_told_from_a_slow_start(name):
    """`first`: the epoch after which it is told."""
    k, losses, entropies, first = RUNS[name]
    trend = Trend(math.log(k))
    said = [
        trend.warning(a * math.log(k), b * math.log(k))
        for a, b in zip(losses, entropies, strict=True)
    ]
    told = [epoch for epoch, words in enumerate(said) if words]
    assert told[:1] == ([] if first is None else [first]), told


def test_collapses_of_the_committed_runs_are_told_and_others_are_not():
    """Loss and entropy of 36 runs on small data; the longest that a good one may be warned."""
    result = json.loads((ROOT / "benchmarks/results/small_data-cpu.json").read_text())
    uniform = good = 0
    for case in result["cases"][1:]:
        for row in case["rows"]:
            trend, told = Trend(1.0), 0
            for loss, entropy in zip(row["losses"], row["entropies"], strict=True):
                told += trend.warning(loss, entropy) is not None
            uniform += row["entropies"][-1] > 0.99
            good += row["entropies"][-1] < 0.8
            assert row["entropies"][-1] <= 0.99 or told >= 3, (case["name"], row["data"])
            assert row["entropies"][-1] >= 0.8 or told <= 3, (case["name"], row["data"])
    assert uniform >= 10 and good >= 10


def test_one_advice_for_small_data_everywhere():
    """In the guide, the help, and what a run says before and after a collapse; one setting that was
    measured, all of it."""
    given = dict(re.findall(r"`(\w+)` ([\d.]+)", SMALL_DATA))
    assert len(given) == 4 and SMALL_DATA in WHAT_HELPS
    for text in ((ROOT / "docs/training.md").read_text(), pretrain.__doc__):
        assert all(f"--{name} {value}" in text for name, value in given.items()), given
    for temp in re.findall(r"teacher_temp`? ([\d.]+)", WHAT_HELPS):
        assert temp == given["teacher_temp"]
    assert re.findall(r"momentum_teacher`? ([\d.]+)", WHAT_HELPS) == [given["momentum_teacher"]]
    path = ROOT / "benchmarks/small_data.py"
    spec = importlib.util.spec_from_file_location("small_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    measured = module.START | module.SETTINGS["temperature 0.02"]
    assert {name: float(value) for name, value in given.items()} == {
        name: float(measured[name]) for name in given
    }


def test_a_run_that_goes_on_remembers_its_best_loss(tmp_path):
    log_k = math.log(64)
    losses = (0.81, 0.85, 0.86, 0.87)
    (tmp_path / "log.txt").write_text(
        "".join(
            json.dumps({"epoch": i, "train_loss": x * log_k}) + "\n" for i, x in enumerate(losses)
        )
    )
    r = run(tmp_path, epochs=9)
    r.go_on(12)
    assert r._trend.losses == pytest.approx([x * log_k for x in losses[:3]])


def test_collapse_is_shown_at_the_end_of_an_epoch(tmp_path, capsys):
    uniform = math.log(64)
    run(tmp_path).end_epoch(0, sums_of(4 * uniform, 4 * uniform, 0, 0, 0, 4, 4), 0.1, 0.2)
    assert "warning, epoch 0: the loss 4.159 sits at log K" in capsys.readouterr().out


def test_plain_lines_say_what_a_person_wants_to_know(tmp_path, capsys):
    r = run(tmp_path)
    with r.live(0, {}):
        r.show(12, sums_of(24, 12, 0, 0, 0, 12, 12), 0.001, 0.0)
    line = capsys.readouterr().out
    assert (
        "epoch 2 of 0-2  step 12  loss 2.0000  entropy 24%  lr 1.00e-03" in line
        and "images/s  data wait 0%  ETA 0:00:00" in line
    )


NUMBERS = {
    "loss": "10.1234",
    "entropy": "83%",
    "lr": "5.00e-04",
    "": "2,498.1 images/s",
    "data wait": "3%",
    "ETA": "12:34:56",
}


@pytest.mark.parametrize(
    "columns, left_out",
    [
        (200, []),
        (80, ["5.00e-04", "data wait", "entropy", "images/s"]),
        (60, ["5.00e-04", "images/s", "data wait", "entropy", "loss"]),
        (20, ["images/s"]),
    ],
)
def test_a_narrow_terminal_keeps_the_bar_and_the_eta(columns, left_out):
    line = status_line("epoch 99 of 0-299", 500_000, 750_000, NUMBERS, columns)
    assert len(line) <= columns and all(word not in line for word in left_out)
    if columns >= 60:
        assert "[==" in line and "ETA 12:34:56" in line and "500000/750000" in line


def test_time_in_words():
    assert [in_words(s) for s in (40, 150, 5400, 12_600, 90_000, 1e6)] == [
        "40 s",
        "2.5 min",
        "90 min",
        "3.5 h",
        "25 h",
        "12 days",
    ]


@pytest.mark.parametrize("compiles", [False, True])
def test_the_time_of_the_whole_run_is_told_after_a_step(tmp_path, capsys, compiles):
    r, sums = run(tmp_path), EpochSums(torch.device("cpu"))
    with r.live(2, {}):
        said = []
        for step in (3, 4, 5):
            r.estimate(step, compiles, sums)
            said.append(capsys.readouterr().out)
    told = said.pop(compiles)
    assert f"step {3 + compiles} took" in told and f"for the {9 - compiles} to come" in told
    assert said == ["", ""]


def test_gives_up_after_many_bad_steps(tmp_path):
    r = run(tmp_path, steps_per_epoch=100)
    with r.live(0, {}):
        r.show(10, sums_of(*[0] * 6, 10), 0.001, 0.0)
        r.show(15, sums_of(5.0, 0, 0, 0, 0, 1, 15), 0.001, 0.0)  # one good step in between
        r.show(25, sums_of(5.0, 0, 0, 0, 0, 1, 25), 0.001, 0.0)
        with pytest.raises(Diverged, match="20 steps in a row"):
            r.show(35, sums_of(5.0, 0, 0, 0, 0, 1, 35), 0.001, 0.0)


def test_signals_are_noted_and_handed_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        with pytest.raises(Interrupted, match="before the first step"):
            signal.raise_signal(signal.SIGTERM)
        stop.training = True
        signal.raise_signal(signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_is_lost_at_the_start_is_found_again():
    """Some of what is imported or called back swallows whatever is raised."""
    with StopSignal() as stop:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # noqa: B036
            pass
        with pytest.raises(Interrupted, match="before the first step") as raised:
            stop.begin(lambda: 0.0, False)
    assert raised.value.signum == signal.SIGTERM


def test_one_key_press_is_one_signal(monkeypatch):
    """However often it is sent on; pressed again, it ends the run at once."""
    clock = iter((100.0, 100.2, 102.0))
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    with StopSignal() as stop:
        stop.training = True
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.signum == signal.SIGINT


def test_an_interrupt_is_no_damaged_file(monkeypatch, tmp_path):
    """Whatever is being read when it comes: a checkpoint, a shard."""

    def interrupt(*args, **options):
        raise Interrupted(signal.SIGINT, "stopped")

    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"anything")
    for module, name, read in (
        (torch, "load", lambda: checkpoint.read(path)),
        (tarfile.TarFile, "next", lambda: list(shards.images(path.open("rb")))),
    ):
        with monkeypatch.context() as patched, pytest.raises(Interrupted, match="stopped"):
            patched.setattr(module, name, interrupt)
            read()


def test_sums_of_other_metrics_are_dropped():
    sums = EpochSums(torch.device("cpu"), {"loss": 6.0, "good_steps": 3.0, "steps": 3.0})
    sums.add({"loss": torch.tensor(1.0), "kl": torch.tensor(2.0)})
    assert sums.read() == {"loss": 1.0, "kl": 2.0, "good_steps": 1.0, "steps": 1.0}


def test_options_are_spelled_as_the_reader_writes_them(tmp_path, capsys):
    r = run(tmp_path)
    with spelling(lambda text: text.replace("`lr`", "--lr")):
        r.log("`lr` was 1")
    r.log("`lr` was 1")
    assert capsys.readouterr().out == "--lr was 1\n`lr` was 1\n"
