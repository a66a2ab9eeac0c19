"""What a run leaves beside its checkpoints: scores, best.pth, metrics, options, and what callbacks
are told."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pretraining import assert_same_run, finish
from tiny import TINY

from dinofast import Callback, RunFolder, checkpoint, cli, knn, train
from dinofast.callbacks import check_callbacks
from dinofast.data import make_loader
from dinofast.evaluate.while_training.monitor import Monitor
from dinofast.runtime.distributed import Process

SCORES = {"eval_knn", "eval_rankme", "eval_lidar", "eval_patch_matching"}


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labeled") / "data"
    assert cli.main(["sample-data", str(folder), "--n_images", "80", "--size", "32"]) == 0
    return folder


def options(labeled, out):
    return replace(
        TINY,
        data_path=str(labeled / "train"),
        output_dir=str(out),
        batch_size_per_gpu=10,
        epochs=4,
        warmup_epochs=1,
        lr=0.1,
        eval_every=1,
        log_steps=2,
        num_workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def run(labeled, tmp_path_factory):
    return train(replace(options(labeled, tmp_path_factory.mktemp("run")), eval_data=str(labeled)))


def test_a_run_is_an_object_with_all_that_is_known_of_it(run, labeled):
    assert [line["epoch"] for line in run.metrics] == [0, 1, 2, 3]
    assert all(SCORES <= line.keys() for line in run.metrics)
    assert [line["step"] for line in run.steps] == [*range(2, 25, 2)]
    assert run.options["out_dim"] == 32 and run.changes == []
    assert run.teacher(torch.rand(2, 3, 16, 16)).shape == (2, 64) and not run.teacher.training
    assert str(run) == str(run.path / "checkpoint.pth")
    again = RunFolder(run.path)
    assert again.metrics == run.metrics and again.best == run.path / "best.pth"
    with pytest.raises(ValueError, match="there is no run in"):
        RunFolder(run.path / "nothing")


def test_metrics_are_what_the_run_did(run):
    """Means over the steps since the last line; those of an epoch are those of log.txt."""
    first = run.steps[0]
    assert {"loss", "teacher_entropy", "kl", "center_norm", "grad_norm"} <= first.keys()
    assert first["images_per_s"] > 0 and 0 <= first["data_wait"] <= 1
    assert first["momentum"] == pytest.approx(0.996, abs=1e-3)
    for line in run.metrics:
        of_epoch = [step for step in run.steps if step["epoch"] == line["epoch"]]
        for name in ("loss", "grad_norm"):
            mean = sum(step[name] for step in of_epoch) / len(of_epoch)
            assert line[f"train_{name}"] == pytest.approx(mean, rel=1e-6)
    lr = [step["lr"] for step in run.steps]
    assert lr[0] < lr[2] and lr[-1] < lr[5]


def test_the_score_is_that_of_the_knn_command(run, labeled, capsys):
    found = knn(run, labeled, nb_knn=(20,), num_workers=0, device="cpu")
    assert run.metrics[-1]["eval_knn"] == pytest.approx(found[20][0])


def test_best_is_the_checkpoint_with_the_best_score(run):
    scores = [line["eval_knn"] for line in run.metrics]
    assert checkpoint.read(run.best)["epoch"] == scores.index(max(scores)) + 1


def test_scores_change_nothing_of_the_training(run, labeled, tmp_path):
    plain = train(replace(options(labeled, tmp_path), eval_every=0))
    assert not SCORES & plain.metrics[0].keys() and plain.best is None
    theirs, ours = (checkpoint.read(r.checkpoint)["teacher"] for r in (plain, run))
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_scores_and_best_are_the_same_after_a_resume(run, labeled, tmp_path):
    """Ended in the middle of the third epoch."""

    class Stop(Callback):
        def on_step(self, training, step, metrics):
            if step == 14:
                raise InterruptedError

    cfg = replace(options(labeled, tmp_path), eval_data=str(labeled), saveckp_steps=3)
    with pytest.raises(InterruptedError):
        train(cfg, callbacks=[Stop()])
    again = train(cfg)
    assert_same_run(run.path, again.path)
    steps = [line["step"] for line in again.steps]
    assert steps == sorted(set(steps)) and steps[-1] == 24 and {12, 14, 16} <= set(steps)
    assert checkpoint.read(again.best)["epoch"] == checkpoint.read(run.best)["epoch"]


def test_what_is_changed_on_resuming_is_recorded(labeled, tmp_path):
    cfg = replace(options(labeled, tmp_path), epochs=1, eval_every=0)
    train(cfg)
    run = train(replace(cfg, epochs=2, lr=0.05))
    assert run.changes == [
        {"step": 6, "option": "lr", "from": 0.1, "to": 0.05},
        {"step": 6, "option": "epochs", "from": 1, "to": 2},
    ]


def test_without_labels_and_for_any_backbone(labeled, tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.layer(x)).mean((2, 3))

    run = train(replace(options(labeled, tmp_path), epochs=1), backbone=Net)
    assert SCORES & run.metrics[0].keys() == {"eval_rankme", "eval_lidar"}
    assert 1 <= run.metrics[0]["eval_rankme"] <= 8 and isinstance(run.teacher, Net)
    assert run.best is not None


def test_callbacks_are_told_of_steps_readings_and_epochs(labeled, tmp_path):
    told = []

    class Watch:
        def on_start(self, training):
            told.append(("start", training.start, training.cfg.out_dim))

        def on_step(self, training, step, metrics):
            told.append(("step", step, metrics["loss"].item()))

        def on_log(self, training, step, metrics):
            told.append(("log", step, metrics["loss"]))

        def on_epoch(self, training, epoch, metrics):
            saved = (training.output_dir / "checkpoint.pth").exists()
            told.append(("epoch", epoch, saved and metrics["train_loss"]))

        def on_end(self, training):
            told.append(("end", training.model.student is not None, 0))

    run = train(replace(options(labeled, tmp_path), epochs=2), callbacks=[Watch()])
    kinds = [kind for kind, *_ in told]
    assert kinds[:4] == ["start", "step", "step", "log"] and kinds[-1] == "end"
    assert kinds.count("step") == 12 and kinds.count("log") == 6
    epochs = [value for kind, _, value in told if kind == "epoch"]
    assert epochs == [line["train_loss"] for line in run.metrics]
    steps = [value for kind, _, value in told if kind == "step"]
    assert epochs[0] == pytest.approx(sum(steps[:6]) / 6, rel=1e-6)


@pytest.mark.parametrize(
    "given, words", [([Callback], "the class Callback"), ([3], "an int"), ([object()], "an object")]
)
def test_what_is_no_callback_is_refused(given, words):
    with pytest.raises(ValueError, match=f"one of `callbacks` is {words}"):
        check_callbacks(TINY, given)


@pytest.mark.parametrize("name, value", [("tensorboard", True), ("wandb", "project")])
def test_a_writer_without_its_package_is_refused(name, value, monkeypatch):
    monkeypatch.setattr("dinofast.callbacks.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"`{name}` needs a package that is not installed"):
        check_callbacks(replace(TINY, **{name: value}), ())


def monitor_of(labeled, n_images=1000, **changes):
    cfg = replace(options(labeled, "out"), eval_every=None, epochs=100)
    loader = make_loader(replace(cfg, batch_size_per_gpu=4))
    loader.n_images = n_images
    return Monitor(replace(cfg, **changes), loader, Process(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("n_images, epochs", [(100, 20), (1000, 100), (50_000, 7), (60, 1)])
def test_by_default_scores_take_at_most_two_percent(labeled, n_images, epochs):
    monitor = monitor_of(labeled, n_images, epochs=epochs)
    times = sum(map(monitor.is_due, range(epochs)))
    crops = 2 * min(n_images, 512) * times
    local = 2 * 8 * 8 / (16 * 16)  # of a global crop
    images = crops / (2 + 3 * (2 + local)) + 50 * times
    assert images <= 0.02 * n_images * epochs + 1e-9
    assert (times > 0) == monitor.is_due(epochs - 1)
    assert times == (epochs if n_images == 50_000 else times)
    assert (
        monitor.told() == "scores: none in so short a run; `eval_every` 1 takes them all the same"
    ) == (times == 0)


def test_scores_are_taken_as_often_as_asked_and_at_the_end(labeled):
    monitor = monitor_of(labeled, eval_every=30)
    assert [epoch for epoch in range(100) if monitor.is_due(epoch)] == [9, 39, 69, 99]
    assert not any(map(monitor_of(labeled, eval_every=0).is_due, range(100)))
    assert monitor_of(labeled, eval_every=0).told() == ""


def test_an_unreadable_image_is_left_out(labeled, tmp_path):
    shutil.copytree(labeled, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "val").rglob("*.jpg"))[0]
    broken.write_bytes(b"no image")
    cfg = replace(options(tmp_path / "data", tmp_path / "out"), eval_data=str(tmp_path / "data"))
    run = train(replace(cfg, epochs=1))
    assert 0 <= run.metrics[0]["eval_knn"] <= 100
    assert run.metrics[0]["eval_knn"] * 19 / 100 == pytest.approx(
        round(run.metrics[0]["eval_knn"] * 19 / 100)
    )


def test_two_processes_find_the_scores_of_one(labeled, tmp_path):
    cfg = replace(options(labeled, tmp_path / "one"), epochs=2, drop_path_rate=0.0)
    one = train(replace(cfg, eval_data=str(labeled)))
    words = [
        *("--batch_size_per_gpu", "5", "--epochs", "2", "--warmup_epochs", "1", "--lr", "0.1"),
        *("--eval_every", "1", "--eval_data", str(labeled), "--log_steps", "2"),
        *("--out_dim", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"),
        *("--norm_last_layer", "true", "--num_workers", "0", "--drop_path_rate", "0"),
    ]
    finish(labeled / "train", tmp_path / "two", *words, processes=2)
    two = RunFolder(tmp_path / "two")
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        for name in SCORES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert len(two.steps) == len(one.steps)


def test_scores_of_a_broken_backbone_are_no_reason_to_end(labeled, tmp_path):
    """A teacher that has become nan has scores that are nan, and no best."""

    class Spoil(Callback):
        def on_step(self, training, step, metrics):
            training.model.teacher.backbone.norm.weight.data.fill_(math.nan)

    cfg = replace(options(labeled, tmp_path), epochs=1, eval_data=str(labeled))
    run = train(cfg, callbacks=[Spoil()])
    assert run.best is None


def test_tensorboard_reads_what_was_written(labeled, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(replace(options(labeled, tmp_path), epochs=2, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [e.step for e in losses] == [line["step"] for line in run.steps]
    assert losses[-1].value == pytest.approx(run.steps[-1]["loss"], rel=1e-6)
    assert events.Scalars("epoch/eval_rankme")[-1].step == 12


def test_wandb_offline_keeps_the_metrics(labeled, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = replace(options(labeled, tmp_path), epochs=1, wandb="tiny")
    train(cfg)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    name = (tmp_path / "wandb-run-id.txt").read_text().strip()
    assert folder.name.endswith(name) and list(folder.glob("*.wandb"))


def test_writers_are_not_imported_unless_asked_for(labeled, tmp_path):
    code = (
        "import sys; from dinofast import cli; assert cli.main(sys.argv[1:]) == 0; "
        "assert not {'tensorboard', 'wandb'} & set(sys.modules)"
    )
    words = [
        *("pretrain", str(labeled / "train"), "--output_dir", str(tmp_path), "--device", "cpu"),
        *("--arch", "vit_nano", "--patch_size", "4", "--out_dim", "32", "--epochs", "1"),
        *("--global_crops_size", "16", "--local_crops_size", "8", "--local_crops_number", "1"),
        *("--batch_size_per_gpu", "30", "--num_workers", "0", "--warmup_epochs", "0"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "log.txt").read_text())["epoch"] == 0


def test_a_run_may_begin_with_other_weights_and_goes_on_without_them(labeled, run, tmp_path):
    start = tmp_path / "start.pth"
    shutil.copy(run.checkpoint, start)
    cfg = replace(options(labeled, tmp_path / "run"), init=str(start), epochs=1, lr=0.0, min_lr=0.0)
    cfg = replace(cfg, weight_decay=0.0, weight_decay_end=0.0)
    begun = train(cfg)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(begun.teacher(images), run.teacher(images), rtol=1e-5, atol=1e-6)
    start.unlink()
    assert len(train(replace(cfg, epochs=2)).metrics) == 2
    with pytest.raises(ValueError, match="start.pth"):
        train(replace(cfg, output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_on_a_gpu_are_those_of_a_cpu(gpu, labeled, tmp_path, precision):
    cfg = replace(options(labeled, tmp_path), eval_data=str(labeled), epochs=2, device="cuda")
    run = train(replace(cfg, precision=precision, compile="off"))
    found = knn(run, labeled, nb_knn=(20,), num_workers=0, device="cpu")
    assert run.metrics[-1]["eval_knn"] == pytest.approx(found[20][0], abs=10)
    assert run.metrics[-1].keys() >= SCORES
