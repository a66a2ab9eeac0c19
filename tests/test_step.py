"""The optimizer step in all its ways: each reproduces the official eight steps, and none compiles
anew or waits."""

import itertools
import types

import golden
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trajectory import GOLDEN, GoldenLoader, golden_model

from dinofast import checkpoint, resume
from dinofast import step as step_module
from dinofast.bench.baseline import OfficialStep
from dinofast.config import Config
from dinofast.nn import onednn_linear as linear
from dinofast.nn.dino import Model
from dinofast.runtime.distributed import Process
from dinofast.schedule import Schedule
from dinofast.step import Step

pytestmark = pytest.mark.usefixtures("forget_graphs")

CPU = Process(0, 1, torch.device("cpu"))
SMALL = Config(
    arch="vit_nano",
    patch_size=4,
    out_dim=64,
    head_hidden_dim=32,
    head_bottleneck_dim=16,
    batch_size_per_gpu=4,
    local_crops_number=2,
    global_crops_size=16,
    local_crops_size=8,
    drop_path_rate=0.3,
    epochs=4,
    warmup_epochs=1,
    freeze_last_layer=0,
    device="cpu",
)


class Batches:
    """Random crops, other ones at each step."""

    def __init__(self, cfg, device="cpu"):
        self.generator, self.device = torch.Generator().manual_seed(1), device
        self.shapes = [
            (n * cfg.batch_size_per_gpu, 3, side, side)
            for n, side in (
                (2, cfg.global_crops_size),
                (cfg.local_crops_number, cfg.local_crops_size),
            )
        ]

    def __next__(self):
        return [
            torch.randn(shape, generator=self.generator).to(self.device) for shape in self.shapes
        ]


def small(process=CPU, **changes):
    cfg = Config(**{**SMALL.to_dict(), "device": process.device.type, **changes}).check()
    return Step(
        cfg, Model.from_config(cfg), process, Schedule(cfg, 100, 1, process.device)
    ), Batches(cfg, process.device)


def golden_step(process=CPU, **changes):
    cfg = Config(**{**GOLDEN.to_dict(), "device": process.device.type, **changes})
    return Step(cfg, golden_model(cfg), process, Schedule(cfg, 2, 1, process.device))


class OnDevice(GoldenLoader):
    def __init__(self, device):
        super().__init__()
        self.device = device

    def __next__(self):
        return [x.to(self.device) for x in super().__next__()]


def assert_official(step, model, device="cpu", tolerance=1e-5, center=None):
    loader, data = OnDevice(device), golden.load("train.npz")
    losses = [step(i, loader)["loss"].item() for i in range(8)]
    assert losses == pytest.approx([data[f"step{i}.loss"].item() for i in range(8)], rel=tolerance)
    for name in ("student", "teacher"):
        state = getattr(model, name).state_dict()
        for key, value in golden.load("train.npz", f"final.{name}.").items():
            torch.testing.assert_close(
                state[key].cpu(),
                value,
                rtol=0,
                atol=10 * tolerance,
                msg=lambda m, k=key: f"{k}: {m}",
            )
    torch.testing.assert_close(
        (model.dino_loss.center if center is None else center()).cpu(),
        data["final.center"],
        rtol=10 * tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "eager"},
        {"grad_checkpointing": True},
        {"compile": "on"},
        {"compile": "on", "grad_checkpointing": True},
        {"compile": "max-autotune"},
    ],
    ids=str,
)
def test_official_trajectory(changes):
    step = golden_step(**changes)
    assert ("not compiled" in step.how) == ("compile" not in changes)
    assert f"attention {changes.get('attention', 'sdpa')}" in step.how
    assert_official(step, step.model)


@pytest.mark.parametrize("changes", [{}, {"compile": "on"}], ids=str)
def test_official_trajectory_with_all_linear_layers_by_onednn(monkeypatch, changes):
    step = golden_step(linear="onednn", **changes)
    monkeypatch.setattr(linear, "WORTHWHILE", 0)
    # nothing goes to BLAS
    monkeypatch.setattr(linear, "F", types.SimpleNamespace(conv2d=torch.nn.functional.conv2d))
    # whose choice is BLAS
    for layer in (*step.model.student.head.mlp, *step.model.teacher.head.mlp):
        layer.library = "onednn"
    assert "large linear layers of the ViT by oneDNN" in step.how
    assert_official(step, step.model)


