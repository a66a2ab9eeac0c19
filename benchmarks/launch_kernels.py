"""Launches every kernel once at awkward shapes: `compute-sanitizer --tool memcheck python
benchmarks/launch_kernels.py`.

Odd lengths, one row, strided rows, more chunks than one, every dtype: where an index can run over
the end. Few variants: each is compiled, and the sanitizer is slow.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from dinofast import ops
from dinofast.bench.inputs import loss_inputs
from dinofast.bench.record import choose_device
from dinofast.config import Config
from dinofast.data import augmentation
from dinofast.data.loader import views

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSS_SHAPES = ((2, 1, 1), (3, 2, 1001), (10, 3, 8193))  # (V, B, K)
TENSOR_SHAPES = ((1,), (3, 5), (1023,), (7, 11, 13), (65537,))


def dino_loss(device: torch.device) -> int:
    """Loss and gradient, contiguous and with a gap after each row, the loss alone, of
    probabilities; the number of calls."""
    calls = 0
    for dtype in DTYPES:
        for shape in LOSS_SHAPES if dtype != torch.float16 else LOSS_SHAPES[-1:]:
            student, teacher, center = (
                x.to(device) for x in loss_inputs("peaked", *shape, dtype=dtype)
            )
            for gap in (0, 3):
                wide = torch.cat(
                    [student, student[..., :1].expand(-1, -1, gap)], -1
                ).requires_grad_()
                loss = ops.dino_loss(wide[..., : shape[2]], teacher, center, 0.1, 0.04)[0]
                loss.backward()
                assert loss.isfinite() and wide.grad.isfinite().all()
                calls += 1
        assert ops.dino_loss(student, teacher, center, 0.1, 0.04)[0].isfinite()
        for crops, diagonal in ((1, True), (2, False)):
            targets = torch.softmax(teacher[:crops].float() / 0.04, -1)
            loss = ops.soft_cross_entropy(student.requires_grad_(), targets, diagonal=diagonal)
            loss.backward()
            assert loss.isfinite() and student.grad.isfinite().all()
        calls += 3
    return calls


def adamw_ema(device: torch.device) -> int:
    """Norms, optimizer's step and average of lists of tensors; some without a teacher; skipped and
    not."""

    def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.rand(shape, generator=generator).to(device, dtype) for shape in TENSOR_SHAPES]

    generator, calls = torch.Generator().manual_seed(0), 0
    for dtype in DTYPES:
        grads, teachers = tensors(dtype), tensors()
        assert ops.grad_norms(grads).isfinite().all()
        steps = [torch.zeros((), device=device) for _ in grads]
        factors = torch.ones(len(grads), device=device)
        for skip in (False, True):
            params, moments, squares = tensors(), tensors(), tensors()
            ops.adamw_ema_(
                params,
                grads,
                moments,
                squares,
                steps,
                [*teachers[:-1], None],
                factors,
                torch.tensor(skip, device=device),
                lr=1e-3,
                weight_decay=0.04,
                betas=(0.9, 0.999),
                eps=1e-8,
                momentum=0.99,
            )
            assert all(p.isfinite().all() for p in params)
            calls += 1
        ops.ema_(teachers, grads, 0.99)
        assert all(t.isfinite().all() for t in teachers)
        calls += 2
    return calls


def color(device: torch.device) -> int:
    """Crops of one pixel, of less than a block and of several; some blurred, none blurred."""
    table = torch.rand(3, 256).to(device)
    for dtype, side in ((torch.float32, 1), (torch.float32, 7), (torch.bfloat16, 97)):
        crops = [
            torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8).to(device)
            for _ in range(2)
        ]
        drawn = augmentation.draw(0, 0, np.arange(3), views(Config())).views[:, :2].T.copy()
        assert ops.color(crops, drawn, table, dtype).isfinite().all()
        drawn["blur_radius"] = 0
        assert ops.color(crops, drawn, table, dtype).isfinite().all()
    return 6


def normalize(device: torch.device) -> int:
    """Planes and interleaved pixels: of one pixel, of less than a block and of several."""
    for dtype in (torch.float32, torch.bfloat16):
        table = torch.rand(3, 256).to(device, dtype)
        for side in (1, 7, 97):
            crops = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8).to(device)
            for same in (crops, crops.contiguous(memory_format=torch.channels_last)):
                assert ops.normalize(same, table).isfinite().all()
    return 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    device = choose_device(parser.parse_args().device)
    paths = {op: by_device[device.type] for op, by_device in ops.paths().items()}
    calls = sum(
        globals()[file](device)
        for file in sorted({operation.file for operation in ops.OPERATIONS.values()})
    )
    print(f"{calls} calls on {device}: {paths}")
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
