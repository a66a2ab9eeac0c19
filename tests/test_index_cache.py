"""The index beside the run: what is looked at again and what is not, whoever comes and whatever happened to the files."""

import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from test_index import photograph
from test_loader import SMALL
from test_shards import pack, paths

from dinofast.config import Config
from dinofast.data import index, index_cache, make_loader, pil
from dinofast.data.findings import NOTHING, Findings
from dinofast.data.names import Names


@pytest.fixture
def source(tmp_path):
    """Photographs 00 to 08, a refused 09, and a shard of three, one of which is refused; all of them an hour old."""
    folder = tmp_path / "data"
    files = [photograph(folder / f"{i:02}.png", seed=i) for i in range(9)]
    pack(folder / "shard.tar", {"a.png": files[0].read_bytes(), "b.png": b"text", "c.png": files[1].read_bytes()})
    (folder / "09.png").write_text("text")
    for path in folder.iterdir():
        age(path)
    return folder


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "run" / "index.npz")


@pytest.fixture
def looked(monkeypatch):
    """Names of the files that are looked at."""
    names, look = [], index.look

    def look_and_tell(path, stopped):
        names.append(os.path.basename(os.fsdecode(path)))
        return look(path, stopped)

    monkeypatch.setattr(index, "look", look_and_tell)
    return names


def age(path, hours=1.0):
    then = time.time() - 3600 * hours
    os.utime(path, (then, then), follow_symlinks=False)


def everything(built):
    """Of an index and its refusals, all there is."""
    found, refused = built
    return (paths(found), found.sizes.tolist(), found.places.tolist(), [found.read(i) for i in range(len(found))],
            found.fingerprint, refused)


def build(source, cache):
    return index.build(str(source), 0.9, cache=cache)


def test_nothing_is_looked_at_twice(source, cache, looked, monkeypatch):
    first = build(source, cache)
    assert sorted(looked) == sorted(os.listdir(source))
    assert paths(first[0])[-2:] == [f"{source}/shard.tar/a.png", f"{source}/shard.tar/c.png"]
    assert [path for path, _ in first[1]] == [f"{source}/09.png", f"{source}/shard.tar/b.png"]
    looked.clear()
    written, kept = os.stat(cache).st_mtime_ns, everything(first)
    monkeypatch.setattr(index, "inspect", None)
    monkeypatch.setattr(index.shards, "images", None)
    assert everything(build(source, cache)) == kept and not looked
    assert os.stat(cache).st_mtime_ns == written  # nor is anything written


def test_without_a_cache_nothing_is_written(source, tmp_path):
    index.build(str(source), 0.9)
    assert os.listdir(tmp_path) == ["data"]


def grow(path):
    photograph(path, (50, 20), seed=77), age(path)


def touch(path):
    age(path, 2)


def same_size_and_time(path):
    """Another file in its place, which only the inode tells."""
    status, data = os.stat(path), path.read_bytes()
    other = path.with_suffix(".new")
    other.write_bytes(data)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [grow, touch, same_size_and_time])
def test_a_changed_file_alone_is_looked_at(source, cache, looked, change):
    build(source, cache)
    for name in ("03.png", "shard.tar"):
        if change is grow and name == "shard.tar":
            pack(source / name, {"z.png": (source / "01.png").read_bytes()}), age(source / name)
        else:
            change(source / name)
        looked.clear()
        assert everything(build(source, cache)) == everything(index.build(str(source), 0.9))
        assert looked[0] == name and looked.count("00.png") == 1  # the latter without the cache
        looked.clear()
        build(source, cache)
        assert not looked


def test_new_files_are_looked_at_and_removed_ones_drop_out(source, cache, looked):
    build(source, cache)
    for name in ("00.png", "05.png", "09.png"):
        (source / name).unlink()
    photograph(source / "04a.png", seed=50), age(source / "04a.png")
    pack(source / "another.tar", {"x.png": (source / "01.png").read_bytes()}), age(source / "another.tar")
    looked.clear()
    again = everything(build(source, cache))
    assert sorted(looked) == ["04a.png", "another.tar"]
    assert again == everything(index.build(str(source), 0.9))
    looked.clear()
    assert everything(build(source, cache)) == again and not looked
    (source / "01.png").unlink()
    build(source, cache)
    assert not looked and len(index_cache.load(cache, str(source))[0]) == 9  # of files that are gone nothing is kept


def test_a_refused_file_that_is_mended(source, cache, looked):
    build(source, cache)
    photograph(source / "09.png"), age(source / "09.png")
    pack(source / "shard.tar", {"b.png": (source / "02.png").read_bytes()}), age(source / "shard.tar")
    looked.clear()
    found, refused = build(source, cache)
    assert not refused and sorted(looked) == ["09.png", "shard.tar"] and f"{source}/09.png" in paths(found)


