"""Images of a caller's own data set: every form that people have, and what is no image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast.data.decode import TransientReadError, UnreadableImage
from dinofast.data.items import ItemDataset, ItemReader, image_in, pixels_of

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9, 5), dtype=np.uint16)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(COLOR),
        COLOR,
        torch.from_numpy(COLOR).permute(2, 0, 1),
        COLOR.transpose(2, 0, 1),
        file_of(Image.fromarray(COLOR)),
        {"bytes": file_of(Image.fromarray(COLOR)), "path": None},
    ],
    ids=["pil", "array", "tensor", "channels first", "file", "hugging face"],
)
def test_color_of_8_bits_is_a_pil_image(image):
    assert np.array_equal(np.asarray(pixels_of(image)), COLOR)


@pytest.mark.parametrize("image", [GRAY, torch.from_numpy(GRAY)[None], Image.fromarray(GRAY)])
def test_gray_becomes_color(image):
    assert np.array_equal(np.asarray(pixels_of(image)), GRAY[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    "image, scale",
    [
        (DEEP, 65535),
        (torch.from_numpy(DEEP.astype(np.int32)).permute(2, 0, 1).numpy().astype(np.uint16), 65535),
        ((DEEP >> 8).astype(np.uint8), 255),
        ((DEEP / 65535).astype(np.float32), None),
        (torch.from_numpy((DEEP / 65535).astype(np.float32)).permute(2, 0, 1), None),
    ],
)
def test_other_channels_and_depths_are_floats(image, scale):
    found = pixels_of(image, channels=5)
    wanted = DEEP / 65535 if scale != 255 else (DEEP >> 8) / 255
    assert found.dtype == np.float32 and np.allclose(found, wanted, atol=1e-6)


def test_color_of_16_bits_keeps_them():
    found = pixels_of(DEEP[..., :3])
    assert found.dtype == np.float32 and len(np.unique(found)) > 100


def test_a_value_range_scales_and_clips():
    values = np.array([[-10.0, 0.0, 50.0, 100.0, np.nan, np.inf]], np.float32)
    found = pixels_of(values, channels=1, value_range=(0, 100))
    assert found[0, :, 0].tolist() == [0, 0, 0.5, 1, 0, 1]


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_files_of_gray_have_one_channel(mode):
    if mode == "I;16":
        image = Image.fromarray(DEEP[..., 0])
        wanted = DEEP[..., 0] / 65535
    else:
        image = Image.fromarray(GRAY).convert(mode)
        wanted = GRAY / 255
    found = pixels_of(file_of(image), channels=1)
    assert found.shape == (6, 9, 1) and np.allclose(found[..., 0], wanted, atol=1e-6)


@pytest.mark.parametrize(
    "item",
    [
        *(COLOR, (COLOR, 3), [COLOR], {"image": COLOR, "label": 1}, {"img": COLOR}),
        *({"anything": COLOR}, {"image": COLOR, "path": "cat.jpg"}),
    ],
)
def test_the_image_of_an_item_is_found(item):
    assert image_in(item) is COLOR


@pytest.mark.parametrize(
    "image, channels, words",
    [
        (3, 3, "an int, where an image should be"),
        (None, 3, "None, where an image should be"),
        (np.zeros((2, 2, 2, 2)), 3, "an array of shape (2, 2, 2, 2)"),
        (np.zeros((0, 4, 3), np.uint8), 3, "an array of shape (0, 4, 3)"),
        (np.zeros((4, 4, 2), np.uint8), 3, "an image of shape (4, 4, 2), where `in_channels` is 3"),
        (torch.zeros(4, 8, 8), 3, "an image of shape (4, 8, 8), where `in_channels` is 3"),
        (np.full((4, 4), -1000, np.int16), 1, "values of int16 from -1000 to -1000: give"),
        (np.full((4, 4, 5), 7.0), 5, "floats from 7 to 7: scale them to [0, 1]"),
        (np.zeros((4, 4, 5), np.int64), 5, "values of int64 from 0 to 0: give `value_range`"),
        (b"no image", 3, "text, not an image"),
    ],
)
def test_what_is_no_image_is_named(image, channels, words):
    reader = ItemReader(ItemDataset([image]), channels)
    with pytest.raises(UnreadableImage) as caught:
        reader.decode(0)
    assert words in str(caught.value)


def test_a_dict_without_an_image_names_its_keys():
    with pytest.raises(UnreadableImage, match="a dict with a, b: give the image under"):
        ItemDataset([{"a": 1, "b": 2}]).read(0)


def test_what_an_item_raises_is_the_reason():
    class Broken(list):
        def __getitem__(self, i):
            raise OSError(5, "Input/output error") if i else RuntimeError("no such slice")

    dataset = ItemDataset(Broken([1, 2]))
    with pytest.raises(UnreadableImage, match="no such slice"):
        dataset.read(0)
    with pytest.raises(TransientReadError, match="Input/output error"):
        dataset.read(1)


class Stream(torch.utils.data.IterableDataset):
    """With a length, and a __getitem__ of torch's that only raises."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    "items, words",
    [
        (iter([1]), "__len__ and __getitem__"),
        (Stream(), "Stream: give one with __len__ and __getitem__"),
        ([], "is empty"),
        ({"train": [COLOR], "test": [COLOR]}, "is a dict with train, test: give one data set"),
        ("cifar10", "is a str: give one data set"),
    ],
)
def test_what_is_no_data_set_is_refused(items, words):
    with pytest.raises(ValueError, match=words):
        ItemDataset(items)


def test_fingerprints_tell_data_sets_apart():
    class Other(list):
        _fingerprint = "abc"

    found = {ItemDataset(items).fingerprint for items in ([1, 2], [1, 2, 3], Other([1, 2]))}
    assert len(found) == 3


def test_a_value_range_is_of_gray_of_more_than_8_bits():
    """In files of one channel as in those of three."""
    deep = Image.fromarray(np.full((4, 4), 2048, np.uint16))
    assert pixels_of(file_of(deep), 1, (0, 4096)).max() == 0.5
    assert pixels_of(file_of(Image.fromarray(GRAY)), 1, (0, 4096)).max() == GRAY.max() / 255


def test_files_of_one_channel_are_turned_as_exif_says():
    image, out = Image.fromarray(GRAY), io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    image.save(out, "PNG", exif=exif)
    assert pixels_of(out.getvalue(), 1).shape == (6, 9, 1)
    assert pixels_of(out.getvalue(), 1, exif=True).shape == (9, 6, 1)
