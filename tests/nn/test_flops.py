"""Operations of a step: those that torch counts in the official network, and what a device is said
to do in a second."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinofast.bench import baseline as official
from dinofast.config import Config
from dinofast.nn import flops
from dinofast.nn.backbones import build_backbone
from dinofast.nn.dino import Model

SMALL = dict(
    global_crops_size=32,
    local_crops_size=16,
    out_dim=50,
    head_hidden_dim=48,
    head_bottleneck_dim=24,
    batch_size_per_gpu=2,
)


@pytest.mark.parametrize(
    "options",
    [
        dict(arch="vit_nano", patch_size=4, local_crops_number=0, head_layers=1),
        dict(arch="vit_nano", patch_size=8, local_crops_number=3, head_layers=2),
        dict(arch="vit_tiny", patch_size=8, local_crops_number=1, head_layers=3),
    ],
    ids=str,
)
def test_what_torch_counts(options):
    """In the forward passes of the official teacher and student and the student's backward pass:
    the same number."""
    cfg = Config(**SMALL | options).check()
    model, images = Model.from_config(cfg), cfg.batch_size_per_gpu
    student, teacher = (
        official.MultiCrop(official.Backbone(net.backbone, sdpa=False), net.head)
        for net in (model.student, model.teacher)
    )
    crops = [
        torch.randn(images, 3, side, side)
        for n, side in ((2, 32), (cfg.local_crops_number, 16))
        for _ in range(n)
    ]
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            teacher(crops[:2])
        student(crops).sum().backward()
    assert counter.get_total_flops() == images * flops.flops_of(cfg, model.student.backbone) > 0


def test_the_published_setting():
    cfg = Config()  # ViT-S/16, 2 x 224 and 8 x 96, K = 65,536
    with torch.device("meta"):
        vit = build_backbone(cfg, 0.0)
    assert flops.flops_of(cfg, vit) / 1e9 == pytest.approx(113.4, abs=0.05)


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", None),
        ("NVIDIA L4", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_data_sheets(name, tera, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(flops, "_measured", lambda *_: 1234e12)
    measured = (1234e12, "1,234 TFLOP/s, measured on large bfloat16 products")
    assert flops.peak_flops(gpu, torch.bfloat16) == (
        measured if tera is None else (tera * 1e12, f"the data sheet's {tera} TFLOP/s")
    )
    assert flops.peak_flops(gpu, torch.float32) == (
        1234e12,
        "1,234 TFLOP/s, measured on large float32 products",
    )


def test_a_cpu_is_measured(monkeypatch):
    libraries = []
    # of six products each
    blas, onednn = [4.0, 2.0, 3.0, 2.0, 2.0, 2.0], [2.0, 2.0, 1.0, 2.0, 2.0, 2.0]
    seconds = iter([at for took in blas + onednn for at in (0.0, took)])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(flops, "linear", lambda a, b, bias, library: libraries.append(library))
    peak, whose = flops.peak_flops(torch.device("cpu"), torch.float32)
    # the fastest of all
    assert peak == 2 * 2048**3 / 1.0 and libraries == ["blas"] * 6 + ["onednn"] * 6
    assert whose == "0.0172 TFLOP/s, measured on large float32 products"
