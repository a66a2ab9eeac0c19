"""What a run says before its first step."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from pretraining import finish

from dinofast import introduce
from dinofast.config import Config
from dinofast.nn.vit import vit_small
from dinofast.schedule import Schedule


@pytest.mark.parametrize(
    "changes, n_images, words",
    [
        ({}, 1_281_167, []),
        ({"epochs": 5}, 10**6, ["`warmup_epochs` 10, the default", "shortened to 1"]),
        ({"epochs": 1}, 10**6, ["shortened to 0"]),
        ({"epochs": 5, "warmup_epochs": 2}, 10**6, []),
        ({"out_dim": 4096}, 1000, ["`out_dim` 4,096 is more prototypes than", "(1,000)", "try `"]),
        ({"out_dim": 1000}, 1000, []),
        ({"out_dim": 64}, 12, []),
    ],
)
def test_advice(changes, n_images, words):
    said = " ".join(introduce.advice(Config(**changes).check(), n_images))
    assert all(word in said for word in words) and bool(said) == bool(words)


def test_a_short_run_gets_a_short_warm_up():
    lr = Schedule(Config(epochs=5).check(), 10, 1).lr
    assert len(lr) == 50 and lr[0] == 0 and lr.argmax() in (9, 10)
    assert (Schedule(Config(epochs=5, warmup_epochs=1).check(), 10, 1).lr == lr).all()


def test_a_warm_up_that_was_given_is_not_shortened():
    with pytest.raises(ValueError, match="`warmup_epochs` is 6 but `epochs` is only 5"):
        Config(epochs=5, warmup_epochs=6).check()


def test_a_run_tells_its_learning_rate_and_how_long_it_takes(photographs, tmp_path):
    said = finish(photographs, tmp_path).splitlines()
    first = said.index(next(line for line in said if line.startswith("step 1 took")))
    (rate,) = [line for line in said[:first] if line.startswith("learning rate: ")]
    assert rate == ("learning rate: 0.00156 after 1 epoch of warm-up (--lr 0.1 x 4 / 256 images)")
    steps = 3 * (len(list(photographs.glob("*"))) // 4)
    todo = f"to do: 3 epochs, {steps} steps; how long that takes is told after the first step"
    assert todo in said and f"for the {steps - 1} to come" in said[first]
    whole = "\n".join(said)
    assert not re.search(r"\(s\)|\(es\)|\b1 (images|epochs|steps|threads)\b(?!/)", whole)
    lines = [line for line in said if line.startswith("end of ")]  # as log.txt counts and says
    logged = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line.split(": ")[0] for line in lines] == [f"end of epoch {i} of 0-2" for i in range(3)]
    for line, found in zip(lines, logged, strict=True):
        share = found["train_teacher_entropy"] / math.log(64)
        assert f"loss {found['train_loss']:.4f}, teacher entropy {share:.0%} of log K" in line
    path = tmp_path / "checkpoint.pth"
    assert said.count(f"saved in '{path}', as after every epoch") == 1
    done = said.index(next(line for line in said if line.startswith("done: 3 epochs (0 to 2), ")))
    assert said[done + 1] == f"teacher and student are saved in '{path}'"
    assert said[done + 2].startswith("measure it: dinofast knn ")


def test_first_lines_fit_a_terminal(photographs, tmp_path):
    said = finish(photographs, tmp_path, "--epochs", "1", "--warmup_epochs", "0").splitlines()
    first = next(i for i, line in enumerate(said) if line.startswith("step 1 took"))
    assert [line.partition(":")[0] for line in said[:first]] == [
        *("model", "device", "data", "network", "learning rate", "to do", "scores")
    ]
    assert all(len(line) <= 80 for line in said[: first + 1])
    assert any(line.startswith("epoch 0  step 12  loss") for line in said)


def test_a_long_run_is_estimated_beforehand(monkeypatch):
    """By its matrix products: ViT-S/16 with 10 crops takes 113 GFLOP an image."""
    cfg = Config(epochs=100).check()
    step = SimpleNamespace(
        model=SimpleNamespace(student=SimpleNamespace(backbone=vit_small())), dtype=torch.float32
    )
    monkeypatch.setattr(introduce, "peak_flops", lambda *_, **__: (100e9, "my word"))
    process = SimpleNamespace(device=torch.device("cpu"))
    said = introduce._duration(cfg, process, step, 100_000)
    days = 100 * 1000 * 64 * 113.4 / 100 / 86400
    assert said == (f"at least {days:.0f} days, at this device's full speed")


def test_a_folder_of_halves_is_told(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    (said,) = introduce.advice(Config(data_path=str(tmp_path)).check(), 10**6)
    assert "has train/ and val/, and all images below it are used" in said
    assert introduce.advice(Config(data_path=str(tmp_path / "train")).check(), 10**6) == []
