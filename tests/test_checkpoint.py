import os
import pathlib
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import golden
import pytest
import torch
from tiny import TINY, parts

from dinofast import (
    SGDEMA,
    DINOHead,
    checkpoint,
    load_backbone,
    param_groups,
    resume,
    vit_nano,
    vit_tiny,
)
from dinofast.config import Config

CFG = replace(TINY, norm_last_layer=False)

POSITION = checkpoint.TrainState(
    7, 1, 12, 40, {"loss": 1.5, "good_steps": 3.0, "steps": 3.0}, "f" * 32, 4
)


def saved(folder, cfg=CFG):
    model, optimizer = parts(cfg)
    model([torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)], 0.04).total.backward()
    optimizer.step(momentum=0.9)
    model.dino_loss.step()
    path = folder / "checkpoint.pth"
    checkpoint.save(path, model, optimizer, torch.amp.GradScaler("cpu"), cfg, POSITION)
    return path, model, optimizer


def test_layout_is_the_official_one(tmp_path):
    path, model, optimizer = saved(tmp_path)
    # the default, weights only: what the official evaluation scripts do today
    ours = torch.load(path)
    with torch.serialization.safe_globals(checkpoint._SAFE):
        theirs = torch.load(golden.DATA / "official_checkpoint.pth")
    assert set(theirs) | {"dinofast", "fp16_scaler"} == set(ours)
    assert (
        all(name.startswith("module.") for name in ours["student"])
        and "backbone.cls_token" in ours["teacher"]
    )
    assert list(ours["dino_loss"]) == ["center"] and ours["epoch"] == 1
    assert (
        ours["optimizer"]["param_groups"][0].keys() == theirs["optimizer"]["param_groups"][0].keys()
    )
    assert ours["optimizer"]["state"][0].keys() == theirs["optimizer"]["state"][0].keys()
    assert ours["args"]["global_crops_scale"] == (0.4, 1.0)
    torch.optim.AdamW(param_groups(model.student)).load_state_dict(ours["optimizer"])
    # as the official evaluation does
    state = {
        k.replace("module.", "").replace("backbone.", ""): v for k, v in ours["teacher"].items()
    }
    assert not model.student.backbone.load_state_dict(state, strict=False).missing_keys


def test_restore_is_exact(tmp_path):
    path, model, optimizer = saved(tmp_path)
    other = Config(
        **{
            **CFG.to_dict(),
            "seed": 5,
            "lr": 0.1,
            "attention": "plain",
            "compile": "off",
            "cuda_graph": True,
            # but the last: same numbers
            "grad_checkpointing": True,
            "linear": "blas",
            "precision": "bf16",
        }
    )
    model2, optimizer2 = parts(other)
    position, changed = resume.restore(path, model2, optimizer2, None, other)
    assert position == POSITION
    assert sorted(changed) == [
        "`lr` was 0.0005 and is now 0.1",
        "`precision` was auto and is now bf16",
        "`seed` was 0 and is now 5",
    ]
    torch.testing.assert_close(model2.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        optimizer2.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0
    )


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, model, optimizer = saved(tmp_path)
    before = path.read_bytes()

    def half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, model, optimizer, None, CFG, checkpoint.TrainState())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_kept_copies_survive_the_next_save(tmp_path):
    path, model, optimizer = saved(tmp_path)
    checkpoint.link(path, tmp_path / "checkpoint0000.pth")
    checkpoint.save(path, model, optimizer, None, CFG, checkpoint.TrainState(step=9))
    assert checkpoint.read(tmp_path / "checkpoint0000.pth")["dinofast"]["step"] == 7
    assert checkpoint.read(path)["dinofast"]["step"] == 9


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_nothing_inside_a_file_is_run(save, tmp_path):
    path = tmp_path / "bad.pth"
    save({"student": {}, "args": Malicious(str(tmp_path / "owned"))}, path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.read(path)
    assert not (tmp_path / "owned").exists()


def test_foreign_contents_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.read(tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError,
        match="no DINO training checkpoint .it lacks student, teacher, optimizer, epoch, dino_loss",
    ):
        resume.restore(tmp_path / "other.pth", *parts(CFG), None, CFG)
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "absent.pth")


