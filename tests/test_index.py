"""Which files are images, in which order, and which are refused for what reason."""

import os
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dinofast.data import index
from dinofast.data.index import build, inspect
from dinofast.data.shards import EXTENSIONS


def find(source):
    return [os.fsdecode(path) for path in index.find(source)]


def photograph(path, size=(40, 30), seed=0):
    """A smooth picture of its own, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(small).resize(size).save(path)
    return path


def odd_images(folder):
    """One file of each kind that is unusual but readable."""
    photograph(folder / "odd_plain.jpg")
    Image.new("L", (20, 20), 99).save(folder / "odd_grey.jpg")
    Image.new("CMYK", (20, 20)).save(folder / "odd_cmyk.jpg")
    Image.new("RGB", (20, 20)).quantize(4).save(folder / "odd_palette.png")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "odd_deep.png")
    Image.new("RGB", (1, 1)).save(folder / "odd_pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "odd_turned.jpg", exif=exif)
    Image.new("RGB", (20, 20)).save(folder / "odd_moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")])
    Image.new("RGB", (20, 20)).save(folder / "odd_misnamed.jpg", format="png")
    data = (folder / "odd_plain.jpg").read_bytes()
    (folder / "odd_trailing.jpg").write_bytes(data + b"\0" * 500)
    (folder / "odd_long_header.jpg").write_bytes(data[:2] + (b"\xff\xe5\xff\xff" + b"\0" * 65533) + data[2:])
    return sorted(str(p) for p in folder.glob("odd_*"))


def bad_images(folder):
    """One file of each kind that must be refused, with a word of the reason."""
    photograph(folder / "whole.jpg", (400, 300)), photograph(folder / "whole.png", (400, 300))
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    (folder / "whole.jpg").unlink(), (folder / "whole.png").unlink()
    (folder / "bad_truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "bad_truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "bad_empty.jpg").touch()
    (folder / "bad_text.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "bad_header.jpg").write_bytes(b"\x01\x02" + jpeg[2:])
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    (folder / "bad_bomb.png").write_bytes(bomb)
    (folder / "bad_link.jpg").symlink_to(folder / "nowhere.jpg")
    reasons = {"truncated.jpg": "truncated", "truncated.png": "truncated", "empty.jpg": "empty", "text.jpg": "text",
               "header.jpg": "wrong header", "bomb.png": "decompression bomb", "link.jpg": "No such file"}
    return {str(folder / f"bad_{name}"): reason for name, reason in reasons.items()}


def test_folders_of_any_depth_are_searched_in_sorted_order(tmp_path):
    names = ["b/2.JPG", "b/1.jpeg", "a/deep/er/x.PNG", "top.webp", "z.tif", "a.bmp", "g.gif", "p.ppm", "t.TIFF"]
    for name in names:
        photograph(tmp_path / name)
    photograph(tmp_path / "q.png").rename(tmp_path / "q.npy")
    (tmp_path / "notes.txt").write_text("not counted")
    assert find(str(tmp_path)) == sorted(str(tmp_path / name) for name in names)
    index, refused = build(str(tmp_path), 0.0)
    assert [index.path(i) for i in range(len(index))] == find(str(tmp_path)) and not refused
    assert index.sizes.tolist() == [[30, 40]] * len(names)


def test_links_are_followed_but_not_in_circles(tmp_path):
    photograph(tmp_path / "elsewhere" / "far.jpg")
    photograph(tmp_path / "here" / "near.jpg")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "one.jpg").symlink_to(tmp_path / "elsewhere" / "far.jpg")
    (tmp_path / "here" / "circle").symlink_to(tmp_path / "here")
    got = [os.path.relpath(path, tmp_path / "here") for path in find(str(tmp_path / "here"))]
    assert got == ["linked/far.jpg", "near.jpg", "one.jpg"]


def test_a_text_file_keeps_its_order_and_its_folder_is_the_start(tmp_path):
    photograph(tmp_path / "images" / "b.jpg"), photograph(tmp_path / "images" / "a.jpg"), photograph(tmp_path / "far" / "c.jpg")
    listing = tmp_path / "images" / "train.txt"
    listing.write_text(f"b.jpg\r\n\na.jpg \n{tmp_path}/far/c.jpg", encoding="utf-8-sig")
    assert find(str(listing)) == [str(tmp_path / name) for name in ("images/b.jpg", "images/a.jpg", "far/c.jpg")]
    index, _ = build(str(listing), 0.0)
    assert index.path(0).endswith("b.jpg") and index.path(2).endswith("c.jpg")


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9 \xe2\x82\xac.jpg"
    photograph(tmp_path / "x.jpg").rename(os.fsdecode(path))
    index, _ = build(str(tmp_path), 0.0)
    assert os.fsencode(index.path(0)) == path


def test_odd_images_are_kept_and_bad_ones_refused_by_name(tmp_path):
    kept, refused = odd_images(tmp_path), bad_images(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index, got = build(str(tmp_path), 0.5)
    assert [index.path(i) for i in range(len(index))] == kept
    assert index.sizes[kept.index(str(tmp_path / "odd_turned.jpg"))].tolist() == [30, 40]
    assert [path for path, _ in got] == sorted(refused)
    for path, reason in got:
        assert refused[path] in reason and "\n" not in reason and "\t" not in reason, (path, reason)


def test_what_cannot_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    photograph(tmp_path / "good.jpg"), (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def locked(folder):  # as root, permissions stop nobody
        if folder.endswith(b"locked"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    index, refused = build(str(tmp_path), 0.5)
    assert len(index) == 1 and [path for path, _ in refused] == [str(tmp_path / "locked")]


def test_progress_reaches_the_total(tmp_path):
    for i in range(3):
        photograph(tmp_path / f"{i}.jpg")
    (tmp_path / "list.txt").write_text("0.jpg\n1.jpg\n2.jpg\n" * 100)
    calls = []
    build(str(tmp_path / "list.txt"), 0.0, lambda done, total: calls.append((done, total)))
    assert calls == [(256, 300), (300, 300)]


def test_a_source_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"/nowhere cannot be read \(No such file or directory\): give a folder"):
        find(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images.*" + EXTENSIONS[0]):
        find(str(tmp_path / "empty"))
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="blank.txt lists no images"):
        find(str(tmp_path / "blank.txt"))
    with pytest.raises(ValueError, match="neither a folder nor a text file"):
        find(str(photograph(tmp_path / "image.png")))


def test_too_many_refusals_stop_the_run(tmp_path):
    bad = bad_images(tmp_path)
    photograph(tmp_path / "good.jpg")
    with pytest.raises(ValueError, match=r"7 of 8 images are refused and --max_refused is 0.5: \S+bad_bomb.png \("):
        build(str(tmp_path), 0.5)
    index, refused = build(str(tmp_path), 7 / 8)
    assert len(index) == 1 and len(refused) == len(bad)
    (tmp_path / "good.jpg").unlink()
    with pytest.raises(ValueError, match="7 of 7 images"):
        build(str(tmp_path), 1.0)


def test_inspect_gives_height_and_width(tmp_path):
    path = photograph(tmp_path / "x.jpg", (50, 20))
    with path.open("rb") as file:
        assert inspect(file.fileno(), 0, path.stat().st_size) == (20, 50)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.jpg")
    found, refused = build(str(tmp_path), 0.5)
    assert len(found) == 1 and refused == [(str(tmp_path / "b.jpg"), "not a regular file")]
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        find(str(tmp_path / "b.jpg"))


def test_links_to_themselves_and_devices_are_refused(tmp_path):
    photograph(tmp_path / "a.png"), photograph(tmp_path / "b.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png"), (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    assert build(str(tmp_path), 0.5)[1] == [(str(tmp_path / "self.png"), "cannot be read: Too many levels of symbolic links"),
                                            (str(tmp_path / "zero.jpg"), "not a regular file")]


def test_a_file_too_large_for_an_image_is_refused_unread(tmp_path):
    photograph(tmp_path / "a.jpg"), photograph(tmp_path / "b.jpg")
    with open(tmp_path / "b.jpg", "r+b") as file:
        end = file.read()[-2:]
        file.seek(index.LARGEST)  # a header and an end, and between them zeros that take no room on the disk
        file.write(end)
    assert build(str(tmp_path), 0.5)[1] == [(str(tmp_path / "b.jpg"), "2,000,000,002 bytes, too many for an image")]


def test_fingerprint_follows_the_images_and_not_the_place(tmp_path):
    for place in ("here", "there", "other"):
        (tmp_path / place).mkdir()
        for name in ("a.png", "c.png" if place == "other" else "b.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / place / name)
    here, there, other = (build(str(tmp_path / place), 0.5)[0].fingerprint for place in ("here", "there", "other"))
    assert here == there != other


def test_files_that_must_be_waited_for_are_looked_at_together(tmp_path, monkeypatch):
    photograph(tmp_path / "one.jpg")
    (tmp_path / "list.txt").write_text("one.jpg\n" * 64)
    at_work, most, look = [], [], index.look

    def slowly(*where):
        at_work.append(where)
        most.append(len(at_work))
        time.sleep(0.02)                                       # a network's latency
        at_work.pop()
        return look(*where)

    monkeypatch.setattr(index, "CHUNK", 4)
    monkeypatch.setattr(index, "SURE_S", 0.0)
    monkeypatch.setattr(index, "look", slowly)
    assert len(build(str(tmp_path / "list.txt"), 0.0)[0]) == 64
    assert max(most[:4]) == 1 and max(most) > 4               # the first chunk tells
