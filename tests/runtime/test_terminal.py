"""Whatever becomes of what a run says, the run goes on."""

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest
from pretraining import SMALL, command, start

from dinofast.runtime import terminal

ROWS, COLUMNS = 24, 80


def epochs(out):
    return (out / "log.txt").read_text().count("train_loss")


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_streams_that_are_closed_or_full(redirection, photographs, tmp_path):
    line = command(photographs, tmp_path / "o")
    code = subprocess.run(["bash", "-c", f'"$@" {redirection}', "bash", *line], timeout=120)
    assert code.returncode == 0 and epochs(tmp_path / "o") == 3
    assert (tmp_path / "o" / "checkpoint.pth").exists()


def test_a_reader_that_goes_away(photographs, tmp_path):
    process = start(photographs, tmp_path / "o")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and epochs(tmp_path / "o") == 3


def test_a_name_that_the_encoding_lacks(photographs, tmp_path):
    """A file named in Latin-1, bad, on a strict UTF-8 stream, and on an ASCII one."""
    data = tmp_path / "data"
    data.mkdir()
    for i, image in enumerate(sorted(photographs.glob("*"))):
        (data / f"{i}{image.suffix}").write_bytes(image.read_bytes())
    (data / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    for encoding in ("utf-8:strict", "ascii:strict"):
        out = tmp_path / encoding[:4]
        done = subprocess.run(
            command(data, out, "--max_bad_files", "1"),
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert b"\\udce9" in done.stdout and epochs(out) == 3


def run_on_a_terminal(line, encoding="utf-8", resize=None):
    """Exit status, and what was written to a terminal of 80 columns."""
    pid, fd = pty.fork()
    if not pid:
        os.environ["PYTHONIOENCODING"] = encoding
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        os.execv(line[0], line)
    said = b""
    try:
        while block := os.read(fd, 65536):
            said += block
            if resize and b"step" in said:
                fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, resize, 0, 0))
                resize = None
    except OSError:
        pass
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def test_a_terminal_of_80_columns_in_latin_1(photographs, tmp_path):
    line = command(photographs, tmp_path, "--log_steps", "1")
    code, said = run_on_a_terminal(line, "latin-1")
    drawn = [part for part in said.split(b"\r\033[J") if part.startswith(b"epoch ")]
    assert code == 0 and epochs(tmp_path) == 3 and drawn
    for line in (part.partition(b"\r")[0] for part in drawn):
        assert len(line) < COLUMNS and b"[" in line and b"ETA" in line and b"loss" in line


def test_a_terminal_that_goes_away_ends_the_run_with_a_save(photographs, tmp_path):
    line = command(photographs, tmp_path, "--log_steps", "1", "--epochs", "5000")
    pid, fd = pty.fork()
    if not pid:
        os.execv(line[0], line)
    while b"ETA" not in os.read(fd, 65536):
        pass
    os.close(fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 128 + signal.SIGHUP and (tmp_path / "checkpoint.pth").exists()


def test_nothing_of_a_line_stays_when_the_terminal_gets_narrower(capsys, monkeypatch):
    """The cursor waits where the line begins: all of it is below, however it was wrapped."""
    monkeypatch.setattr(terminal.StatusLine, "columns", lambda self: 30)
    status = terminal.StatusLine()
    status.show("x" * 100)
    status.log("above")
    status.end()
    line = "\r\033[J" + "x" * 30 + "\r"
    assert capsys.readouterr().out == line + "\r\033[Jabove\n" + line + "\n"


class OnlyWrite:
    """As some programs put in place of a stream."""

    def write(self, text):
        pass


@pytest.mark.parametrize("stream", [None, "closed", OnlyWrite()])
def test_say_where_there_is_no_stream(monkeypatch, stream):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.say("anything")
    assert not terminal.is_terminal()


def test_a_thread_may_train(photographs, tmp_path):
    """Without signals, which are the main thread's; twice in a process."""
    from dinofast import train
    from dinofast.cli import options_of, parser
    from dinofast.config import Config

    given = vars(
        parser("pretrain").parse_args(
            ["pretrain", "--data_path", str(photographs), "--output_dir", str(tmp_path), *SMALL]
        )
    )
    del given["command"]
    cfg, paths = options_of(Config, given), []
    for backend in ("native", "pil"):
        from dataclasses import replace

        one = replace(cfg, data_backend=backend, output_dir=str(tmp_path / backend), epochs=1)
        thread = threading.Thread(target=lambda one=one: paths.append(train(one)))
        thread.start()
        thread.join(120)
    assert [run.path.name for run in paths] == ["native", "pil"]
