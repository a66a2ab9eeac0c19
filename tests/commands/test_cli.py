import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinofast import cli, ops
from dinofast.commands import doctor
from dinofast.config import Config
from dinofast.nn import attention
from dinofast.nn.onednn_linear import select_library

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
    "line, words",
    [
        ("--epcohs 3", "there is no flag --epcohs. Did you mean --epochs?"),
        ("--epochs three", "--epochs: 'three' is not a whole number. See dinofast pretrain"),
        ("--epochs 1e2", "'1e2' is not a whole number: write 100."),
        ("--epochs 2.5", "'2.5' is not a whole number. "),
        ("--lr 0,001", "--lr: '0,001' is not a number: write 0.001."),
        ("--device cuda:1", "CUDA_VISIBLE_DEVICES=1 before the command chooses it"),
        (
            "--precision bfloat16",
            "invalid choice: 'bfloat16' (choose from bf16, fp16, fp32). Did you",
        ),
        ("--batchsize 64", "there is no flag --batchsize. Did you mean --batch_size_per_gpu?"),
        ("--gpus 8", "torchrun --nproc_per_node=8 -m dinofast pretrain ..."),
        ("--gpus=8", "torchrun --nproc_per_node=8 -m dinofast pretrain ..."),
        ("--devices 0,2", "CUDA_VISIBLE_DEVICES=0,2 torchrun --nproc_per_node=2 -m dinofast"),
        ("--world-size", "torchrun --nproc_per_node=N -m dinofast pretrain ..."),
        ("--gpu 3", "CUDA_VISIBLE_DEVICES=3 before the command"),
        ("--temperature 0.1", "The temperatures are --student_temp and --teacher_temp."),
        (
            "--pretrained x.pth",
            "Training starts at random, or goes on with the run in --output_dir",
        ),
        ("--weights x.pth", "Training starts at random"),
        ("--config c.yaml", "The options are flags, and there is no configuration file"),
        ("--num-heads 3", "The size of a ViT comes with its --arch"),
        ("--scheduler cosine", "The learning rate follows the official schedule: --warmup_epochs"),
        ("--eps 1e-8", "The rest of the optimizer is as in the official code"),
        ("--overwrite", "A run in --output_dir is resumed: give another folder"),
        ("--num_classes 10", "Training takes no labels"),
        ("\u2014lr 1", "'\u2014lr' begins with a long dash, as text editors write it: type --lr."),
        ("\u2013-epochs 1", "begins with a long dash, as text editors write it: type --epochs."),
        ("-- base", "'-- base' has a space after the dashes, and there is no file 'base'"),
        ("-- lr 1", "write a flag as one word. Did you mean --lr?"),
        ("--epochs 5 --warmup_epochs 6", "--warmup_epochs is 6 but --epochs is only 5"),
        (
            "--epochs 20 --warmup_teacher_temp_epochs 30",
            "--warmup_teacher_temp_epochs is 30 but --epochs is only 20",
        ),
        ("--epochs 0", "--epochs is 0: it must be at least 1"),
        ("--norm_last_layer maybe", "'maybe' is not a truth value"),
        ("--optimizer adam", "invalid choice: 'adam'"),
        (
            "--global_crops_size 225",
            "--global_crops_size 225 is not a multiple of --patch_size 16: take 224 or 240",
        ),
        ("--local_crops_size 8", "take 16"),
        ("--patch_size 0", "--patch_size is 0"),
        ("--local_crops_number -1", "--local_crops_number is -1"),
        ("--global_crops_scale 0.5", "expected 2 arguments"),
        ("--global_crops_scale 1 0.4", "--global_crops_scale is 1.0 0.4"),
        ("--teacher_temp 0", "--teacher_temp is 0.0: it must be above 0"),
        ("--momentum_teacher 1.5", "--momentum_teacher is 1.5"),
        ("--drop_path_rate 1", "--drop_path_rate is 1.0"),
        ("--lr nan", "--lr is nan"),
        ("--arch vit_smal", "--arch 'vit_smal' is not known"),
        (
            "--epochs 2000000000 --warmup_epochs 0",
            "--epochs is 2000000000: it must be at most 1000000",
        ),
        ("--out_dim 99999999999", "--out_dim is 99999999999"),
        ("stray", "stray and --data_path"),
        ("--batch_size 8", "there is no flag --batch_size. Did you mean --batch_size_per_gpu?"),
        ("--learning-rate 1", "Did you mean --lr?"),
        ("--image_size 96", "Did you mean --global_crops_size?"),
        ("--resume x.pth", "Did you mean --output_dir?"),
        ("--lr -1e-3", "--lr is -0.001: it must not be negative"),
    ],
)
def test_what_cannot_be_right_is_said_in_one_sentence(line, words, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    assert (
        cli.main(
            [
                "pretrain",
                "--data_path",
                str(folder),
                "--output_dir",
                str(tmp_path / "out"),
                *line.split(),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("dinofast: ")
    assert not (tmp_path / "out").exists()  # nothing was allocated or written


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


@pytest.mark.parametrize(
    "line, words",
    [
        ("knn D", "--pretrained_weights is missing: a checkpoint of dinofast or of the official "),
        ("knn D", "Usage: dinofast knn DIR --pretrained_weights FILE [flags]\n"),
        ("knn D D/list.txt", "write --pretrained_weights "),
        ("knn D --weights x", "Did you mean --pretrained_weights?"),
        ("knn --nb_knn 1 2 D --pretrained_weights x", "a folder stands before the flags"),
        ("pretrain D D E", "' and 1 more cannot be taken as well: DIR is '"),
        ("pretrain D lr=0.1", "'lr=0.1' is a flag without its dashes: write --lr 0.1."),
        ("pretrain D epochs 5", "'epochs' is a flag without its dashes: write --epochs."),
        ("pretrain D --output_dir=", "--output_dir is an empty word, as a variable that is not"),
        ("knn D --pretrained_weights=", "--pretrained_weights is an empty word"),
        ("pretrain |", "DIR is an empty word, as a variable that is not set gives one."),
        ("pretrain ~/none", "the shell left its ~ alone; write /"),
        ("pretrain s3://bucket/x", "only files of this machine are read"),
        ("pretrain D/*.jpg", "give the folder itself; all images below it are found"),
        ("pretrain D/lsit.txt", "/list.txt'?"),
        ("doctor x", "'x' is too much: dinofast doctor takes flags alone"),
        ("D", "' is a path, not a command: dinofast pretrain /"),
        ("export D", "there is no command export. A trained backbone is used in Python: "),
        ("--lr 1 pretrain D", "the command comes first: dinofast pretrain ... --lr ..."),
        ("show_crops D", "Did you mean show-crops?"),
        ("sample-data D/list.txt", "is a file: give a folder."),
        ("demo --output_dir D/list.txt/x", "is a file: give a folder."),
        ("pretrain D --output_dir D/list.txt", "is a file: give a folder."),
        ("show-crops D -o D/none/x.png", "but there is no folder '"),
        ("knn D --pretrained_weights x --json D/none/x.json", "but there is no folder '"),
        ("knn D --pretrained_weights x --json D", ", a folder: name a file in it."),
        ("knn D --pretrained_weights x --json /proc/x.json", ", which cannot be written (No such"),
    ],
)
def test_a_command_line_as_strangers_type_it(tmp_path, capsys, line, words):
    """`|`: an empty word."""
    (tmp_path / "list.txt").write_text("a.jpg\n")
    given = [re.sub("^D", str(tmp_path), word.strip("|")) for word in line.split()]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("dinofast: ")
    assert os.listdir(tmp_path) == ["list.txt"]


def test_help_and_version_as_words(capsys):
    said = {}
    for line in ("help", "--help", "help knn", "knn --help", "version", "-v", "-V", "--version"):
        with pytest.raises(SystemExit) as end:
            cli.main(line.split())
        assert not end.value.code
        said[line] = capsys.readouterr().out
    assert said["help"] == said["--help"] != said["help knn"] == said["knn --help"]
    assert said["version"] == said["-v"] == said["-V"] == said["--version"] == "dinofast 0.1.0\n"


def test_help_says_a_default_once(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for about in re.split(r" (?=--?\w+ )", text):
            assert about.lower().count("default:") <= 1, about
        assert "/path/to/imagenet" not in text
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "eager, the formula. Default: sdpa. --linear" in text
    assert "on a CPU it gains little. Here: off. --cuda_graph" in text or torch.cuda.is_available()


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
    assert " DIR " in said and len(asked) <= 10

    def gone(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "scandir", gone)
    assert " DIR " in pretrain.what_next(Path("x.pth"), tmp_path)


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
    measure, use, export = what_next(path, tmp_path / "my data" / "train").splitlines()
    given = shlex.split(measure.partition(": ")[2])
    assert given == ["dinofast", "knn", f"{tmp_path}/my data", "--pretrained_weights", str(path)]
    assert " DIR " in what_next(path, tmp_path / "my data" / "flat")
    assert " DIR " in what_next(path, path) and " DIR " in what_next(path, tmp_path / "gone")
    import dinofast

    names = {"dinofast": dinofast}
    exec(use.partition(": ")[2], names)
    assert names["backbone"](torch.zeros(1, 3, 16, 16)).shape == (1, 64)
    assert "torch.onnx.export(backbone, (images,), " in export


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sample-data {} --n_images 3", "--n_images is 3: take at least 40"),
        ("sample-data {} --size 3", "--size is 3 pixels"),
        ("check-data {} --delete_list {}", "--delete_list is '"),
    ],
)
def test_messages_of_other_commands_name_their_flags(line, words, tmp_path, capsys):
    assert cli.main([word.format(tmp_path) for word in line.split()]) == 2
    assert words in capsys.readouterr().err


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
    assert "has no images" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"epochs": "3"}, "`epochs` is '3': give a whole number"),
        ({"lr": "0.1"}, "`lr` is '0.1': give a number"),
        ({"global_crops_scale": 0.4}, "`global_crops_scale` is 0.4: give 2 numbers"),
        ({"out_dim": 64.0}, "`out_dim` is 64.0"),
        ({"norm_last_layer": 1}, "`norm_last_layer` is 1: give True or False"),
        ({"precision": 16}, "`precision` is 16: give a word"),
    ],
)
def test_options_of_the_wrong_type(options, words):
    with pytest.raises(ValueError, match=words.replace(".", "[.]")):
        Config(**options).check()
    assert Config(global_crops_scale=[0.4, 1], lr=1).check().global_crops_scale == (0.4, 1)


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