def test_what_could_not_be_read_is_tried_again(source, cache, looked, monkeypatch):
    inspect, broken = index.inspect, True

    def no_network(fd, start, length):
        if broken and os.readlink(f"/proc/self/fd/{fd}").endswith(("03.png", "shard.tar")):
            with pil.refusing():
                raise OSError(5, "Input/output error")
        return inspect(fd, start, length)

    monkeypatch.setattr(index, "inspect", no_network)
    _, refused = build(source, cache)
    assert (f"{source}/03.png", "cannot be read: Input/output error") in refused and len(refused) == 5
    broken = False
    looked.clear()
    found, refused = build(source, cache)
    assert sorted(looked) == ["03.png", "shard.tar"] and len(found) == 11 and len(refused) == 2


def test_a_link_to_nowhere_is_tried_again(source, cache, looked):
    (source / "10.png").symlink_to(source / "later.jpeg2")
    assert build(source, cache)[1][-2:][0][0] == f"{source}/10.png"
    written = os.stat(cache).st_mtime_ns
    looked.clear()
    build(source, cache)
    assert looked == ["10.png"] and os.stat(cache).st_mtime_ns == written  # for its sake the cache is not written again


def test_a_file_written_just_now_is_not_relied_on(source, cache, looked):
    """It could change once more in the same tick of the clock, and keep size and time."""
    photograph(source / "03.png", seed=3)
    build(source, cache)
    looked.clear()
    build(source, cache)
    assert looked == ["03.png"]
    os.utime(source / "03.png", (time.time() + 3600,) * 2)  # a server's clock that is wrong
    build(source, cache), looked.clear(), build(source, cache)
    assert looked == ["03.png"]


def test_a_list_in_any_order_with_repetitions(source, cache, looked):
    listing = source / "list.txt"
    listing.write_text("03.png\nshard.tar\n00.png\n03.png\n")
    first = everything(build(listing, cache))
    assert len(looked) == 4
    looked.clear()
    assert everything(build(listing, cache)) == first and not looked
    listing.write_text("00.png\n04.png\n03.png\nshard.tar\n03.png\n00.png\n")
    assert paths(build(listing, cache)[0]) == [str(source / name) for name in (
        "00.png", "04.png", "03.png", "shard.tar/a.png", "shard.tar/c.png", "03.png", "00.png")]
    assert looked == ["04.png"]


