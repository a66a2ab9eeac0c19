"""The loop itself, on the official eight-step trajectory and on small runs."""

import json
import types

import golden
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import GOLDEN, GoldenLoader, golden_backbone

from dinofast import checkpoint, ops
from dinofast import train as train_module
from dinofast.config import Config
from dinofast.nn.dino import Model, MultiCropWrapper
from dinofast.nn.head import DINOHead
from dinofast.optim import OPTIMIZERS, AdamWEMA
from dinofast.runtime.progress import Diverged, Run


@pytest.fixture
def official(monkeypatch):
    """Start the loop from the official weights and batches; what it does is recorded."""
    seen = types.SimpleNamespace(losses=[], norms=[], loader=GoldenLoader(), tables=[])
    build = Model.from_config.__func__

    def from_config(cls, cfg, backbone=None):
        model = build(cls, cfg, backbone)
        start = golden.load("train.npz", "init.")
        model.student.load_state_dict(start)
        model.teacher.load_state_dict(start)
        return model

    class Recording(AdamWEMA):
        def step(self, *args, **arguments):
            seen.norms.append(
                [
                    p.grad.norm()
                    for g in self.param_groups
                    for p in g["params"]
                    if p.grad is not None
                ]
            )
            seen.tables.append(
                (
                    float(self.param_groups[1]["lr"]),
                    float(self.param_groups[0]["weight_decay"]),
                    float(arguments["momentum"]),
                )
            )
            return super().step(*args, **arguments)

    def show(self, step, sums, lr, wait_s):
        total = sum(seen.losses[-((step - 1) % 2) :]) if (step - 1) % 2 else 0.0
        seen.losses.append(sums["loss"] - total)
        return {}

    monkeypatch.setattr(Model, "from_config", classmethod(from_config))
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: seen.loader)
    monkeypatch.setattr(Run, "show", show)
    monkeypatch.setitem(OPTIMIZERS, "adamw", Recording)
    return seen


def options(tmp_path, **changes):
    return Config(**{**GOLDEN.to_dict(), "output_dir": str(tmp_path), "eval_every": 0, **changes})


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def assert_official_end(path):
    state = checkpoint.read(path)
    for name in ("student", "teacher"):
        for key, value in golden.load("train.npz", f"final.{name}.").items():
            torch.testing.assert_close(
                state[name][f"module.{key}" if name == "student" else key],
                value,
                rtol=0,
                atol=1e-4,
                msg=lambda m, key=key, name=name: f"{name}.{key}: {m}",
            )
    torch.testing.assert_close(
        state["dino_loss"]["center"], golden.load("train.npz")["final.center"], rtol=1e-4, atol=1e-5
    )


def test_official_trajectory(official, tmp_path):
    path = train_module.train(options(tmp_path), backbone=golden_backbone).checkpoint
    data = golden.load("train.npz")
    assert official.losses == pytest.approx(
        [data[f"step{i}.loss"].item() for i in range(8)], rel=1e-5
    )
    tables = torch.tensor(official.tables, dtype=torch.float64)
    torch.testing.assert_close(
        tables, torch.stack((data["lr"], data["wd"], data["momentum"]), 1), rtol=1e-12, atol=0
    )
    for i in range(8):
        theirs = data[f"step{i}.grad_norms"].sort().values
        ours = torch.stack(official.norms[i]).double().sort().values
        if i < 2:  # the last layer is frozen; the official norms still count it
            assert len(ours) == len(theirs) - 2
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert_official_end(path)
    assert official.loader.closed


