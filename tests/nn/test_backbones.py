"""Backbones that others make: tried at both sizes, copied for the teacher, refused in words."""

import os
import random
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from nets import CFG, SMALL, FixedSize, Net, trained
from PIL import Image
from torch import nn
from torch.nn.utils import parametrizations

from dinofast import vit_nano
from dinofast.checkpoint import load_backbone
from dinofast.config import Config
from dinofast.nn.dino import Model


def integers():
    return Net(codes=nn.Parameter(torch.arange(7), requires_grad=False))


def complexes():
    return Net(waves=nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False))


def frozen():
    net = Net()
    net.layers[0].requires_grad_(False)
    return net


def old_weight_norm():
    net = Net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.layers[0])
    return net


def lazy():
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(6)
    )


def with_classifier():
    vit = vit_nano()
    vit.classifier = nn.Linear(64, 10)
    return vit


MAKERS = {
    "parameters that take no part": lambda: Net(classifier=nn.Linear(8, 10)),
    "integers": integers,
    "complex": complexes,
    "float8": lambda: Net(
        scale=nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    ),
    "frozen": frozen,
    "all frozen": lambda: Net().requires_grad_(False),
    "a lock": lambda: Net(lock=threading.Lock()),
    "a generator": lambda: Net(generator=(i for i in range(3))),
    "weight_norm, which deepcopy refuses": old_weight_norm,
    "parametrized": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    ),
    "lazy": lazy,
    "our ViT": vit_nano,
    "our ViT with a classifier": with_classifier,
    "no parameters": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_trains(name):
    model = trained(MAKERS[name])
    student, teacher = model.student.state_dict(), model.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert {id(x) for x in student.values()}.isdisjoint(id(x) for x in teacher.values())
    for key, value in model.student.named_parameters():
        if not value.requires_grad:  # the teacher's never leaves it
            assert torch.equal(value.view(torch.uint8), teacher[key].view(torch.uint8)), key


def test_parameters_that_take_no_part_are_named_and_stay():
    def make():
        return Net(classifier=nn.Linear(8, 10))

    model = trained(make)
    assert not model.all_trained and len(model.notes) == 1
    assert "2 parameter(s) of Net in a trial: classifier.weight, classifier.bias;" in model.notes[0]
    torch.manual_seed(CFG.seed)
    start = make().classifier.weight
    for network in (model.student, model.teacher):
        assert torch.equal(network.backbone.classifier.weight, start)
    assert "classifier.weight" in Model.from_config(CFG, with_classifier).notes[0]
    assert Model.from_config(CFG, Net).all_trained and not Model.from_config(CFG, Net).notes


def test_weights_that_are_tied_stay_tied_in_both():
    def make():
        a, b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        b.weight = a.weight
        return nn.Sequential(a, nn.GELU(), b)

    model = trained(make)
    for network in (model.student, model.teacher):
        first, last = network.backbone[0].weight, network.backbone[2].weight
        assert first is last
    assert not torch.equal(model.student.backbone[0].weight, model.teacher.backbone[0].weight)


def test_the_trial_leaves_no_trace():
    class Random(Net):
        def __init__(self):
            super().__init__(dropout=nn.Dropout())
            self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.register_buffer("kept", torch.rand(3), persistent=False)

        def forward(self, x):
            random.random()
            self.seen = self.seen + 1
            return self.dropout(super().forward(x))

    random.seed(1)
    torch.manual_seed(CFG.seed)
    made = Random()
    after = torch.rand(3)
    python = random.getstate()
    states = []
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        build = Model.__init__

        def init(self, *args):
            torch.manual_seed(0)
            build(self, *args)

        patch.setattr(Model, "__init__", init)
        patch.setattr(
            "dinofast.nn.dino.DINOHead", lambda *_: states.append(torch.rand(3)) or nn.Identity()
        )
        model = Model.from_config(CFG, Random)
    # the head is drawn from where the backbone's own weights left the generator
    assert torch.equal(states[0], after) and random.getstate() == python
    for backbone in (model.student.backbone, model.teacher.backbone):
        assert backbone.seen == 0 and backbone.layers[1].num_batches_tracked == 0
        assert torch.equal(backbone.kept, made.kept) and backbone.training
        assert torch.equal(backbone.layers[0].weight, made.layers[0].weight)
        assert all(p.grad is None for p in backbone.parameters())
    assert not model.all_trained  # what draws may leave a layer out


