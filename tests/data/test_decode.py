"""Gray of every depth as levels of 8 bits, EXIF orientation, formats of plug-ins, and files that
PIL opens and nobody expects."""

import io

import numpy as np
import PIL
import pytest
from PIL import Image, TiffImagePlugin

from dinofast.data import names
from dinofast.data.decode import UnreadableImage, decode, levels, remark, shade

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))  # black on the left to white on the right


def encoded(image, kind, **options):
    """Of an array or an image."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, kind, **options
    )
    return file.getvalue()


def sixteen(values):
    """An image of mode I;16 in every version of Pillow."""
    size = values.shape[1], values.shape[0]
    return Image.frombytes("I;16", size, values.astype("<u2").tobytes())


def tiff(values, **tags):
    """An uncompressed TIFF of one strip as no version of Pillow writes it; tags by name."""
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    height, width = values.shape[:2]
    given = {
        **dict(width=width, length=height, bits=values.itemsize * 8, compression=1, photometric=1),
        **dict(offset=0, samples=1, rows=height, count=values.nbytes, format=1),
        **tags,
    }
    numbers = dict(width=256, length=257, bits=258, compression=259, photometric=262, offset=273)
    numbers |= dict(samples=277, rows=278, count=279, format=339)
    for name, number in numbers.items():
        ifd[number] = given[name]
    file = io.BytesIO()
    ifd.save(file)  # which adds its own end to the offset
    return file.getvalue() + values.tobytes()


def twelve_bits(values):
    """Two values in three bytes, as a TIFF of 12 bits holds them."""
    a, b = values.astype(np.uint32).reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8)


def pgm(top):
    return b"P5\n64 48\n%d\n" % top + np.rint(RAMP * top).astype(">u2").tobytes()


UINT16, FLOAT = RAMP * 65535, RAMP.astype(np.float32)
RAMPS = {
    "PNG, 16 bits": lambda: encoded(sixteen(UINT16), "PNG"),
    "TIFF, 16 bits": lambda: encoded(sixteen(UINT16), "TIFF"),
    "TIFF, 16 bits, big-endian": lambda: encoded(
        Image.frombytes("I;16B", (64, 48), UINT16.astype(">u2").tobytes()), "TIFF"
    ),
    "TIFF, 16 bits, white is zero": lambda: tiff((65535 - UINT16).astype("<u2"), photometric=0),
    "TIFF, 16 bits with a sign": lambda: tiff((UINT16 - 32768).astype("<i2"), format=2),
    "TIFF, 12 bits": lambda: tiff(
        twelve_bits(RAMP * 4095), width=64, length=48, rows=48, bits=12, count=4608
    ),
    "TIFF, 32 bits": lambda: encoded(UINT16.astype(np.int32), "TIFF"),
    "TIFF, 32 bits, of 255": lambda: encoded((RAMP * 255).astype(np.int32), "TIFF"),
    "TIFF, 32 bits without a sign": lambda: tiff((RAMP * (2**32 - 1)).astype("<u4")),
    "TIFF, 32 bits with a sign": lambda: tiff(((RAMP - 0.5) * 2e9).astype("<i4"), format=2),
    "TIFF, float to 1": lambda: encoded(FLOAT, "TIFF"),
    "TIFF, float to 255": lambda: encoded(FLOAT * 255, "TIFF"),
    "TIFF, float of any range": lambda: encoded(FLOAT * 3e30 - 1e30, "TIFF"),
    "PGM, 16 bits": lambda: pgm(65535),
    "PGM, 12 bits": lambda: pgm(4095),
    "PGM, 9 bits": lambda: pgm(511),
    "JPEG 2000, 16 bits": lambda: encoded(sixteen(UINT16), "JPEG2000"),
}


@pytest.mark.parametrize("name", RAMPS)
def test_gray_of_every_depth_spans_all_levels(name):
    pixels = np.asarray(decode(RAMPS[name]()))
    expected = np.rint(RAMP * 255)
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 1


def test_what_levels_promises():
    row = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert (levels(row, 16) == row >> 8).all()  # the upper eight bits, as of 16-bit color
    assert levels(np.array([[0, 128, 255]], np.int32)).tolist() == [[0, 128, 255]]
    assert levels(np.array([[100, 150, 300]], np.int32)).tolist() == [[0, 64, 255]]
    assert levels(np.array([[7, 7]], np.float32) * 1000).tolist() == [[0, 0]]  # nothing to span
    odd = np.array([[np.nan, -np.inf, 0.5, 1, np.inf]], np.float32)
    assert levels(odd).tolist() == [[0, 0, 128, 255, 255]]
    with pytest.raises(UnreadableImage, match="none of its values is finite"):
        levels(np.full((2, 2), np.nan, np.float32))
    assert (
        levels(np.full((2, 2), -1.0, np.float32) * 1e38, value_range=(0, 1)).tolist()
        == [[0, 0]] * 2
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_value_range_says_what_the_file_does_not(kind):
    """12 bits in a file of 16: black without it."""
    data = encoded(sixteen(RAMP * 4095), kind)
    assert np.asarray(decode(data)).max() == 15 and shade(decode(data)) == "black"
    pixels = np.asarray(decode(data, (0, 4095)))
    assert np.abs(pixels[..., 0] - RAMP * 255).max() <= 1 and not shade(decode(data, (0, 4095)))
    clipped = np.asarray(decode(data, (1000, 2000)))
    assert clipped[0, 0, 0] == 0 and clipped[0, -1, 0] == 255
    color = encoded((RAMP * 15).astype(np.uint8), "PNG")
    assert np.asarray(decode(color, (0, 15))).max() == 15  # 8 bits are what they are


def test_memory_of_scaling_is_bounded(monkeypatch):
    """In strips: the same for every height of them."""
    values = np.random.default_rng(0).random((37, 50)).astype(np.float32) * 1000
    whole = levels(values)
    monkeypatch.setattr("dinofast.data.decode.STRIP", 120)
    assert (levels(values) == whole).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "La", "RGBA", "RGBa", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb_without_alpha(mode, monkeypatch):
    image = Image.new(mode, (5, 4))
    monkeypatch.setattr("dinofast.data.decode.identify", lambda data: image)
    assert decode(b"").mode == "RGB" and decode(b"").size == (5, 4)


def test_alpha_is_dropped_and_not_blended():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    for kind in ("PNG", "WEBP"):
        data = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
        assert np.asarray(decode(data)).reshape(-1, 3).tolist() == [[200, 100, 50]] * 16


@pytest.mark.parametrize(
    "bits, kind, words", [(64, 3, "64-bit floats"), (64, 1, "64-bit integers")]
)
def test_a_tiff_that_pil_cannot_read_says_what_it_is(bits, kind, words):
    values = np.zeros((4, 4), np.float64 if kind == 3 else np.uint64)
    with pytest.raises(UnreadableImage, match=f"a TIFF with 1 band.* of {words}.*save it as"):
        decode(tiff(values, format=kind))
    with pytest.raises(UnreadableImage, match="a damaged TIFF"):
        decode(b"II*\0" + bytes(range(100, 140)))


# ---- EXIF
def corners():
    """A picture whose corners differ."""
    image = Image.new("RGB", (48, 32))
    for color, at in zip(("red", "lime", "blue"), ((0, 0), (24, 0), (0, 16)), strict=True):
        image.paste(color, (*at, at[0] + 24, at[1] + 16))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_where_it_is_asked_for(kind, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(corners(), kind, exif=exif)
    stored = np.asarray(decode(data)).astype(int)
    assert stored.shape == (32, 48, 3)  # as in the official code
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert (np.asarray(decode(data, exif=True)) == upright).all()
    assert (orientation == 1) == np.array_equal(upright, stored)


def test_a_tiff_is_turned_once():
    """By Pillow itself, in every version of it."""
    data = encoded(corners(), "TIFF", tiffinfo={0x0112: 6})
    assert (np.asarray(decode(data)) == np.asarray(decode(data, exif=True))).all()
    assert decode(data).size == (32, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger")
def test_damaged_exif_costs_no_image():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 20
    data = encoded(corners(), "JPEG", exif=exif)
    assert decode(data, exif=True).size == (48, 32)


# ---- plug-ins
@pytest.fixture
def forget_plugins():
    names.has_plugin.cache_clear()
    yield
    names.has_plugin.cache_clear()


def test_heic_is_read_where_its_package_is(forget_plugins):
    """Whatever the file is called, and without anybody having imported the plug-in."""
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    if tuple(map(int, PIL.__version__.split(".")[:2])) < (11, 1):
        pytest.skip("pillow-heif needs Pillow 11.1 or newer")
    file = io.BytesIO()
    heif.from_pillow(corners()).save(file)
    assert names.has_ending(b"x.HEIC") and names.has_ending(b"x.heif")
    pixels = np.asarray(decode(file.getvalue())).astype(int)
    assert pixels.shape == (32, 48, 3) and np.abs(pixels - np.asarray(corners())).mean() < 10


def test_avif_is_read_where_pillow_has_it(forget_plugins):
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF (11.3 and newer have it)")
    pixels = np.asarray(decode(encoded(corners(), "AVIF"))).astype(int)
    assert names.has_ending(b"x.avif") and np.abs(pixels - np.asarray(corners())).mean() < 10


def test_without_the_package_the_reason_names_it(forget_plugins, monkeypatch):
    monkeypatch.setattr(names, "PLUGINS", dict.fromkeys(names.PLUGINS, ("no_such_plugin",)))
    monkeypatch.setattr(names, "PACKAGES", {"no_such_plugin": "its-package"})
    assert not names.has_ending(b"x.heic")
    for data in (b"\0\0\0\x18ftypheic" + bytes(99), b"\xff\x0a" + bytes(range(128, 228))):
        with pytest.raises(UnreadableImage, match=r"a \.\w+ file: pip install its-package"):
            decode(data)


# ---- nothing to be seen
def test_shades():
    night = np.zeros((90, 90, 3), np.uint8)
    digit = night.copy()
    digit[30:50, 30:50] = 255
    shades = [shade(Image.fromarray(a)) for a in (night, digit, 255 - night, 255 - digit)]
    assert shades == ["black", "", "white", ""]
    assert shade(Image.new("RGB", (60000, 1))) == "black"


def test_when_a_remark_is_made():
    assert "18 of 20 images looked at come out nearly black: " in remark({"black": 18, "": 2}, 20)
    assert "`value_range` 0 4095" in remark({"white": 20}, 20)
    for shades, n in (({"black": 17, "": 3}, 20), ({"black": 3}, 3), ({}, 0), ({"": 20}, 20)):
        assert not remark(shades, n)
