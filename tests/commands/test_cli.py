import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinofast import cli
from dinofast.config import Config

OFFICIAL_DEFAULTS = {
    "arch": "vit_small",
    "patch_size": 16,
    "out_dim": 65536,
    "norm_last_layer": True,
    "momentum_teacher": 0.996,
    "use_bn_in_head": False,
    "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0,
    "use_fp16": True,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "clip_grad": 3.0,
    "batch_size_per_gpu": 64,
    "epochs": 100,
    "freeze_last_layer": 1,
    "lr": 0.0005,
    "warmup_epochs": 10,
    "min_lr": 1e-6,
    "optimizer": "adamw",
    "drop_path_rate": 0.1,
    "global_crops_scale": (0.4, 1.0),
    "local_crops_number": 8,
    "local_crops_scale": (0.05, 0.4),
    "output_dir": ".",
    "saveckp_freq": 20,
    "seed": 0,
    "num_workers": 10,
    "dist_url": "env://",
    "local_rank": 0,
    "data_path": "/path/to/imagenet/train/",
}
RECIPES = {
    "vanilla": "",
    "boosted": "--epochs 300 --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer "
    "false",
    "ResNet-50": "--arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end "
    "1e-4 --global_crops_scale 0.14 1 --local_crops_scale 0.05 0.14",
}


@pytest.fixture
def pretrain(monkeypatch, tmp_path):
    """Parse a `pretrain` command as the program does; what would be trained comes back."""
    import dinofast.train

    seen = []
    monkeypatch.setattr(dinofast.train, "train", seen.append)

    def parse(line):
        code = cli.main(["pretrain", "--data_path", str(tmp_path), *line.split()])
        return seen.pop() if seen else code

    return parse


def test_defaults_are_the_official_ones():
    assert {name: getattr(Config(), name) for name in OFFICIAL_DEFAULTS} == OFFICIAL_DEFAULTS


@pytest.mark.parametrize("name", RECIPES)
def test_official_recipes_parse_unchanged(pretrain, name):
    cfg = pretrain(RECIPES[name])
    given = RECIPES[name].split("--")[1:]
    assert len(given) == {"vanilla": 0, "boosted": 4, "ResNet-50": 7}[name]
    for flag, *values in map(str.split, given):
        value = getattr(cfg, flag)
        assert [str(v).lower() for v in (value if isinstance(value, tuple) else (value,))] == [
            v
            if not v[0].isdigit()
            else str(type(value[0] if isinstance(value, tuple) else value)(v))
            for v in values
        ]


@pytest.mark.parametrize(
    "text, value",
    [
        ("true", True),
        ("ON", True),
        ("1", True),
        ("false", False),
        ("off", False),
        ("0", False),
    ],
)
def test_booleans_as_the_official_ones(pretrain, text, value):
    assert pretrain(f"--norm_last_layer {text}").norm_last_layer is value


def test_dashes_and_old_names(pretrain):
    cfg = pretrain("--batch-size-per-gpu 8 --arch deit_tiny --local-rank 3")
    assert (cfg.batch_size_per_gpu, cfg.vit, cfg.local_rank) == (8, "vit_tiny", 3)
    assert pretrain("--arch deit_small_patch16_224").vit is None  # of timm: left alone


@pytest.mark.parametrize(
    "line, on_gpu, on_cpu",
    [
        ("", "bf16", "fp32"),
        ("--use_fp16 true", "fp16", "fp16"),
        ("--use_fp16 false", "fp32", "fp32"),
        ("--precision bf16", "bf16", "bf16"),
        ("--use_fp16 true --precision fp32", "fp32", "fp32"),
    ],
)
def test_precision(pretrain, line, on_gpu, on_cpu):
    cfg = pretrain(line)
    assert (cfg.precision_on("cuda"), cfg.precision_on("cpu")) == (on_gpu, on_cpu)


