"""The contact sheet shows the crops of a run, and what was drawn."""

import re
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image
from test_loader import spoil

from dinofast import cli
from dinofast.commands import show_crops
from dinofast.commands.show_crops import CELL, GAP, LINE, LINES, describe, write
from dinofast.config import Config
from dinofast.data import dataset
from dinofast.data.augmentation import VIEW, draw
from dinofast.data.backend_pil import render
from dinofast.data.decode import decode
from dinofast.data.loader import views
from dinofast.data.sampler import epoch_order


def test_the_sheet_holds_the_crops_of_the_run(photographs, tmp_path):
    sheet = tmp_path / "crops.png"
    assert (
        cli.main(
            [
                "show-crops",
                str(photographs),
                "-o",
                str(sheet),
                "--n_images",
                "2",
                "--epoch",
                "3",
                "--seed",
                "5",
                "--local_crops_number",
                "2",
                "--global_crops_size",
                "160",
                "--local_crops_size",
                "160",
            ]
        )
        == 0
    )
    picture = np.asarray(Image.open(sheet))
    assert picture.shape == (2 * (CELL + LINES * LINE + 2 * GAP) + GAP, 5 * (CELL + GAP) + GAP, 3)
    cfg = Config(local_crops_number=2, global_crops_size=160, local_crops_size=160)
    found = dataset.scan(str(photographs))
    samples = epoch_order(5, 3, len(found))[:2]
    drawn = draw(5, 3, samples, views(cfg))
    for row, sample in enumerate(samples.tolist()):
        image = decode(found.read(sample))
        plan = drawn.plan(row, image.height, image.width)
        for column, view in enumerate(plan, 1):  # drawn at their size, so pixel for pixel
            top, left = GAP + row * (CELL + LINES * LINE + 2 * GAP), GAP + column * (CELL + GAP)
            expected = render(image, view)
            assert (picture[top : top + CELL, left : left + CELL] == expected).all()
        assert (picture[GAP + CELL + 4 : GAP + CELL + LINES * LINE] < 128).any()  # text


def test_everything_drawn_is_told():
    view = np.zeros((), VIEW)
    view["box"], view["size"] = (3, 4, 50, 60), 96
    assert describe(view) == ["96 px of 60 x 50 at 4, 3"]
    view["jitter"], view["order"], view["factors"] = True, (3, 0, 2, 1), (0.7, 1.25, 0.9, -0.05)
    view["flip"], view["gray"], view["blur_radius"], view["solarize"] = True, True, 0.5, True
    assert describe(view)[1:] == [
        "hue -0.05, brightness 0.70",
        "saturation 0.90, contrast 1.25",
        "mirrored, gray, blur 0.50, solarized",
    ]


def test_the_next_stands_in_for_an_image_that_does_not_decode(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
        tmp_path / "data" / "a.png"
    )
    data, sheet = str(tmp_path / "data"), tmp_path / "sheet.png"
    (tmp_path / "data" / "b.png").write_bytes((tmp_path / "data" / "a.png").read_bytes())
    spoil(tmp_path / "data" / "a.png")
    shown, ((path, _),) = write(Config(data_path=data), sheet)
    assert shown == 2 and path == f"{data}/a.png"
    assert cli.main(["show-crops", data, "-o", str(sheet)]) == 0
    said = capsys.readouterr().out
    assert "1 bad file replaced by the next image that decodes, as in training: " + path in said
    rows = np.vsplit(np.asarray(Image.open(sheet))[GAP:], 2)
    assert all((row[:CELL, GAP : GAP + CELL].std((0, 1)) > 20).all() for row in rows)
    spoil(tmp_path / "data" / "b.png")
    with pytest.raises(ValueError, match="has no image that decodes: .*a.png"):
        write(Config(data_path=data), sheet)


def test_no_photograph_is_overwritten(photographs, tmp_path, capsys):
    """Neither in the folder, nor in a list, nor elsewhere; an earlier sheet is."""
    data, source = tmp_path / "data", tmp_path / "list.txt"
    data.mkdir()
    image = Image.new("RGB", (40, 40), "red")
    image.save(data / "a 1.png"), image.save(data / "b.JPG"), image.save(tmp_path / "c.jpg")
    (tmp_path / "link.png").symlink_to(data / "a 1.png")
    source.write_text("data/a 1.png\n")
    for given, sheet, words in (
        (data, data / "a 1.png", "among the images"),
        (data, tmp_path / "link.png", "among the images"),
        (data, data / "b.JPG", "not PNG"),
        (data, tmp_path / "c.jpg", "not PNG"),
        (source, data / "a 1.png", "one of the images"),
        (source, source, "not PNG"),
    ):
        before = sheet.read_bytes()
        assert cli.main(["show-crops", str(given), "-o", str(sheet)]) == 2
        assert words in capsys.readouterr().err and sheet.read_bytes() == before
    for _ in range(2):
        assert cli.main(["show-crops", str(data), "-o", str(tmp_path / "crops.png")]) == 0


def test_the_help_names_the_flags_of_crops():
    named = re.findall(r"--(\w+)", show_crops.__doc__)
    assert set(named) <= {field.name for field in fields(Config)}
    assert {name for name in Config.__dataclass_fields__ if "crops" in name} <= set(named)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--n_images", "0"], "--n_images is 0"),
        (["--epoch", "-1"], "--epoch is -1"),
        (["-o", "no/such/folder/x.png"], "no folder"),
        (["-o", "."], "--sheet is '.', a folder: name a file"),
        (["--blur_radius", "2", "1"], "--blur_radius is 2.0 1.0"),
    ],
)
def test_what_cannot_be_is_said(photographs, more, message, capsys):
    assert cli.main(["show-crops", str(photographs), *more]) == 2
    assert message in capsys.readouterr().err


def test_extreme_shapes_are_shown(tmp_path):
    for size in ((60000, 1), (1, 60000), (1, 1)):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / "data" / f"{size[0]}x{size[1]}.png")
    cfg = Config(data_path=str(tmp_path / "data"), local_crops_number=1)
    assert write(cfg, tmp_path / "crops.png", 3) == (3, [])


def test_images_are_shown_as_a_run_sees_them(tmp_path):
    """Scaled by value_range and turned by EXIF."""
    (tmp_path / "data").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.frombytes("I;16", (40, 30), np.full((30, 40), 2048, "<u2").tobytes())
    deep.save(tmp_path / "data" / "a.png", exif=exif)
    for options, level, upright in (
        ({}, 8, False),
        ({"value_range": (0.0, 4095.0), "exif": True}, 128, True),
    ):
        cfg = Config(data_path=str(tmp_path / "data"), local_crops_number=0, **options)
        write(cfg, tmp_path / "crops.png", 1)
        cell = np.asarray(Image.open(tmp_path / "crops.png").convert("L"))[GAP:, GAP:]
        cell = cell[:CELL, :CELL]
        values, counts = np.unique(cell[:100, :100], return_counts=True)
        assert values[counts.argmax()] == level  # boxes are drawn on it
        assert (cell[130:] == 255).all() != upright and (cell[:, 130:] == 255).all() == upright
