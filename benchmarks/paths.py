"""Second paths to the same result, each timed against the plain one: what they gain is why they are
there.

    python benchmarks/paths.py --threads 1 --save-results    all; kept in benchmarks/results
    python benchmarks/paths.py memory chunks                       some of them

The clock is the processor time of the process, so that what else runs on the machine counts little.
Of the step the memory case has three blocks instead of twelve, which take turns in the same memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from dinofast import ops
from dinofast.bench import record
from dinofast.bench.inputs import loss_inputs
from dinofast.bench.step import Synthetic, schedule_of
from dinofast.bench.timing import Turns, row_of
from dinofast.config import Config
from dinofast.nn.dino import Model
from dinofast.nn.vit import VisionTransformer
from dinofast.ops import _dino_loss
from dinofast.runtime.distributed import Process
from dinofast.runtime.memory import retain_freed_memory
from dinofast.step import Step

Times = tuple[list[float], list[float]]  # milliseconds with a path, and without it
Without = Callable[[], AbstractContextManager[None]]
CPU, PROTOTYPES, CROPS = torch.device("cpu"), 65536, 10
WARM_UP = 2  # steps of each process that do not count


def used_ms() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return (use.ru_utime + use.ru_stime) * 1e3


def in_turns(call: Callable[[int], object], without: Without, rounds: int, warm_up: int) -> Times:
    """Times of call(round), first as it is and then without a path, the next time the other way
    round."""
    times: Times = [], []
    for i in range(-warm_up, rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            with without() if which else nullcontext():
                start = used_ms()
                call(i)
                if i >= 0:
                    times[which].append(used_ms() - start)
    return times


# ---- the step
def step_of(images: int, blocks: int) -> Callable[[int], object]:
    """An optimizer step of ViT-S/16, cut to so many blocks, on random crops."""
    cfg = Config(
        arch="vit_small",
        batch_size_per_gpu=images,
        freeze_last_layer=0,
        data_path="none",
        output_dir="none",
    )

    def backbone() -> VisionTransformer:
        return VisionTransformer(
            embed_dim=384, num_heads=6, depth=blocks, drop_path_rate=cfg.drop_path_rate
        )

    step = Step(cfg, Model.from_config(cfg, backbone), Process(0, 1, CPU), schedule_of(cfg, CPU))
    crops = Synthetic(cfg, CPU, torch.float32)
    return lambda i: step(max(i, 0), crops)


def memory(rounds: int) -> Times:
    """In two processes, as malloc's settings are a process's."""
    command = (sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--answer")
    children = {
        how: subprocess.Popen(
            (*command, how), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for how in ("kept", "usual")
    }

    def step_of_child(child: subprocess.Popen[str]) -> float:
        child.stdin.write("go\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    turns = Turns({how: partial(step_of_child, child) for how, child in children.items()}, catch=())
    turns.run(0.0, fewest=WARM_UP + rounds, most=WARM_UP + rounds)
    for child in children.values():
        child.communicate()
    return turns.results["kept"][WARM_UP:], turns.results["usual"][WARM_UP:]


def answer_with_steps(how: str) -> None:
    """A step for each line that comes in, and its milliseconds out."""
    with retain_freed_memory(CPU) if how == "kept" else nullcontext():
        step = step_of(images=16, blocks=3)
        for i, _ in enumerate(sys.stdin):
            start = used_ms()
            step(i)
            print(used_ms() - start, flush=True)


# ---- the loss, forward and backward
@contextmanager
def fresh_memory() -> Iterator[None]:
    with mock.patch.object(
        _dino_loss, "_empty", lambda shape, dtype: torch.empty(shape, dtype=dtype)
    ):
        yield


def gradient(rounds: int) -> Times:
    student, teacher, center = loss_inputs("peaked", CROPS, 32, PROTOTYPES)
    student.requires_grad_()
    return in_turns(
        lambda _: torch.autograd.grad(
            ops.dino_loss(student, teacher, center, 0.1, 0.04)[0], student
        ),
        fresh_memory,
        rounds,
        warm_up=3,
    )


@contextmanager
def stacking() -> Iterator[None]:
    with mock.patch.object(_dino_loss, "_lie_side_by_side", lambda pieces: False):
        yield


def chunks(rounds: int, images: int = 32) -> Times:
    """As DINOv2 calls it: local crops are chunks of a part of the head's output."""
    student, teacher, _ = loss_inputs("peaked", CROPS, images, PROTOTYPES)
    head, targets = student.flatten(0, 1).requires_grad_(), torch.softmax(teacher / 0.04, -1)

    def call(_: int) -> object:
        local, both = head.split([(CROPS - 2) * images, 2 * images])
        loss = ops.soft_cross_entropy(
            local.chunk(CROPS - 2), list(targets)
        ) + ops.soft_cross_entropy([both], [targets.flatten(0, 1)])
        return torch.autograd.grad(loss, head)

    with retain_freed_memory(CPU):  # or fresh memory would count most
        return in_turns(call, stacking, rounds, warm_up=3)


CASES: dict[str, tuple[str, int, Callable[[int], Times]]] = {  # name: what, rounds, how
    "memory": (
        "step of three blocks of ViT-S/16, 16 images: freed memory kept | given back",
        5,
        memory,
    ),
    "gradient": (
        "loss, B = 32: a gradient in memory of an earlier one | in fresh memory",
        21,
        gradient,
    ),
    "chunks": ("loss as DINOv2 calls it, B = 32: chunks viewed | stacked", 21, chunks),
    "fewer_chunks": (
        "loss as DINOv2 calls it, B = 8: chunks viewed | stacked",
        21,
        lambda rounds: chunks(rounds, 8),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--answer", choices=("kept", "usual"), help=argparse.SUPPRESS)
    parser.add_argument("--save-results", nargs="?", const=record.RESULTS, type=Path, metavar="DIR")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.answer:
        return answer_with_steps(args.answer)
    command = f"python benchmarks/paths.py --threads {args.threads} --save-results"
    result = record.environment("paths", CPU, command) | {"clock": "processor time", "cases": []}
    for name in args.cases or CASES:
        what, rounds, run = CASES[name]
        rows = [
            row_of(way, times) for way, times in zip(("with", "without"), run(rounds), strict=True)
        ]
        medians_ms = [row["median_ms"] for row in rows]
        result["cases"].append(
            {
                "case": what,
                "rounds": rounds,
                "rows": rows,
                "times_longer_without": medians_ms[1] / medians_ms[0],
            }
        )
        print(
            f"{what}: {medians_ms[0]:,.1f} | {medians_ms[1]:,.1f} ms of processor time", flush=True
        )
        if args.save_results:
            record.save(result, args.save_results)


if __name__ == "__main__":
    main()