def test_the_official_loop_rewritten_has_the_official_trajectory():
    model = golden_model()
    step = OfficialStep(GOLDEN, model, CPU.device, Schedule(GOLDEN, 2, 1))
    assert_official(step, model, center=lambda: step.center)


class Reads(TorchDispatchMode):
    """Counts values that the host reads."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_official_loop_rewritten_waits_where_the_official_one_does():
    """For the loss, and with clipping twice for each gradient: its norm, and whether to scale
    it."""
    for clip_grad in (0.0, 3.0):
        cfg = Config(**{**SMALL.to_dict(), "clip_grad": clip_grad})
        model = Model.from_config(cfg)
        step, batches = OfficialStep(cfg, model, CPU.device, Schedule(cfg, 100, 1)), Batches(cfg)
        step.optimizer.step = lambda: None  # torch's own, which on a CPU reads its counters
        with Reads() as reads:
            step(0, batches)
        trained = sum(p.requires_grad for p in model.student.parameters())
        assert reads.n == 1 + (2 * trained if clip_grad else 0)


def gradients(step, model, batch, dtype, precision="fp32"):
    """Of one step, all in one tensor, float64 if `dtype` is."""
    model.to(dtype)
    if isinstance(step, Step):
        step.precision = precision
        step.copies.refresh()  # `model.to` has made other buffers
        step.forward_backward([x.to(dtype) for x in batch], torch.tensor(0.04))
        model.dino_loss.step()
    else:
        step.precision = precision
        step.optimizer.step = lambda: None
        step.cfg = Config(**{**step.cfg.to_dict(), "clip_grad": 0.0, "freeze_last_layer": 0})
        step(0, iter([[x.to(dtype) for x in batch]]))
    grad = torch.cat([p.grad.flatten() for p in model.student.parameters() if p.grad is not None])
    model.zero_grad()
    return grad


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("changes", [{}, {"grad_checkpointing": True}, {"accumulate": 2}], ids=str)
def test_copies_of_weights_are_what_autocast_would_cast(changes, precision):
    """To the last bit, also after a checkpoint's weights were loaded in between."""
    found = []
    for with_copies in (True, False):
        step, batches = small(precision=precision, **changes)
        networks = step.model.student, step.model.teacher
        if not with_copies:
            for module in (module for network in networks for module in network.modules()):
                for name in [name for name in module._buffers if name.endswith("_copy")]:
                    del module._buffers[name]
            step.copies._places.clear()
            step.copies.of.clear()
        # two blocks, patches, head
        assert len(step.copies.of) == (2 * (2 * (4 * 2 + 1) + 2 * 3) if with_copies else 0)
        losses = [step(i, batches)["loss"] for i in range(2)]
        for network in networks:
            network.load_state_dict(
                {name: value * 1.01 for name, value in network.state_dict().items()}
            )
        losses += [step(i, batches)["loss"] for i in range(2, 4)]
        assert all(torch.equal(p.to(copy.dtype), copy) for p, copy in step.copies.of.items())
        found.append(
            (torch.stack(losses), [p for network in networks for p in network.parameters()])
        )
    (losses, parameters), (cast_losses, cast_parameters) = found
    assert torch.equal(losses, cast_losses) and len(set(losses.tolist())) == 4
    assert all(
        torch.equal(ours, cast) for ours, cast in zip(parameters, cast_parameters, strict=True)
    )


def test_a_hook_that_writes_weights_after_the_optimizer_is_seen():
    step, batches = small(precision="bf16")
    parameters = list(step.model.student.parameters())
    step.optimizer.register_step_post_hook(lambda *_: [p.detach().add_(0.1) for p in parameters])
    for i in range(2):
        step(i, batches)
    assert any(not torch.equal(p.to(torch.bfloat16), copy) for p, copy in step.copies.of.items())
    step.copies.refresh()
    assert all(torch.equal(p.to(torch.bfloat16), copy) for p, copy in step.copies.of.items())


