"""The PIL backend against what the official transforms gave, stage by stage and bit for bit; and
what becomes of odd files."""

from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from dinofast.data.augmentation import VIEW
from dinofast.data.backend_pil import cut, render
from dinofast.data.decode import TransientReadError, UnreadableImage, decode, read_file, unreadable

GOLDEN = np.load(Path(__file__).parents[1] / "official" / "augment.npz")


def golden_view(i):
    """Element of the plan for golden crop i."""
    view = np.zeros((), VIEW)
    names = {
        "box": "box_yxhw",
        "size": "size",
        "flip": "flip",
        "order": "order_bcsh",
        "factors": "factors_bcsh",
        "gray": "gray",
        "blur_radius": "blur_radius",
        "solarize": "solarize",
    }
    for ours, theirs in names.items():
        view[ours] = GOLDEN[f"{i}.{theirs}"]
    view["jitter"] = True
    return view


@pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason=f"Pillow before 13 resizes some boxes in another order, and this is {PIL.__version__}",
)
@pytest.mark.parametrize("i", range(8))
def test_every_stage_equals_the_official_one(i):
    image, view = Image.fromarray(GOLDEN["image"]), golden_view(i)
    assert (
        np.asarray(cut(image, view["box"].tolist(), int(view["size"]))) == GOLDEN[f"{i}.crop"]
    ).all()
    assert (render(image, view) == GOLDEN[f"{i}.final_u8"]).all()
    for stage, field in (("blur_out", "solarize"), ("gray_out", "blur_radius"), ("jitter", "gray")):
        view[field] = 0  # switched off from the last stage backwards
        assert (render(image, view) == GOLDEN[f"{i}.{stage}"]).all(), stage
    view["jitter"] = False
    flipped = GOLDEN[f"{i}.crop"][:, ::-1] if view["flip"] else GOLDEN[f"{i}.crop"]
    assert (render(image, view) == flipped).all()


def test_golden_covers_every_switch():
    views = np.array([golden_view(i)[()] for i in range(8)])
    for switch in (
        views["flip"],
        views["gray"],
        views["solarize"],
        views["blur_radius"] > 0,
        views["factors"][:, 3] > 0,
    ):
        assert 0 < switch.sum() < 8
    assert len(np.unique(views["order"], axis=0)) > 5


def pixels(shape, top, dtype):
    return np.random.default_rng(0).integers(0, top, shape).astype(dtype)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_what_pil_opens_is_rgb(tmp_path):
    rgb = pixels((6, 9, 3), 256, np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    assert (np.asarray(decode((tmp_path / "rgb.png").read_bytes())) == rgb).all()

    Image.fromarray(rgb[..., 0]).save(tmp_path / "gray.png")
    assert (np.asarray(decode((tmp_path / "gray.png").read_bytes())) == rgb[..., :1]).all()

    deep = pixels((6, 9), 65536, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (
        np.asarray(decode((tmp_path / "deep.png").read_bytes())) == (deep >> 8)[..., None]
    ).all()

    palette = Image.fromarray(rgb).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255, 255]))
    assert (
        np.asarray(decode((tmp_path / "palette.png").read_bytes()))
        == np.asarray(palette.convert("RGB"))
    ).all()

    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert decode((tmp_path / "cmyk.jpg").read_bytes()).mode == "RGB"

    frames = [Image.new("RGB", (9, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert (np.asarray(decode((tmp_path / "moving.gif").read_bytes())) == (255, 0, 0)).all()


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    Image.new("RGB", (9, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode((tmp_path / "turned.jpg").read_bytes()).size == (9, 6)


def test_one_pixel_makes_a_crop():
    view = golden_view(0)
    view["box"] = (0, 0, 1, 1)
    assert render(Image.new("RGB", (1, 1), (200, 100, 50)), view).shape == (224, 224, 3)


def test_a_missing_file_is_unreadable_with_the_reason(tmp_path):
    with pytest.raises(UnreadableImage, match="cannot be read: No such file or directory"):
        read_file(tmp_path / "gone.jpg")


def test_what_may_be_right_another_time_is_told_apart():
    for error, kind, reason in (
        (MemoryError(), TransientReadError, "MemoryError"),
        (OSError(5, "Input"), TransientReadError, "cannot be read: Input"),
        (OSError("image file is truncated"), UnreadableImage, "image file is truncated"),
        (OSError(2, "No such file"), UnreadableImage, "cannot be read: No such file"),
    ):
        with pytest.raises(UnreadableImage, match=reason) as raised, unreadable():
            raise error
        assert type(raised.value) is kind


def test_rgb_is_not_copied(tmp_path, monkeypatch):
    rgb = pixels((6, 9, 3), 256, np.uint8)
    monkeypatch.setattr(Image.Image, "convert", None)
    monkeypatch.setattr(Image.Image, "copy", None)
    for name in ("rgb.png", "rgb.tif", "rgb.bmp", "rgb.ppm"):
        Image.fromarray(rgb).save(tmp_path / name)
        image = decode((tmp_path / name).read_bytes())
        assert image.mode == "RGB" and (np.asarray(image) == rgb).all()
