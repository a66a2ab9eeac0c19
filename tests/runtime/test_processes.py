"""Two gloo processes under torchrun against one with the same global batch."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from pretraining import assert_same_run, finish, start
from test_resume import wait_for

from dinofast import checkpoint

# Sums run in another order, so losses are held to 1e-4 relative and weights to 1e-4 absolute. SGD,
# because Adam's first steps turn the rounding of a gradient near zero into a whole step of the
# learning rate.
OPTIONS = ("--drop_path_rate", "0", "--optimizer", "sgd", "--lr", "0.5")


@pytest.fixture(scope="module")
def alone(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    finish(photographs, out, "--batch_size_per_gpu", "8", *OPTIONS)
    return out


@pytest.fixture(scope="module")
def together(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    said = finish(photographs, out, "--batch_size_per_gpu", "4", *OPTIONS, processes=2)
    assert said.count("images a step") == 1 and "2 processes" in said  # one of them speaks
    return out


def losses(out):
    return [json.loads(line)["train_loss"] for line in (out / "log.txt").read_text().splitlines()]


def test_same_trajectory_as_one_process(alone, together):
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    one, two = (checkpoint.read(out / "checkpoint.pth") for out in (alone, together))
    for part in ("student", "teacher", "dino_loss"):
        for name, value in one[part].items():
            torch.testing.assert_close(
                two[part][name], value, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert one["dino_loss"]["center"].any()


def test_a_run_may_change_its_number_of_processes(alone, photographs, tmp_path):
    """Stopped with two processes in the middle of an epoch, finished by one."""
    process = start(
        photographs,
        tmp_path,
        "--batch_size_per_gpu",
        "4",
        "--saveckp_steps",
        "1",
        "--log_steps",
        "1",
        *OPTIONS,
        processes=2,
    )
    wait_for(tmp_path / "checkpoint.pth", process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    step = checkpoint.read(tmp_path / "checkpoint.pth")["dinofast"]["step"]
    assert 0 < step <= 18, said
    finish(photographs, tmp_path, "--batch_size_per_gpu", "8", *OPTIONS)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-4)


def test_two_processes_repeat_bitwise(together, photographs, tmp_path):
    finish(photographs, tmp_path, "--batch_size_per_gpu", "4", *OPTIONS, processes=2)
    assert_same_run(together, tmp_path)


@pytest.mark.parametrize(
    ("ends", "failed"), [("", 0), ("raise KeyboardInterrupt", 0), ("raise RuntimeError", 1)]
)
def test_no_thread_outlives_the_process_group(tmp_path, ends, failed):
    """One of gloo's that dropped a tensor while Python ended would abort the process, after all was
    done."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import atexit, os, torch
        from dinofast.runtime import distributed

        def gloo():
            tasks = "/proc/self/task"
            names = [open(f"{{tasks}}/{{thread}}/comm").read() for thread in os.listdir(tasks)]
            return [name for name in names if "gloo" in name]

        atexit.register(lambda: print("left:", gloo()))  # the first to come is the last to go

        def train():
            with distributed.session("cpu", "file://{tmp_path}/meet"):
                model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
                model(torch.ones(1, 4)).sum().backward()
                cycle = [model]
                cycle.append(cycle)
                assert gloo()
                {ends or "pass"}

        try:
            train()
        except KeyboardInterrupt:
            pass
    """)
    )
    both = [
        subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    for process in both:
        said, complaint = process.communicate(timeout=120)
        assert process.returncode == failed and said == "left: []\n", said + complaint
