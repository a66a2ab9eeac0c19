"""The official protocol: its crops, inputs, loop and files; a run that is resumed; layers of
others."""

from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast import vit_base, vit_nano, vit_small
from dinofast.checkpoint import SaveFailed, read
from dinofast.data.augmentation import View, boxes, draw
from dinofast.data.decode import decode
from dinofast.evaluate.frozen import FrozenBackbone
from dinofast.evaluate.images import EvalTransform, labeled_folder
from dinofast.evaluate.linear import official
from dinofast.evaluate.linear.crops import RandomCrop, training_crops
from dinofast.evaluate.linear.official import Inputs, LinearClassifier, Official, inputs_of

TRANSFORM = EvalTransform(18, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six classes of 4 images of noise around a color, and one file that is no image."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for c in range(6):
        (root / f"c{c}").mkdir()
        for i in range(4):
            noise = rng.integers(0, 40, (20 + i, 24, 3)) + 30 * c
            Image.fromarray(noise.astype(np.uint8)).save(root / f"c{c}" / f"{i}.png")
    (root / "c0" / "9.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    module = vit_nano(img_size=(16,), patch_size=8).eval()
    told, cpu = "the teacher's vit_nano", torch.device("cpu")
    return FrozenBackbone(module, "vit_nano", 8, TRANSFORM, decode, cpu, told)


def how(**options):
    given = {"num_labels": 6, "epochs": 3, "lr": 0.5, "batch_size": 10, "num_workers": 0}
    return Official(Inputs(2, False), **{**given, **options})


# ---- crops
def test_a_crop_is_torchvision_s(folder):
    """Of the box that is drawn."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = Image.open(folder / "c3" / "1.png")
    flipped = 0
    for sample in range(8):
        drawn = draw(5, 2, np.array([sample]), (View(16, (0.08, 1), 0, 0, (0, 0)),))
        y, x, h, w = boxes(drawn.tries[0], image.height, image.width)[0]
        bilinear = functional.InterpolationMode.BILINEAR
        expected = functional.resized_crop(image, y, x, h, w, [16, 16], bilinear)
        if drawn.views["flip"][0, 0]:
            expected, flipped = functional.hflip(expected), flipped + 1
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
        mean, std = torch.tensor(TRANSFORM.mean), torch.tensor(TRANSFORM.std)
        expected = (expected - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(RandomCrop(TRANSFORM, 5, 2, sample)(image), expected)
    assert 0 < flipped < 8


def test_crops_are_a_function_of_seed_epoch_and_image(folder):
    images = labeled_folder(folder, TRANSFORM)

    def drawn(seed, epoch):
        crops = training_crops(images, seed, epoch)
        found = {}
        for i in range(len(crops)):
            _, image, _ = crops[i]
            if image is not None:
                found[crops.paths[i]] = image
                assert crops.labels[i] == int(crops.paths[i].parent.name[1:])
        return list(found), found

    order, first = drawn(0, 1)
    assert sorted(order) == sorted(p for p in images.paths if p.stem != "9") != order
    again, same = drawn(0, 1)
    assert again == order and all(torch.equal(first[p], same[p]) for p in order)
    for seed, epoch in ((1, 1), (0, 2)):
        others, other = drawn(seed, epoch)
        assert others != order and not any(torch.equal(first[p], other[p]) for p in order)


def test_crops_take_a_share_of_8_to_100_percent():
    drawn = draw(0, 0, np.arange(500), (View(16, (0.08, 1), 0, 0, (0, 0)),))
    areas = [h * w / 1e6 for t in drawn.tries for _, _, h, w in boxes(t, 1000, 1000)]
    assert 0.075 < min(areas) < 0.12 and 0.9 < max(areas) <= 1
    assert 0.45 < np.mean(areas) < 0.54 and 0.4 < drawn.views["flip"].mean() < 0.6


# ---- what the layer sees
@torch.no_grad()
def test_inputs_are_the_official_ones(frozen):
    images = torch.randn(3, 3, 16, 16)
    layers = frozen.module.get_intermediate_layers(images, 2)
    cls = torch.cat([x[:, 0] for x in layers], dim=-1)
    assert torch.equal(Inputs(2, False)(frozen.module, images), cls)
    # eval_linear.py, lines 187 to 190: unsqueeze, concatenate, reshape
    last, mean = layers[-1][:, 0], torch.mean(layers[-1][:, 1:], dim=1)
    expected = torch.cat((last.unsqueeze(-1), mean.unsqueeze(-1)), dim=-1).reshape(3, -1)
    assert torch.equal(Inputs(1, True)(frozen.module, images), expected)
    assert torch.equal(Inputs(2, True)(frozen.module, images), torch.cat((cls, mean), 1))


def test_inputs_by_size_of_the_backbone(frozen):
    with torch.device("meta"):
        small, base = vit_small(), vit_base()
    assert inputs_of(small, None, None) == Inputs(4, False)
    assert inputs_of(base, None, None) == Inputs(1, True)
    assert inputs_of(base, 4, False) == Inputs(4, False)
    assert inputs_of(frozen.module, None, None) == Inputs(2, False)
    assert inputs_of(torch.nn.Conv2d(3, 5, 4), None, None) == Inputs(0, False)
    with pytest.raises(ValueError, match="`n_last_blocks` is 3, but the backbone has 2 blocks"):
        inputs_of(frozen.module, 3, None)
    with pytest.raises(ValueError, match="`avgpool_patchtokens` is for our ViTs, not for Conv2d"):
        inputs_of(torch.nn.Conv2d(3, 5, 4), None, True)


# ---- the loop
def test_the_loop_is_the_official_one(folder, frozen, tmp_path):
    """By hand, image by image where that is shorter."""
    images, settings = labeled_folder(folder, TRANSFORM), how(val_freq=2)
    found = official.train(frozen, images, images, settings, tmp_path)
    layer = LinearClassifier(128, 6, seed=0)
    assert layer.linear.bias.abs().max() == 0 and 0.009 < layer.linear.weight.std() < 0.011
    optimizer = torch.optim.SGD(layer.parameters(), 0.5 * 10 / 256, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=0)
    lines, best = [], 0
    for epoch in range(3):
        crops = training_crops(images, 0, epoch)
        losses, rate = [], optimizer.param_groups[0]["lr"]
        for batch in torch.arange(25).split(10):
            items = [(crops[i][1], crops.labels[i]) for i in batch.tolist()]
            items = [(image, label) for image, label in items if image is not None]
            x = torch.stack([image for image, _ in items])
            y = torch.tensor([label for _, label in items])
            with torch.no_grad():
                layers = frozen.module.get_intermediate_layers(x, 2)
            scores = layer(torch.cat([tokens[:, 0] for tokens in layers], -1))
            loss = torch.nn.functional.cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        lines.append({"train_loss": np.mean(losses), "train_lr": rate, "epoch": epoch})
        good = [i for i in range(25) if images[i][1] is not None]
        with torch.no_grad():
            x = torch.stack([images[i][1] for i in good])
            layers = frozen.module.get_intermediate_layers(x, 2)
            scores = layer(torch.cat([tokens[:, 0] for tokens in layers], -1))
        right = scores.argmax(1) == torch.tensor([images.labels[i] for i in good])
        if epoch in (0, 2):
            best = max(best, 100 * right.double().mean().item())
    logged = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    for line, expected in zip(logged, lines, strict=True):
        assert {k: line[k] for k in expected} == pytest.approx(expected)
    assert ["test_acc5" in line for line in logged] == [True, False, True]
    assert found["top1"] == pytest.approx(100 * right.double().mean().item())
    assert found["best_top1"] == pytest.approx(best) and best > 20
    state = read(tmp_path / "checkpoint.pth.tar")
    assert {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} <= state.keys()
    assert state["epoch"] == 3 and state["best_acc"] == found["best_top1"]
    assert list(state["state_dict"]) == ["module.linear.weight", "module.linear.bias"]
    torch.testing.assert_close(
        state["state_dict"]["module.linear.weight"], layer.linear.weight.data
    )
    assert state["scheduler"]["last_epoch"] == 3 and state["scheduler"]["T_max"] == 3


def test_a_run_that_was_ended_goes_on_exactly(folder, frozen, tmp_path, monkeypatch, capsys):
    images = labeled_folder(folder, TRANSFORM)
    official.train(frozen, images, images, how(), tmp_path / "whole")
    real = official.training_crops

    def ended(images, seed, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(images, seed, epoch)

    monkeypatch.setattr(official, "training_crops", ended)
    with pytest.raises(KeyboardInterrupt):
        official.train(frozen, images, images, how(), tmp_path / "halves")
    monkeypatch.undo()
    with open(tmp_path / "halves" / "log.txt", "a") as file:
        file.write('{"epoch": 2, "torn')
    torch.manual_seed(123)
    official.train(frozen, images, images, how(), tmp_path / "halves")
    assert "after 2 epochs" in capsys.readouterr().out
    states = [read(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "halves")]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])
    for i, momentum in states[0]["optimizer"]["state"].items():
        other = states[1]["optimizer"]["state"][i]
        assert torch.equal(momentum["momentum_buffer"], other["momentum_buffer"])
    assert states[0]["scheduler"] == states[1]["scheduler"]
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("whole", "halves")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3


def test_a_run_that_is_another(folder, frozen, tmp_path):
    images = labeled_folder(folder, TRANSFORM)
    official.train(frozen, images, images, how(epochs=1), tmp_path)
    with pytest.raises(ValueError, match="was trained with `lr` 0.5, not 0.4: give the same"):
        official.train(frozen, images, images, how(epochs=1, lr=0.4), tmp_path)
    other = vit_nano(img_size=(16,), patch_size=8).eval()
    changed = FrozenBackbone(other, *list(vars(frozen).values())[1:])
    with pytest.raises(ValueError, match="was trained with another backbone"):
        official.train(changed, images, images, how(epochs=1), tmp_path)
    done = official.train(frozen, images, images, how(epochs=1), tmp_path)  # evaluates
    assert done["best_top1"] == read(tmp_path / "checkpoint.pth.tar")["best_acc"]
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(ValueError, match="is the folder of a pretraining run"):
        official.train(frozen, images, images, how(), tmp_path)


def test_files_that_are_not_a_run(folder, frozen, tmp_path):
    images = labeled_folder(folder, TRANSFORM)
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        official.train(frozen, images, images, how(), tmp_path)
    layer = {f"module.{k}": v for k, v in LinearClassifier(128, 6).state_dict().items()}
    torch.save({"state_dict": layer}, tmp_path / "checkpoint.pth.tar")
    with pytest.raises(ValueError, match="cannot be gone on with"):
        official.train(frozen, images, images, how(), tmp_path)


def test_a_full_disk_leaves_the_epoch_before(folder, frozen, tmp_path, monkeypatch):
    images, real = labeled_folder(folder, TRANSFORM), torch.save

    def full(state, file):
        if state["epoch"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveFailed, match="No space left on device.*the epoch before is as it was"):
        official.train(frozen, images, images, how(), tmp_path)
    assert read(tmp_path / "checkpoint.pth.tar")["epoch"] == 1
    assert not list(tmp_path.glob("*.tmp"))


# ---- layers of others
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("nested", [True, False])
def test_a_released_classifier(folder, frozen, tmp_path, prefix, nested):
    """`nested`: as the release has it."""
    images = labeled_folder(folder, TRANSFORM)
    official.train(frozen, images, images, how(lr=5), tmp_path)
    shutil.move(tmp_path / "checkpoint.pth.tar", tmp_path / "whole.pth")
    layer = official.read_classifier(tmp_path / "whole.pth")
    state = {prefix + name: value for name, value in layer.items()}
    torch.save({"state_dict": state} if nested else state, tmp_path / "weights.pth")
    found = official.evaluate(frozen, images, how(), tmp_path / "weights.pth")
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert found == {"top1": last["test_acc1"], "top5": last["test_acc5"]}


def test_classifiers_that_do_not_fit(folder, frozen, tmp_path):
    images, file = labeled_folder(folder, TRANSFORM), tmp_path / "weights.pth"
    torch.save(LinearClassifier(128, 7).state_dict(), file)
    with pytest.raises(ValueError, match="knows 7 classes, but the images are of 6"):
        official.evaluate(frozen, images, how(), file)
    official.evaluate(frozen, images, how(num_labels=7), file)
    with pytest.raises(
        ValueError, match="takes 128 features, but there are 64 .*`n_last_blocks` 2"
    ):
        official.evaluate(frozen, images, Official(Inputs(1, False), 7), file)
    torch.save(vit_nano().state_dict(), file)
    with pytest.raises(ValueError, match="holds no linear classifier"):
        official.evaluate(frozen, images, how(), file)
