"""`train` inside other people's programs, and waits that a signal must end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from pretraining import SMALL, assert_same_run, command, finish
from test_resume import wait_for

from dinofast.runtime import distributed, idle_threads
from dinofast.runtime.torch_state import usual_state


def can_mount():
    test = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(test, capture_output=True).returncode
    )


def script(tmp_path, text):
    """A program that has `cfg(output_dir, **changes)`, and what it was told."""
    path = tmp_path / "program.py"
    path.write_text(
        textwrap.dedent("""\
        import sys
        from dataclasses import replace
        from dinofast import Config, cli, train
        def cfg(out, **changes):
            line = ["pretrain", sys.argv[1], "--output_dir", out, *sys.argv[3:]]
            given = vars(cli.parser("pretrain").parse_args(line))
            del given["command"]
            return replace(cli.options_of(Config, given), **changes)
        """)
        + textwrap.dedent(text)
    )
    return path


def run(path, data, out, *more, **environment):
    done = subprocess.run(
        [sys.executable, path, data, out, *SMALL, *more],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def alone(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    finish(photographs, out)
    return out


OWN_GROUP = """
import torch.distributed as dist, torch.multiprocessing as mp
def work(rank, meet):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    for out in ("own", "again"):
        path = train(cfg(f"{sys.argv[2]}/{out}", batch_size_per_gpu=2))
        print(f"process {rank} of {dist.get_world_size()}: {path}")
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(work, (f"{sys.argv[2]}/meet",), nprocs=2)
"""


def test_a_process_group_of_the_caller_s_is_joined_and_left_to_it(alone, photographs, tmp_path):
    code, said = run(script(tmp_path, OWN_GROUP), photographs, tmp_path)
    assert code == 0, said
    for rank in (0, 1):
        assert said.count(f"process {rank} of 2: {tmp_path}") == 2
    assert said.count("2 processes") == 2  # one of them speaks, once a run
    a, b = (
        torch.load(tmp_path / out / "checkpoint.pth", weights_only=True)["teacher"]
        for out in ("own", "again")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_twice_in_a_process(alone, photographs, tmp_path):
    text = "for out in 'ab': train(cfg(f'{sys.argv[2]}/{out}'))"
    code, said = run(script(tmp_path, text), photographs, tmp_path)
    assert code == 0, said
    for out in "ab":
        assert_same_run(alone, tmp_path / out)


MEETING = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    "world, words",
    [
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "1"}, "RANK 1 and no WORLD_SIZE: .* start with torchrun"),
        ({"WORLD_SIZE": "2"}, "no RANK and no MASTER_ADDR and no MASTER_PORT: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "has no MASTER_ADDR: start"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "has no MASTER_PORT: start"),
        ({**MEETING, "MASTER_PORT": "x"}, "MASTER_PORT is 'x' in the environment"),
        ({**MEETING, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000 .* torchrun"),
    ],
)
def test_an_environment_without_a_launcher(world, words, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    if words:
        with pytest.raises(ValueError, match=words):
            with distributed.session("cpu"):
                pass
    else:
        with distributed.session("cpu") as process:
            assert (process.rank, process.world, distributed.local_world()) == (0, 1, 1)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {**MEETING, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        words = rf"process 0 of 2 could not meet .* 127.0.0.1:{port} .*another MASTER_PORT"
        with pytest.raises(ValueError, match=words), distributed.session("cpu"):
            pass


def test_an_unknown_way_to_meet_is_named(monkeypatch):
    for name, value in MEETING.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="could not meet the others at nowhere://x"):
        with distributed.session("cpu", "nowhere://x"):
            pass


@pytest.mark.parametrize("local", ["2", "-1"])
def test_a_process_without_a_gpu_of_its_own_is_named(local, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=rf"process {local} .*finds only 2 GPU"):
        with distributed.session("cuda"):
            pass


def test_torch_s_idle_threads_are_kept_from_spinning_once(monkeypatch):
    started = []
    monkeypatch.setattr(idle_threads, "_sleeper", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(idle_threads, "_own_a_team", lambda ready: (started.append(1), ready.set()))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    idle_threads.let_idle_threads_sleep()
    idle_threads.let_idle_threads_sleep()
    assert started == [1]
    monkeypatch.setattr(idle_threads, "_sleeper", None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    idle_threads.let_idle_threads_sleep()
    assert started == [1]


HANGS = """
import os, threading
from dinofast.data import dataset
read, calls = dataset.ImageDataset.read, []
def hangs(self, i):
    calls.append(i)
    if len(calls) > 40:
        open(sys.argv[2] + "/hung", "w").close()
        threading.Event().wait()
    return read(self, i)