def test_nothing_is_half_loaded(tmp_path):
    path, _, _ = saved(tmp_path)
    wider = Config(**{**CFG.to_dict(), "out_dim": 33})
    model, optimizer = parts(wider)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"does not fit this student: 'head.last_layer.weight_g' is \(32, 1\) in the file and "
        r"\(33, 1\) here: it was saved with `out_dim` 32 \(now 33\); resume with that. It was left",
    ):
        resume.restore(path, model, optimizer, None, wider)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


NAN = float("nan")


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("optimizer", {"a": 1}, "no optimizer state"),
        ("optimizer", None, "no optimizer state"),
        ("dinofast", {"step": "x", "epoch": 1}, "does not tell where the run stands"),
        ("dinofast", {"step": -3}, "does not tell where the run stands"),
        ("epoch", -5, "does not tell where"),
        ("student", [1], "holds a list under 'student', where weights should be"),
        (
            "dino_loss",
            {"center": torch.full((1, 32), NAN)},
            "not finite, in 'center' of the dino_loss",
        ),
    ],
)
def test_damaged_parts_are_named_and_nothing_is_loaded(key, value, words, tmp_path):
    path, _, _ = saved(tmp_path)
    state = checkpoint.read(path)
    state[key] = value
    if key == "epoch":
        del state["dinofast"]
    torch.save(state, path)
    model, optimizer = parts(Config(**{**CFG.to_dict(), "seed": 3}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        resume.restore(path, model, optimizer, None, CFG)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# the second has another shape
@pytest.mark.parametrize("damage", [lambda m: m[:1].fill_(NAN), lambda m: m])
def test_damaged_moments_are_named(damage, tmp_path):
    path, _, _ = saved(tmp_path)
    state = checkpoint.read(path)
    state["optimizer"]["state"][0]["exp_avg"] = damage(
        state["optimizer"]["state"][0]["exp_avg"].expand(2, -1, -1).clone()
    )
    torch.save(state, path)
    with pytest.raises(ValueError, match="another optimizer .*or other trainable parameters"):
        resume.restore(path, *parts(CFG), None, CFG)


def test_paths_in_the_options_stay_readable(tmp_path):
    cfg = Config(**{**CFG.to_dict(), "data_path": tmp_path, "output_dir": tmp_path})
    path, _, _ = saved(tmp_path, cfg)
    assert checkpoint.read(path)["args"]["output_dir"] == str(tmp_path)


def test_a_folder_is_claimed_by_one_run_at_a_time(tmp_path):
    hold = textwrap.dedent("""\
        import sys, time
        from pathlib import Path
        from dinofast import checkpoint
        with checkpoint.lock_output_dir(Path(sys.argv[1])):
            print('held', flush=True)
            time.sleep(60)
        """)
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match="another run is writing"),
            checkpoint.lock_output_dir(tmp_path / "out"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with checkpoint.lock_output_dir(tmp_path / "out"):  # free again, however the other ended
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match="cannot be written"),
        checkpoint.lock_output_dir(tmp_path / "file" / "out"),
    ):
        pass


@pytest.mark.parametrize(
    "content", [b"texts begin anyhow", b"a", b"some", b"ends", b"\x80\x02]", b"PK\x03\x04 no zip"]
)
def test_whatever_a_file_begins_with_is_named(content, tmp_path):
    (tmp_path / "notes.pth").write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.read(tmp_path / "notes.pth")


def test_another_optimizer_is_named_before_anything_is_loaded(tmp_path):
    path, _, _ = saved(tmp_path)
    model, _ = parts(Config(**{**CFG.to_dict(), "seed": 3}))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sgd = SGDEMA(param_groups(model.student), student=model.student, teacher=model.teacher)
    with pytest.raises(ValueError, match="another optimizer .*`optimizer` adamw .now sgd."):
        resume.restore(path, model, sgd, None, replace(CFG, optimizer="sgd"))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_backbone_of_our_checkpoint(key, tmp_path):
    path, model, _ = saved(tmp_path)
    backbone = load_backbone(path, key)
    x = torch.randn(2, 3, 16, 16)
    assert not backbone.training
    torch.testing.assert_close(backbone(x), getattr(model.eval(), key).backbone(x), rtol=0, atol=0)