def test_official_checkpoint_resumes(official, tmp_path):
    """Two more epochs from the file that the official script saved equal a run of ours that is
    resumed in the same place."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    longer = dict(epochs=6, warmup_epochs=1)
    train_module.train(options(tmp_path / "ours"), backbone=golden_backbone)
    (tmp_path / "theirs" / "checkpoint.pth").write_bytes(
        (golden.DATA / "official_checkpoint.pth").read_bytes()
    )
    ends = [
        checkpoint.read(
            train_module.train(options(tmp_path / name, **longer), golden_backbone).checkpoint
        )
        for name in ("ours", "theirs")
    ]
    assert [e["epoch"] for e in ends] == [6, 6] and ends[1]["dinofast"]["step"] == 12
    for key, value in ends[0]["teacher"].items():
        torch.testing.assert_close(ends[1]["teacher"][key], value, rtol=0, atol=3e-4)


def test_log_has_the_official_keys_and_more(official, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: GoldenLoader())
    train_module.train(options(tmp_path), backbone=golden_backbone)
    lines = log_of(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert list(lines[0])[:4] == ["train_loss", "train_lr", "train_wd", "epoch"]
    for line in lines:
        assert line["train_kl"] + line["train_teacher_entropy"] == pytest.approx(
            line["train_loss"], rel=1e-5
        )
        assert (
            line["train_center_norm"] > 0
            and line["train_grad_norm"] > 0
            and line["skipped_steps"] == 0
        )
    assert lines[0]["train_lr"] == pytest.approx(0.001) and lines[3]["train_wd"] == pytest.approx(
        (0.34727922 + 0.38629832) / 2
    )
    assert (tmp_path / "checkpoint0000.pth").exists() and not (
        tmp_path / "checkpoint0001.pth"
    ).exists()


def test_a_poisoned_batch_is_skipped_and_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: GoldenLoader(poison={3}))
    path = train_module.train(options(tmp_path), backbone=golden_backbone).checkpoint
    state = checkpoint.read(path)
    assert all(
        torch.isfinite(v).all()
        for part in ("student", "teacher", "dino_loss")
        for v in state[part].values()
    )
    lines = log_of(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0, 0]
    assert max(s["step"] for s in state["optimizer"]["state"].values()) == 7


def test_training_that_stays_broken_ends_with_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(
        train_module, "make_loader", lambda cfg, **_: GoldenLoader(poison=range(2, 1000))
    )
    with pytest.raises(Diverged, match="not been finite for 20 steps in a row.*`precision` fp32"):
        train_module.train(options(tmp_path, epochs=40), backbone=golden_backbone)
    state = checkpoint.read(tmp_path / "checkpoint.pth")
    assert all(torch.isfinite(v).all() for v in state["student"].values())


def test_bf16_stays_near_fp32(monkeypatch, tmp_path):
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: GoldenLoader())
    for p in ("fp32", "bf16"):
        train_module.train(options(tmp_path / p, precision=p, epochs=2), backbone=golden_backbone)
    wide, half = (log_of(tmp_path / p)[0]["train_loss"] for p in ("fp32", "bf16"))
    assert half == pytest.approx(wide, rel=0.02) and half != wide


def test_fp16_finds_its_loss_scale(monkeypatch, tmp_path):
    """The first steps overflow at a scale of 65,536 and are skipped; then training goes on and the
    scaler is saved."""
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: GoldenLoader())
    path = train_module.train(
        options(tmp_path, precision="fp16", epochs=8), backbone=golden_backbone
    )
    lines = log_of(tmp_path)
    assert (
        lines[0]["skipped_steps"] > 0
        and lines[-1]["skipped_steps"] == 0
        and lines[-1]["train_loss"] > 0
    )
    assert checkpoint.read(path.checkpoint)["fp16_scaler"]["scale"] < 65536


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_other_optimizers_train(optimizer, monkeypatch, tmp_path):
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: GoldenLoader())
    path = train_module.train(
        options(tmp_path, optimizer=optimizer, epochs=2), backbone=golden_backbone
    )
    moved = checkpoint.read(path.checkpoint)["student"]["module.backbone.blocks.0.attn.qkv.weight"]
    torch.manual_seed(0)
    assert not torch.equal(moved, golden_backbone().blocks[0].attn.qkv.weight)


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: a value that is read, by torch itself or by
    us in Python."""

    OURS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = 0
        for name in self.OURS:
            monkeypatch.setattr(torch.Tensor, name, self.counting(getattr(torch.Tensor, name)))

    def counting(self, inner):
        def read(*args, **arguments):
            self.reads += 1
            return inner(*args, **arguments)

        return read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def reads_of_a_run(tmp_path, steps, **changes):
    with pytest.MonkeyPatch.context() as patch:
        # the C++ path may look at numbers: it has no device
        for module in (ops._dino_loss, ops._adamw_ema):
            patch.setattr(module, "choose", lambda *_: "reference")
        for module in (ops._dino_loss, ops._checks, ops):
            patch.setattr(module, "is_known", lambda _: False)
        patch.setattr(checkpoint.saving, "save", lambda *_: None)
        loader = GoldenLoader()
        loader.steps_per_epoch, loader.n_images = steps, 4 * steps
        patch.setattr(train_module, "make_loader", lambda cfg, **_: loader)
        with CountReads(patch) as mode:
            train_module.train(
                options(tmp_path, epochs=2, saveckp_freq=0, **changes), backbone=golden_backbone
            )
        return mode.reads


