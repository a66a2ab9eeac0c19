"""Loaders, their workers and threads: none outlives its parent, none is waited for without end."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import test_loader
from test_dataset import photograph
from test_loader import crop_threads

from dinofast.data import make_loader, threads

photographs, config = test_loader.photographs, test_loader.config


def test_a_loader_that_nobody_closes_does_not_end_the_process_badly(config):
    """Threads that come back from C++ while the interpreter ends would be killed, and the process
    with them."""
    code = (
        "from dinofast.config import Config\n"
        "from dinofast.data import make_loader\n"
        f"options = {config(num_workers=2, global_crops_size=512).to_dict()!r}\n"
        "loader = make_loader(Config(**options))\n"
        "next(loader)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_loaders_that_are_forgotten_leave_no_threads(config):
    for _ in range(3):
        next(make_loader(config(num_workers=2)))
    deadline = time.monotonic() + 20  # one that is working ends when it has done so
    while crop_threads() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not crop_threads()


def runs(pid):
    """Whether a process is alive. A zombie is not: in a container nobody may reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to see the processes")
def test_workers_answer_to_their_parent_alone(config, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from dinofast.config import Config\n"
        "from dinofast.data import make_loader\n"
        f"options = {config(num_workers=1, data_backend='pil').to_dict()!r}\n"
        "loader = make_loader(Config(**options))\n"
        "next(loader)\n"
        "print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 1
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(workers[0], number)
        time.sleep(0.3)
        assert runs(workers[0])
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while runs(workers[0]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(workers[0])


def test_close_does_not_wait_for_a_stuck_worker(config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    photograph(tmp_path / "data" / "only.png")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # whoever opens it waits for a writer
    monkeypatch.setattr("dinofast.data.dataset.read_file", lambda path: pipe.read_bytes())
    cfg = config(data_path=str(tmp_path / "data"), batch_size_per_gpu=1, num_workers=1)
    loader = make_loader(cfg)
    loader._start()
    if cfg.data_backend != "pil":
        monkeypatch.setattr(threads, "WAIT_S", 0.2)
    if cfg.data_backend == "dali":
        loader._batches._pool.submit(loader._batches._encoded, 0)
    elif cfg.data_backend == "native":
        loader._batches._ahead.append(
            loader._batches._pool.submit(loader._batches._begin, *next(loader._batches._indices))
        )
    else:
        assert len(multiprocessing.active_children()) == 1
    writer = None
    deadline = time.monotonic() + 10
    while writer is None and time.monotonic() < deadline:
        with suppress(OSError):  # as long as the worker has not opened it
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    assert writer is not None  # the worker reads, and will wait until the writer writes or closes
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 5 and not multiprocessing.active_children()
    pipe.unlink()  # or a second try would wait for a second writer
    os.close(writer)
