"""Help of the program and of its commands."""

import re
from dataclasses import fields

import pytest
import torch

from dinofast import cli
from dinofast.config import Config


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


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "usage:" in text
    if command == "pretrain":
        assert (
            all(f"--{f.name}" in text for f in fields(Config))
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
        "scores while training",
        "run and checkpoints",
        "speed",
        "many options at once",
    ]
    shown = [name for names in of.values() for name in names]
    assert shown == [f.name.replace("data_path", "DIR") for f in fields(Config)]
    assert (of["data"][0], of["speed"][0]) == ("DIR", "use_fp16")


def test_a_bare_flag_has_one_spelling_and_the_defaults_of_this_device(capsys, monkeypatch):
    for device, shown in (("cpu", "fp32, as on a CPU here"), ("cuda", "bf16, as on a GPU here")):
        monkeypatch.setattr(cli, "_device", lambda device=device: device)
        with pytest.raises(SystemExit):
            cli.main(["pretrain", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"(default: {shown})" in text and "--batch-size-per-gpu" not in text
        assert text.startswith("usage: dinofast pretrain DIR [flags] ")
