"""Pictures and scores of images of any size: what the network sees, what is shown, and the command
from files to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast import cli, vit_nano
from dinofast.commands import sample_data
from dinofast.config import Config
from dinofast.data.decode import UnreadableImage
from dinofast.evaluate.segmentation import patch_pictures
from dinofast.evaluate.segmentation.images import _spaced, _whose, segment
from dinofast.evaluate.segmentation.patch_pictures import (
    Column,
    PatchColors,
    contact_sheet,
    cut_out,
    single,
)
from dinofast.evaluate.segmentation.whole_patches import Seen, WholePatches


# ---- what the network sees
@pytest.mark.parametrize(
    ("size", "given", "resized", "cropped"),
    [
        ((64,), (100, 75), (85, 64), (80, 64)),
        ((64,), (75, 100), (64, 85), (64, 80)),
        ((60,), (50, 50), (60, 60), (56, 56)),
        ((48, 30), (500, 20), (30, 48), (24, 48)),
    ],
)
def test_images_are_cropped_to_whole_patches(size, given, resized, cropped):
    whole = WholePatches(size, 8)
    assert whole.sides(*given) == (resized, cropped)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*given[::-1], 3), dtype=np.uint8))
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(whole.image(image), expected[: cropped[1], : cropped[0]])
    mask = image.getchannel(0)
    expected = np.asarray(mask.resize(resized, Image.Resampling.NEAREST))
    np.testing.assert_array_equal(whole.mask(mask), expected[: cropped[1], : cropped[0]])


def test_what_is_shown_is_what_the_network_sees():
    """A crop of half a patch: the last column of pixels is neither seen nor shown."""
    image = np.zeros((16, 20, 3), np.uint8)
    image[:, 16:] = 255
    shown = WholePatches((16,), 8).shown(Image.fromarray(image), (64, 64))
    assert np.asarray(shown)[:, :61].max() == 0 and np.asarray(shown).mean() < 4
    with pytest.raises(UnreadableImage, match="2 x 20000 patches, more than 16,384"):
        WholePatches((16,), 8).sides(100_000, 10)


# ---- pictures
def seen_by_hand():
    """Two images of 2 x 4 patches: CLS looks at the left half, whose patches differ from those of
    the right one and a little from each other."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        features = torch.zeros(2, 4, 6)
        features[:, :2, 0], features[:, 2:, 0] = 5, -5
        features[:, :2, 1:] = torch.randn(2, 2, 5, generator=generator)
        attention = torch.full((3, 2, 4), 0.01)
        attention[:, :, :2] = 0.2
        found.append(Seen(attention, features))
    return found


def test_colors_are_the_same_in_all_images_and_dark_behind_them():
    seen = seen_by_hand()
    colors = PatchColors.of(seen)
    first = colors.picture(seen[0], (2, 4))
    assert first.shape == (3, 2, 4) and first.min() >= 0 and first.max() <= 1
    assert (first[:, :, 3] == 0).all() and first[:, :, 0].max() > 0.2
    torch.testing.assert_close(colors.picture(seen[0], (2, 4)), first)
    alone = PatchColors.of(seen[:1]).picture(seen[0], (2, 4))
    assert (alone - first).abs().max() > 0.05
    # an image that is all of one kind has no foreground to take components from
    flat = Seen(torch.ones(1, 2, 2), torch.ones(2, 2, 6))
    assert torch.isfinite(PatchColors.of([flat]).picture(flat, (8, 8))).all()


def test_cut_out_follows_the_patches():
    shown = torch.rand(3, 8, 16).clamp(min=0.2)
    area = torch.tensor([[True, False], [False, False]])
    found = cut_out(area, shown)
    assert torch.equal(found[:, :4, :8], shown[:, :4, :8])
    gray = 0.3 * shown.mean(0)
    torch.testing.assert_close(found[:, 4:], gray[4:].expand(3, 4, 16))


def column(name, h, w, given=False, names=("trained", "untrained")):
    shown = torch.zeros(3, h, w)
    cells = [(caption, torch.rand(3, h, w)) for caption in ("attention", "PCA of patches")]
    return Column(name, shown, shown if given else None, [(whose, cells) for whose in names])


def test_sheets_take_images_of_all_shapes():
    columns = [column("a.jpg", 60, 100), column("b.jpg", 100, 40, given=True)]
    captions = [caption for caption, _ in columns[1].rows()]
    assert captions == [
        "image",
        "its mask",
        "attention, trained",
        "attention, untrained",
        "PCA of patches, trained",
        "PCA of patches, untrained",
    ]
    picture = contact_sheet(columns)
    assert picture.height > 6 * 108 and picture.width == 8 + 120 + 8 + 2 * 108
    more = contact_sheet([column(str(i), 20, 20) for i in range(8)])  # two blocks of four
    assert more.width == 8 + 120 + 8 + 4 * 28
    one = single(column("a", 33, 51, given=True))
    assert one.width % 2 == one.height % 2 == 0
    above, rows = column("a", 33, 51, given=True).grid()
    assert above == ["image", "its mask", "attention", "PCA of patches"]
    assert [(whose, len(cells)) for whose, cells in rows] == [("trained", 4), ("untrained", 4)]


