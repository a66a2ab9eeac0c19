"""`dinofast check-data`: everything is decoded, bad files are told by reason, and what may be
deleted is listed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dataset import bad_images, odd_images, photograph
from test_shards import offset_of, pack

from dinofast import cli
from dinofast.commands import check_data
from dinofast.validation import check_output


@pytest.fixture
def folder(tmp_path):
    """Odd and bad images, a name with a line break, a pipe, and a shard with a bad member."""
    data = tmp_path / "data"
    data.mkdir()
    good, bad = odd_images(data), bad_images(data)
    (data / "two\nlines.png").write_bytes(b"text")
    os.mkfifo(data / "pipe.jpg")
    pack(
        data / "shard.tar", {"a.png": photograph(tmp_path / "a.png").read_bytes(), "b.png": b"text"}
    )
    return data, len(good) + 1, bad


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_bad_is_told_and_listed(folder, tmp_path, capsys, workers, monkeypatch):
    data, n_good, bad = folder
    monkeypatch.setattr(check_data, "CHUNK", 4)
    listing = tmp_path / "bad.txt"
    assert (
        cli.main(
            ["check-data", str(data), "--delete-list", str(listing), "--num_workers", str(workers)]
        )
        == 1
    )
    said = capsys.readouterr().out
    n_bad = len(bad) + 3
    n = n_good + n_bad
    assert f"{n} of {n} images, " in said and f"{n_bad} of {n} images do not decode:" in said
    for path, reason in [
        *bad.items(),
        (f"{data}/shard.tar/b.png", "text"),
        (f"{data}/pipe.jpg", "not a regular file"),
    ]:
        assert path in said and reason in said
    deletable = {path for path in bad if not path.endswith("link.jpg")}  # which cannot be read
    assert (
        set(listing.read_text().splitlines()) == deletable and f"{len(deletable)} paths in " in said
    )
    assert not multiprocessing.active_children()
    subprocess.run(["xargs", "-r", "-d", "\n", "-a", str(listing), "rm", "--"], check=True)
    assert (
        cli.main(["check-data", str(data), "--delete_list", str(listing)]) == 1
        and not listing.read_text()
    )


def test_a_good_folder(photographs, capsys):
    assert cli.main(["check-data", str(photographs)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all 48 images decode"


def test_a_damaged_shard_is_told_and_not_to_be_deleted(tmp_path, capsys):
    shard = pack(
        tmp_path / "a.tar",
        {f"{i}.png": photograph(tmp_path / f"{i}.png").read_bytes() for i in range(3)},
    )
    os.truncate(shard, offset_of(shard, "2.png")[1] + 10)
    assert cli.main(["check-data", str(shard), "--delete_list", str(tmp_path / "bad.txt")]) == 1
    assert f"{shard}: damaged tar archive" in capsys.readouterr().out
    assert not (tmp_path / "bad.txt").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_workers", "-1"], "--num_workers is -1"),
        (
            ["--delete_list", "no/such/folder/x"],
            "--delete_list is 'no/such/folder/x', but there is no folder 'no/such/folder'",
        ),
        (["--delete-lists", "x"], "Did you mean"),
    ],
)
def test_what_cannot_be_is_said(photographs, more, message, capsys):
    assert cli.main(["check-data", str(photographs), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_an_earlier_list_in_a_folder_that_takes_no_file_is_told_first(
    photographs, tmp_path, monkeypatch, capsys
):
    """The new list is written beside it. As root nothing is refused: it is here by hand."""

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "bad.txt").write_text("earlier\n")
    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert cli.main(["check-data", str(photographs), "--delete_list", f"{tmp_path}/bad.txt"]) == 2
    assert "/bad.txt', which cannot be written (Permission denied)" in capsys.readouterr().err


def test_what_is_no_file_is_not_replaced(photographs, tmp_path, capsys):
    """A device would be: the list is written beside it, and takes its name."""
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(["check-data", str(photographs), "--delete_list", str(tmp_path / "pipe")]) == 2
    assert "/pipe', which is no plain file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_a_name_with_control_characters_is_printed_as_escapes(tmp_path, capsys):
    for name in ("a\nb", "c\x1b[2Jd", "e\rf", "g\u202eh", "\x9bi", "\u00e9"):
        (tmp_path / f"{name}.png").write_bytes(b"text")
    photograph(tmp_path / "good.png")
    assert cli.main(["check-data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert not {"\x1b", "\r", "\u202e", "\x9b"} & set(said)
    assert "6 of 7 images do not decode" in said
    for name in (r"a\nb", r"c\x1b[2Jd", r"e\rf", r"g\u202eh", r"\x9bi", "\u00e9"):
        assert f"{tmp_path}/{name}.png\n" in said


def test_the_source_is_not_overwritten(tmp_path, capsys):
    photograph(tmp_path / "one.png")
    source, link = tmp_path / "list.txt", tmp_path / "link.txt"
    source.write_text("one.png\n")
    link.symlink_to(source)
    for path in (source, link):
        assert cli.main(["check-data", str(source), "--delete_list", str(path)]) == 2
        assert "the source itself" in capsys.readouterr().err and source.read_text() == "one.png\n"
    for shard in (tmp_path, tmp_path / "dir.txt"):
        shard.mkdir(exist_ok=True)
        assert cli.main(["check-data", str(source), "--delete_list", str(shard)]) == 2


@pytest.mark.parametrize("name", ["IMG 000.JPG", "a.ppm", "s.tar", "w.pth"])
def test_no_image_is_overwritten_by_the_list(tmp_path, capsys, name):
    photograph(tmp_path / "one.png")
    (tmp_path / name).write_bytes(b"P3 1 1 255 0 0 0" if name == "a.ppm" else b"\xff\xd8\0\1")
    before = (tmp_path / name).read_bytes()
    assert cli.main(["check-data", str(tmp_path), "--delete_list", str(tmp_path / name)]) == 2
    assert "would be lost" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == before


def test_a_json_is_not_written_over_anything_else(tmp_path):
    for content, lost in ((b"", False), (b' {"a": 1}', False), (b"[1]", False), (b"x\n", True)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="not JSON") if lost else nullcontext():
            check_output("json", str(tmp_path / "x"))
        assert (tmp_path / "x").read_bytes() == content


def test_an_earlier_list_stays_until_the_end(tmp_path, monkeypatch):
    photograph(tmp_path / "data" / "one.png")
    listing = tmp_path / "bad.txt"
    listing.write_text("earlier\n")

    def interrupted(*args):
        assert listing.read_text() == "earlier\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(check_data, "report", interrupted)
    assert cli.main(["check-data", str(tmp_path / "data"), "--delete_list", str(listing)]) == 130
    assert listing.read_text() == "earlier\n" and not list(tmp_path.glob("*.tmp"))


def test_reasons_are_counted():
    bad = [(f"{i}.jpg", "empty file") for i in range(12)] + [("x.jpg", "text, not an image")]
    said = check_data.report(bad, 1000).splitlines()
    assert said[0] == "13 of 1,000 images do not decode:" and said[1] == "       12  empty file"
    assert said[12:] == [
        "           and 2 more",
        "        1  text, not an image",
        "           x.jpg",
    ]


def test_ctrl_c_ends_it(tmp_path):
    photograph(tmp_path / "one.png", (3000, 3000))
    (tmp_path / "list.txt").write_text("one.png\n" * 5000)
    command = [
        sys.executable,
        "-m",
        "dinofast",
        "check-data",
        str(tmp_path / "list.txt"),
        "--num_workers",
        "2",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while len(children.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said


@pytest.fixture
def deep(tmp_path):
    """Values of 12 bits in files of 16, and what a Mac and a person leave beside them."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        values = np.random.default_rng(i).integers(0, 4096, (20, 30)).astype("<u2")
        Image.frombytes("I;16", (30, 20), values.tobytes()).save(data / f"{i}.png")
        (data / f"._{i}.png").write_bytes(b"\0\5")
    (data / "notes.txt").touch()
    return data


def test_what_is_ignored_and_dark_is_told(deep, capsys):
    assert cli.main(["check-data", str(deep)]) == 0
    said = capsys.readouterr().out
    assert "7 files ignored: 6 hidden, 1 .txt\n" in said
    assert "warning: 6 of 6 images looked at come out nearly black: " in said
    assert "--value_range 0 4095" in said and said.endswith("all 6 images decode\n")
    assert cli.main(["check-data", str(deep), "--value_range", "0", "4095"]) == 0
    assert "nearly" not in capsys.readouterr().out
    assert cli.main(["check-data", str(deep), "--value_range", "5", "5"]) == 2
    assert "--value_range is 5 5: give two values" in capsys.readouterr().err


def test_a_run_tells_the_same(deep, tmp_path, capsys):
    from pretraining import SMALL

    command = ["pretrain", "--data_path", str(deep), "--output_dir", str(tmp_path / "run"), *SMALL]
    assert cli.main([*command, "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "7 files ignored: 6 hidden, 1 .txt\n" in said
    assert "warning: 6 of 6 images looked at" in said and "--value_range 0 4095" in said