@pytest.mark.parametrize(
    "line, words",
    [
        ("--temperature nan", "--temperature is nan"),
        ("--crop 0", "--crop is 0"),
        ("--nb_knn 0", "--nb_knn is 0"),
        ("--batch_size_per_gpu 0", "--batch_size_per_gpu is 0"),
        ("--num_workers -1", "--num_workers is -1"),
    ],
)
def test_knn_options_that_cannot_be_right(line, words, capsys, tmp_path):
    assert (
        cli.main(
            ["knn", "--data_path", str(tmp_path), "--pretrained_weights", "none.pth", *line.split()]
        )
        == 2
    )
    assert words in capsys.readouterr().err


def test_unknown_command_and_none(capsys):
    for given, meant in {
        "pretrian": "pretrain",
        "train": "pretrain",
        "evaluate": "knn",
        "bench": "bench-step",
        "show": "show-crops",
    }.items():
        assert cli.main([given, "x"]) == 2
        words = f"there is no command {given}. Did you mean {meant}? Commands: pretrain, knn"
        assert words in capsys.readouterr().err
    assert cli.main([]) == 2
    said = capsys.readouterr().err
    assert "usage: dinofast" in said and all(f"\n    {command}" in said for command in cli.COMMANDS)


@pytest.mark.parametrize(
    "command",
    ["pretrain", "knn", "sample-data", "demo", "doctor", "show-crops", "bench-data", "bench-step"],
)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "usage:" in text
    if command == "pretrain":
        assert (
            all(f"--{name}" in text for name in OFFICIAL_DEFAULTS)
            and "0.9995" in text
            and "(default: 0.4 1.0)" in text
        )


