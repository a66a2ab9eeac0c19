"""File systems that lack something, and disks that are full or read-only."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pretraining import assert_same_run, command, finish

from dinofast import checkpoint
from dinofast.checkpoint import SaveFailed, storage


def failing(code, when=lambda *_: True, otherwise=None):
    def call(*args, **options):
        if when(*args):
            raise OSError(code, os.strerror(code))
        return otherwise(*args, **options)

    return call


def write(path, content=b"new"):
    storage.write(path, lambda file: file.write(content), lambda path: None)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
def test_a_file_system_without_fsync(kind, code, tmp_path, monkeypatch):
    real = os.fsync
    refuses = failing(code, lambda fd: kind(os.fstat(fd).st_mode), real)
    monkeypatch.setattr(os, "fsync", refuses)
    write(tmp_path / "a")
    checkpoint.link(tmp_path / "a", tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_an_error_of_the_disk_at_fsync_counts(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK])
def test_a_file_system_without_hard_links(code, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(code))
    write(tmp_path / "a")
    checkpoint.link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new" and not (tmp_path / "b").samefile(tmp_path / "a")
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(code, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    with checkpoint.lock_output_dir(tmp_path):
        pass


def test_half_a_file_of_a_killed_run_is_removed(tmp_path):
    for name in ("checkpoint.pth.tmp", "checkpoint0003.pth.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with checkpoint.lock_output_dir(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "mine.tmp"]


def on_a_small_disk(folder: Path, size: str, *argv: str) -> subprocess.CompletedProcess:
    """Run a command where `folder` is a disk of this size, and nowhere else."""
    script = f'mount -t tmpfs -o size={size} tmpfs "{folder}" && exec "$@"'
    mounts = ["unshare", "-rm", "sh", "-c", script, "-", *argv]
    return subprocess.run(mounts, capture_output=True, text=True, timeout=120)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("unshare") or on_a_small_disk(folder, "1m", "true").returncode:
        pytest.skip("no mount namespaces here: a small disk cannot be made")
    return folder


@pytest.mark.parametrize("size", ["4k", "1m", "3m"])  # fails at the header, in a tensor, at the end
def test_a_full_disk_is_told_and_the_old_file_stays(size, small_disk):
    code = """if True:
        import os, sys, torch
        from pathlib import Path
        from dinofast.checkpoint import saving, storage
        path = Path(sys.argv[1], "checkpoint.pth")
        path.write_bytes(b"old")
        saving.contents = lambda *_: {"student": torch.randn(800_000)}
        try:
            saving.save(path, *[None] * 5)
        except storage.SaveFailed as error:
            print(error, error.may_pass, path.read_bytes(), os.listdir(path.parent))
    """
    done = on_a_small_disk(small_disk, size, sys.executable, "-c", code, str(small_disk))
    assert done.stdout == (
        f"'{small_disk}/checkpoint.pth' could not be saved (No space left on device, it takes about"
        " 3 MB beside the one before); 'checkpoint.pth' is still that of an earlier save. "
        "True b'old' ['checkpoint.pth']\n"
    ), done.stdout + done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_a_full_disk_trains_on_and_ends_with_an_error(processes, small_disk, photographs):
    """No process waits for ever, and the log of the screen goes on to the end."""
    argv = command(photographs, small_disk, processes=processes)
    done = on_a_small_disk(small_disk, "100k", *argv)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert said.count("warning: ") == 3 and "Training goes on, and saving is tried again" in said
    assert "dinofast: '" in said and "done:" not in said
    assert processes > 1 or "Traceback" not in said


def test_a_disk_that_is_full_for_a_while(photographs, tmp_path):
    """The second save of three finds room again; the end is that of a run without."""
    script = f"""if True:
        import errno, os, sys
        real, calls = os.replace, []
        def replace(a, b):
            if str(b).endswith(".pth"):
                calls.append(b)
                if len(calls) == 1:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            real(a, b)
        os.replace = replace
        from dinofast.cli import main
        sys.exit(main({command(photographs, tmp_path / "out")[3:]!r}))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("warning: ") == 1 and "Read-only file system" in done.stdout
    finish(photographs, tmp_path / "unbroken")
    assert_same_run(tmp_path / "out", tmp_path / "unbroken")


def test_without_room_for_a_copy_the_newest_is_kept(tmp_path, monkeypatch):
    """A numbered checkpoint on a disk without hard links: better one name than the older state."""
    saves = object.__new__(checkpoint.Saver)
    saves.path, said = tmp_path / "checkpoint.pth", []
    saves.log = said.append
    saves.path.write_bytes(b"old")
    numbered = tmp_path / "checkpoint0003.pth"
    numbered.write_bytes(b"new")
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(shutil, "copyfile", failing(errno.ENOSPC))
    saves._link(numbered)
    assert saves.path.read_bytes() == b"new" and os.listdir(tmp_path) == ["checkpoint.pth"]
    assert "'checkpoint0003.pth' could not be kept" in said[0] and "No space left" in said[0]


def test_what_cannot_pass_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.saving, "contents", lambda *_: {"a": lambda: 0})
    with pytest.raises(SaveFailed, match="could not be saved: .*'a' is a function") as caught:
        checkpoint.save(tmp_path / "checkpoint.pth", *[None] * 5)
    assert not caught.value.may_pass and not os.listdir(tmp_path)