def test_names_of_files_fit_above_their_columns():
    assert patch_pictures._short("a/b/cat.jpg") == "cat.jpg"
    assert len(patch_pictures._short("x" * 200)) == 28


def test_evenly_spaced():
    assert _spaced(3, 12) == [0, 1, 2] and _spaced(10, 2) == [2, 7]
    assert _spaced(1000, 12)[0] == 41 and len(set(_spaced(13, 12))) == 12


def test_what_backbones_are_called():
    run, key = "runs/a/checkpoint.pth", "teacher"
    assert _whose(run, key, [(run, key)]) == "trained"
    assert _whose(run, "untrained", [(run, "untrained")]) == "untrained"
    both = [(run, "teacher"), (run, "untrained")]
    assert [_whose(*one, both) for one in both] == ["trained", "untrained"]
    both = [(run, "teacher"), ("runs/b", "teacher")]
    assert [_whose(*one, both) for one in both] == ["checkpoint.pth", "b"]
    both = [("x/a/checkpoint.pth", "teacher"), ("y/a/checkpoint.pth", "teacher")]
    assert [_whose(*one, both) for one in both] == ["x/a/checkpoint.pth", "y/a/checkpoint.pth"]
    both = [(run, "teacher"), (run, "student")]
    assert [_whose(*one, both) for one in both] == ["teacher", "student"]


# ---- files
@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run's folder, at random."""
    folder = tmp_path_factory.mktemp("run")
    cfg = Config(arch="vit_nano", patch_size=4, out_dim=8, global_crops_size=16)
    torch.manual_seed(1)
    torch.save(
        {"teacher": vit_nano(4).state_dict(), "args": cfg.to_dict()}, folder / "checkpoint.pth"
    )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    sample_data.write(folder, n_images=40, size=24)
    return folder


@pytest.fixture
def segmented(weights, tmp_path, monkeypatch, capsys):
    """A function: exit code and words of the command with this run, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main(["segment", "--pretrained_weights", str(weights), *map(str, words)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_a_sheet_of_some_images(segmented, data, tmp_path):
    code, said = segmented(data / "val", "--n_images", "3", "--compare", "untrained")
    assert code == 0 and "3 of 10 images in 'segment.png'" in said
    with Image.open(tmp_path / "segment.png") as picture:
        assert picture.format == "PNG" and picture.width == 8 + 120 + 8 + 3 * (192 + 8)
        assert picture.height > 7 * 192
    assert [path.name for path in tmp_path.iterdir()] == ["segment.png"]


def test_a_picture_for_each_image(segmented, data, tmp_path):
    words = ("--output_dir", "out", "--heads", "true", "--masks", data / "masks")
    code, said = segmented(data / "val", *words)
    assert code == 0 and "10 images, masks that hold 60% of the attention" in said
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 10 and names[0] == "blobs_blob_blobs_blob_0004.png"
    heads = vit_nano(4).blocks[-1].attn.num_heads
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert picture.width // (320 + 8) == 5 + heads  # image, mask, three cells, and the heads
    assert not (tmp_path / "segment.png").exists()


def test_scores_of_both(segmented, data, tmp_path, weights):
    words = ("--masks", data / "masks", "--compare", "untrained", "--json", "found.json")
    code, said = segmented(data / "val", *words, "-o", "two.png", "--n_images", "2")
    assert Image.open(tmp_path / "two.png").width == 8 + 120 + 8 + 2 * (192 + 8)
    found = json.loads((tmp_path / "found.json").read_text())
    scores = found["scores"]
    assert code == 0 and scores["n_images"] == 10 and found["threshold"] == 0.6
    assert 0.1 < scores["trained"]["object_area"] == scores["untrained"]["object_area"] < 0.4
    # by hand, of one image
    path = data / "val" / "rings_disc" / "rings_disc_0004.jpg"
    one = segment(weights, path, masks=str(data / "masks" / "val"))["trained"]
    attention = segment_by_hand(weights, path)
    mask = np.asarray(
        Image.open(data / "masks/val/rings_disc/rings_disc_0004.png").resize((32, 32), 0)
    )
    large = np.kron(attention, np.ones((1, 4, 4)))
    shares = (large * (mask == 255)).sum((1, 2)) / large.sum((1, 2))
    assert one["attention_on_object"] == pytest.approx(shares.mean(), rel=1e-4)
    assert one["attention_best_head"] == pytest.approx(shares.max(), rel=1e-4)
    assert one["jaccard"] == one["jaccard_foreground"] > 0


def segment_by_hand(weights, path):
    """Attention of CLS to 8 x 8 patches, (H, 8, 8), at twice the crops of training."""
    backbone = vit_nano(4)
    backbone.load_state_dict(torch.load(weights / "checkpoint.pth")["teacher"])
    pixels = np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    batch = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        return backbone.eval().get_last_selfattention(batch)[0, :, 0, 1:].view(-1, 8, 8).numpy()


def test_a_folder_of_voc(segmented, data, tmp_path):
    """Two listed images, one with an object of two classes and void around it, one with void
    alone; and one that is not listed."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i, name in enumerate(("one", "two", "other")):
        Image.new("RGB", (50, 37), (i * 60, 90, 30)).save(root / "JPEGImages" / f"{name}.jpg")
        values = np.full((37, 50), 255, np.uint8)
        if name == "one":
            values[:20], values[2:10, 5:20], values[10:18, 5:20] = 0, 15, 7
        mask = Image.fromarray(values)
        mask.putpalette([0, 0, 0] * 256)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("one\ntwo\n")
    code, said = segmented(root, "--json", "voc.json")
    assert code == 0 and "PASCAL VOC: 2 validation images" in said
    assert "1 image without an object, not scored" in said
    found = json.loads((tmp_path / "voc.json").read_text())["scores"]
    assert found["n_images"] == 1
    # 16 x 15 pixels of 20 x 50 that are not void, but for the rounding of the resize
    assert found["trained"]["object_area"] == pytest.approx(0.24, abs=0.03)