def test_no_value_is_read_between_logging_points(tmp_path):
    """Twenty steps in an epoch read no more than five: only what is logged at its end. Logging each
    step does read more."""
    few, many = (reads_of_a_run(tmp_path, steps, log_steps=1000) for steps in (5, 20))
    assert few == many
    assert reads_of_a_run(tmp_path, 20, log_steps=1) > many + 30


def test_first_ten_losses_of_a_small_run_are_pinned(photographs, monkeypatch, tmp_path):
    """From weights that no version of torch draws; one step an epoch, so that the log tells every
    loss.

    To 1e-3, as decoders and resizers differ in a last bit.
    """
    build = Model.from_config.__func__

    def from_config(cls, cfg, backbone=None):
        model, rng = build(cls, cfg, backbone), np.random.default_rng(0)
        weights = {
            name: torch.from_numpy(rng.normal(0, 0.2 if p.ndim > 1 else 0.02, p.shape)).float()
            for name, p in sorted(model.student.state_dict().items())
        }
        model.student.load_state_dict(weights)
        model.teacher.load_state_dict(weights)
        return model

    monkeypatch.setattr(Model, "from_config", classmethod(from_config))
    cfg = Config(
        data_path=str(photographs),
        output_dir=str(tmp_path),
        arch="vit_nano",
        patch_size=4,
        global_crops_size=16,
        local_crops_size=8,
        local_crops_number=2,
        out_dim=64,
        head_hidden_dim=32,
        head_bottleneck_dim=16,
        seed=7,
        batch_size_per_gpu=48,
        epochs=10,
        warmup_epochs=2,
        lr=0.01,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=5,
        momentum_teacher=0.9,
        norm_last_layer=False,
        drop_path_rate=0.0,
        num_workers=0,
        device="cpu",
    )
    train_module.train(cfg)
    losses = [line["train_loss"] for line in log_of(tmp_path)]
    assert losses == pytest.approx(PINNED, rel=1e-3)


PINNED = [3.26099, 3.54137, 3.72959, 3.85629, 3.95512, 3.98970, 4.02587, 4.06276, 4.09677, 4.12675]


def test_head_of_the_golden_run_fits():
    model = MultiCropWrapper(
        golden_backbone(),
        DINOHead(48, 160, norm_last_layer=False, hidden_dim=64, bottleneck_dim=24),
    )
    model.load_state_dict(golden.load("train.npz", "init."))


def test_the_list_of_bad_files_is_begun_anew_by_new_runs_alone(monkeypatch, tmp_path):
    loader = GoldenLoader()
    monkeypatch.setattr(train_module, "make_loader", lambda cfg, **_: loader)
    train_module.train(options(tmp_path, epochs=2), backbone=golden_backbone)
    assert loader.called == ["all_are_here", "begin_run"]
    train_module.train(options(tmp_path, epochs=3), backbone=golden_backbone)
    assert loader.called == ["all_are_here", "begin_run", "all_are_here"]


@pytest.mark.parametrize("cfg", ["photographs", {"data_path": "photographs"}, None])
def test_what_is_no_config_is_said(cfg):
    with pytest.raises(TypeError, match=r"give train\(Config\(data_path=\.\.\., \.\.\.\)\)"):
        train_module(cfg)
