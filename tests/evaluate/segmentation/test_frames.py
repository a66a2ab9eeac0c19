"""Sources of images: files, folders, lists and videos."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from dinofast.data.decode import UnreadableImage, decode
from dinofast.evaluate.segmentation import frames as frames_module
from dinofast.evaluate.segmentation.frames import are_numbered, frames_of


@pytest.fixture
def images(tmp_path):
    for i, name in enumerate(("a/1.png", "a/2.png", "b/x.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4 + i, 4)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("b/x.png\na/2.png\n")
    return tmp_path


def widths(frames, chosen=None):
    return [(i, image.width) for i, image in frames.read(chosen)]


def test_files_folders_and_lists(images):
    both = frames_of([images / "b" / "x.png", images / "a"], decode)
    assert both.names == ("x.png", "1.png", "2.png") and not both.is_video
    assert both.paths[1] == str(images / "a" / "1.png")
    assert widths(both) == [(0, 6), (1, 4), (2, 5)]
    assert widths(both, [2, 0]) == [(0, 6), (2, 5)]
    assert widths(both) == [(0, 6), (1, 4), (2, 5)]  # again
    listed = frames_of([images / "list.txt"], decode)
    assert listed.names == ("b/x.png", "a/2.png") and widths(listed) == [(0, 6), (1, 5)]


def test_a_numbered_folder_is_a_video(images):
    assert frames_of([images / "a"], decode).is_video
    assert not frames_of([images / "a", images / "b"], decode).is_video
    assert not frames_of([images], decode).is_video
    assert are_numbered(["f_08.jpg", "f_09.jpg", "f_10.jpg"])
    assert not are_numbered(["4.jpg", "8.jpg"]) and not are_numbered(["1.jpg", "a2.jpg"])
    assert not are_numbered(["1.jpg"]) and not are_numbered(["1.jpg", "cat.jpg"])


def test_unreadable_images_give_the_reason(images):
    (images / "a" / "2.png").write_bytes(b"no image")
    (_, first), (_, second) = frames_of([images / "a"], decode).read(None)
    assert first.size == (4, 4) and isinstance(second, UnreadableImage)


def test_a_video_file_needs_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(frames_module, "READERS", ("no_such_module",))
    (tmp_path / "film.mp4").touch()
    with pytest.raises(ValueError, match=r"takes PyAV: pip install av, .* ffmpeg -i .*film.mp4"):
        frames_of([tmp_path / "film.mp4"], decode)
    with pytest.raises(ValueError, match="'none.mp4' does not exist"):
        frames_of(["none.mp4"], decode)
    with pytest.raises(ValueError, match="is a video and stands among others"):
        frames_of([tmp_path, tmp_path / "film.mp4"], decode)


class Container:
    """What av.open gives."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def decode(self, video):
        assert video == 0
        for i in range(3):
            yield SimpleNamespace(to_image=lambda i=i: Image.new("L", (8 + i, 8)))


def test_frames_of_a_video_file(tmp_path, monkeypatch):
    """The readers are stood in for: neither is installed with the tests."""
    (tmp_path / "film.MP4").touch()
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda path: Container()))
    found = frames_of([tmp_path / "film.MP4"], decode)
    assert found.is_video and found.names == ("00000.png", "00001.png", "00002.png")
    assert widths(found) == [(0, 8), (1, 9), (2, 10)] and widths(found, [1]) == [(1, 9)]
    assert next(found.read(None))[1].mode == "RGB"

    def broken(path):
        raise OSError("no moov atom")

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=broken))
    with pytest.raises(ValueError, match=r"cannot be read as a video \(no moov atom\): write its"):
        frames_of([tmp_path / "film.MP4"], decode)
