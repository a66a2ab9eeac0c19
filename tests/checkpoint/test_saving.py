"""What a run saves it can read, or it is refused before training."""

import argparse
import collections
import datetime
import enum
import io
import pathlib

import numpy as np
import pytest
import tiny
import torch
from tiny import TINY
from torch import nn

from dinofast import Config, checkpoint, load_backbone, resume


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.f(x).flatten(1)


def with_buffer(make):
    class Buffer(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("b", make())

    return Buffer


def with_extra(value):
    class Extra(Base):
        def get_extra_state(self):
            return value

        def set_extra_state(self, state):
            self.__dict__["came"] = state

    return Extra


class Tied(Base):
    def __init__(self):
        super().__init__()
        self.again = nn.Sequential(self.f[0])


class Renamed(Base):
    """A hook that renames a key on the way out, another on the way in."""

    def __init__(self):
        super().__init__()
        self._register_state_dict_hook(self.out)
        self.register_load_state_dict_pre_hook(self.back)

    @staticmethod
    def out(module, state, prefix, _):
        state[prefix + "kernel"] = state.pop(prefix + "f.0.weight")

    @staticmethod
    def back(module, state, prefix, *_):
        state[prefix + "f.0.weight"] = state.pop(prefix + "kernel")


class RenamedOneWay(Base):
    def __init__(self):
        super().__init__()
        self._register_state_dict_hook(Renamed.out)


class Module(Base):
    """Another module inside, of torch's quantization."""

    def __init__(self, make):
        super().__init__()
        self.inner = make()


class OnlyGet(Base):
    def get_extra_state(self):
        return 1


def parts(make, seed=0):
    torch.manual_seed(seed)
    return tiny.parts(TINY, make)


BUFFERS = {
    "causal mask": lambda: torch.full((4, 4), -torch.inf).triu(1),
    "mask in half": lambda: torch.full((4,), -torch.inf).half(),
    "nan": lambda: torch.full((2,), torch.nan),
    "complex": lambda: torch.ones(2, dtype=torch.cfloat) * 1j,
    "conjugated": lambda: (torch.ones(2, dtype=torch.cfloat) * 1j).conj(),
    "bool": lambda: torch.ones(2).bool(),
    "uint8": lambda: torch.ones(2).byte(),
    "uint16": lambda: torch.zeros(2, dtype=torch.uint16),
    "empty": lambda: torch.empty(0, 3),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "float8 e5m2": lambda: torch.full((2,), torch.inf).to(torch.float8_e5m2),
    "float8 e8m0": lambda: torch.ones(2).to(torch.float8_e8m0fnu),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    "per channel": lambda: torch.quantize_per_channel(
        torch.ones(3, 2), torch.ones(3), torch.zeros(3), 0, torch.qint8
    ),
    "large": lambda: torch.randn(5000),
    "view": lambda: torch.randn(5000)[::1000],
}
EXTRAS = {
    "None": None,
    "dict": {"version": 2},
    "keys": {1: 2, (1, 2): 3, None: 1, 0.5: b"x"},
    "tensor": torch.ones(3),
    "large": {"t": [torch.randn(5000)]},
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "datetime": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "path": pathlib.Path("x/y"),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "size": torch.Size([1, 2]),
    "number": np.float32(1.5),
    "text": np.str_("a"),
    "array": np.eye(2),
    "date": np.datetime64("2020-01-01"),
}
MODULES = {
    "observer": torch.ao.quantization.MinMaxObserver,
    "histogram": torch.ao.quantization.HistogramObserver,
    "fake quantize": torch.ao.quantization.FakeQuantize,
    "quantized linear": lambda: torch.ao.nn.quantized.Linear(4, 4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "lstm": lambda: nn.LSTM(2, 2),
}
KEPT = {
    **{f"buffer: {k}": with_buffer(v) for k, v in BUFFERS.items()},
    **{f"extra: {k}": with_extra(v) for k, v in EXTRAS.items()},
    **{f"module: {k}": lambda v=v: Module(v) for k, v in MODULES.items()},
    "tied": Tied,
    "renamed": Renamed,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.layout == b.layout
        if a.layout != torch.strided:
            a, b = a.to_dense(), b.to_dense()
        if a.is_quantized or a.itemsize == 1 and a.is_floating_point():
            a, b = a.dequantize() if a.is_quantized else a.float(), b
            b = b.dequantize() if b.is_quantized else b.float()
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            same(one, other)
    else:
        assert a == b and type(a) is type(b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", KEPT)
def test_it_is_saved_and_read(name, tmp_path):
    model, optimizer = parts(KEPT[name])
    before = {k: v for k, v in model.student.state_dict().items()}
    saver = checkpoint.Saver(tmp_path / "checkpoint.pth", model, optimizer, None, TINY, print)
    same(before, dict(model.student.state_dict()))  # the trial changes nothing
    saver(checkpoint.TrainState(step=3, epoch=1), keep=True)
    assert saver.failed is None
    fresh, other = parts(KEPT[name], seed=1)
    position, notes = resume.restore(saver.path, fresh, other, None, TINY)
    assert position.step == 3 and not notes
    same(dict(model.student.state_dict()), dict(fresh.student.state_dict()))
    loaded = load_backbone(saver.path, backbone=KEPT[name]())
    same(dict(model.teacher.backbone.state_dict()), dict(loaded.state_dict()))


class Kind(enum.Enum):
    A = 1


class Pair(collections.namedtuple("Pair", "a b")):
    pass


class Text(str):
    pass


ENDLESS = [1]
ENDLESS.append(ENDLESS)
REFUSED = {
    "endless": (with_extra({"a": ENDLESS}), "holds itself, or one of more levels"),
    "mkldnn": (with_extra(torch.ones(2, 2).to_mkldnn()), "a tensor of layout _mkldnn, which"),
    "enum": (with_extra({"kind": [1, Kind.A]}), r"_extra_state.kind.1' is a [\w.]*Kind, which"),
    "class": (with_extra(argparse.ArgumentParser()), "an? argparse.ArgumentParser, which"),
    "function": (with_extra({"f": lambda: 0}), "_extra_state.f' is a function"),
    "type": (with_extra([int]), "_extra_state.0' is a type"),
    "key": (with_extra({Kind.A: 1}), r"key <Kind.A: 1>' is a [\w.]*Kind"),
    "namedtuple": (with_extra(Pair(1, 2)), r"_extra_state' is a [\w.]*Pair"),
    "text": (with_extra(Text("a")), r"_extra_state' is a [\w.]*Text"),
    "objects": (with_extra(np.array([{}], object)), "a numpy.ndarray of object"),
    "generator": (with_extra(torch.Generator()), "a torch._C.Generator"),
    "storage": (with_extra(torch.ones(2).untyped_storage()), "torch.storage.UntypedStorage"),
    "meta in extra": (with_extra({"t": torch.ones(2, device="meta")}), "on the meta device"),
    "meta": (with_buffer(lambda: torch.ones(2, device="meta")), "'backbone.b' is on the meta dev"),
    "one way": (RenamedOneWay, "cannot be loaded into a copy of it .*f.0.weight"),
    "only get": (OnlyGet, "cannot be loaded into a copy of it .*_extra_state"),
    "jagged": (
        with_buffer(
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
        ),
        "backbone.b",  # in words that differ between versions of torch
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_training_by_name(name, tmp_path):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        checkpoint.Saver(tmp_path / "checkpoint.pth", *parts(make), None, TINY, print)


@pytest.mark.parametrize(
    "value, words",
    [
        (lambda: 0, "_extra_state' is a function"),
        ({"a": [1, Kind.A]}, r"_extra_state.a.1' is a [\w.]*Kind"),
        (Text("a"), r"_extra_state' is a [\w.]*Text"),
    ],
    ids=["function", "enum", "text"],
)
def test_what_training_made_of_it_is_named_when_it_cannot_be_saved(value, words, tmp_path):
    make = with_extra({})
    model, optimizer = parts(make)
    saver = checkpoint.Saver(tmp_path / "checkpoint.pth", model, optimizer, None, TINY, print)
    model.student.backbone.get_extra_state = lambda: value
    saver(checkpoint.TrainState())
    said = f"could not be saved: since training began '[\\w.]*{words}, which a checkpoint cannot"
    with pytest.raises(checkpoint.SaveFailed, match=said) as failed:
        saver.raise_failed()
    assert saver.must_end and ".tmp" not in str(failed.value) and not list(tmp_path.iterdir())


def test_a_buffer_that_became_infinite_is_read_and_told(tmp_path):
    make = with_buffer(lambda: torch.zeros(2))
    model, optimizer = parts(make)
    model.student.backbone.b.fill_(torch.inf)
    model.student.backbone.f[1].running_mean.fill_(torch.nan)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, model, optimizer, None, TINY, checkpoint.TrainState())
    _, notes = resume.restore(path, *parts(make), None, TINY)
    assert set(notes) == {
        f"'backbone.{name}' of the student holds numbers that are not finite"
        for name in ("b", "f.1.running_mean")
    }
    load_backbone(path, backbone=make())
    with pytest.raises(ValueError, match="not finite, in 'f.1.running_mean' of the backbone"):
        load_backbone(path, "student", backbone=make())


def test_the_first_save_is_read_back_and_only_that(tmp_path, monkeypatch):
    model, optimizer = parts(None)
    saver = checkpoint.Saver(tmp_path / "checkpoint.pth", model, optimizer, None, TINY, print)
    read, reads = checkpoint.saving.read, []

    def count(path, mmap):
        reads.append(path.name)
        return read(path, mmap)

    monkeypatch.setattr(checkpoint.saving, "read", count)
    for _ in range(3):
        saver(checkpoint.TrainState())
    assert reads == ["checkpoint.pth.tmp"] and saver.failed is None


def test_what_reads_back_otherwise_is_no_checkpoint(tmp_path, monkeypatch):
    """And no later save could be better: the run ends."""
    model, optimizer = parts(None)
    saver = checkpoint.Saver(tmp_path / "checkpoint.pth", model, optimizer, None, TINY, print)
    real = torch.save

    def half(state, file):
        if isinstance(file, io.BytesIO):  # what asks whether a state can be saved at all
            return real(state, file)
        real({**state, "teacher": {k: v[:1] for k, v in state["teacher"].items()}}, file)

    monkeypatch.setattr(torch, "save", half)
    saver(checkpoint.TrainState())
    assert saver.must_end and "'teacher' reads back as something else" in str(saver.failed)
    assert not list(tmp_path.iterdir())
    with pytest.raises(checkpoint.SaveFailed):
        saver.raise_failed()


def test_arguments_answer_both_ways(tmp_path):
    """Also for who reads the file without dinofast, safely or not."""
    model, optimizer = parts(None)
    path = tmp_path / "checkpoint.pth"
    checkpoint.save(path, model, optimizer, None, TINY, checkpoint.TrainState())
    for args in (
        torch.load(path, weights_only=True)["args"],
        torch.load(path, weights_only=False)["args"],
        torch.load(path, mmap=True)["args"],
        checkpoint.read(path)["args"],
        checkpoint.arguments(path),
    ):
        assert args["arch"] == args.arch == "vit_nano" and args.global_crops_scale == (0.4, 1.0)
        assert vars(args) == dict(args) == TINY.to_dict()
        assert argparse.Namespace(**args).patch_size == 4


class Arch(str, enum.Enum):
    NANO = "vit_nano"


@pytest.mark.parametrize(
    "name, given, kept",
    [
        ("arch", np.str_("vit_nano"), "vit_nano"),
        ("arch", np.random.choice(["vit_nano"]), "vit_nano"),
        ("arch", Arch.NANO, "vit_nano"),
        ("arch", Text("vit_nano"), "vit_nano"),
        ("data_path", np.array(["base"])[0], "base"),
        ("data_path", pathlib.PurePosixPath("a/b"), "a/b"),
        ("output_dir", pathlib.Path("a"), "a"),
        ("epochs", np.int64(30), 30),
        ("epochs", np.array(30), 30),
        ("epochs", torch.tensor(30), 30),
        ("lr", np.float32(0.5), 0.5),
        ("lr", np.float64(0.5), 0.5),
        ("lr", np.longdouble(0.5), 0.5),
        ("use_bn_in_head", np.bool_(True), True),
        ("global_crops_scale", np.array([0.25, 1.0]), (0.25, 1.0)),
        ("global_crops_scale", [np.float32(0.25), 1], (0.25, 1)),
        ("compile", True, "on"),
        ("compile", np.bool_(False), "off"),
    ],
)
def test_options_become_plain_values(name, given, kept):
    value = getattr(Config(**{name: given}).check(), name)
    assert value == kept and type(value) is type(kept)
    if isinstance(kept, tuple):
        assert [type(v) for v in value] == [type(v) for v in kept]
    assert Config(**{name: given}).to_dict()[name] == kept


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_nested_tensor_in_extra_state_is_saved_and_read(tmp_path):
    value = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    model, optimizer = parts(with_extra(value))
    saver = checkpoint.Saver(tmp_path / "checkpoint.pth", model, optimizer, None, TINY, print)
    saver(checkpoint.TrainState())
    fresh, other = parts(with_extra(value), seed=1)
    resume.restore(saver.path, fresh, other, None, TINY)
    for ours, back in zip(value, fresh.student.backbone.came, strict=True):
        assert torch.equal(ours, back)