@pytest.mark.parametrize(
    "name, word, given, meant",
    [
        ("compile", "true", True, "on"),
        ("compile", "False", False, "off"),
        ("compile", "1", "TRUE", "on"),
        ("compile", "off", "off", "off"),
        ("attention", "mslk", "mslk", "xformers"),
    ],
)
def test_another_word_for_the_same(pretrain, name, word, given, meant):
    assert (
        getattr(pretrain(f"--{name} {word}"), name)
        == getattr(Config(**{name: given}).check(), name)
        == meant
    )


@pytest.mark.parametrize(
    "line", ["0.4,1", "0.4, 1", "(0.4,1)", "[0.4, 1]", "0.4 1", "0.4|1", "=0.4,1", "=0.4|1"]
)
def test_numbers_may_stand_together(monkeypatch, tmp_path, line):
    """`|`: where the shell parts words."""
    import dinofast.train

    seen = []
    monkeypatch.setattr(dinofast.train, "train", lambda cfg: seen.append(cfg) or tmp_path / "x.pth")
    words = f"--global_crops_scale{line}" if line[0] == "=" else f"--global_crops_scale|{line}"
    assert cli.main(["pretrain", *words.split("|"), str(tmp_path), "--seed", "3"]) == 0
    assert (seen[0].global_crops_scale, seen[0].data_path) == ((0.4, 1.0), str(tmp_path))


@pytest.mark.parametrize("word", ["--local-rank=1", "--local_rank=0"])
def test_the_older_launcher_of_torch(word, tmp_path, monkeypatch):
    """python -m torch.distributed.launch -m dinofast pretrain: its word comes before the command.
    The official README starts DINO so."""
    given = []
    monkeypatch.setattr("dinofast.commands.pretrain.run", given.append)
    assert cli.main([word, "pretrain", str(tmp_path), "--epochs", "3"]) == 0
    assert (given[0].data_path, given[0].epochs) == (str(tmp_path), 3)


def test_labels_are_looked_for_in_few_files(tmp_path, monkeypatch):
    """After the training: of a million files each would be asked of the storage, whose errors would
    make a good run a failed one."""
    from dinofast.commands import pretrain

    for i in range(50):
        (tmp_path / f"{i}.jpg").touch()
    monkeypatch.setattr(pretrain, "LOOKED_AT", 10)
    asked = []
    monkeypatch.setattr(os, "stat", lambda *args, **_: asked.append(args))
    said = pretrain.what_next(Path("x.pth"), tmp_path)
    monkeypatch.undo()
    assert " LABELED_DIR " in said and len(asked) <= 10

    def gone(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "scandir", gone)
    assert " LABELED_DIR " in pretrain.what_next(Path("x.pth"), tmp_path)


def test_one_process_tries_the_output(tmp_path, monkeypatch):
    """It alone writes; on another machine there may be no such folder."""
    from dinofast.commands import pretrain

    monkeypatch.setattr("dinofast.train.train", lambda _: Path("x.pth"))
    tried = []
    monkeypatch.setattr(pretrain, "check_output", lambda *args, **_: tried.append(args))
    for rank, times in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        pretrain.run(Config(data_path=str(tmp_path)))
        assert len(tried) == times


def test_what_can_be_done_with_a_checkpoint(tmp_path):
    """The lines after a run: with the real paths, and Python's is Python."""
    from dinofast import vit_nano
    from dinofast.commands.pretrain import what_next

    for name in ("train/a", "train/b", "val/a", "val/b", "flat"):
        (tmp_path / "my data" / name).mkdir(parents=True)
    path = tmp_path / "it's.pth"
    state = {
        f"backbone.{k}": v for k, v in vit_nano(patch_size=8, img_size=(16,)).state_dict().items()
    }
    torch.save({"teacher": state}, path)
    measure, use, export, report = what_next(path, tmp_path / "my data" / "train").splitlines()
    given = shlex.split(measure.partition(": ")[2])
    assert given == ["dinofast", "knn", f"{tmp_path}/my data", "--pretrained_weights", str(path)]
    assert " LABELED_DIR " in what_next(path, tmp_path / "my data" / "flat")
    assert " LABELED_DIR " in what_next(path, path) and " LABELED_DIR " in what_next(
        path, tmp_path / "gone"
    )
    import dinofast

    names = {"dinofast": dinofast}
    exec(use.partition(": ")[2], names)
    assert names["backbone"](torch.zeros(1, 3, 16, 16)).shape == (1, 64)
    given = shlex.split(export.partition(": ")[2])
    assert given == ["dinofast", "export", str(path), "--format", "onnx"]