def test_a_second_call_gives_what_the_first_had():
    """Also buffers that are not saved, where deepcopy cannot."""

    def make():
        net = Net(lock=threading.Lock())
        net.register_buffer("projection", torch.randn(4), persistent=False)
        return net

    model = Model.from_config(CFG, make)
    student, teacher = model.student.backbone, model.teacher.backbone
    assert student.projection is not teacher.projection
    assert torch.equal(student.projection, teacher.projection)


SCRIPT = """
import sys, torch
from torch import nn
from dinofast import Config
from dinofast.train import train
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, 10)  # takes no part
    def forward(self, x):
        x = self.first(x)
        return x if self.training and torch.rand(()) < 0.5 else self.second(x)  # at times
train(Config(**{options}), backbone=Net)
"""


def test_unused_parameters_train_in_two_processes(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 9, 99)).save(tmp_path / "images" / f"{i}.png")
    options = SMALL | {"data_path": "images", "output_dir": "o", "epochs": 3, "warmup_epochs": 0}
    options |= {"device": "cpu", "num_workers": 0}
    (tmp_path / "s.py").write_text(SCRIPT.replace("{options}", repr(options)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "s.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "classifier.weight, classifier.bias" in done.stdout
    assert "9 steps" in done.stdout


# ---- of packages, by stand-ins; the real ones are in tests/clients
def package(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name.partition(".")[0], types.ModuleType("package"))
    monkeypatch.setitem(sys.modules, name, module)


def test_timms_is_taken_where_torchvisions_does_not_fit(monkeypatch, tmp_path):
    def net(weights=None):
        model = FixedSize()
        model.fc = nn.Linear(1, 1)
        return model

    package(monkeypatch, "torchvision.models", net=net)
    package(monkeypatch, "timm", is_model=lambda n: n == "net", create_model=lambda n, **_: Net())
    cfg = Config(**SMALL, arch="net")
    model = Model.from_config(cfg)
    assert type(model.student.backbone) is Net and model.notes[0] == "net is timm's"
    # and again when its weights are read
    weights = model.teacher.backbone.state_dict()
    torch.save({"teacher": weights, "args": cfg.to_dict()}, tmp_path / "c.pth")
    assert type(load_backbone(tmp_path / "c.pth")) is Net
    package(monkeypatch, "timm", is_model=lambda name: False)
    with pytest.raises(ValueError, match="`arch` net of torchvision does not take crops of 8 x 8"):
        Model.from_config(cfg)


def test_what_torchvision_has_besides_models_is_no_arch(monkeypatch):
    package(
        monkeypatch, "torchvision.models", get_model=lambda name, **config: Net(), list_models=list
    )
    package(monkeypatch, "timm", is_model=lambda name: False)
    for name in ("get_model", "list_models", "__name__"):
        with pytest.raises(ValueError, match=f"'{name}' is not known"):
            Model.from_config(Config(**SMALL, arch=name))


def test_an_own_backbone_is_loaded_with_a_module_or_told(tmp_path, monkeypatch):
    package(monkeypatch, "torchvision.models")
    package(monkeypatch, "timm", is_model=lambda name: False)
    net = Net()
    torch.save({"teacher": net.state_dict(), "args": {"arch": "Net"}}, tmp_path / "c.pth")
    assert type(load_backbone(tmp_path / "c.pth", backbone=Net())) is Net
    with pytest.raises(ValueError, match=r"`arch` Net, .*load_backbone\(path, backbone=.*knn\("):
        load_backbone(tmp_path / "c.pth")


class Double(nn.Module):
    """Computes in another dtype than the head."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.to(dtype)

    def forward(self, x):
        return self.layers(x.to(self.layers[0].weight.dtype))


class Closure(nn.Module):
    """A copy's forward computes with the original's layers."""

    def __init__(self):
        super().__init__()
        self.layers = layers = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.AdaptiveAvgPool2d(1))
        self.forward = lambda x: layers(x).flatten(1)


def scripted():
    return torch.jit.script(Double(torch.float32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [Double, lambda: Double(torch.bfloat16), Closure, scripted],
    ids=["float64", "bfloat16", "closure", "scripted"],
)
def test_the_teacher_computes_with_its_own_weights(make):
    cfg = Config(global_crops_size=16, local_crops_size=8, local_crops_number=1, out_dim=8)
    model = Model.from_config(cfg, make)
    crops = [torch.rand(2, 3, 16, 16), torch.rand(1, 3, 8, 8)]
    model(crops, 0.04).total.backward()
    assert all(p.grad is not None for p in model.student.backbone.parameters())
    before = model.teacher(crops[:1])
    with torch.no_grad():
        for p in model.student.backbone.parameters():
            p.zero_()
    assert before.dtype == torch.float32 and torch.equal(model.teacher(crops[:1]), before)
