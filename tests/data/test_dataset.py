"""Which files are images, in which order; which of them do not decode and for what reason; one copy
for all processes."""

import gc
import os
import pickle
import struct
import tempfile
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dinofast.config import Config
from dinofast.data import dataset, decode, make_loader, shared
from dinofast.data.dataset import scan
from dinofast.data.decode import UnreadableImage
from dinofast.data.names import EXTENSIONS
from dinofast.data.packed import PackedStrings
from dinofast.data.reader import ImageReader


def find(source):
    images = scan(source)
    return [images.path(i) for i in range(len(images))]


def why_bad(images):
    """Of each image that does not decode, the reason by its path."""
    reader, bad = ImageReader(images), {}
    for i in range(len(images)):
        try:
            reader.decode(i)
        except UnreadableImage as reason:
            bad[images.path(i)] = str(reason)
    return bad


def photograph(path, size=(40, 30), seed=0):
    """A smooth picture of its own, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    Image.fromarray(small).resize(size).save(path)
    return path


def odd_images(folder):
    """One file of each kind that is unusual but readable."""
    photograph(folder / "odd_plain.jpg")
    Image.new("L", (20, 20), 99).save(folder / "odd_gray.jpg")
    Image.new("CMYK", (20, 20)).save(folder / "odd_cmyk.jpg")
    Image.new("RGB", (20, 20)).quantize(4).save(folder / "odd_palette.png")
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(folder / "odd_deep.png")
    Image.new("RGB", (1, 1)).save(folder / "odd_pixel.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "odd_turned.jpg", exif=exif)
    Image.new("RGB", (20, 20)).save(
        folder / "odd_moving.gif", save_all=True, append_images=[Image.new("RGB", (20, 20), "red")]
    )
    Image.new("RGB", (20, 20)).save(folder / "odd_misnamed.jpg", format="png")
    data = (folder / "odd_plain.jpg").read_bytes()
    (folder / "odd_trailing.jpg").write_bytes(data + b"\0" * 500)
    (folder / "odd_long_header.jpg").write_bytes(
        data[:2] + (b"\xff\xe5\xff\xff" + b"\0" * 65533) + data[2:]
    )
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
    bomb = (
        png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    )
    (folder / "bad_bomb.png").write_bytes(bomb)
    (folder / "bad_link.jpg").symlink_to(folder / "nowhere.jpg")
    reasons = {
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "text",
        "header.jpg": "wrong header",
        "bomb.png": "decompression bomb",
        "link.jpg": "No such file",
    }
    return {str(folder / f"bad_{name}"): reason for name, reason in reasons.items()}


def test_folders_of_any_depth_are_searched_in_sorted_order(tmp_path):
    names = [
        "b/2.JPG",
        "b/1.jpeg",
        "a/deep/er/x.PNG",
        "top.webp",
        "z.tif",
        "a.bmp",
        "g.gif",
        "p.ppm",
        "t.TIFF",
        "b-c/y.png",
        "b.d/y.png",
        "b.png",
    ]
    for name in names:
        photograph(tmp_path / name)
    photograph(tmp_path / "q.png").rename(tmp_path / "q.npy")
    (tmp_path / "notes.txt").write_text("not counted")
    assert find(str(tmp_path)) == sorted(str(tmp_path / name) for name in names)
    assert not why_bad(scan(str(tmp_path)))


def test_more_folders_than_are_listed_at_a_time(tmp_path):
    names = [f"{i}/{j}/x.png" for i in range(3) for j in range(3 * dataset.THREADS)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert find(str(tmp_path)) == sorted(str(tmp_path / name) for name in names)


def test_no_file_is_opened_to_list_it(tmp_path, monkeypatch):
    for i in range(20):
        photograph(tmp_path / f"{i % 3}" / f"{i}.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "0" / "0.png")
    (tmp_path / "list.txt").write_text("0/0.png\n1/1.png\n")
    looked = []

    def told(own):
        return lambda path, *args, **options: (looked.append(path), own(path, *args, **options))[1]

    for name in ("open", "stat", "lstat"):
        monkeypatch.setattr(os, name, told(getattr(os, name)))
    assert len(scan(str(tmp_path))) == 21
    assert not [path for path in looked if os.fsencode(path).endswith(b".png")] and looked
    assert len(scan(str(tmp_path / "list.txt"))) == 2  # of a list, at one: whether lines are paths
    assert len([path for path in looked if os.fsencode(path).endswith(b".png")]) == 1


def test_links_are_followed_but_not_in_circles(tmp_path):
    photograph(tmp_path / "elsewhere" / "far.jpg")
    photograph(tmp_path / "here" / "near.jpg")
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "one.jpg").symlink_to(tmp_path / "elsewhere" / "far.jpg")
    (tmp_path / "here" / "circle").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "itself").symlink_to(tmp_path / "here" / "itself")
    got = [os.path.relpath(path, tmp_path / "here") for path in find(str(tmp_path / "here"))]
    assert got == ["linked/far.jpg", "near.jpg", "one.jpg"]


def test_a_text_file_keeps_its_order_and_its_folder_is_the_start(tmp_path):
    (
        photograph(tmp_path / "images" / "b.jpg"),
        photograph(tmp_path / "images" / "a.jpg"),
        photograph(tmp_path / "far" / "c.jpg"),
    )
    listing = tmp_path / "images" / "train.txt"
    listing.write_text(f"b.jpg\r\n\na.jpg \n{tmp_path}/far/c.jpg", encoding="utf-8-sig")
    assert find(str(listing)) == [
        str(tmp_path / name) for name in ("images/b.jpg", "images/a.jpg", "far/c.jpg")
    ]
    assert not why_bad(scan(str(listing)))


def test_sources_named_from_the_folder_they_are_in(tmp_path, monkeypatch):
    photograph(tmp_path / "images" / "a.jpg"), (tmp_path / "list.txt").write_text("images/a.jpg\n")
    monkeypatch.chdir(tmp_path)
    assert find("images") == find("list.txt") == find("images/") == ["images/a.jpg"] and find(
        "."
    ) == ["./images/a.jpg"]
    assert not why_bad(scan("list.txt"))


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9 \xe2\x82\xac.jpg"
    photograph(tmp_path / "x.jpg").rename(os.fsdecode(path))
    assert [os.fsencode(name) for name in find(str(tmp_path))] == [path]


def test_odd_images_decode_and_bad_ones_say_why(tmp_path):
    odd, bad = odd_images(tmp_path), bad_images(tmp_path)
    images = scan(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Palette images|Truncated File Read")
        got = why_bad(images)
    assert find(str(tmp_path)) == sorted([*odd, *bad]) and not images.bad_files
    assert ImageReader(images).decode(
        find(str(tmp_path)).index(str(tmp_path / "odd_turned.jpg"))
    ).size == (40, 30)
    assert got.keys() == bad.keys()
    for path, reason in got.items():
        assert bad[path] in reason and "\n" not in reason and "\t" not in reason, (path, reason)


def test_a_folder_that_cannot_be_listed_is_a_bad_file(tmp_path, monkeypatch):
    photograph(tmp_path / "good.jpg"), (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def locked(folder):  # as root, permissions stop nobody
        if folder.endswith(b"locked/"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    images = scan(str(tmp_path))
    assert len(images) == 1 and images.bad_files == [
        (f"{tmp_path}/locked/", "cannot be read: Permission denied")
    ]


def test_progress_reaches_the_total(tmp_path, monkeypatch):
    for i in range(7):
        photograph(tmp_path / f"{i}.jpg")
    monkeypatch.setattr(dataset, "PROGRESS_EVERY", 3)
    calls = []
    scan(str(tmp_path), lambda done, total: calls.append((done, total)))
    assert calls == [(3, 0), (6, 0), (7, 7)]


def test_a_source_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(ValueError, match="/nowhere' does not exist: give a folder"):
        find(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="/empty is an empty folder: give one that has images"):
        find(str(tmp_path / "empty"))
    (tmp_path / "empty" / "below").mkdir()
    with pytest.raises(ValueError, match="/empty holds nothing but empty folders: give one"):
        find(str(tmp_path / "empty"))
    (tmp_path / "empty" / "below" / "x.doc").touch()
    with pytest.raises(ValueError, match=f"has no images: .*{EXTENSIONS[0]}.*1 .doc"):
        find(str(tmp_path / "empty"))
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="blank.txt lists no images"):
        find(str(tmp_path / "blank.txt"))
    one = f"is one image: give a folder of many, such as '{tmp_path}'"
    with pytest.raises(ValueError, match=one):
        find(str(photograph(tmp_path / "image.png")))
    for name, data, words in (
        ("a.zip", b"PK\3\4", "an archive that is not read: unpack it"),
        ("a.7z", b"x", "an archive that is not read: unpack it"),
        ("list.txt.gz", b"\x1f\x8b\0", "compressed with gzip: unpack it first"),
        ("w.pth", b"PK\3\4", "a file of weights: give the images"),
        ("t.backup", b"\0" * 257 + b"ustar", "a tar archive by another name"),
        ("x.bin", b"\0", "neither a folder nor a text file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            find(str(tmp_path / name))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="it is a link, and what it leads to is not there"):
        find(str(tmp_path / "link"))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match="neither a folder nor a file"):
        find(str(tmp_path / "pipe.txt"))


def test_pipes_devices_and_links_to_themselves_are_bad_and_not_waited_for(tmp_path):
    photograph(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (
        (tmp_path / "self.png").symlink_to(tmp_path / "self.png"),
        (tmp_path / "zero.jpg").symlink_to("/dev/zero"),
    )
    (tmp_path / "folder.png").symlink_to(tmp_path), os.mkfifo(tmp_path / "pipe.tar")
    assert scan(str(tmp_path)).bad_files == [(f"{tmp_path}/pipe.tar", "not a regular file")]
    assert why_bad(scan(str(tmp_path))) == {
        f"{tmp_path}/{name}": reason
        for name, reason in (
            ("pipe.jpg", "not a regular file"),
            ("self.png", "cannot be read: Too many levels of symbolic links"),
            ("zero.jpg", "not a regular file"),
            ("folder.png", "not a regular file"),
        )
    }


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    photograph(tmp_path / "a.jpg"), photograph(tmp_path / "b.jpg")
    with open(tmp_path / "b.jpg", "r+b") as file:
        end = file.read()[-2:]
        # a header and an end, and between them zeros that take no room on the disk
        file.seek(decode.LARGEST)
        file.write(end)
    assert why_bad(scan(str(tmp_path))) == {
        str(tmp_path / "b.jpg"): "2,000,000,002 bytes, too many for an image"
    }


def test_fingerprint_follows_the_names_and_not_the_place(tmp_path):
    for place in ("here", "there", "other"):
        (tmp_path / place).mkdir()
        for name in ("a.png", "c.png" if place == "other" else "b.png"):
            Image.new("RGB", (8, 8 + (place == "there"))).save(tmp_path / place / name)
    here, there, other = (
        scan(str(tmp_path / place)).fingerprint for place in ("here", "there", "other")
    )
    assert here == there != other and scan(f"{tmp_path}/here/").fingerprint == here
    (tmp_path / "here" / "list.txt").write_text(f"a.png\n{tmp_path}/here/b.png\n")
    assert scan(str(tmp_path / "here" / "list.txt")).fingerprint == here
    (tmp_path / "here" / "list.txt").write_text("b.png\na.png\n")
    assert scan(str(tmp_path / "here" / "list.txt")).fingerprint != here


def test_an_interrupt_ends_the_scan(tmp_path):
    for i in range(5):
        photograph(tmp_path / f"{i}" / f"{i}.jpg")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(str(tmp_path), stop)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


# ---- strings, and one copy of them for all processes
def test_packed_strings():
    listed = [b"a", b"", b"ccc", b"a", b"\xe9\n"]
    strings = PackedStrings.of(listed)
    assert (
        len(strings) == 5 and list(strings) == listed and [strings[i] for i in range(5)] == listed
    )
    assert list(PackedStrings(b"")) == [] and list(PackedStrings.of([b"a\0b"])) == [b"a?b"]
    many = [b"%d" % i for i in range(10_000)]
    assert list(PackedStrings.of(many)) == many
    copy = pickle.loads(pickle.dumps(strings))
    assert list(copy) == listed


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Two processes on this machine, in its own folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture
def mixed(tmp_path):
    """Photographs and a shard."""
    from test_shards import pack

    files = {
        f"{i}.png": photograph(tmp_path / "data" / f"{i}.png", seed=i).read_bytes()
        for i in range(4)
    }
    pack(tmp_path / "data" / "a.tar", files)
    return str(tmp_path / "data")


@pytest.mark.parametrize("kind", ["mixed", "folder"])
def test_ranks_share_one_copy(kind, mixed, ranks):
    if kind == "folder":
        os.remove(f"{mixed}/a.tar")
    own = scan(mixed)
    (first, remove), (second, _) = shared.between_ranks(own), shared.between_ranks(scan(mixed))
    (name,) = os.listdir(ranks)
    # two processes would map it by themselves
    assert first.files.text.base is not second.files.text.base
    maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else name * 2
    assert maps.count(name) == 2
    for dataset_ in (first, second, pickle.loads(pickle.dumps(first))):
        assert [dataset_.path(i) for i in range(len(own))] == [own.path(i) for i in range(len(own))]
        assert [dataset_.read(i) for i in range(len(own))] == [own.read(i) for i in range(len(own))]
        assert dataset_.fingerprint == own.fingerprint
    assert not first.files.text.flags.writeable
    remove()
    assert not os.listdir(ranks) and first.read(0) == own.read(0)
    remove()
    third, _ = shared.between_ranks(own)
    assert os.listdir(ranks)
    del third
    gc.collect()
    assert not os.listdir(ranks)  # a process that never trains leaves nothing behind


def test_once_all_are_here_nothing_is_left_for_a_kill_to_leave(mixed, ranks, tmp_path):
    cfg = Config(
        data_path=mixed, output_dir=str(tmp_path / "run"), batch_size_per_gpu=2, num_workers=0
    )
    loaders = [make_loader(cfg, rank=rank, world=2) for rank in (0, 1)]
    assert os.listdir(ranks)
    for loader in loaders:
        loader.all_are_here(lambda number: True)
        assert not os.listdir(ranks)
    assert len(loaders[1].reader.dataset) == 8 and loaders[1].reader.dataset.read(0)


def test_a_process_alone_shares_nothing(mixed, ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    own = scan(mixed)
    assert shared.between_ranks(own)[0] is own and not os.listdir(ranks)


def test_where_nothing_can_be_shared_each_keeps_its_own(mixed, ranks, monkeypatch):
    own = scan(mixed)
    path = ranks / f"dinofast-{os.getuid()}-{own.fingerprint}.files"
    for spoil in (
        lambda: path.write_bytes(b"something else"),
        lambda: path.write_bytes(b"\0" * path.stat().st_size),
    ):
        kept, _ = shared.between_ranks(own)
        spoil()
        assert shared.between_ranks(own)[0] is own
        path.unlink()
        del kept
    path.symlink_to(ranks / "elsewhere")
    assert shared.between_ranks(own)[0] is own and not (ranks / "elsewhere").exists()
    path.unlink(), ranks.rmdir()
    assert shared.between_ranks(own)[0] is own
