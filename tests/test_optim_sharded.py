"""Parameters that are shared out over processes: FSDP2, FSDP1, ZeroRedundancyOptimizer."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dinofast import LARSEMA, SGDEMA, AdamWEMA, DINOLoss


def test_two_processes(tmp_path):
    """`two_processes` below."""
    env = os.environ | {"WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parent.parent)}
    both = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "meet")],
            env=env | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "as alone" in said, said


def two_processes(meet):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    # the center, when a script moves it itself
    loss, rows = DINOLoss(5, 2, 0.04, 0.04, 0, 1), torch.randn(2, 4, 5)
    dist.broadcast(rows, 0)
    loss.update_center(rows[rank])
    torch.testing.assert_close(loss.center, 0.1 * rows.mean((0, 1))[None])
    for kind in (AdamWEMA, SGDEMA):
        for mode in ("tensor", "global"):
            sharded_as_alone(kind, clip_grad=0.5, clip_mode=mode)
    print("as alone")


def sharded_as_alone(kind, **options):
    """A step on FSDP2's shards, clipped, is that on whole tensors; 3 rows go to 2 processes as 2
    and 1."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    pair = student, copy.deepcopy(student)
    whole, its_teacher = copy.deepcopy(pair)
    for module in pair:
        fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    options |= {"lr": 0.1, "teacher_momentum": 0.9}
    ours = kind(student.parameters(), student=pair[0], teacher=pair[1], **options)
    alone = kind(whole.parameters(), student=whole, teacher=its_teacher, **options)
    for step in range(3):
        for model, optimizer in ((student, ours), (whole, alone)):
            optimizer.zero_grad()
            model(torch.full((2, 4), step + 1.0)).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(ours.grad_norm, alone.grad_norm)
    for a, b in zip(pair, (whole, its_teacher), strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)
    student[0].weight.grad.to_local().fill_(float("nan") if dist.get_rank() == 0 else 1.0)
    ours.step()
    assert ours.skipped == 1  # on both, though one has a finite shard


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_parameters_are_not_clipped(group, use_orig_params):
    def wrap(module):
        return FullyShardedDataParallel(
            module, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )

    student, teacher = (wrap(nn.Linear(3, 2)) for _ in range(2))
    options = {"lr": 0.1, "student": student, "teacher": teacher, "teacher_momentum": 0.9}
    with pytest.raises(ValueError, match="clip_grad is 1.0 but FSDP1 .* use fully_shard"):
        AdamWEMA(student.parameters(), clip_grad=1.0, **options)
    with pytest.raises(ValueError, match="LARSEMA needs the norms of whole parameters"):
        LARSEMA(student.parameters(), **options)
    optimizer = AdamWEMA(student.parameters(), **options)
    before = [p.detach().clone() for p in teacher.parameters()]
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for old, p in zip(before, teacher.parameters(), strict=True):
        assert not torch.equal(old, p)


@pytest.mark.filterwarnings("ignore")
def test_one_side_sharded_and_lars(group):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    student = nn.Linear(3, 2)
    teacher = copy.deepcopy(student)
    fully_shard(student, mesh=mesh)
    with pytest.raises(ValueError, match="'weight' is not sharded alike"):
        AdamWEMA(student.parameters(), student=student, teacher=teacher)
    with pytest.raises(ValueError, match="LARSEMA needs the norms of whole parameters"):
        LARSEMA(student.parameters())


@pytest.mark.filterwarnings("ignore")
def test_zero_redundancy_optimizer(group):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    for options in (
        {"clip_grad": 1.0, "clip_mode": "global"},
        {"student": model, "teacher": plain},
    ):
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer gives each process a part"):
            ZeroRedundancyOptimizer(model.parameters(), AdamWEMA, lr=0.1, **options)
    zero = ZeroRedundancyOptimizer(model.parameters(), AdamWEMA, lr=0.1, clip_grad=0.5)
    alone = AdamWEMA(plain.parameters(), lr=0.1, clip_grad=0.5)
    for net, optimizer in ((model, zero), (plain, alone)):
        net(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


if __name__ == "__main__":
    two_processes(sys.argv[1])