dataset.ImageDataset.read = hangs
if __name__ == "__main__":
    from dinofast.runtime import signals
    signals.GRACE_S = 1.0
    sys.exit(cli.main(["pretrain", sys.argv[1], "--output_dir", sys.argv[2], *sys.argv[3:]]))
"""


@pytest.mark.parametrize("signum, backend", [(signal.SIGTERM, "native"), (signal.SIGINT, "pil")])
def test_a_signal_ends_a_wait_for_a_batch_that_never_comes(
    signum, backend, alone, photographs, tmp_path
):
    """The storage hangs in the middle of an epoch; what was done is saved, and the same command
    goes on from there to the same end."""
    path = script(tmp_path, HANGS)
    process = subprocess.Popen(
        [sys.executable, path, photographs, tmp_path, *SMALL, "--data_backend", backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "hung", process)
    time.sleep(2)  # the batches that were there are used up
    process.send_signal(signum)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, said
    assert "stopped after step" in said and "Traceback" not in said
    finish(photographs, tmp_path)
    assert_same_run(alone, tmp_path)


def test_of_several_processes_too_after_a_while(photographs, tmp_path):
    path = script(tmp_path, HANGS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launch, path, photographs, tmp_path, *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "hung", process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "stopped after step" in said and (tmp_path / "checkpoint.pth").exists(), said
    # the one that waits for the other in a sum learns that it is gone; torchrun need not kill it
    assert "Unable to shutdown" not in said, said


def test_ctrl_c_under_torchrun_ends_with_our_sentence(photographs, tmp_path):
    """As a terminal sends it, to all processes at once; torchrun sends it to its children again."""
    process = subprocess.Popen(
        command(photographs, tmp_path, "--epochs", "5000", processes=2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "checkpoint.pth", process)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    last = said.strip().splitlines()[-1]
    assert last.startswith("stopped after step") and "the same command goes on" in last, said


@pytest.mark.skipif(not can_mount(), reason="may not mount a file system here")
@pytest.mark.parametrize("small, words", [("16m", "none starts"), ("1g", None)])
def test_a_small_shared_memory(small, words, photographs, tmp_path):
    """As in a container: 64 MiB there unless --shm-size is given."""
    line = command(photographs, tmp_path, "--data_backend", "pil", "--epochs", "1")
    line += ["--batch_size_per_gpu", "4", "--warmup_epochs", "0"]
    line += ["--global_crops_size", "512", "--local_crops_size", "256", "--patch_size", "64"]
    code = f'mount -t tmpfs -o size={small} tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", code, "bash", *line],
        capture_output=True,
        text=True,
        timeout=180,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert ("/dev/shm has" in said) == bool(words) and (words or "") in said


@pytest.mark.skipif(not can_mount(), reason="may not mount a file system here")
def test_a_shared_memory_that_gets_full_ends_the_wait(photographs, tmp_path):
    """What a worker cannot put there is an error of its batch, not a batch that never comes."""
    path = script(
        tmp_path,
        """
        from dinofast.data import loader
        loader.fewer_workers = lambda wanted, each: (wanted, None)
        if __name__ == "__main__":
            data, out, *more = sys.argv[1:]
            sys.exit(cli.main(["pretrain", data, "--output_dir", out, *more]))
        """,
    )
    more = [
        "--data_backend",
        "pil",
        "--global_crops_size",
        "512",
        "--local_crops_size",
        "256",
        "--patch_size",
        "64",
    ]
    code = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
    line = [sys.executable, path, photographs, tmp_path, *SMALL, *more]
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", code, "bash", *map(str, line)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "/dev/shm is full" in done.stderr and "lower --num_workers" in done.stderr


@pytest.mark.parametrize(
    "state",
    [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "device"],
)
def test_a_caller_s_state_of_torch_does_not_matter(state):
    torch.set_default_dtype(torch.float64)
    try:
        with state():
            with usual_state():
                layer = torch.nn.Linear(2, 2)
                layer(torch.ones(1, 2)).sum().backward()
            grads = torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.device.type == "cpu"
    assert grads == (state not in (torch.no_grad, torch.inference_mode))
