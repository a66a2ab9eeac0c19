import json
import random
import signal
import time

import pytest
from pretraining import assert_same_run, finish, start


@pytest.fixture(scope="module")
def unbroken(photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    finish(photographs, out, "--drop_path_rate", "0.3")
    return out


def wait_for(path, process, newer_than=0, seconds=60):
    """Until the file has been written (again)."""
    end = time.monotonic() + seconds
    while not path.exists() or path.stat().st_mtime_ns <= newer_than:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"'{path}' was not written:\n{process.communicate()[0]}")
        time.sleep(0.01)


def test_killed_at_random_moments_and_resumed(unbroken, photographs, tmp_path):
    """SIGKILL, three times, at moments that differ from test to test; the end is bitwise that of a
    run without any."""
    seed = random.randrange(10**6)
    print(f"moments drawn with seed {seed}")
    moments = random.Random(seed)
    options = ("--drop_path_rate", "0.3", "--saveckp_steps", "2")
    path, kills, written = tmp_path / "checkpoint.pth", 0, 0
    for _ in range(3):
        process = start(photographs, tmp_path, *options)
        wait_for(path, process, newer_than=written)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        written = path.stat().st_mtime_ns
    said = finish(photographs, tmp_path, *options)
    assert kills == 3 and "resumed from" in said
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_end_cleanly(signum, unbroken, photographs, tmp_path):
    process = start(photographs, tmp_path, "--drop_path_rate", "0.3", "--saveckp_steps", "1")
    wait_for(tmp_path / "checkpoint.pth", process)
    process.send_signal(signum)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum, said
    assert "stopped after step" in said and "Traceback" not in said
    finish(photographs, tmp_path, "--drop_path_rate", "0.3")
    assert_same_run(unbroken, tmp_path)


def test_a_run_in_bf16_goes_on_where_it_was(photographs, tmp_path):
    """Its copies of the weights are not saved: they are rounded anew from what is."""
    for out, stops in ((tmp_path / "unbroken", False), (tmp_path / "stopped", True)):
        options = ("--precision", "bf16", "--saveckp_steps", "1")
        if stops:
            process = start(photographs, out, *options)
            wait_for(out / "checkpoint.pth", process)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
        said = finish(photographs, out, *options)
        assert ("resumed from" in said) == stops
    assert_same_run(tmp_path / "unbroken", tmp_path / "stopped")


def test_a_finished_run_has_nothing_left_to_do(unbroken, photographs):
    before = (unbroken / "log.txt").read_bytes()
    said = finish(photographs, unbroken, "--drop_path_rate", "0.3")
    assert "training already complete" in said and (unbroken / "log.txt").read_bytes() == before


def test_changed_options_are_told(unbroken, photographs, tmp_path):
    (tmp_path / "checkpoint.pth").write_bytes((unbroken / "checkpoint.pth").read_bytes())
    said = finish(photographs, tmp_path, "--drop_path_rate", "0.3", "--lr", "0.2", "--epochs", "4")
    assert (
        "note: --lr was 0.1 and is now 0.2" in said and "note: --epochs was 3 and is now 4" in said
    )
    assert [
        json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()
    ] == [3]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda b: b[: len(b) // 2], "it is truncated at"),
        (lambda b: b"", "it is empty"),
        (lambda b: b"my precious notes", "it is a text"),
    ],
)
def test_a_file_that_is_no_checkpoint_stays_as_it_is(make, words, unbroken, photographs, tmp_path):
    content = make((unbroken / "checkpoint.pth").read_bytes())
    (tmp_path / "checkpoint.pth").write_bytes(content)
    process = start(photographs, tmp_path)
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and words in said
        and "left as it is" in said
        and "Traceback" not in said
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoint.pth"]


def test_a_numbered_checkpoint_alone_is_gone_on_from(unbroken, photographs, tmp_path):
    """Without a word it would be written over by a run from the start."""
    content = (unbroken / "checkpoint.pth").read_bytes()
    for name in ("checkpoint0002.pth", "checkpoint0001.pth", "checkpoint0000.pth.bak"):
        (tmp_path / name).write_bytes(content if "0002" in name else b"older")
    said = finish(photographs, tmp_path, "--drop_path_rate", "0.3")
    assert "'checkpoint0002.pth' beside it is taken instead" in said
    assert "training already complete" in said
    assert (tmp_path / "checkpoint.pth").read_bytes() == content
    assert (tmp_path / "checkpoint0001.pth").read_bytes() == b"older"


def test_a_link_is_read_and_what_it_points_to_is_kept(unbroken, photographs, tmp_path):
    content = (unbroken / "checkpoint.pth").read_bytes()
    (tmp_path / "best.pth").write_bytes(content)
    path = tmp_path / "checkpoint.pth"
    path.symlink_to("best.pth")
    said = finish(photographs, tmp_path, "--drop_path_rate", "0.3", "--epochs", "4")
    assert "is a link to 'best.pth': the next save takes the place of the link" in said
    assert "resumed from" in said and "to do: to the end of epoch 3, 12 steps; " in said
    assert not path.is_symlink()
    assert (tmp_path / "best.pth").read_bytes() == content != path.read_bytes()


def test_another_architecture_is_refused(unbroken, photographs, tmp_path):
    content = (unbroken / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(content)
    process = start(photographs, tmp_path, "--out_dim", "65")
    said, _ = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and "(64, 1) in the file and (65, 1) here" in said
        and "--out_dim 64" in said
    )
    assert (tmp_path / "checkpoint.pth").read_bytes() == content


def test_accumulation_equals_the_whole_batch(photographs, tmp_path):
    import torch

    from dinofast import checkpoint

    finish(photographs, tmp_path / "whole", "--drop_path_rate", "0", "--batch_size_per_gpu", "8")
    finish(
        photographs,
        tmp_path / "parts",
        "--drop_path_rate",
        "0",
        "--batch_size_per_gpu",
        "4",
        "--accumulate",
        "2",
    )
    whole, parts = (
        checkpoint.read(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts")
    )
    assert whole["dinofast"]["step"] == parts["dinofast"]["step"] == 18
    for name, value in whole["teacher"].items():
        torch.testing.assert_close(parts["teacher"][name], value, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        parts["dino_loss"]["center"], whole["dino_loss"]["center"], rtol=0, atol=2e-3
    )
