"""What a run leaves beside its checkpoints, where it was ended, files are damaged or disks full."""

import json
import resource
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import TINY

from dinofast import Callback, RunFolder, checkpoint, train
from dinofast.callbacks import check_callbacks
from dinofast.config_file import changes_in
from dinofast.runtime.json_lines import JsonLines

RUN = replace(
    TINY,
    batch_size_per_gpu=10,
    epochs=2,
    warmup_epochs=1,
    lr=0.1,
    eval_every=1,
    saveckp_steps=1,
    num_workers=0,
    device="cpu",
)
IMAGES = torch.randint(0, 256, (40, 3, 24, 24), dtype=torch.uint8)


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, training, step, metrics):
        if step == self.step:
            raise InterruptedError


def go(folder, stop=None, **changes):
    cfg = replace(RUN, output_dir=str(folder), **changes)
    if stop is None:
        return train(cfg, dataset=IMAGES)
    with pytest.raises(InterruptedError):
        train(cfg, dataset=IMAGES, callbacks=[Stop(stop)])
    return RunFolder(folder)


def test_best_stays_that_of_an_epoch_s_end(tmp_path):
    """When a run goes on in the middle of the epoch after it."""
    best = go(tmp_path, stop=6).best
    assert checkpoint.read(best)["dinofast"]["step"] == 4
    go(tmp_path, stop=7)
    assert checkpoint.read(best)["dinofast"]["step"] == 4


def test_best_is_made_where_a_run_was_killed_before_it_was(tmp_path):
    go(tmp_path, stop=4).best.unlink()
    assert checkpoint.read(go(tmp_path, stop=5).best)["dinofast"]["step"] == 4


def test_best_of_an_earlier_run_is_set_aside(tmp_path):
    go(tmp_path, epochs=1)
    for path in tmp_path.glob("checkpoint*.pth"):
        path.unlink()
    assert go(tmp_path, eval_every=0).best is None
    assert (tmp_path / "best.old.pth").exists()


@pytest.mark.parametrize("text", ["", "\0\0\0", "changes: 5\nepochs: 1", "[1, 2]"])
def test_a_run_goes_on_with_a_damaged_list_of_options(text, tmp_path):
    """As a power cut leaves it."""
    go(tmp_path, epochs=1)
    (tmp_path / "config.yaml").write_text(text)
    run = go(tmp_path)
    assert run.options["epochs"] == 2 and len(run.metrics) == 2
    assert isinstance(changes_in(tmp_path), list)


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", "step")
    assert lines.append({"step": 1}) is None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        assert lines.append({"step": 2, "loss": 3.0}) == "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines.path.read_text() == '{"step": 1}\n'
    assert lines.append({"step": 3}) is None
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3]


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_x").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    found = __import__("importlib.util").util.find_spec("wandb_x")
    monkeypatch.setattr("dinofast.callbacks.find_spec", lambda name: found)
    with pytest.raises(ValueError, match="`wandb` needs a package that is not installed"):
        check_callbacks(replace(TINY, wandb="project"), ())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("teacher", ["fp32", "bf16"])
def test_scores_in_16_bits_on_a_cpu(precision, teacher, tmp_path):
    if precision == "fp16" and teacher == "bf16":
        pytest.skip("refused: they do not go together")
    run = go(tmp_path, epochs=1, precision=precision, teacher_precision=teacher)
    assert {"eval_rankme", "eval_patch_matching"} <= run.metrics[-1].keys()


def test_a_writer_that_cannot_begin_says_why(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="`tensorboard` cannot begin .*: repair the package"):
        go(tmp_path, epochs=1, tensorboard=True)


def test_metrics_of_epochs_before_stay_where_the_batch_has_changed(tmp_path):
    """Then an epoch has half as many steps: the count goes back."""
    first = go(tmp_path, stop=5, log_steps=1).steps
    assert [line["step"] for line in first] == [1, 2, 3, 4, 5]
    again = go(tmp_path, batch_size_per_gpu=20, log_steps=1).steps
    assert [(line["epoch"], line["step"]) for line in again] == [
        *((0, 1), (0, 2), (0, 3), (0, 4)),
        *((1, 3), (1, 4)),
    ]


@pytest.mark.parametrize(
    "halves, changes, words",
    [
        ({}, {}, "`eval_data`: '.*' holds no labeled images"),
        ({"train": "a", "val": "a"}, {}, "images of one class only in train/"),
        ({"train": "ab", "val": "ab"}, {"in_channels": 1}, "for images of three channels"),
    ],
)
def test_labeled_images_that_cannot_be_are_told_before_anything_is_written(
    halves, changes, words, tmp_path
):
    labeled = tmp_path / "labeled"
    labeled.mkdir()
    for half, classes in halves.items():
        for name in classes:
            (labeled / half / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(labeled / half / name / "x.png")
    with pytest.raises(ValueError, match=words):
        images = IMAGES[:, : changes.get("in_channels", 3)]
        cfg = replace(RUN, output_dir=str(tmp_path / "run"), eval_data=str(labeled), **changes)
        train(cfg, dataset=images)
    assert not (tmp_path / "run").exists()
