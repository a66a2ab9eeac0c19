"""Labels carried from frame to frame: against slow loops, on patches that can be told apart, and
from files to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dinofast import cli, vit_nano
from dinofast.config import Config
from dinofast.evaluate.segmentation import davis as video_segmentation
from dinofast.evaluate.segmentation.davis import (
    Propagation,
    as_mask,
    network_size,
    propagate,
    segment_video,
    videos,
)


def slow(target, sources, labels, how):
    """Patch by patch, neighbor by neighbor."""
    rows, columns, _ = target.shape
    out = torch.zeros(labels[0].shape[0], rows, columns)
    for y in range(rows):
        for x in range(columns):
            votes = []
            for source, own in zip(sources, labels, strict=True):
                for v in range(rows):
                    for u in range(columns):
                        far = max(abs(y - v), abs(x - u)) > how.size_mask_neighborhood
                        if how.size_mask_neighborhood and far:
                            continue
                        cosine = F.cosine_similarity(target[y, x], source[v, u], dim=0).item()
                        votes.append((np.exp(cosine / how.temperature), own[:, v, u]))
            votes.sort(key=lambda vote: -vote[0])
            kept = votes[: how.topk]
            total = sum(weight for weight, _ in kept)
            out[:, y, x] = sum(weight * label for weight, label in kept) / total
    return out


@pytest.mark.parametrize("reach", [0, 1, 2])
@pytest.mark.parametrize("topk", [1, 5, 1000])
@pytest.mark.parametrize("elements", [2**27, 60])
def test_agrees_with_slow_loops(reach, topk, elements, monkeypatch):
    monkeypatch.setattr(video_segmentation, "CHUNK_ELEMENTS", elements)  # 60: one patch at a time
    generator = torch.Generator().manual_seed(0)
    target, *sources = torch.randn(4, 4, 5, 6, generator=generator)
    labels = list(torch.rand(3, 2, 4, 5, generator=generator))
    how = Propagation(size_mask_neighborhood=reach, topk=topk)
    found = propagate(target, sources, labels, how)
    torch.testing.assert_close(found, slow(target, sources, labels, how), rtol=1e-4, atol=1e-5)


def test_equal_neighbors_all_vote():
    """Three sources that are the same: of one patch's three equal votes none is dropped by topk 1,
    as in the official code."""
    source = torch.eye(4).view(2, 2, 4)
    labels = [torch.full((1, 2, 2), value) for value in (0.0, 0.3, 0.9)]
    found = propagate(source, [source] * 3, labels, Propagation(topk=1))
    torch.testing.assert_close(found, torch.full((1, 2, 2), 0.4))


def test_objects_are_followed():
    """Patches of one color each: the object moves by a column a frame, and its label with it; what
    leaves the neighborhood is lost."""
    frames = []
    for t in range(6):
        colors = torch.zeros(4, 8, 2)
        colors[..., 0] = 1
        colors[1:3, t : t + 2] = torch.tensor([0.0, 1.0])
        frames.append(colors)
    truth = [frame.movedim(-1, 0) for frame in frames]
    for n_last in (1, 7):
        how = Propagation(n_last_frames=n_last, size_mask_neighborhood=1)
        found = list(segment_video(iter(frames), truth[0], how))
        assert len(found) == 5
        for labels, own in zip(found, truth[1:], strict=True):
            assert (labels.argmax(0) == own.argmax(0)).all()
    only_first = Propagation(n_last_frames=0, size_mask_neighborhood=1)
    assert (list(segment_video(iter(frames), truth[0], only_first))[-1].argmax(0) == 0).all()


def test_labels_become_masks():
    """Each label is stretched before the largest wins, so that weak ones count as much."""
    labels = torch.zeros(2, 2, 4)
    labels[0, :, :2], labels[1, :, 2:] = 1, 0.01
    mask = as_mask(labels, 4, (32, 16))
    assert mask.shape == (16, 32) and mask.dtype == np.uint8
    assert (mask[:, :14] == 0).all() and (mask[:, 18:] == 1).all()
    assert (as_mask(torch.ones(1, 2, 2), 4, (9, 9)) == 0).all()


@pytest.mark.parametrize(
    ("given", "patch", "resized"),
    [
        ((854, 480), 16, (832, 480)),  # of DAVIS, as in the official code
        ((910, 480), 8, (896, 480)),
        ((480, 854), 16, (480, 832)),
        ((850, 480), 14, (840, 480)),
        ((480, 480), 16, (448, 480)),
    ],
)
def test_sizes_of_the_official_code(given, patch, resized):
    assert network_size(*given, 480, patch) == resized


def test_the_palette_is_that_of_davis():
    colors = np.array(video_segmentation._palette()).reshape(256, 3)
    assert colors[:6].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [128, 0, 128],
    ]
    assert colors[255].tolist() == [224, 224, 192] and len(np.unique(colors, axis=0)) == 256


# ---- files
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's folder, at random."""
    folder = tmp_path_factory.mktemp("run")
    cfg = Config(arch="vit_nano", patch_size=4, out_dim=8, global_crops_size=16)
    torch.manual_seed(0)
    torch.save(
        {"teacher": vit_nano(4).state_dict(), "args": cfg.to_dict()}, folder / "checkpoint.pth"
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two videos of moving squares, the second with masks of its first frame alone."""
    root = tmp_path_factory.mktemp("davis")
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
    for name, n_masks in (("squares", 5), ("unknown", 1)):
        frames, masks = (root / part / "480p" / name for part in ("JPEGImages", "Annotations"))
        frames.mkdir(parents=True), masks.mkdir(parents=True)
        for t in range(5):
            image, mask = ground.copy(), np.zeros((64, 96), np.uint8)
            for number, (y, x, color) in enumerate([(4, 4 + 4 * t, 250), (36, 60 - 4 * t, 150)], 1):
                image[y : y + 24, x : x + 24] = (color, 255 - color, 30)
                mask[y : y + 24, x : x + 24] = number
            Image.fromarray(image).save(frames / f"{t:05}.jpg", quality=95)
            if t < n_masks:
                image = Image.fromarray(mask)
                image.putpalette(video_segmentation._palette())
                image.save(masks / f"{t:05}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("squares\nunknown\n")
    return root


def test_the_command_writes_masks_and_measures(data, weights, tmp_path, capsys):
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    line = ["davis", str(data), "--pretrained_weights", str(weights), "--output_dir", str(out)]
    assert cli.main([*line, "--size", "64", "--json", str(scores)]) == 0
    said = capsys.readouterr().out
    assert "squares: 5 frames, 2 objects, J " in said
    assert "unknown: 5 frames, not measured: masks of the other frames are not there" in said
    names = [f"{t:05}.png" for t in range(5)]
    for video in ("squares", "unknown"):
        assert sorted(path.name for path in (out / video).iterdir()) == names
        first = Image.open(out / video / names[0])
        given = Image.open(data / "Annotations" / "480p" / video / names[0])
        assert first.mode == "P" and first.getpalette() == given.getpalette()
        np.testing.assert_array_equal(first, given)
    found = json.loads(scores.read_text())["measures"]
    assert set(found["objects"]) == {"squares_1", "squares_2"}
    # squares of one color on dark noise: even at random a ViT can tell them apart
    assert 0.6 < found["J-Mean"] <= 1 and 0.3 < found["F-Mean"] <= 1
    assert found["J&F-Mean"] == pytest.approx((found["J-Mean"] + found["F-Mean"]) / 2)


def test_measures_are_of_the_masks_that_were_written(data, weights, tmp_path):
    """J anew from the files of both sides, by its definition."""
    result = video_segmentation.davis(weights, data, tmp_path, size=64)
    for number in (1, 2):
        values = []
        for t in range(1, 4):
            own = np.asarray(Image.open(tmp_path / "squares" / f"{t:05}.png")) == number
            path = data / "Annotations" / "480p" / "squares" / f"{t:05}.png"
            truth = np.asarray(Image.open(path)) == number
            values.append((own & truth).sum() / (own | truth).sum())
        mean = result["objects"][f"squares_{number}"]["J"]["mean"]
        assert mean == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--size 66", "--size 66 is not a multiple of the patch size 4: take 64."),
        ("--topk 0", "--topk is 0: give 1 or more."),
        ("--temperature 0", "--temperature is 0.0: give a number above 0."),
        ("--split train", "train.txt' does not exist: give DAVIS's folder, with JPEGImages/480p"),
    ],
)
def test_what_cannot_be(data, weights, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    line = f"davis {data} --pretrained_weights {weights} --output_dir {out} {words}"
    assert cli.main(line.split()) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_masks_are_not_overwritten(data, weights, capsys):
    out = data / "Annotations" / "480p"
    line = f"davis {data} --pretrained_weights {weights} --output_dir {out}"
    assert cli.main(line.split()) == 2
    assert "where the masks are: name another." in capsys.readouterr().err


def test_a_layout_that_lacks_something(tmp_path):
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    listed = tmp_path / "ImageSets" / "2017" / "val.txt"
    listed.write_text("")
    with pytest.raises(ValueError, match="names no video"):
        videos(tmp_path)
    listed.write_text("a\n")
    with pytest.raises(ValueError, match="holds no .jpg"):
        videos(tmp_path)
    (tmp_path / "JPEGImages" / "480p" / "a").mkdir(parents=True)
    (tmp_path / "JPEGImages" / "480p" / "a" / "00000.jpg").touch()
    with pytest.raises(ValueError, match=r"lacks 00000.png, the first frame's masks"):
        videos(tmp_path)
