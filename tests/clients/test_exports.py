"""Our ViTs through torch's exporters: what they make gives what eager gives, for other numbers of
images and at sizes that interpolate the positions, also such as the exporter never saw."""

import shlex
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dinofast import DINOHead, MultiCropWrapper, cli, load_backbone
from dinofast.commands.pretrain import what_next
from dinofast.nn.vit import _resampled, vit_nano

BATCHES = (1, 3, 5)
SIZES = [(32, 32), (48, 40)]  # that of the learned positions, and another
# of a model whose sizes are left open: the official code resamples (35, 32) and not (32, 32)
OTHER_SIZES = [(48, 40), (32, 32), (64, 64), (35, 32), (16, 100)]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters deprecate parts of themselves
        yield


def backbone(**options):
    torch.manual_seed(0)
    return vit_nano(**options).eval()


class Method(nn.Module):
    """A method as a module, as people export it."""

    def __init__(self, vit, name, *args):
        super().__init__()
        self.vit, self.name, self.args = vit, name, args

    def forward(self, x):
        out = getattr(self.vit, self.name)(x, *self.args)
        return tuple(out) if isinstance(out, list) else out  # a trace warns of any list


def wrapper():
    vit = backbone()
    head = DINOHead(64, 32, hidden_dim=16, bottleneck_dim=8)
    return MultiCropWrapper(vit, head).eval()


MODULES = {
    "features": backbone,
    "get_intermediate_layers": lambda: Method(backbone(), "get_intermediate_layers", 2),
    "get_last_selfattention": lambda: Method(backbone(), "get_last_selfattention"),
    "backbone and head": wrapper,
}


def batch_of(exported, module, size, run, atol=1e-5, batches=BATCHES):
    """What `run` gives is what eager gives, for each number of images."""
    for n in batches:
        x = torch.randn(n, 3, *size)
        with torch.no_grad():
            wanted = module(x)
        wanted = as_list(wanted)
        given = run(exported, x)
        assert len(given) == len(wanted)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def as_list(out):
    return list(out) if isinstance(out, list | tuple) else [out]


def by_onnxruntime(path, x):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return [torch.from_numpy(y) for y in given]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_trace_at_another_batch(name, size):
    module = MODULES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, torch.randn(2, 3, *size))
    batch_of(traced, module, size, lambda t, x: as_list(t(x)))
    for other in OTHER_SIZES:
        batch_of(traced, module, other, lambda t, x: as_list(t(x)), batches=[3])


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(
    "name, size", [("features", SIZES[0]), *((name, SIZES[1]) for name in MODULES)]
)
def test_torch_export_with_a_dynamic_batch(name, size, strict):
    module, batch = MODULES[name](), torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch},)
    if name == "backbone and head":
        shapes = {"crops": {0: batch}}
    program = torch.export.export(
        module, (torch.randn(2, 3, *size),), dynamic_shapes=shapes, strict=strict
    )
    batch_of(program.module(), module, size, lambda m, x: as_list(m(x)))


@pytest.mark.parametrize(
    "name, size",
    [("features", SIZES[0]), *((n, SIZES[1]) for n in MODULES if n != "get_intermediate_layers")],
)
def test_onnx_with_a_dynamic_batch(name, size, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    module, batch = MODULES[name](), torch.export.Dim("batch", min=1, max=64)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        module,
        (torch.randn(2, 3, *size),),
        path,
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    batch_of(path, module, size, by_onnxruntime)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onnx_by_the_older_exporter(size, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    module, path = backbone(), str(tmp_path / "model.onnx")
    torch.onnx.export(
        module,
        (torch.randn(2, 3, *size),),
        path,
        dynamo=False,
        input_names=["images"],
        dynamic_axes={"images": {0: "batch"}},
    )
    batch_of(path, module, size, by_onnxruntime)


def open_shapes(name):
    dims = {0: ("batch", 1, 64), 2: ("height", 16, 256), 3: ("width", 16, 256)}
    shapes = {i: torch.export.Dim(n, min=a, max=b) for i, (n, a, b) in dims.items()}
    return {"crops": shapes} if name == "backbone and head" else (shapes,)


@pytest.mark.parametrize("name", MODULES)
def test_torch_export_with_dynamic_sizes(name):
    module = MODULES[name]()
    x = torch.randn(2, 3, 48, 40)
    program = torch.export.export(module, (x,), dynamic_shapes=open_shapes(name)).module()
    for size in OTHER_SIZES:
        batch_of(program, module, size, lambda m, x: as_list(m(x)), batches=[1, 3])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "older"])
def test_onnx_with_dynamic_sizes(dynamo, size, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    module, path = backbone(), str(tmp_path / "model.onnx")
    how = (
        {"dynamo": True, "dynamic_shapes": open_shapes("features"), "verbose": False}
        if dynamo
        else {
            "dynamo": False,
            "input_names": ["images"],
            "dynamic_axes": {"images": {0: "batch", 2: "height", 3: "width"}},
        }
    )
    torch.onnx.export(module, (torch.randn(2, 3, *size),), path, **how)
    for other in OTHER_SIZES:
        batch_of(path, module, other, by_onnxruntime, batches=[1, 3])


def test_a_loaded_backbone_with_drop_path_is_exported(tmp_path):
    """As saved of a run with stochastic depth; in eval mode nothing is dropped."""
    trained = backbone(drop_path_rate=0.3)
    torch.save({"teacher": trained.state_dict(), "args": {"arch": "vit_nano"}}, tmp_path / "c.pth")
    loaded = load_backbone(tmp_path / "c.pth")
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(loaded, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes)
    batch_of(program.module(), trained, (32, 32), lambda m, x: as_list(m(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_exported(dtype):
    module, x = backbone().to(dtype), torch.randn(2, 3, 48, 48, dtype=dtype)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes).module()
    x = torch.randn(5, 3, 48, 48, dtype=dtype)
    torch.testing.assert_close(program(x), module(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_trace_under_another_default_dtype(dtype):
    module, x = backbone().to(dtype), torch.randn(2, 3, 48, 40).to(dtype)
    torch.set_default_dtype(dtype)
    try:
        traced = torch.jit.trace(module, x, check_trace=False)
    finally:
        torch.set_default_dtype(torch.float32)
    atol = 0.01 if dtype is torch.float16 else 1e-5
    torch.testing.assert_close(traced(x), module(x), rtol=0, atol=atol)


def test_positions_under_autocast():
    """In fp32, as in eager: a matrix product would be in bf16, which is off by 0.01."""
    table, x = torch.randn(16, 8), torch.zeros(1, 3, 48, 40)
    patches = torch.zeros(1, 8, 6, 5)
    wanted = _resampled(table, 4, x, patches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_resampled(table, 4, x, patches), wanted)


def test_scripting_is_refused_in_words():
    with pytest.raises(ValueError, match=r"use torch\.jit\.trace.*or torch\.export"):
        torch.jit.script(backbone())


def test_the_lines_that_end_a_run_export_it(tmp_path, monkeypatch):
    """`export it`, as it is printed."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    monkeypatch.chdir(tmp_path)
    vit = backbone(patch_size=16)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in vit.state_dict().items()}}, "x.pth")
    export = what_next(Path("x.pth"), tmp_path).splitlines()[2]
    program, *line = shlex.split(export.partition(": ")[2])
    assert program == "dinofast" and cli.main(line) == 0
    batch_of("x.onnx", vit, (32, 32), by_onnxruntime)