def test_frames_of_a_video(segmented, data, tmp_path):
    (tmp_path / "frames").mkdir()
    for i in range(4):
        image = sample_data.draw(3, pixels=40)[0]
        Image.fromarray(np.roll(image, 3 * i, 1)).save(tmp_path / "frames" / f"{i:03}.jpg")
    code, said = segmented(tmp_path / "frames", "--output_dir", "out", "--fps", "5")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert code == 0 and names == [*(f"0000{i}.png" for i in range(4)), "animation.webp"]
    with Image.open(tmp_path / "out" / "animation.webp") as film:
        assert film.n_frames == 4 and film.width % 2 == film.height % 2 == 0
        film.load()
        assert film.info["duration"] == 200


def test_bad_images_are_named_and_left_out(segmented, data, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(b"no image")
    code, said = segmented(folder)
    assert code == 2 and "1 image, and none can be read" in said
    Image.new("RGB", (20, 30)).save(folder / "good.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "good.png")
    code, said = segmented(folder)
    assert code == 0 and said.count("/bad.jpg (text, not an image)") == 1
    code, said = segmented(folder, "--masks", tmp_path)
    assert code == 2 and "good.png (its mask has 9 x 9 pixels, it has 20 x 30)" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("D --threshold 0", "--threshold is 0.0: give a share of the attention above 0"),
        ("D --size 1 2 3", "--size is 1 2 3: give the shorter side, or height and width."),
        ("D --size 3", "--size is 3, less than a patch of 4 pixels."),
        ("D --n_images 0", "--n_images is 0: give 1 or more."),
        ("D --fps 0", "--fps is 0.0: give frames a second, above 0."),
        ("D --masks none", "--masks is 'none', which is no folder"),
        ("D --output_dir D", "where the images or masks are: name another."),
        ("D -o D/blobs_blob/blobs_blob_0004.jpg", "a file that is not PNG and would be lost"),
        ("D none.jpg", "none.jpg' does not exist"),
        ("D --compare none.pth", "none.pth"),
        ("D --compare teacher", "--compare is teacher, which is what it would be compared with."),
        ("", "SOURCE is missing: what to look at. Usage: dinofast segment SOURCE"),
    ],
)
def test_what_cannot_be(segmented, data, words, said, tmp_path):
    code, found = segmented(*(word.replace("D", str(data / "val")) for word in words.split()))
    assert code == 2 and said in found and found.strip().count("dinofast: ") == 1
    assert not list(tmp_path.iterdir())


def test_a_sheet_is_not_written_over_an_image(segmented, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "in" / "a.png")
    for source in ("in", "in/a.png"):
        code, said = segmented(source, "-o", "in/a.png")
        assert code == 2 and "name another" in said


def test_a_backbone_without_attention(segmented, weights, data):
    with pytest.raises(ValueError, match="a Flat has no attention to show: choose a ViT"):
        segment(weights, data / "val", sheet="x.png", backbone=Flat())


class Flat(torch.nn.Module):
    """Takes whatever weights it is given."""

    def load_state_dict(self, state, strict=True, assign=False):
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def state_dict(self, *args, **kwargs):
        return vit_nano(4).state_dict()