def test_backbone_of_published_weights(tmp_path):
    """The official releases hold the bare state of the backbone; the width tells which ViT it
    is."""
    published = vit_tiny(patch_size=8, img_size=[32])
    torch.save(published.state_dict(), tmp_path / "dino_vit.pth")
    backbone = load_backbone(tmp_path / "dino_vit.pth")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(backbone(x), published(x), rtol=0, atol=0)


def test_backbone_of_your_own_takes_the_weights(tmp_path):
    path, model, _ = saved(tmp_path)
    own = vit_nano(patch_size=4, img_size=(16,))
    assert load_backbone(path, backbone=own) is own and torch.equal(
        own.pos_embed, model.teacher.backbone.pos_embed
    )
    with pytest.raises(ValueError, match="does not fit this backbone"):
        load_backbone(path, backbone=torch.nn.Linear(2, 2))


def test_backbone_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not fit this backbone: 'cls_token'"):
        load_backbone(golden.DATA / "official_checkpoint.pth")  # says vit_tiny, is 48 wide
    path, _, _ = saved(tmp_path)
    with pytest.raises(ValueError, match="has no 'pupil': choose from teacher, student"):
        load_backbone(path, "pupil")
    torch.save(DINOHead(4, 8, hidden_dim=4, bottleneck_dim=4).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="a projection head alone"):
        load_backbone(tmp_path / "head.pth")


@pytest.mark.parametrize("sums", [[], [1.5] * 7])
def test_sums_from_before_metrics_had_names_are_dropped(sums):
    state = {"dinofast": {"version": "0.1.0", "step": 3, "epoch": 1, "sums": sums}}
    assert resume._position(pathlib.Path("checkpoint.pth"), state) == checkpoint.TrainState(
        step=3, epoch=1
    )


def gone_on(folder):
    return resume.go_on(folder / "checkpoint.pth", *parts(CFG), None, CFG)


def test_a_numbered_checkpoint_that_does_not_fit_is_no_new_run(tmp_path):
    assert gone_on(tmp_path) == (None, checkpoint.TrainState(), [])
    (tmp_path / "checkpoint0000.pth").write_bytes(b"of something else")
    with pytest.raises(ValueError, match="checkpoint0000.pth' cannot be read as a checkpoint"):
        gone_on(tmp_path)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: path.symlink_to("gone.pth"), "is a link to 'gone.pth', which is not there"),
        (lambda path: path.mkdir(), "is a folder, not a checkpoint.*: move it away"),
    ],
)
def test_what_stands_in_the_place_of_a_checkpoint_is_named(make, words, tmp_path):
    make(tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match=words):
        gone_on(tmp_path)


def test_a_good_numbered_checkpoint_beside_a_damaged_one_is_named(tmp_path):
    path, _, _ = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(
        ValueError, match="truncated.*move it away, or choose another `output_dir`.$"
    ):
        gone_on(tmp_path)
    (tmp_path / "checkpoint0001.pth").write_bytes(b"damaged, too")
    (tmp_path / "checkpoint0000.pth").write_bytes(content)
    with pytest.raises(
        ValueError,
        match="truncated.* 'checkpoint0000.pth' beside it can be read: with 'checkpoint.pth' moved",
    ):
        gone_on(tmp_path)


def test_a_later_checkpoint_is_told_before_it_is_replaced(tmp_path):
    path, _, _ = saved(tmp_path)
    for name in ("checkpoint0000.pth", "checkpoint0001.pth"):
        checkpoint.link(path, tmp_path / name)
    found, position, notes = gone_on(tmp_path)
    assert found == path and position == POSITION
    assert len(notes) == 1 and "'checkpoint0001.pth' is of a later epoch than" in notes[0]
