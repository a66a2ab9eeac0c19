"""The table of runs says what their files say."""

import json

import pytest

from dinofast import Config, RunFolder, cli, config_file
from dinofast.report.compare import differences, names_of, results


def a_run(folder, losses, knn=(), **options):
    folder.mkdir(parents=True)
    config_file.record(folder, Config(**options), 0)
    lines = [
        {"epoch": i, "train_loss": loss, "train_kl": 0.1, "train_teacher_entropy": 1.0}
        for i, loss in enumerate(losses)
    ]
    for line, value in zip(lines, knn, strict=False):
        line["eval_knn"] = value
    steps = [
        {"step": 10 * (i + 1), "epoch": i, "loss": loss, "images_per_s": 100.0 + i, "data_wait": 0}
        for i, loss in enumerate(losses)
    ]
    for name, found in (("log.txt", lines), ("metrics.jsonl", steps)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in found))
    return RunFolder(folder)


def row(table, name):
    return dict(table.rows)[name]


def test_results_are_the_last_ones_and_the_best_score(tmp_path):
    one = a_run(tmp_path / "one", [3.0, 2.5, 2.0], knn=(50, 61.2, 60))
    two = a_run(tmp_path / "two", [1.0], knn=(40,))
    table = results([one, two])
    assert table.columns == ("one", "two")
    assert row(table, "loss") == ("2.000", "1.000") and row(table, "epochs") == ("3", "1")
    assert row(table, "k-NN, %") == ("60.0 (best 61.2, epoch 1)", "40.0")
    assert row(table, "images/s, median") == ("101", "100")
    assert "RankMe" not in dict(table.rows)


def test_only_options_that_differ_are_listed(tmp_path):
    runs = [a_run(tmp_path / str(seed), [1.0], seed=seed, lr=0.1) for seed in range(2)]
    assert differences(runs).rows == (("seed", ("0", "1")),)
    assert differences(runs[:1]).rows == ()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.txt").touch()
    table = differences([*runs, RunFolder(tmp_path / "old")])
    assert table.rows == (("seed", ("0", "1", "?")),)


def test_names_tell_runs_apart(tmp_path):
    runs = [a_run(tmp_path / place, [1.0]) for place in ("a/run", "b/run")]
    assert names_of(runs) == ("a/run", "b/run") and names_of(runs[:1]) == ("run",)


def test_the_command_prints_it(tmp_path, capsys):
    for seed in range(2):
        a_run(tmp_path / f"run{seed}", [1.0], seed=seed)
    assert cli.main(["compare", str(tmp_path / "run0"), str(tmp_path / "run1")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["run0", "run1"]
    assert ["loss", "1.000", "1.000"] in [line.split() for line in said]
    assert said[-1].split() == ["seed", "0", "1"]


@pytest.mark.parametrize(
    "words, told", [([], "RUN is missing"), (["nowhere"], "there is no run in 'nowhere'")]
)
def test_bad_words(words, told, capsys):
    assert cli.main(["compare", *words]) == 2
    assert told in capsys.readouterr().err
