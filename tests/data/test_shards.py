"""Tar shards as a source: what is an image in them, what is refused, and patterns that name
many."""

import gzip
import io
import os
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest
from test_dataset import bad_images, odd_images, photograph, why_bad

from dinofast import cli
from dinofast.data import decode, shards
from dinofast.data.dataset import scan
from dinofast.data.decode import UnreadableImage


def pack(shard, files, format=tarfile.PAX_FORMAT):
    """A shard of members with these names and bytes."""
    with tarfile.open(shard, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return shard


def offset_of(shard, name):
    with tarfile.open(shard) as tar:
        return tar.getmember(name).offset, tar.getmember(name).offset_data


def pictures(folder, n, start=0):
    return {
        f"{i:04}.png": photograph(folder / f"{i:04}.png", seed=i).read_bytes()
        for i in range(start, start + n)
    }


def paths(found):
    return [found.path(i) for i in range(len(found))]


def build(source):
    """The images of a source, and its bad files."""
    images = scan(source)
    return images, images.bad_files


def look(shard):
    """What is in a shard: images, and (name, reason) of what is bad, the name of the shard itself
    being empty."""
    images, bad = [], []
    try:
        with shard.open("rb", buffering=0) as file:
            for header in shards.images(file):
                (bad if header.reason else images).append(
                    (header.name.decode(errors="surrogateescape"), header.reason)
                )
    except UnreadableImage as reason:
        bad.append(("", str(reason)))
    return images, bad


@pytest.fixture
def images(tmp_path):
    return pictures(tmp_path / "pictures", 4)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_read_from_their_places(images, tmp_path, format):
    shard = pack(tmp_path / "a.tar", images, format)
    found, refused = build(str(shard))
    assert paths(found) == [f"{shard}/{name}" for name in images] and not refused
    assert [found.read(i) for i in range(4)] == list(images.values())


def test_what_is_an_image_in_a_shard(images, tmp_path):
    data = images["0000.png"]
    kept = ["0.png", "1.JPG", "deep/er/2.jpeg", "./3.gif", "4.cls/5.png"]
    kept += ["photo.v1.jpg", "2020.01.02.jpg", "IMG.0001.jpg", "6.left.png", "6.right.png"]
    left = ["0.seg.png", "1.json", "2.cls", "a.png.txt", "deep/.png", "._0.png", "png"]
    left += ["__MACOSX/0.png", "7.svg"]
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        shard = pack(tmp_path / "a.tar", {name: data for name in left + kept}, format)
        found, refused = build(str(shard))
        assert paths(found) == [f"{shard}/{name}" for name in kept] and not refused
        assert [found.read(i) for i in range(len(found))] == [data] * len(kept)
        assert found.ignored.startswith("6 files ignored: 3 hidden, ")
        assert "1 .seg.png" in found.ignored and "json" not in found.ignored


def test_names_of_any_length_and_bytes(images, tmp_path):
    names = ["x" * 300 + ".png", os.fsdecode(b"caf\xe9 \xe2\x82\xac.png"), "d/" * 120 + "y.png"]
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        shard = pack(tmp_path / "a.tar", {name: images["0000.png"] for name in names}, format)
        found, _ = build(str(shard))
        assert paths(found) == [f"{shard}/{name}" for name in names]


def test_members_that_are_no_plain_file_are_refused(images, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, (kind, to) in enumerate(
            {
                tarfile.SYMTYPE: "9.png",
                tarfile.LNKTYPE: "9.png",
                tarfile.FIFOTYPE: "",
                tarfile.GNUTYPE_SPARSE: "",
            }.items()
        ):
            member = tarfile.TarInfo(f"{i}.png")
            member.type, member.linkname = kind, to
            tar.addfile(member)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        good = tarfile.TarInfo("9.png")
        good.size = len(images["0000.png"])
        tar.addfile(good, io.BytesIO(images["0000.png"]))
    found, refused = build(str(tmp_path / "a.tar"))
    assert paths(found) == [f"{tmp_path}/a.tar/9.png"]
    assert [reason for _, reason in refused] == [
        "a link inside a shard",
        "a link inside a shard",
        "not a regular file",
        "a sparse member of a shard",
    ]
    assert [path for path, _ in refused] == [f"{tmp_path}/a.tar/{i}.png" for i in range(4)]


def test_odd_and_bad_images_fare_as_in_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    odd_images(tmp_path / "data"), bad_images(tmp_path / "data")
    (tmp_path / "data" / "bad_link.jpg").unlink()
    from_folder, _ = build(str(tmp_path / "data"))
    names = sorted(os.listdir(tmp_path / "data"))
    shard = pack(
        tmp_path / "a.tar", {name: (tmp_path / "data" / name).read_bytes() for name in names}
    )
    from_shard, _ = build(str(shard))
    assert [path.rpartition("/")[2] for path in paths(from_shard)] == [
        path.rpartition("/")[2] for path in paths(from_folder)
    ]
    bad = why_bad(from_folder)
    assert len(bad) == 6
    assert {f"{shard}/{os.path.basename(path)}": reason for path, reason in bad.items()} == why_bad(
        from_shard
    )
    for i in range(len(from_folder)):
        assert from_shard.read(i) == from_folder.read(i)


def test_shards_and_images_mix_in_a_folder_and_a_list(images, tmp_path):
    folder = tmp_path / "data"
    photograph(folder / "c.png"), (folder / "b").mkdir()
    pack(folder / "b" / "2.TAR", images), pack(folder / "d.tar", {"x.png": images["0000.png"]})
    members = [f"b/2.TAR/{name}" for name in images]
    found, _ = build(str(folder))
    assert [os.path.relpath(path, folder) for path in paths(found)] == [
        *members,
        "c.png",
        "d.tar/x.png",
    ]
    (folder / "list.txt").write_text(f"d.tar\nc.png\n{folder}/b/2.TAR\n")
    listed, _ = build(str(folder / "list.txt"))
    assert [os.path.relpath(path, folder) for path in paths(listed)] == [
        "d.tar/x.png",
        "c.png",
        *members,
    ]


def test_a_shard_cut_off_anywhere_keeps_what_comes_before(images, tmp_path):
    shard, good = pack(tmp_path / "a.tar", images), pack(tmp_path / "b.tar", images)
    whole = shard.read_bytes()
    ends = [offset_of(shard, name)[1] + len(data) for name, data in images.items()]
    for cut in range(0, offset_of(shard, "0003.png")[1] + 2000, 333):
        shard.write_bytes(whole[:cut])
        found, refused = build(str(tmp_path / "{a,b}.tar"))
        n = sum(end <= cut for end in ends)
        assert paths(found) == [f"{shard}/{i:04}.png" for i in range(n)] + [
            f"{good}/{i:04}.png" for i in range(4)
        ]
        assert [found.read(i) for i in range(n)] == list(images.values())[:n]
        assert str(shard) in dict(refused) and len(refused) <= 2


def claiming(data, header, size):
    """A shard in which the member of this header claims another size, 12 bytes as tar writes it;
    its checksum is right."""
    data = bytearray(data)
    data[header + 124 : header + 136] = size
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    return bytes(data)


def test_a_member_too_large_for_an_image_is_refused(images, tmp_path):
    shard = pack(tmp_path / "a.tar", images)
    last, start = offset_of(shard, "0003.png")
    shard.write_bytes(claiming(shard.read_bytes(), last, b"%011o\0" % (decode.LARGEST + 1)))
    os.truncate(shard, start + decode.LARGEST + 10_000)  # zeros that take no room on the disk
    assert why_bad(scan(str(shard))) == {
        f"{shard}/0003.png": "2,000,000,001 bytes, too many for an image"
    }


def test_listing_a_shard_keeps_no_object_for_each_member(tmp_path):
    shard = pack(tmp_path / "a.tar", {f"{i:05}.png": b"x" for i in range(3000)})
    with shard.open("rb", buffering=0) as file:
        tracemalloc.start()
        assert sum(1 for _ in shards.images(file)) == 3000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 500_000  # bytes; it would be megabytes


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(images, tmp_path, format, monkeypatch):
    """Those that are read without it too: of a floating time, as WebDataset writes, of names in two
    parts, of none."""
    names = [
        "a.png",
        "d/" * 60 + "b.png",
        "x" * 99 + "/c.png",
        "c.json",
        os.fsdecode(b"\xe9.png"),
        "z/",
    ]
    names += ["x" * 100 + ".png"] if format != tarfile.USTAR_FORMAT else ["y" * 90 + ".png"]
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 500 + i, 1.5 * i
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    quick = []
    plain = shards._plain_header
    monkeypatch.setattr(
        shards, "_plain_header", lambda *where: quick.append(plain(*where)) or quick[-1]
    )
    with shard.open("rb", buffering=0) as file:
        mine = list(shards.images(file))
    monkeypatch.setattr(shards, "_plain_header", lambda *where: None)
    with shard.open("rb", buffering=0) as file:
        assert mine == list(shards.images(file))
    assert len(mine) == 5 and len([found for found in quick if found]) >= 4


def test_each_kind_of_damage_is_named(images, tmp_path):
    shard = pack(tmp_path / "a.tar", images)
    whole = shard.read_bytes()
    third, _ = offset_of(shard, "0002.png")
    last = offset_of(shard, "0003.png")[1]
    end = last + -(-len(images["0003.png"]) // 512) * 512
    huge, backwards = (
        claiming(whole, third, size) for size in (b"77777777777\0", b"\xff" * 10 + b"\xfc\0")
    )
    before, after = whole[:third], whole[third + 1024 :]
    past = {
        "/0002.png": "truncated: reaches past the end",
        "": "damaged tar archive: unexpected end of data",
    }
    for data, n, reasons in (
        (
            before + b"\xff" * 1024 + after,
            2,
            {"": f"damaged tar archive: no header at byte {third:,}"},
        ),
        (
            before + bytes(1024) + after,
            2,
            {"": f"damaged tar archive: it ends at byte {third:,}, but there is more"},
        ),
        (whole[:end], 4, {"": f"truncated tar archive: no end mark at byte {end:,}"}),
        (whole + whole, 4, {"": "damaged tar archive: it ends at byte"}),
        (whole[: third + 600], 2, past),
        (huge, 2, past),
        (backwards, 2, {"": "damaged tar archive: "}),  # or it would be read in circles
        (
            pack(tmp_path / "none.tar", {"a.txt": b"text"}).read_bytes(),
            0,
            {"": "a tar archive without images"},
        ),
        (b"words " * 200, 0, {"": "text, not a tar archive"}),
        (os.urandom(2048), 0, {"": "not a tar archive"}),
        (b"", 0, {"": "empty file"}),
        (bytes(10240), 0, {"": "a tar archive without images"}),
    ):
        shard.write_bytes(data)
        good, bad = look(shard)
        assert len(good) == n, reasons
        bad = dict(bad)
        assert bad.keys() == {name.removeprefix("/") for name in reasons}, (bad, reasons)
        for name, reason in reasons.items():
            assert bad[name.removeprefix("/")].startswith(reason), (bad, reasons)


def test_mutated_shards_are_refused_in_a_line_and_never_end_the_pass(images, tmp_path):
    shard = tmp_path / "a.tar"
    whole = bytearray(pack(shard, images).read_bytes())
    headers = [offset_of(shard, name)[0] for name in images]
    damaged = 0
    for seed in range(300):
        rng, data = np.random.default_rng(seed), bytearray(whole)
        for header in rng.choice(headers, rng.integers(1, 4)).tolist():
            data[header + int(rng.choice((rng.integers(157), rng.integers(512))))] = int(
                rng.integers(256)
            )
            if seed % 4:  # by its sum, the header is whole
                data[header + 148 : header + 156] = b" " * 8
                data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
        shard.write_bytes(data)
        good, bad = look(shard)
        assert (
            all(reason.isprintable() and len(reason) < 500 for _, reason in bad)
            and len(good) + len(bad) <= 5
        ), seed
        damaged += any(not name for name, _ in bad)
    assert 100 < damaged < 250


def test_compressed_shards_are_refused_with_the_way_out(images, tmp_path):
    data = pack(tmp_path / "plain.tar", images).read_bytes()
    (tmp_path / "data").mkdir()
    (
        photograph(tmp_path / "data" / "a.png"),
        photograph(tmp_path / "data" / "b.png"),
        photograph(tmp_path / "data" / "c.png"),
    )
    for name in ("a.tar.gz", "b.tgz", "misnamed.tar"):
        (tmp_path / "data" / name).write_bytes(gzip.compress(data))
    found, refused = build(str(tmp_path / "data"))
    assert len(found) == 3
    assert refused == [
        (f"{tmp_path}/data/{name}", "compressed with gzip: unpack it to a plain .tar first")
        for name in ("a.tar.gz", "b.tgz", "misnamed.tar")
    ]
    with pytest.raises(
        ValueError, match="has no readable images: .*a.tar.gz .compressed with gzip: unpack it"
    ):
        build(str(tmp_path / "data" / "a.tar.gz"))


def test_a_shard_that_shrinks_after_the_scan(images, tmp_path):
    shard = pack(tmp_path / "a.tar", images)
    found, _ = build(str(shard))
    os.truncate(shard, found.members.spans[3, 0] + 5)
    with pytest.raises(UnreadableImage, match="reaches past the end of its shard"):
        found.read(3)
    shard.unlink()
    with pytest.raises(UnreadableImage, match="cannot be read: No such file"):
        found.read(0)


def test_threads_and_forked_processes_read_together(images, tmp_path):
    found, _ = build(str(pack(tmp_path / "a.tar", images)))
    expected, wrong = list(images.values()), []

    def read():
        wrong.extend(i for i in [0, 1, 2, 3] * 200 if found.read(i) != expected[i])

    threads = [threading.Thread(target=read) for _ in range(4)]
    pid = os.fork()
    if not pid:
        read()
        os._exit(len(wrong) > 0)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.waitpid(pid, 0)[1] == 0 and not wrong


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{,y}", ["x", "xy"]),
        ("{3..3}", ["3"]),
    ],
)
def test_patterns(pattern, names):
    assert shards.expand(pattern) == names


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("s-{1..}.tar", "holds {1..}, neither a range"),
        ("s-{5..1}", "holds {5..1}"),
        ("s-{a}", "holds {a}"),
        ("s-{a,{b,c}}", "nested or not closed"),
        ("s-{1..2", "nested or not closed"),
        ("{0..999999999999}", "more than 1,000,000 files"),
        ("{0..999}{0..9999}", "more than 1,000,000 files"),
    ],
)
def test_patterns_that_cannot_be(pattern, words, tmp_path):
    with pytest.raises(
        ValueError, match="`data_path` .*" + words.replace("{", r"\{").replace("}", r"\}")
    ):
        scan(str(tmp_path / pattern))


def test_a_pattern_is_a_source_and_missing_shards_are_named(images, tmp_path, capsys):
    for i in (0, 1, 3):
        pack(tmp_path / f"s-{i:02}.tar", {f"{i}.png": images[f"{i:04}.png"]})
    found, _ = build(str(tmp_path / "s-{00,01,03}.tar"))
    assert paths(found) == [f"{tmp_path}/s-{i:02}.tar/{i}.png" for i in (0, 1, 3)]
    line = [
        "pretrain",
        "--data_path",
        str(tmp_path / "s-{00..06}.tar"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert cli.main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()
    missing = ", ".join(f"{tmp_path}/s-{i:02}.tar" for i in (2, 4, 5))
    assert f"stands for 7 files, of which 4 are missing: {missing} and 1 more;" in said


def test_the_fingerprint_follows_the_shards_and_not_the_place(images, tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        pack(tmp_path / place / "a.tar", images)
    assert (
        len(
            {
                scan(str(tmp_path / place)).fingerprint
                for place in ("here", "there/a.tar", "there/{a,a}.tar")
            }
        )
        == 2
    )
