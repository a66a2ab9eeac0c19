"""Bad files and files that cannot be read for the moment: what replaces them, where they are
listed, when a run ends."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import test_loader
import torch
from test_dataset import photograph
from test_loader import NEAR, SMALL, images_of, same, spoil, take

from dinofast.config import Config
from dinofast.data import decode, make_loader, reader
from dinofast.data.bad_files import BadFileList
from dinofast.data.sampler import epoch_order

photographs, config, spoilt = test_loader.photographs, test_loader.config, test_loader.spoilt


def test_a_bad_image_is_replaced_by_the_next_that_decodes(spoilt, tmp_path):
    loader = make_loader(spoilt(batch_size_per_gpu=12))
    assert loader.n_images == 12 and not loader.bad_files
    big, small = images_of(next(loader), (2, 2))
    place = {int(sample): b for b, sample in enumerate(epoch_order(0, 0, 12))}
    for bad, good in ((3, 5), (4, 5), (11, 0)):
        assert torch.equal(big[:, place[bad]], big[:, place[good]]) and torch.equal(
            small[:, place[bad]], small[:, place[good]]
        )
    names = [f"{tmp_path}/data/{i:02}.png" for i in (3, 4, 11)]
    next(loader)
    assert sorted(path for path, _ in loader.bad_files) == names and all(
        reason for _, reason in loader.bad_files
    )
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == names


def test_good_images_are_drawn_as_if_there_were_no_bad_ones(spoilt, tmp_path):
    """Their place in the order and their crops depend on the names alone."""
    with_bad = [images_of(batch, (2, 2)) for batch in take(spoilt(batch_size_per_gpu=12), 2)]
    for i in (3, 4, 11):
        photograph(tmp_path / "data" / f"{i:02}.png", seed=i)
    whole = [images_of(batch, (2, 2)) for batch in take(spoilt(batch_size_per_gpu=12), 2)]
    for epoch in range(2):
        good = [b for b, sample in enumerate(epoch_order(0, epoch, 12)) if sample not in (3, 4, 11)]
        assert same([[t[:, good] for t in with_bad[epoch]]], [[t[:, good] for t in whole[epoch]]])


def test_replacements_do_not_depend_on_workers_or_processes(spoilt, tmp_path):
    whole = take(spoilt(), 9)
    assert same(take(spoilt(num_workers=2), 9), whole)
    assert same(take(spoilt(), 4, start_step=5), whole[5:])
    pairs = [take(spoilt(batch_size_per_gpu=2), 9, rank=r, world=2) for r in (0, 1)]
    for step in range(9):
        parts = [images_of(pairs[r][step], (2, 2)) for r in (0, 1)]
        assert same(
            [[torch.cat(p, 1) for p in zip(*parts, strict=True)]], [images_of(whole[step], (2, 2))]
        )
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert len(lines) == 3  # both processes met them; each is listed once


def test_backends_replace_alike(spoilt):
    by_pil, ours = take(spoilt(data_backend="pil"), 6), take(spoilt(), 6)
    for x, y in zip(ours, by_pil, strict=True):
        for a, b in zip(x, y, strict=True):
            assert (
                (a - b).abs().mean() < NEAR
                if spoilt().data_backend == "dali"
                else torch.equal(a, b)
            )


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(spoilt, workers):
    loader = make_loader(spoilt(num_workers=workers, max_bad_files=0.2))
    with pytest.raises(OSError, match="3 of 12 images are bad and `max_bad_files` is 0.2: .*png"):
        for _ in range(4):
            next(loader)
    loader.close()


def test_the_share_is_of_the_images_drawn_so_far(config, tmp_path):
    """Of 400 images the last 100 are bad, which the first one drawn of them is enough to know: they
    do not count before they are drawn."""
    data = photograph(tmp_path / "one.png").read_bytes()
    (tmp_path / "data").mkdir()
    for i in range(400):
        (tmp_path / "data" / f"{i:03}.png").write_bytes(data if i < 300 else b"text")
    for share, raises in ((0.35, False), (0.1, True)):
        loader = make_loader(
            config(data_path=str(tmp_path / "data"), batch_size_per_gpu=20, max_bad_files=share)
        )
        done = 0
        try:
            while done < 20:
                next(loader)
                done += 1
        except OSError as error:
            assert (
                raises and done < 8 and "images are bad and `max_bad_files` is 0.1: " in str(error)
            )
        else:
            assert not raises
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_decodes_the_first_batch_says_so(config, tmp_path, workers):
    (tmp_path / "data").mkdir()
    for i in range(3000):
        (tmp_path / "data" / f"{i:04}.jpg").write_bytes(b"text")
    tried = []
    loader = make_loader(
        config(
            data_path=str(tmp_path / "data"),
            num_workers=workers,
            max_bad_files=1.0,
            batch_size_per_gpu=2,
        )
    )
    read = loader.reader.dataset.read
    object.__setattr__(loader.reader.dataset, "read", lambda i: (tried.append(i), read(i))[1])
    reason = r"\S+jpg \(text, not an image\)"
    with pytest.raises(
        ValueError,
        match=rf"^none of the first \d+ images tried decodes: {reason}; {reason}; {reason}\. "
        r"`dinofast check-data` tries every file\.$",
    ):
        next(loader)
    loader.close()
    assert len(tried) < 3000


def test_a_long_stretch_of_bad_files_is_no_reason_to_stop(config, tmp_path):
    data = photograph(tmp_path / "one.png").read_bytes()
    (tmp_path / "data").mkdir()
    for i in range(600):
        (tmp_path / "data" / f"{i:04}.png").write_bytes(data if i < 150 else b"text")
    cfg = config(data_path=str(tmp_path / "data"), batch_size_per_gpu=1, max_bad_files=1.0)
    first = int(np.flatnonzero(epoch_order(0, 0, 600) >= 150)[0])
    assert len(take(cfg, 1, start_step=first)) == 1


def test_when_nothing_decodes_any_more_the_run_stops(spoilt, tmp_path):
    loader = make_loader(spoilt(max_bad_files=1.0))
    next(loader)
    for path in (tmp_path / "data").iterdir():
        photograph(path), spoil(path)
    with pytest.raises(OSError, match="no image decodes any more: .*png"):
        for _ in range(8):
            next(loader)
    with pytest.raises(OSError, match="no image decodes any more: "):
        next(loader)  # nothing new is bad, and still there is nothing to give


def test_an_image_of_another_size_is_simply_another_image(config, tmp_path):
    for i in range(4):
        photograph(tmp_path / "data" / f"{i}.png", seed=i)
    cfg = config(data_path=str(tmp_path / "data"))
    loader = make_loader(cfg)
    photograph(tmp_path / "data" / "2.png", (10, 10), seed=2)
    crops = next(loader)
    loader.close()
    assert not loader.bad_files and same([crops], take(cfg, 1))


@pytest.fixture
def storage(config, tmp_path, monkeypatch):
    """Four photographs on a storage whose reading of 2.png fails as often as `storage.fails`
    says."""

    class Storage:
        fails, asked = 0, 0
        cfg = config(data_path=str(tmp_path / "data"))

        def __call__(self, path):
            if os.fsdecode(path).endswith("2.png"):
                self.asked += 1
                if self.asked <= self.fails:
                    with decode.unreadable():
                        raise OSError(5, "Input/output error")
            return read(path)

    for i in range(4):
        photograph(tmp_path / "data" / f"{i}.png", (40 + i, 30), seed=i)
    read, storage = decode.read_file, Storage()
    monkeypatch.setattr("dinofast.data.dataset.read_file", storage)
    monkeypatch.setattr(reader, "RETRY_PAUSES_S", (0.0, 0.0))
    return storage


def test_a_read_that_fails_is_tried_again_at_once(storage):
    whole = take(storage.cfg, 1)
    storage.fails, storage.asked = 2, 0
    loader = make_loader(storage.cfg)
    assert same([next(loader)], whole) and not loader.bad_files and storage.asked >= 3
    loader.close()


def test_a_file_that_could_not_be_read_has_another_turn(storage, tmp_path):
    whole = take(storage.cfg, 2)
    storage.fails, storage.asked = (3 if storage.cfg.data_backend != "dali" else 4), 0
    loader = make_loader(storage.cfg)
    first, second = next(loader), next(loader)
    place = {int(sample): b for b, sample in enumerate(epoch_order(0, 0, 4))}
    big, _ = images_of(first, (2, 2))
    assert torch.equal(big[:, place[2]], big[:, place[3]])  # replaced this time
    assert same([second], whole[1:])  # and there again in the next epoch
    assert (loader.n_unread, loader.unread_reason) == (1, "cannot be read: Input/output error")
    assert not loader.bad_files and not (tmp_path / "run" / "bad_files.txt").exists()
    loader.close()


def test_reads_that_fail_are_no_part_of_the_share(storage):
    """Eight times in a row the same image of four: a quarter of what is drawn, and nothing is
    bad."""
    storage.fails = 10**6
    loader = make_loader(replace(storage.cfg, max_bad_files=0.0))
    for _ in range(8):
        next(loader)
    loader.close()
    assert loader.n_unread == 8 and not loader.bad_files


def test_a_storage_that_fails_ends_the_run_soon(config, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for i in range(1000):
        (tmp_path / "data" / f"{i:03}.png").touch()
    asked = []

    def fail(path):
        asked.append(path)
        with decode.unreadable():
            raise OSError(116, "Stale file handle")

    monkeypatch.setattr("dinofast.data.dataset.read_file", fail)
    monkeypatch.setattr(reader, "RETRY_PAUSES_S", (0.05,))
    monkeypatch.setattr(reader, "UNREAD_S", 0.5)
    # whose processes would not count in `asked`
    workers = 0 if config().data_backend == "pil" else 4
    cfg = config(
        data_path=str(tmp_path / "data"),
        max_bad_files=0.0,
        batch_size_per_gpu=64,
        num_workers=workers,
    )
    loader = make_loader(cfg)
    loader.n_workers = workers  # however few cores are here
    start = time.monotonic()
    with pytest.raises(
        OSError,
        match=r"storage of `data_path` .* fails, .*png \(cannot be read: Stale file handle\)\.$",
    ):
        next(loader)
    assert time.monotonic() - start < 5  # 64 images one after the other would take half a minute
    loader.close()
    assert (
        len(asked) < 1000
        and not loader.bad_files
        and not (tmp_path / "run" / "bad_files.txt").exists()
    )


def test_a_storage_that_is_back_is_read_as_before(storage, monkeypatch):
    images = reader.ImageReader(make_loader(storage.cfg).reader.dataset)
    monkeypatch.setattr(reader, "UNREAD_S", 0.0)
    storage.fails = 3
    met = []
    assert (
        images.decode_next(2, met) == (None, 2)
        and [file.kind for file in met] == ["unread", "lost"]
        and images._lost
    )
    assert images.decode_next(2, met)[1] == 2 and not images._lost and len(met) == 2
    storage.fails, storage.asked = 2, 0
    assert images.decode_next(2, met)[1] == 2 and storage.asked == 3  # with second tries again


def test_the_list_of_bad_files_repeats_nothing(tmp_path):
    path = tmp_path / "run" / "bad_files.txt"
    ours, others = BadFileList(str(path)), BadFileList(str(path))
    ours.append([])
    assert not path.exists()
    ours.append([("a", "1"), ("b", "2"), ("a", "1")])
    others.append([("b", "2"), ("c\udce9", "3")])
    ours.append([("c\udce9", "3"), ("a", "1")])
    assert path.read_bytes() == b"a\t1\nb\t2\nc\xe9\t3\n"
    for bad_files in (ours, others):
        bad_files.append([("two\nlines\tof a name", "odd")])
        assert path.read_bytes().splitlines()[3:] == [b"two\\nlines\\tof a name\todd"]
    ours.clear(), ours.append([("a", "1")])
    assert path.read_bytes() == b"a\t1\n"


def test_the_list_of_an_earlier_run_does_not_stay(spoilt, tmp_path):
    BadFileList(str(tmp_path / "run" / "bad_files.txt")).append([("old.png", "gone")])
    loader = make_loader(spoilt())
    loader.begin_run()
    for _ in range(3):
        next(loader)
    loader.close()
    assert "old.png" not in (tmp_path / "run" / "bad_files.txt").read_text()


def test_a_run_that_goes_on_adds_to_the_list(spoilt, tmp_path):
    listed = tmp_path / "run" / "bad_files.txt"
    take(spoilt(batch_size_per_gpu=1), 12)
    before = listed.read_text()
    assert len(before.splitlines()) == 3
    for step in (11, 0, 7):  # 7 meets one of them again at most
        take(spoilt(batch_size_per_gpu=1), 1, start_step=step)
        assert listed.read_text() == before


def test_a_run_that_goes_on_tells_only_what_is_new(spoilt, tmp_path):
    listed = tmp_path / "run" / "bad_files.txt"
    take(spoilt(batch_size_per_gpu=12), 1)
    first, *others = listed.read_text().splitlines(keepends=True)
    listed.write_text(first)
    loader = make_loader(spoilt(batch_size_per_gpu=12), start_step=1)
    next(loader)
    told = {path for path, _ in loader.bad_files}
    assert told == {line.split("\t")[0] for line in others} and len(told) == 2
    loader.close()
    loader = make_loader(spoilt(batch_size_per_gpu=12))
    assert not loader.bad_files
    loader.begin_run()
    next(loader)
    assert len(loader.bad_files) == 3
    loader.close()


def test_one_image_that_does_not_decode_is_not_several(config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(b"text")
    loader = make_loader(
        config(data_path=str(tmp_path / "data"), batch_size_per_gpu=1, max_bad_files=1.0)
    )
    with pytest.raises(ValueError, match="^no image decodes: .*a.jpg"):
        next(loader)
    loader.close()


def test_no_process_takes_back_what_another_has_listed(spoilt, tmp_path):
    """Rank 1 is first."""
    loaders = [make_loader(spoilt(batch_size_per_gpu=2), rank=rank, world=2) for rank in (0, 1)]
    loaders[0].begin_run()
    for loader in loaders[::-1]:
        for _ in range(loader.steps_per_epoch):
            next(loader)
        loader.close()
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == [
        f"{tmp_path}/data/{i:02}.png" for i in (3, 4, 11)
    ]


def test_a_share_that_chance_explains_ends_no_run(photographs, tmp_path):
    """Of 100 images drawn from many, 59 bad ones at an allowed half are luck, 70 are not; of a
    whole epoch nothing is luck; and one of several processes has enough when it has drawn its
    own."""
    loader = make_loader(
        Config(**SMALL, data_path=str(photographs), output_dir=str(tmp_path), max_bad_files=0.5)
    )
    for n_images, n_own, drawn, bad, ends in (
        (10**6, 10**6, 100, 59, False),
        (10**6, 10**6, 100, 70, True),
        (10**6, 10**6, 99, 99, False),
        (200, 200, 200, 101, True),
        (200, 200, 200, 100, False),
        (200, 200, 400, 201, True),
        (800, 50, 49, 49, False),
        (800, 50, 50, 50, True),
        (800, 50, 50, 30, False),
    ):
        loader._bad.n_images = n_images
        loader._bad.n_own = n_own
        loader._bad.n_drawn = drawn
        loader._bad.n_replaced = bad
        if ends:
            with pytest.raises(OSError, match=f"{bad} of {drawn} images are bad"):
                loader._bad.check_share()
        else:
            loader._bad.check_share()


def test_a_list_that_cannot_be_written_is_written_later(tmp_path):
    path = tmp_path / "bad_files.txt"
    path.mkdir()  # as on a full disk: it cannot be opened
    files = BadFileList(str(path))
    files.append([("a.jpg", "text")])
    path.rmdir()
    files.append([("b.jpg", "empty")])
    assert path.read_text() == "a.jpg\ttext\nb.jpg\tempty\n"