@pytest.mark.parametrize(
    "changes, most",
    [({}, 1.1), ({"compile": "on"}, 1.1), ({"residual_precision": "bf16"}, 1.3)],
    ids=str,
)
def test_bf16_is_as_close_to_the_exact_gradient_as_the_official_autocast(changes, most):
    """Over the eight official batches, as the rounding of one is a matter of luck: ours 1.0 %,
    theirs 1.1 % off; a residual stream in bf16 1.2 %."""
    loader, schedule, official = GoldenLoader(), Schedule(GOLDEN, 2, 1), golden_model()
    theirs = OfficialStep(GOLDEN, official, CPU.device, schedule)
    ours = golden_step(precision="bf16", **changes)
    off = torch.zeros(2, 8)
    for i in range(8):
        batch, exact_step = next(loader), golden_step()
        exact = gradients(exact_step, exact_step.model, batch, torch.float64)
        for row, step, model in ((0, ours, ours.model), (1, theirs, official)):
            off[row, i] = (
                gradients(step, model, batch, torch.float32, "bf16") - exact
            ).norm() / exact.norm()
            model.dino_loss.center.zero_()
        theirs.center.zero_()
    rms = off.square().mean(1).sqrt()
    assert 1e-3 < rms[0] < most * rms[1] < 0.05, off


def test_what_a_run_announces_of_its_step():
    assert small(linear="blas")[0].how == "attention sdpa, not compiled"
    assert small(linear="onednn", grad_checkpointing=True)[0].how == (
        "attention sdpa, large linear layers of the ViT by oneDNN, activations checkpointed, not "
        "compiled"
    )
    halves = {"precision": "bf16", "teacher_precision": "bf16", "residual_precision": "bf16"}
    assert (
        small(**halves)[0].how
        == "attention sdpa, the teacher in bf16, residual stream in bf16, not compiled"
    )
    tuned, _ = small(compile="max-autotune")
    assert tuned.how.endswith("compiled, max-autotune") and "many minutes" in tuned.notes[0]


def test_what_cannot_be_done_is_announced_or_refused(monkeypatch):
    step, _ = small(cuda_graph=True)
    assert step.graph is None and step.notes == ["`cuda_graph`: without it, as there is no GPU"]
    monkeypatch.setattr(
        step_module, "compiler_unavailable_reason", lambda device: "there is no compiler"
    )
    with pytest.raises(ValueError, match="`compile` on was asked for, but there is no compiler."):
        small(compile="on")
    with pytest.raises(
        ValueError,
        match="`linear` onednn was asked for, but it is for fp32 on a CPU, not bfloat16 on cpu",
    ):
        small(linear="onednn", precision="bf16")
    with pytest.raises(
        ValueError, match="`attention` varlen was asked for, but it needs bf16 or fp16 on a GPU"
    ):
        small(attention="varlen")
    for precision, flag in itertools.product(
        ("fp32", "fp16"), ("teacher_precision", "residual_precision")
    ):
        with pytest.raises(
            ValueError,
            match=f"`{flag}` bf16 goes with `precision` bf16, and this run computes in {precision}",
        ):
            small(precision=precision, **{flag: "bf16"})
    other = Config(**{**SMALL.to_dict(), "arch": "own"})

    def foreign(**changes):
        cfg = Config(**{**other.to_dict(), **changes})
        model = Model.from_config(
            cfg, lambda: torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        )
        return Step(cfg, model, CPU, Schedule(cfg, 100, 1))

    assert foreign().how == "not compiled"
    for flag, value in {
        "attention": "eager",
        "linear": "blas",
        "compile": "on",
        "grad_checkpointing": True,
        "residual_precision": "bf16",
    }.items():
        with pytest.raises(ValueError, match=f"`{flag}` .*for our ViTs, not for own"):
            foreign(**{"precision": "bf16", flag: value})


def test_batch_statistics_over_several_gpus_are_not_compiled(monkeypatch):
    """torch's SyncBatchNorm breaks a graph, and ours are whole ones."""
    monkeypatch.setattr(step_module, "compiler_unavailable_reason", lambda device: None)
    step, _ = small(use_bn_in_head=True)
    assert step._compile() == "not compiled" and not step.notes
    step.process = Process(0, 2, torch.device("cuda", 0))  # nothing is put there
    assert step._compile() == "not compiled"
    assert step.notes == [f"not compiled, and slower for it: {step_module._NOT_ONE_GRAPH}"]
    step.cfg = Config(**{**step.cfg.to_dict(), "compile": "on"})
    with pytest.raises(
        ValueError, match="`compile` on was asked for, but batch statistics over several GPUs"
    ):
        step._compile()