def test_help_of_pretrain_is_by_topic(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--help"])
    options = capsys.readouterr().out.partition("\noptions:\n")[2]
    topics = dict(re.findall(r"^(\w[\w ]*):\n(.*?)(?=^\w|\Z)", options, flags=re.M | re.S))
    of = {name: re.findall(r"^  (?:--)?(\w+)", text, flags=re.M) for name, text in topics.items()}
    assert list(of) == [
        "model",
        "crops",
        "loss and teacher",
        "optimizer",
        "data",
        "run and checkpoints",
        "speed",
    ]
    shown = [name for names in of.values() for name in names]
    assert shown == [f.name.replace("data_path", "DIR") for f in fields(Config)]
    assert (of["data"][0], of["speed"][0]) == ("DIR", "use_fp16")


def test_module_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "dinofast", "pretrain", "--epcohs", "3"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "Did you mean --epochs?" in done.stderr


def test_doctor_says_what_and_why(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "GPU" in text
    for name, paths in ops.paths().items():
        assert f"{name:22} {paths['cpu']}" in text
    library = select_library(None, torch.device("cpu"), torch.float32)
    assert (f"{'linear layers':22} the ViTs' large ones in fp32 by oneDNN" in text) == (
        library == "onednn"
    )
    assert f"{'linear layers':22} torch's BLAS\n" in text  # on cuda


def test_doctor_says_which_other_attention_a_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(
        torch.nn.attention, "list_flash_attention_impls", lambda: ["FA3"], raising=False
    )
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    for module in (attention, doctor):
        monkeypatch.setattr(
            module, "xformers_unavailable_reason", lambda: "xformers is not installed"
        )
    assert doctor._attention("cuda") == (
        "sdpa, torch's, per crop size; others: varlen, cudnn, eager; not xformers: xformers is not "
        "installed; not fa3: Some GPU is no H100 or H200, for which its kernels are made"
    )


@pytest.mark.parametrize(
    "there, words",
    [
        (
            {"flash": "fa2F@2.7.4-pt"},
            "flash operators: fa2F@2.7.4-pt (torch has it); what it warns of",
        ),
        (
            {"flash3": "fa3F@pip_pkg", "flash": "fa2F@2.8.3"},
            "flash operators: fa3F@pip_pkg, fa2F@2.8.3; what it warns of",
        ),
        ({}, "flash operators: none; what it warns of"),
    ],
    ids=str,
)
def test_doctor_says_which_of_xformers_kernels_there_are(monkeypatch, there, words):
    def operator(name):
        return SimpleNamespace(
            FwOp=SimpleNamespace(NAME=there.get(name, "unused"), is_available=lambda: name in there)
        )

    monkeypatch.setattr(doctor, "xformers_unavailable_reason", lambda: None)
    monkeypatch.setattr(
        doctor, "fmha", lambda: SimpleNamespace(flash3=operator("flash3"), flash=operator("flash"))
    )
    assert words in doctor._xformers_operators()
    monkeypatch.setattr(doctor, "xformers_unavailable_reason", lambda: "xformers is not installed")
    assert doctor._xformers_operators() == ""


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


def test_a_bare_flag_has_one_spelling_and_the_defaults_of_this_device(capsys, monkeypatch):
    for device, shown in (("cpu", "fp32, as on a CPU here"), ("cuda", "bf16, as on a GPU here")):
        monkeypatch.setattr(cli, "_device", lambda device=device: device)
        with pytest.raises(SystemExit):
            cli.main(["pretrain", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"(default: {shown})" in text and "--batch-size-per-gpu" not in text
        assert text.startswith("usage: dinofast pretrain DIR [flags] ")


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
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parent.parent}"},
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and "torch is not installed" in said and "CPU build" in said
    assert "Traceback" not in said
