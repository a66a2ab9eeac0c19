"""Backbones that others make, which cannot train: refused in one sentence that tells why."""

import threading
import types

import pytest
import torch
from nets import CFG, SMALL, FixedSize, Net, trained
from torch import nn

from dinofast import vit_nano
from dinofast.config import Config
from dinofast.nn.dino import Model


class Collecting(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        self.seen = torch.cat((self.seen, torch.ones(len(x))))
        return super().forward(x)


class Remembering(Net):
    def forward(self, x):
        self.register_buffer("late", torch.ones(1))
        return super().forward(x)


class Growing(Net):
    def forward(self, x):
        self.fc = nn.Linear(8, 4)
        return self.fc(super().forward(x).mean((2, 3)))


class NoGradient(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class NotFinite(Net):
    def forward(self, x):
        return super().forward(x) / 0


class NeedsWidth(Net):
    def __init__(self, width):
        super().__init__()


class Returns(Net):
    """What `change` makes of a map (2, 8, h, w)."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


class Sparse(Net):
    def __init__(self, make=nn.Embedding, **extra):
        super().__init__(table=make(5, 8, sparse=True), **extra)

    def forward(self, x):
        numbers = torch.arange(len(x))
        rows = self.table(numbers if isinstance(self.table, nn.Embedding) else numbers[:, None])
        return super().forward(x).mean((2, 3)) + rows


class SparseWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(3).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.w, x.mean((2, 3)).T).T


class NeedsMask(Net):
    def forward(self, x, mask):
        return super().forward(x)


class Broken(Net):
    def forward(self, x):
        return self.absent(x)


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


class LateExtra(Net):
    seen = None

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state

    def forward(self, x):
        self.seen = threading.Lock()
        return super().forward(x)


class LazyAndUnused(Net):
    def __init__(self):
        super().__init__(late=nn.LazyLinear(3))


class PositionTable(Net):
    def __init__(self):
        super().__init__(table=nn.Embedding(36, 8))

    def forward(self, x):
        tokens = super().forward(x).flatten(2).transpose(1, 2)
        return tokens + self.table(torch.arange(tokens.shape[1]))


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


class Raising(Net):
    def forward(self, x):
        raise Unprintable


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


def observed():
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    return torch.ao.quantization.prepare_qat(net.train())


def inference():
    with torch.inference_mode():
        return Net()


SAME = Net(lock=threading.Lock())
REFUSED = {
    "local size": (
        FixedSize,
        r"backbone FixedSize does not take crops of 8 x 8 \(AssertionError: Wrong image height! "
        r"Expected 16\): set `local_crops_size` to 16 .*`local_crops_number` 0",
    ),
    "global size": (
        lambda: FixedSize(8),
        "does not take crops of 16 x 16 .*: set `global_crops_size` to one that fits",
    ),
    "our ViT, its patch": (
        lambda: vit_nano(patch_size=16),
        "images of 8 x 8 pixels hold no patch of 16 x 16",
    ),
    "width": (nn.Flatten, "returns 768 features for global crops and 192 for crops of 8 x 8"),
    "rows": (lambda: nn.Flatten(0, 2), r"returns 96 rows for 2 images of 16 x 16"),
    "not finite": (NotFinite, "not finite for 16 x 16"),
    "two outputs": (
        lambda: Net(forward=lambda x: {"a": x, "b": x}),
        r"a dict with a \(2, 3, 16, 16\), b",
    ),
    "no gradient": (NoGradient, "no gradient reaches its parameters"),
    "no width": (lambda: Net(forward=lambda x: x[:, :0].flatten(1)), "features of width 0"),
    "a buffer that grows": (Collecting, r"'seen' is \(0,\) before and \(4,\) after"),
    "a buffer made late": (Remembering, r"'late' is absent before and \(1,\) after"),
    "parameters made late": (Growing, r"its forward makes parameters \(fc.weight, fc.bias\)"),
    "complex": (
        lambda: Net(w=nn.Parameter(torch.ones(2, dtype=torch.complex32))),
        "parameter w is complex32.*requires_grad_",
    ),
    "meta": (lambda: Net().to("meta"), "parameter layers.0.weight is on the meta device"),
    "lazy at fault": (
        lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(3, 4)),
        "has lazy layers, and does not take an image of 16 x 16",
    ),
    "arguments": (NeedsWidth, r"called without arguments \(missing a required argument: 'width'"),
    **{
        f"returns {words}": (
            lambda change=change: Returns(change),
            rf"^backbone Returns returns {words}: expected features \(B, D\)",
        )
        for words, change in {
            r"a types.SimpleNamespace": lambda x: types.SimpleNamespace(hidden=x),
            "a tuple of str, str": lambda x: ("a", "b"),
            r"int64 of shape \(2, 8\)": lambda x: x.mean((2, 3)).long(),
            r"complex64 of shape \(2, 8, 14, 14\)": lambda x: torch.complex(x, x),
            r"float32 of shape \(1, 2, 8, 14, 14\)": lambda x: x[None],
            r"sparse float32 of shape \(2, 8\)": lambda x: x.mean((2, 3)).to_sparse(),
            "nested float32": lambda x: torch.nested.nested_tensor(list(x.flatten(2))),
            "None": lambda x: None,
        }.items()
    },
    "sparse gradient": (Sparse, "Sparse: parameter table.weight gets a sparse gradient.*=False"),
    "sparse bag": (lambda: Sparse(nn.EmbeddingBag), "table.weight gets a sparse gradient"),
    "sparse, not copied": (lambda: Sparse(lock=threading.Lock()), "gets a sparse gradient"),
    "sparse parameter": (SparseWeight, "parameter w is sparse_coo.*requires_grad_"),
    "another signature": (
        NeedsMask,
        r"forward fails on images, float32 of shape \(2, 3, 16, 16\) \(TypeError: .*'mask'\)",
    ),
    "a mistake": (Broken, "forward fails on images.*AttributeError: .*no attribute 'absent'"),
    "bf16": (lambda: Net().bfloat16(), "forward fails on images.*c10::BFloat16"),
    "gray": (lambda: nn.Conv2d(1, 8, 4), "forward fails on images.*1 channels, but got 3"),
    "in place": (InPlace, "changes the images it is given, which student and teacher share"),
    "ReLU in place": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 4)),
        "changes the images it is given",
    ),
    "late extra state": (LateExtra, "is a plain value before and a _thread.lock after"),
    "lazy and unused": (LazyAndUnused, r"never uses \(late.weight, late.bias\)"),
    "a table of positions": (PositionTable, "does not take crops of 16 x 16 .*index out of range"),
    "an error without words": (Raising, r"does not take crops of 16 x 16 \(Unprintable\)"),
    "backward": (
        lambda: Returns(NoBackward.apply),
        "its backward pass fails .*NotImplementedError: .*implement .*backward",
    ),
    "an observer that grows": (observed, r"fake_quant.* is \(.,\) before and \(8,\) after"),
    "inference mode": (inference, "is made under torch.inference_mode"),
    "no module": (lambda: torch.relu, "returns a builtin.*: expected a torch.nn.Module"),
    "no function": ("resnet18", "backbone is a str: give a function or class"),
    "the same each time": (
        lambda: SAME,
        r"cannot be copied \(TypeError: cannot pickle .*lock.*returns the same one",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_one_sentence(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as refusal:
        Model.from_config(CFG, make)
    assert "\n" not in str(refusal.value)


def test_a_size_that_no_crop_has_is_not_tried():
    Model.from_config(Config(**{**SMALL, "local_crops_number": 0}), FixedSize)


def test_batch_statistics_of_a_lone_crop_are_told_before():
    cfg = Config(**{**SMALL, "local_crops_number": 1, "batch_size_per_gpu": 1})
    with pytest.raises(ValueError, match="crops of 8 x 8 .*Expected more than 1 value per channel"):
        Model.from_config(
            cfg, lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
        )


@pytest.mark.parametrize(
    "make, words",
    [(FixedSize, "does not take crops of 8 x 8"), (Sparse, "gets a sparse gradient")],
)
def test_it_is_told_before_files_are_listed(make, words, tmp_path, monkeypatch):
    from dinofast import train

    monkeypatch.setattr(train, "make_loader", lambda *_, **__: pytest.fail("files were listed"))
    cfg = Config(**SMALL, data_path=str(tmp_path), output_dir=str(tmp_path / "o"), device="cpu")
    with pytest.raises(ValueError, match=words):
        train.train(cfg, backbone=make)
    assert not list(tmp_path.iterdir())


def test_extra_state_that_a_forward_pass_fills_trains():
    class Filled(LateExtra):
        def forward(self, x):
            self.seen = {"images": len(x)}
            return Net.forward(self, x)

    trained(Filled)


def test_the_last_line_of_torchscript_is_told():
    def make():
        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(768, 8)))

    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="8 x 8 .*768x8"):
        Model.from_config(CFG, make)