def test_a_bf16_teacher_follows_its_average_in_float32():
    step, batches = small(precision="bf16", teacher_precision="bf16")
    whole, same = small(precision="bf16")
    for i in range(5):
        rounded, exact = step(i, batches), whole(i, same)
    assert {p.dtype for p in step.model.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in step.model.student.parameters()} == {torch.float32}
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)
    students = dict(step.model.student.named_parameters())
    for name, p in step.model.teacher.named_parameters():
        master = step.optimizer._state_of(students[name])["teacher_master"]
        assert torch.equal(p, master.bfloat16()), name


def test_a_teacher_that_is_float32_again_goes_on_from_its_average(tmp_path):
    """And back in bf16 from where it then is, not from an average of long ago."""
    path = tmp_path / "checkpoint.pth"
    options = {
        "precision": "bf16",
        "norm_last_layer": False,
        "freeze_last_layer": 1,
        "momentum_teacher": 0.5,
        "lr": 1.0,
    }

    def resumed(before, **changes):
        checkpoint.save(
            path, before.model, before.optimizer, None, before.cfg, checkpoint.TrainState()
        )
        step, batches = small(**options, **changes)
        resume.restore(path, step.model, step.optimizer, None, step.cfg)
        return step, batches

    rounded, batches = small(**options, teacher_precision="bf16")
    for i in range(3):
        rounded(i, batches)
    exact, batches = resumed(rounded)
    students = rounded.model.student.parameters()
    for s, t in zip(students, exact.model.teacher.parameters(), strict=True):
        assert torch.equal(t, rounded.optimizer._state_of(s)["teacher_master"])
    for i in range(3, 20):
        exact(i, batches)
    assert (
        not any("teacher_master" in state for state in exact.optimizer.state.values())
        and not exact.optimizer._frozen_state
    )
    again, batches = resumed(exact, teacher_precision="bf16")
    again.optimizer.step(momentum=1.0)
    for a, b in zip(
        again.model.teacher.parameters(), exact.model.teacher.parameters(), strict=True
    ):
        assert torch.equal(a, b.bfloat16())


def test_checkpointing_keeps_less_for_backward():
    kept = {}
    for checkpointing in (False, True):
        step, batches = small(grad_checkpointing=checkpointing)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.nbytes), x)[1], lambda x: x
        ):
            step.model(next(batches), torch.tensor(0.04))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.75 * kept[False]


class Buffered(torch.nn.Module):
    """A backbone with something beside its weights."""

    def __init__(self, value):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)
        if isinstance(value, torch.nn.Parameter):
            self.mask = value
        else:
            self.register_buffer("mask", value)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


UNSENT = {
    "of torch.sparse_coo": lambda: torch.eye(4).to_sparse(),
    "of torch.sparse_csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "of torch.float8_e4m3fn": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "of torch.int16": lambda: torch.ones(4, dtype=torch.int16),
    "of torch.sparse_coo, ": lambda: torch.nn.Parameter(torch.eye(4).to_sparse(), False),
}


@pytest.mark.parametrize("words", UNSENT)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_sent_between_processes_is_named(words):
    """Before DistributedDataParallel, which would raise in torch's words."""
    model = Model.from_config(SMALL, lambda: Buffered(UNSENT[words]()))
    with pytest.raises(ValueError, match=f"'backbone.mask' is {words}.*train with one process"):
        step_module._distribute(model, Process(0, 2, torch.device("cpu")))
    assert step_module._distribute(model, CPU) is model


def test_a_buffer_that_repeats_its_numbers_is_not_sent():
    model = Model.from_config(SMALL, lambda: Buffered(torch.ones(4)))
    model.student.backbone.mask = torch.ones(1).expand(4)
    with pytest.raises(ValueError, match="'backbone.mask' is an expanded view"):
        step_module._check_broadcast(model)


@pytest.mark.parametrize(
    "value", [torch.ones(4, 3).t(), torch.ones(4) + 0j, torch.ones(2).bool(), torch.ones(1, 4)]
)
def test_other_buffers_are_sent(value):
    step_module._check_broadcast(Model.from_config(SMALL, lambda: Buffered(value)))