def cut_short(path):
    os.truncate(path, os.path.getsize(path) // 2)


def flip_a_bit(path):
    data = bytearray(open(path, "rb").read())
    data[data.index(b"stamps.npy") + 200] ^= 1
    open(path, "wb").write(data)


def empty(path):
    os.truncate(path, 0)


def text(path):
    open(path, "w").write("not a cache\n" * 100)


def a_folder(path):
    os.remove(path), os.mkdir(path)


def pickled(path):
    np.savez(open(path, "wb"), header=np.array([{}], object))


def cut_array(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(open(path, "wb"), **arrays | {"rows": arrays["rows"][:-1]})


def fewer_names(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(open(path, "wb"), **arrays | {"names": arrays["names"][:-30]})


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty, text, a_folder, pickled, cut_array, fewer_names])
def test_a_damaged_cache_is_made_anew(source, cache, looked, damage):
    first = everything(build(source, cache))
    damage(cache)
    looked.clear()
    assert everything(build(source, cache)) == first and len(looked) == 11
    if damage is not a_folder:
        looked.clear()
        assert everything(build(source, cache)) == first and not looked
    assert sorted(os.listdir(os.path.dirname(cache))) == ["index.npz", "index.npz.lock"]


def test_another_source_version_or_pillow_makes_it_anew(source, cache, looked, monkeypatch):
    build(source, cache)
    photograph(source.parent / "other" / "x.png"), age(source.parent / "other" / "x.png")
    looked.clear()
    assert len(build(source.parent / "other", cache)[0]) == 1 and looked == ["x.png"]
    for where, name, value in ((index_cache, "VERSION", 99), (index_cache.PIL, "__version__", "99.0"),
                               (index_cache.Image, "MAX_IMAGE_PIXELS", 10**6)):
        build(source, cache)
        looked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            build(source, cache)
        assert len(looked) == 11, name


def test_a_cache_that_cannot_be_written_fails_nothing(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert len(build(source, str(tmp_path / "file" / "index.npz"))[0]) == 11
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(build(source, str(tmp_path / "run" / "index.npz"))[0]) == 11
    assert os.listdir(tmp_path / "run") == ["index.npz.lock"]  # and no half of it is left


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_pass_keeps_what_it_has_found(source, cache, looked, monkeypatch, again):
    monkeypatch.setattr(index, "CHUNK", 2)
    monkeypatch.setattr(index, "THREADS", 1)
    if again:
        build(source, cache)
        for i in range(9):
            touch(source / f"{i:02}.png")
    photograph(source / "08a.png"), age(source / "08a.png")

    class Stop(BaseException):
        pass

    def stop(done, total):
        assert total == 12
        if done >= 4:
            raise Stop

    with pytest.raises(Stop):
        index.build(str(source), 0.9, stop, cache)
    looked.clear()
    whole = everything(build(source, cache))
    found_before = {"00.png", "01.png", "02.png", "03.png"} | ({"09.png", "shard.tar"} if again else set())
    assert not found_before & set(looked) and "08.png" in looked and len(looked) > 3
    assert whole == everything(index.build(str(source), 0.9))


def go(source, cache, start, log, pause=0.05):
    look = index.look

    def slowly(path, stopped):
        with open(log, "a") as file:
            file.write(os.path.basename(os.fsdecode(path)) + "\n")
        time.sleep(pause)
        return look(path, stopped)

    index.look = slowly
    start.wait()
    assert len(build(source, cache)[0]) == 11


def test_of_processes_that_come_together_one_looks(source, cache, tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=go, args=(source, cache, start, tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == sorted(os.listdir(source))


def test_when_the_one_that_looks_dies_another_takes_its_turn(source, cache, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = []
    for i in range(3):
        where = source, cache, context.Barrier(1), tmp_path / f"log{i}"
        processes.append(context.Process(target=go, args=(*where, 0.05 if i else 60)))
        processes[i].start()
        while not i and not (tmp_path / "log0").exists():
            time.sleep(0.01)
    processes[0].kill()                                                       # has looked at one file, and written nothing
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes[1:]] == [0, 0] and os.path.exists(cache)
    looked = [log.read_text().split() for log in tmp_path.glob("log[12]")]
    assert [sorted(names) for names in looked] == [sorted(os.listdir(source))]  # by one of them


def test_an_interrupt_does_not_wait_for_a_whole_shard(tmp_path, monkeypatch):
    data = photograph(tmp_path / "one.png").read_bytes()
    pack(tmp_path / "big.tar", {f"{i}.png": data for i in range(1000)})
    seen, inspect, numbers = [], index.inspect, itertools.count(1)

    def slowly(*where):
        seen.append(where)
        time.sleep(0.02)
        if next(numbers) == 5:                   # of many threads one, whatever the others have appended meanwhile
            os.kill(os.getpid(), signal.SIGINT)
        return inspect(*where)

    monkeypatch.setattr(index, "inspect", slowly)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)        # a run in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            index.build(str(tmp_path / "big.tar"), 0.5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) < 900


def test_where_there_are_no_locks_each_makes_its_own(source, cache, looked, monkeypatch):
    monkeypatch.setattr(index_cache.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    first = everything(build(source, cache))
    looked.clear()
    assert everything(build(source, cache)) == first and not looked


def test_the_loader_keeps_it_beside_the_run(source, tmp_path, looked):
    cfg = Config(**SMALL, data_path=str(source), output_dir=str(tmp_path / "run"))
    first = make_loader(cfg)
    looked.clear()
    second = make_loader(cfg, rank=1, world=2)
    assert not looked and (tmp_path / "run" / "index.npz").exists()
    assert (first.n_images, first.fingerprint, first.refused) == (second.n_images, second.fingerprint, second.refused)


# ---- the arrays
def test_names():
    listed = [b"a", b"", b"ccc", b"a", b"\xe9\n"]
    names = Names.of(listed)
    assert len(names) == 5 and list(names) == listed and [names[i] for i in range(5)] == listed
    assert names.cut(1, 3) == [b"", b"ccc"] and list(names.take(np.array([4, 0, 0]))) == [b"\xe9\n", b"a", b"a"]
    assert list(Names(b"")) == [] and list(names.take(np.array([], int))) == []
    many = Names.of(b"%d" % i for i in range(10_000))
    which = np.random.default_rng(0).integers(0, 10_000, 9_000)
    assert list(many) == [b"%d" % i for i in range(10_000)] and list(many.take(which)) == [b"%d" % i for i in which]


def test_names_are_found(monkeypatch):
    many = Names.of(b"%d" % i for i in range(5000))
    asked = Names.of([b"7", b"x", b"4999", b"", b"7"])
    assert many.find(asked).tolist() == [7, -1, 4999, -1, 7] and many.find(many).tolist() == list(range(5000))
    assert Names(b"").find(asked).tolist() == [-1] * 5 and many.find(Names(b"")).tolist() == []
    monkeypatch.setattr("dinofast.data.names.hash", lambda name: 1, raising=False)  # all collide: missed at most
    assert set(many.find(Names.of([b"3", b"4"])).tolist()) <= {-1, 3, 4}


def test_findings_are_taken_and_joined():
    rows = [[(b"", -1, -1, 3, 4, "")], [], [(b"a", 5, 6, 7, 8, ""), (b"b", 9, 10, 0, 0, "bad")]]
    found = Findings.of([(1, 2, 3), (4, 5, 6), (7, 8, 9)], rows)
    assert found.file_of().tolist() == [0, 2, 2]
    turned = found.take(np.array([2, 0, 2]))
    assert turned.counts.tolist() == [2, 1, 2] and list(turned.members) == [b"a", b"b", b"", b"a", b"b"]
    assert turned.rows["height"].tolist() == [7, 0, 3, 7, 0] and turned.stamps["inode"].tolist() == [9, 3, 9]
    both = Findings.join([turned, NOTHING, found])
    assert len(both) == 6 and list(both.reasons) == [b"", b"bad", b"", b"", b"bad", b"", b"", b"bad"]
    with pytest.raises(ValueError, match="do not belong together"):
        Findings(found.stamps, found.counts, found.rows[:1], found.members, found.reasons)
