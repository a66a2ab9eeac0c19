"""Processes: who am I, and where do I compute."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.distributed as dist

from .words import counted, first_line


@dataclass(frozen=True)
class Process:
    """This process among `world` ones, and its device. `is_main` is the one that writes files and
    speaks."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {counted(torch.get_num_threads(), 'thread')}"

    def any(self, flag: bool) -> bool:
        """True on every rank where `flag` is true on any. Waits for the others."""
        if self.world == 1:
            return flag
        total = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return bool(total.item())

    def all_equal(self, number: int) -> bool:
        """Whether every rank has the same number. Waits for the others."""
        if self.world == 1:
            return True
        ends = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return bool(ends.sum().item() == 0)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (n, ...) of all ranks, in the order of the ranks, on each of them; n may differ,
        and what follows where n is 0. Waits for the others."""
        if self.world == 1:
            return rows
        about = torch.zeros(self.world, 8, dtype=torch.long, device=self.device)
        about[self.rank, : 1 + rows.ndim] = torch.tensor([rows.ndim, *rows.shape])
        dist.all_reduce(about)
        longest = int(about[:, 1].max())
        shape = next((x[2 : 1 + x[0]] for x in about.tolist() if x[1]), list(rows.shape[1:]))
        own = torch.zeros(longest, *shape, dtype=rows.dtype, device=self.device)
        if len(rows):
            own[: len(rows)] = rows
        all_rows = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(all_rows, own)
        return torch.cat([x[:n] for x, n in zip(all_rows, about[:, 1].tolist(), strict=True)])

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def pick_device(name: str | None) -> torch.device:
    """The device that "cuda", "cpu" or None (a GPU where there is one) means. Raises `ValueError`
    when cuda is absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "`device` cuda: torch sees no GPU here; use `device` cpu, or see what `dinofast "
            "doctor` says."
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def session(device: str | None = None, dist_url: str = "env://") -> Iterator[Process]:
    """Join the processes that torchrun started (one alone otherwise): nccl on GPUs, gloo on CPUs.
    In a process group of the caller's, those of the group; it stays the caller's.

    device: "cuda", "cpu" or None for a GPU where there is one. Raises `ValueError` when cuda is
    asked for and absent, or when the caller's group cannot work on it.
    """
    use_cuda = pick_device(device).type == "cuda"
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        world, rank = dist.get_world_size(), dist.get_rank()
        _check_backend(use_cuda)
        local = _number("LOCAL_RANK", rank % max(torch.cuda.device_count(), 1))
    else:
        world, rank, local = _number("WORLD_SIZE", 1), _number("RANK", 0), _number("LOCAL_RANK", 0)
        _check_environment(world, rank, dist_url)
    if use_cuda and not 0 <= local < torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine (LOCAL_RANK) finds only {torch.cuda.device_count()} "
            "GPU(s), counted from 0: start at most one a GPU."
        )
    where = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    started = world > 1 and not joined
    if started:
        # A thread of gloo that drops a tensor while Python ends aborts the process (pytorch issue
        # 190489): the group must not live that long. The functions of torch.distributed.nn, which
        # DDP imports, have the group of that moment as a default argument: none yet.
        import_module("torch.distributed.nn")
        atexit.register(_let_go)
        _meet("nccl" if use_cuda else "gloo", dist_url, rank, world)
    try:
        yield Process(rank, world, where)
    finally:
        if started:
            dist.destroy_process_group()


def local_world() -> int:
    """Processes on this machine; where no launcher says so, all of the group."""
    joined = dist.is_available() and dist.is_initialized()
    return max(1, _number("LOCAL_WORLD_SIZE", dist.get_world_size() if joined else 1))


def _number(variable: str, default: int) -> int:
    """A whole number of the environment; the default where it is not set, or empty."""
    text = os.environ.get(variable, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ValueError(
            f"{variable} is {text!r} in the environment: torchrun sets it to a number; unset it."
        ) from None


def _check_environment(world: int, rank: int, dist_url: str) -> None:
    """Raise `ValueError` unless the environment tells all that several processes need to meet."""
    if not 0 <= rank < world:
        of = f"of WORLD_SIZE {world}" if os.environ.get("WORLD_SIZE") else "and no WORLD_SIZE"
        raise ValueError(
            f"the environment says RANK {rank} {of}: ranks count from 0; start "
            "with torchrun, or unset both."
        )
    if world == 1:
        return
    needed = ["RANK"] + ["MASTER_ADDR", "MASTER_PORT"] * dist_url.startswith("env://")
    if missing := [name for name in needed if not os.environ.get(name, "").strip()]:
        raise ValueError(
            f"the environment says WORLD_SIZE {world} but has no {' and no '.join(missing)}: start "
            "with torchrun, which sets them all, or unset WORLD_SIZE for one process."
        )
    if "MASTER_PORT" in needed and not 0 <= _number("MASTER_PORT", 0) < 2**16:
        raise ValueError(
            f"MASTER_PORT is {os.environ['MASTER_PORT']} in the environment: ports end at 65535; "
            "start with torchrun, which finds one."
        )


def _meet(backend: str, dist_url: str, rank: int, world: int) -> None:
    """Raises `ValueError` if the processes do not find each other."""
    try:
        dist.init_process_group(backend, init_method=dist_url, rank=rank, world_size=world)
    except (RuntimeError, ValueError, OSError) as error:  # DistNetworkError and its like are such
        where = dist_url
        if dist_url.startswith("env://"):
            where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(
            f"process {rank} of {world} could not meet the others at {where} "
            f"({first_line(error)}): take another MASTER_PORT if that one is in use, or start with "
            "torchrun --standalone."
        ) from error


def _check_backend(use_cuda: bool) -> None:
    """Raise `ValueError` where the caller's group has no backend for the device."""
    device = "cuda" if use_cuda else "cpu"
    backends = dist.get_backend_config()
    if device not in backends:
        raise ValueError(
            f"the process group was made with the backend {backends} and this run computes on "
            f"{device}: make it with {'nccl' if use_cuda else 'gloo'}, or choose another `device`."
        )


def _let_go() -> None:
    """At exit: drop the models that a cycle or an uncaught error still holds, and with them their
    process group."""
    for name in ("last_exc", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    gc.collect()