def test_missing_paths(tmp_path, capsys):
    assert cli.main(["pretrain", "--data_path", str(tmp_path / "none")]) == 2
    assert "none' does not exist: give a folder of images" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert (
        cli.main(["pretrain", "--data_path", str(tmp_path), "--output_dir", str(tmp_path / "file")])
        == 2
    )
    assert "is a file: give a folder" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out in ("link", "link/below"):
        line = ["pretrain", "--data_path", str(tmp_path), "--output_dir", str(tmp_path / out)]
        assert cli.main(line) == 2
        assert "/link' is a link to what is not there: give" in capsys.readouterr().err


def test_data_errors_leave_nothing_behind(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folders = ["--data_path", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["pretrain", *folders]) == 2
    assert "is an empty folder" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_required_kernels_are_checked_first(monkeypatch, tmp_path, capsys, photographs):
    monkeypatch.setenv("DINOFAST_REQUIRE", "cpp,warp")
    assert (
        cli.main(
            ["pretrain", "--data_path", str(photographs), "--output_dir", str(tmp_path / "out")]
        )
        == 2
    )
    assert (
        "DINOFAST_REQUIRE names 'warp'" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


def test_unknown_command_and_none(capsys):
    for given, meant in {
        "pretrian": "pretrain",
        "train": "pretrain",
        "evaluate": "knn",
        "bench": "bench-step",
        "show": "show-crops",
    }.items():
        assert cli.main([given, "x"]) == 2
        words = f"there is no command {given}. Did you mean {meant}? Commands: pretrain, "
        assert words in capsys.readouterr().err
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert "usage: dinofast" in said and all(f"\n    {command}" in said for command in cli.COMMANDS)


def test_module_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "dinofast", "pretrain", "--epcohs", "3"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "Did you mean --epochs?" in done.stderr


@pytest.mark.parametrize(
    "command", ["bench-data", "show-crops", "check-data", "pretrain", "knn --pretrained_weights x"]
)
@pytest.mark.parametrize(
    "line, words", [("", "DIR is missing"), ("a --data_path b", "a and --data_path b are two")]
)
def test_a_folder_is_given_once(command, line, words, capsys):
    assert cli.main([*command.split(), *line.split()]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("line", ["nowhere", "--data_path nowhere", "--data-path=nowhere"])
def test_a_folder_with_or_without_its_flag(line, capsys):
    assert cli.main(["bench-data", *line.split()]) == 2
    assert "--data_path 'nowhere' does not exist" in capsys.readouterr().err


def test_the_folder_may_come_first_or_by_its_flag(pretrain, monkeypatch, tmp_path):
    import dinofast.train

    seen = []
    monkeypatch.setattr(dinofast.train, "train", seen.append)
    for line in ([str(tmp_path)], ["--data_path", str(tmp_path)], ["--data-path", str(tmp_path)]):
        assert cli.main(["pretrain", *line, "--epochs", "20"]) == 0
    assert [cfg.data_path for cfg in seen] == [str(tmp_path)] * 3


def test_names_of_the_package_are_functions():
    """Whichever way they are imported, and in whichever order."""
    code = """
import inspect, pickle, dinofast
from dinofast import knn, train
from dinofast.train import train as again
assert inspect.signature(train) == inspect.signature(again) and dinofast.train.train is again
for call in (train, again, dinofast.train, knn, dinofast.knn):
    try:
        call()
    except TypeError as error:
        assert "missing" in str(error), error
import dinofast.train as module
assert module.train is again
assert pickle.loads(pickle.dumps(dinofast.train)) is module
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["doctor", "pretrain .", "knn . --pretrained_weights x"])
def test_torch_that_is_absent_is_said(command, tmp_path):
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dinofast", *command.split()],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parents[2]}"},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "torch is not installed" in said and "CPU build" in said
    assert "Traceback" not in said
