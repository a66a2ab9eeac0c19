"""The measurement of the data path: counts what the loader gives, says what it costs, and leaves
nothing behind."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_loader import SMALL, spoil

from dinofast import cli
from dinofast.bench import data as bench_data
from dinofast.bench.data import Measured, measure, report, verdict
from dinofast.config import Config
from dinofast.data import backend_dali, backend_native
from dinofast.runtime.backends import cores

FLAGS = [
    word
    for name, value in SMALL.items()
    if name != "num_workers"
    for word in (f"--{name}", str(value))
]
MEASURED = Measured(
    "photos",
    1000,
    [],
    0.5,
    "native",
    "",
    2,
    64,
    10,
    4520,
    10.0,
    [440.0, 452.0, 470.0],
    4.4,
    {"read": 0.05, "decode": 2.0, "crops": 2.1},
)


@pytest.fixture(params=["pil", "native", "dali"])
def backend(request):
    reasons = {
        "native": backend_native.unavailable_reason(),
        "dali": backend_dali.unavailable_reason("cpu"),
    }
    if reason := reasons.get(request.param):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_measured(backend, workers, photographs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = []
    take = bench_data._take
    monkeypatch.setattr(bench_data, "_take", lambda loader, n: given.append(n) or take(loader, n))
    start = time.perf_counter()
    m = measure(
        Config(
            **SMALL | {"num_workers": workers}, data_path=str(photographs), data_backend=backend
        ),
        0.3,
    )
    took = time.perf_counter() - start
    assert (m.n_images, m.bad_files, m.backend, m.n_workers) == (
        48,
        [],
        backend,
        min(workers, cores()),
    )
    assert m.n_counted == sum(given[1:]) * SMALL["batch_size_per_gpu"] and 0.3 <= m.seconds < took
    assert 2 <= len(m.rates) <= 10 and min(m.rates) <= m.n_counted / m.seconds <= max(m.rates)
    stages = (
        ["read", "decode and cut", "color"] if backend == "dali" else ["read", "decode", "crops"]
    )
    assert list(m.stages_ms) == stages and all(ms >= 0 for ms in m.stages_ms.values())
    if os.path.isdir("/proc/self"):
        # the clock of workers ticks every 10 ms
        assert 0 < m.cpu_ms < cores() * 1e3 * m.seconds / m.n_counted * 1.5
    assert not list(tmp_path.iterdir())  # output_dir is the current folder
    assert not multiprocessing.active_children()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("dinofast-crops")
    ]


def test_the_command(backend, photographs, tmp_path, capsys):
    line = [
        "bench-data",
        str(photographs),
        "--seconds",
        "0.3",
        "--data_backend",
        backend,
        *FLAGS,
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert cli.main([*line, "--images_per_second", "1e9"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"source: '{photographs}', 48 images, listed in ")
    assert said[1].startswith(f"crops: {backend}, ")
    for at, pattern in (
        (2, r"speed: [\d,]+ images/s, median of \d+ interval"),
        (3, r"CPU time .*read [\d.]+ ms, decode( and cut)? [\d.]+ ms, (crops|color) [\d.]+ ms"),
        (
            -1,
            r"does not keep up: [\d,]+ of 1,000,000,000 images/s; "
            r"[\d,]+ cores of this kind would do",
        ),
    ):
        assert re.match(pattern, said[at]), said[at]
    assert not (tmp_path / "out").exists()
    assert cli.main([*line, "--images-per-second", "0.1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "keeps up with 0.1 images/s"


def test_the_verdict():
    assert verdict(MEASURED, None) == "enough for training at up to 452 images/s"
    assert verdict(MEASURED, 452) == "keeps up with 452 images/s"
    assert (
        verdict(MEASURED, 4000)
        == "does not keep up: 452 of 4,000 images/s; 18 cores of this kind would do"
    )
    unknown = replace(MEASURED, cpu_ms=None)  # then by the stages
    assert (
        verdict(unknown, 40000)
        == "does not keep up: 452 of 40,000 images/s; 166 cores of this kind would do"
    )
    waits = replace(MEASURED, cpu_ms=0.1)
    assert "1 core would do, so the files come too slowly" in verdict(waits, 4000)
    assert "all in all" in report(MEASURED, None) and "all in all" not in report(unknown, None)


def test_images_that_do_not_decode_are_named_and_left_out(backend, tmp_path):
    from test_dataset import photograph

    for i in range(6):
        photograph(tmp_path / "data" / f"{i}.png", seed=i)
    for i in (0, 5):
        spoil(tmp_path / "data" / f"{i}.png")
    m = measure(Config(**SMALL, data_path=str(tmp_path / "data"), data_backend=backend), 0.1)
    assert {Path(path).name for path, _ in m.bad_files} == {"0.png", "5.png"} and sum(
        m.stages_ms.values()
    ) > 0
    assert "2 bad files replaced or left out" in report(m, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seconds", "0"], "--seconds is 0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--images_per_second", "-3"], "--images_per_second is -3"),
        (["--batch_size_per_gpu", "49"], "has 48 images but"),
        (["--num_workers", "-1"], "--num_workers is -1"),
        (["--second", "3"], "Did you mean --seconds?"),
    ],
)
def test_what_cannot_be_is_said(photographs, more, message, capsys):
    assert cli.main(["bench-data", str(photographs), *FLAGS, *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_missing_folder_is_said(tmp_path, capsys):
    assert cli.main(["bench-data", str(tmp_path / "none"), *FLAGS]) == 2
    assert "none' does not exist: give a folder" in capsys.readouterr().err


def test_ctrl_c_ends_it(backend, photographs, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dinofast",
            "bench-data",
            str(photographs),
            "--seconds",
            "60",
            "--data_backend",
            backend,
            *FLAGS,
            "--num_workers",
            "2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)},
    )
    deadline = time.monotonic() + 30
    # the measurement has begun
    while not list(tmp_path.glob("dinofast-*/")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=30)
    assert (
        process.returncode == 130
        and said == "dinofast: ended at once; what was last saved stands.\n"
    ), said
    assert not list(tmp_path.glob("dinofast-*"))
