"""config.yaml: what is written is read, and changes on resuming are listed."""

from dataclasses import replace

import pytest
import yaml

from dinofast import config_file
from dinofast.config import Config
from dinofast.presets import PRESETS


def test_what_is_written_is_read(tmp_path):
    cfg = Config(lr=1e-7, global_crops_scale=(0.14, 1), eval_every=3, arch="resnet50", wandb="no")
    config_file.record(tmp_path, cfg, 0)
    again = Config(config=str(tmp_path / "config.yaml"))
    assert replace(again, config=None) == cfg


def test_words_of_yaml_become_what_options_take(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("min-lr: 1e-6\nlocal_crops_scale: [5e-2, 0.4]\nuse_fp16: no\nseed: 3\n")
    cfg = Config(config=str(path)).check()
    assert (cfg.min_lr, cfg.local_crops_scale, cfg.seed) == (1e-6, (0.05, 0.4), 3)
    assert cfg.use_fp16 is False
    assert Config(config=str(path), seed=5).seed == 5


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rate: 1", "has `learning_rate`, which is no option. Did you mean lr?"),
        ("- 1", "is no list of options"),
        ("lr: [", "cannot be read"),
        ("config: other.yaml", "has `config`, which is no option"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="c.yaml") as caught:
        Config(config=str(tmp_path / "c.yaml"))
    assert words in str(caught.value)


def test_yaml_runs_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text(f"arch: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(ValueError, match="cannot be read"):
        Config(config=str(tmp_path / "c.yaml"))
    assert not (tmp_path / "made").exists()


def test_changes_on_resuming_are_listed_with_their_step(tmp_path):
    first = Config(lr=0.1)
    assert config_file.record(tmp_path, first, 0) == []
    assert config_file.record(tmp_path, first, 7) == []
    assert config_file.changes_in(tmp_path) == []
    second = replace(first, lr=0.2, num_workers=3)
    found = config_file.record(tmp_path, second, 7)
    assert found == [
        {"step": 7, "option": "lr", "from": 0.1, "to": 0.2},
        {"step": 7, "option": "num_workers", "from": 10, "to": 3},
    ]
    config_file.record(tmp_path, first, 9)
    assert [c["step"] for c in config_file.changes_in(tmp_path)] == [7, 7, 9, 9]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 0.1
    config_file.record(tmp_path, first, 0)  # a new run in the folder
    assert config_file.changes_in(tmp_path) == []


def test_presets_are_below_files_and_both_below_what_is_given(tmp_path):
    name, value = next(iter(PRESETS["tiny"].items()))
    assert getattr(Config(preset="tiny"), name) == value != getattr(Config(), name)
    assert getattr(Config(**{"preset": "tiny", name: getattr(Config(), name)}), name) != value
    (tmp_path / "c.yaml").write_text("preset: tiny\nlr: 0.125\n")
    cfg = Config(config=str(tmp_path / "c.yaml"))
    assert cfg.lr == 0.125 and getattr(cfg, name) == value
    assert replace(cfg, lr=0.5) == replace(Config(preset="tiny"), lr=0.5, config=cfg.config)
    with pytest.raises(ValueError, match="both choose options"):
        Config(preset="small", config=str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options_that_can_be(name):
    Config(preset=name).check()


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="`preset` is 'large': choose from"):
        Config(preset="large").check()


@pytest.mark.parametrize("preset", [["tiny"], {"tiny": 1}, 3])
def test_a_preset_is_a_word(preset):
    with pytest.raises(ValueError, match="`preset` is .*: give a word"):
        Config(preset=preset).check()


def test_numbers_in_quotes_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text('epochs: "10"\nlr: "1e-3"\neval_every: "3"\n')
    cfg = Config(config=str(tmp_path / "c.yaml")).check()
    assert (cfg.epochs, cfg.lr, cfg.eval_every) == (10, 1e-3, 3)
