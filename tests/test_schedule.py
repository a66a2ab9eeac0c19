import golden
import numpy as np
import pytest

from dinofast.config import Config
from dinofast.schedule import Schedule, cosine, teacher_temps


def test_official_tables():
    tables = {k: v.numpy() for k, v in golden.load("schedule.npz").items()}
    np.testing.assert_allclose(
        cosine(5e-4 * 2, 1e-6, 7, 11, warmup_epochs=2), tables["lr"], rtol=1e-12
    )
    np.testing.assert_allclose(cosine(0.04, 0.4, 7, 11), tables["wd"], rtol=1e-12)
    np.testing.assert_allclose(cosine(0.996, 1, 7, 11), tables["momentum"], rtol=1e-12)
    np.testing.assert_allclose(cosine(1.0, 0.1, 3, 5), tables["no_warmup"], rtol=1e-12)


def test_teacher_temperature_rises_by_epoch():
    assert teacher_temps(0.02, 0.07, 3, 5).tolist() == pytest.approx(
        [0.02, 0.045, 0.07, 0.07, 0.07]
    )
    assert teacher_temps(0.04, 0.04, 0, 2).tolist() == [0.04, 0.04]


def test_learning_rate_scales_with_the_whole_batch():
    cfg = Config(batch_size_per_gpu=16, accumulate=2, epochs=4, warmup_epochs=1, lr=0.001)
    schedule = Schedule(cfg, steps_per_epoch=5, world=4)
    assert schedule.total == 20 and schedule.lr.max() == pytest.approx(0.001 * 16 * 2 * 4 / 256)
    values = schedule.at(7)
    assert float(values.lr) == schedule.lr[7] and float(values.momentum) == schedule.momentum[7]


def test_warmup_as_long_as_training():
    assert cosine(1.0, 0.0, 2, 3, warmup_epochs=2).tolist() == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    )
