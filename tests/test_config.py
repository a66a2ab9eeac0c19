"""The options as a dataclass that people build in Python."""

import copy
import inspect
import pickle
from dataclasses import replace

import pytest

from dinofast import Config


@pytest.mark.parametrize(
    "name, meant",
    [
        ("batch_size", "batch_size_per_gpu"),  # by meaning, as on the command line
        ("learning_rate", "lr"),
        ("img_size", "global_crops_size"),
        ("momentum", "momentum_teacher"),
        ("epochss", "epochs"),  # by spelling
        ("patchsize", "patch_size"),
    ],
)
def test_an_unknown_option_names_the_one_that_was_meant(name, meant):
    for make in (Config, lambda **options: replace(Config(), **options)):
        with pytest.raises(TypeError, match=f"^Config has no option `{name}`.*mean {meant}"):
            make(**{name: 1})


def test_an_unknown_option_without_a_like_is_named():
    with pytest.raises(TypeError, match="^Config has no option `zebra`.$"):
        Config(zebra=1)


def test_it_is_still_a_dataclass():
    cfg = Config("vit_tiny", epochs=3)
    assert (cfg.arch, cfg.epochs) == ("vit_tiny", 3)
    assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == replace(cfg) == cfg
    assert list(inspect.signature(Config).parameters) == list(cfg.to_dict())
    assert Config("vit_tiny", preset="tiny") == Config(arch="vit_tiny", preset="tiny")
