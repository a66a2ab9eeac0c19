"""Classifiers trained together are those trained one by one; what is drawn and counted."""

import math

import pytest
import torch

from dinofast import vit_nano
from dinofast.data.sampler import epoch_order
from dinofast.evaluate.images import LabeledImages, to_tensor
from dinofast.evaluate.linear import sweep
from dinofast.evaluate.linear.features import (
    block_features,
    choices,
    few_of_each,
    held_out,
    hits,
    percent,
)

RATES = (1e-3, 0.02, 0.5)
COLUMNS = (slice(5, 10), slice(5, 13), slice(0, 13))


def silent(done, total):
    pass


@pytest.fixture
def problem():
    """60 images of 3 classes with 13 features, and their labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(60, 13, generator=generator), torch.arange(60) % 3


def alone(x, y, columns, rate, start, epochs, batch_size, seed):
    """One classifier by torch's own optimizer, scheduler and autograd."""
    layer = torch.nn.Linear(columns.stop - columns.start, 3)
    with torch.no_grad():
        layer.weight.copy_(start.t())
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
    steps = epochs * math.ceil(len(x) / batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for rows in torch.from_numpy(epoch_order(seed, epoch, len(x))).split(batch_size):
            loss = torch.nn.functional.cross_entropy(layer(x[rows][:, columns]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return layer


def test_all_together_are_each_alone(problem):
    """With a last batch that is smaller."""
    x, y = problem
    made = sweep.start(COLUMNS, len(RATES), 3, seed=4)
    first = made.weight.clone()
    sweep.train(x, y, made, RATES, epochs=5, batch_size=16, seed=7, tell=silent)
    scores = made.scores(x)
    assert scores.shape == (3, 60, 3, 3)
    for g, (columns, rows) in enumerate(zip(COLUMNS, made.rows, strict=True)):
        for r, rate in enumerate(RATES):
            layer = alone(x, y, columns, rate, first[rows, r], 5, 16, seed=7)
            weight, bias = made.weight[rows, r].t(), made.bias[g, r]
            torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(bias, layer.bias.detach(), rtol=1e-5, atol=1e-6)
            expected = layer(x[:, columns]).detach()
            torch.testing.assert_close(scores[g, :, r], expected, rtol=1e-5, atol=1e-5)


def test_a_rate_and_a_choice_do_not_depend_on_the_others(problem):
    x, y = problem
    both = sweep.start(COLUMNS, 2, 3, seed=0)
    one = sweep.start(COLUMNS[1:2], 1, 3, seed=0)
    sweep.train(x, y, both, (0.1, 0.3), epochs=2, batch_size=60, seed=0, tell=silent)
    sweep.train(x, y, one, (0.3,), epochs=2, batch_size=60, seed=0, tell=silent)
    # of COLUMNS[2] more columns are drawn, but the same ones stand in front
    assert not torch.equal(one.weight[:, 0], torch.zeros(8, 3))
    torch.testing.assert_close(both.bias[1, 1], one.bias[0, 0])
    torch.testing.assert_close(both.weight[both.rows[1], 1], one.weight[:, 0])


def test_hits_are_counted_in_chunks(problem, monkeypatch):
    x, y = problem
    made = sweep.start(COLUMNS, 3, 3, seed=0)
    sweep.train(x, y, made, RATES, epochs=3, batch_size=20, seed=0, tell=silent)
    whole = made.hits(x, y)
    monkeypatch.setattr(sweep, "CHUNK_ELEMENTS", 7 * made.bias.numel())
    assert torch.equal(made.hits(x, y), whole)
    right = (made.scores(x).argmax(-1) == y[:, None]).sum(1)
    assert torch.equal(whole[..., 0], right) and (whole[..., 1] == 60).all()


def test_separable_classes_are_learned():
    x = torch.eye(4).repeat(8, 1)
    y = torch.arange(4).repeat(8)
    made = sweep.start([slice(0, 4)], 2, 4, seed=0)
    sweep.train(x, y, made, (1e-6, 1.0), epochs=20, batch_size=8, seed=0, tell=silent)
    assert made.hits(x, y)[0, 1].tolist() == [32, 32]


def test_hits_by_hand():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(6, 1)
    assert hits(scores, torch.arange(6)).tolist() == [1, 5]
    assert hits(scores * math.nan, torch.arange(6)).tolist() == [0, 0]
    assert percent(torch.tensor([1, 5]), 6, 6) == {"top1": 100 / 6, "top5": 500 / 6}
    assert percent(torch.tensor([1, 5]), 10, 4) == {"top1": 10.0}


@pytest.mark.parametrize(
    ("n_images", "batch_size", "epochs"), [(128, 128, 12_500), (1000, 100, 1250), (2**20, 64, 10)]
)
def test_epochs_of_a_set(n_images, batch_size, epochs):
    assert sweep.default_epochs(n_images, batch_size) == epochs


def test_a_tenth_of_each_class_is_held_out():
    labels = torch.tensor([0] * 40 + [1] * 14 + [2] * 3 + [3])
    chooses = held_out(labels, seed=0)
    assert [int(chooses[labels == label].sum()) for label in range(4)] == [4, 1, 1, 0]
    assert torch.equal(chooses, held_out(labels, seed=0))
    assert not torch.equal(chooses, held_out(labels, seed=1))
    with pytest.raises(ValueError, match="no class has two training images"):
        held_out(torch.arange(5), seed=0)


def test_few_of_each_class(capsys):
    paths = tuple(range(25))
    labels = (0,) * 12 + (1,) * 10 + (2,) * 3
    images = LabeledImages(paths, labels, ("a", "b", "c"), to_tensor)
    few = few_of_each(images, 5, seed=0)
    assert few.labels == (0,) * 5 + (1,) * 5 + (2,) * 3 and few.paths == tuple(sorted(few.paths))
    assert "1 class with fewer than 5 images: all of them" in capsys.readouterr().out
    assert few_of_each(images, 5, seed=1).paths != few.paths
    # more images of a class are those, and others
    assert set(few_of_each(images, 3, seed=0).paths) <= set(few.paths)


@torch.no_grad()
def test_columns_of_the_features():
    backbone, images = vit_nano(img_size=(16,)).eval(), torch.randn(3, 3, 16, 16)
    x = block_features(backbone, images)
    assert x.shape == (3, 3 * 64)
    first, last = backbone.get_intermediate_layers(images, 2)
    cls, mean = torch.cat((first[:, 0], last[:, 0]), 1), last[:, 1:].mean(1)
    found = {choice.name: x[:, choice.columns] for choice in choices(backbone, x.shape[1])}
    assert list(found) == [
        "CLS",
        "CLS + mean of patches",
        "CLS of 2 blocks",
        "CLS of 2 blocks + mean of patches",
    ]
    torch.testing.assert_close(found["CLS"], backbone(images))
    torch.testing.assert_close(found["CLS + mean of patches"], torch.cat((last[:, 0], mean), 1))
    torch.testing.assert_close(found["CLS of 2 blocks"], cls)
    assert torch.equal(found["CLS of 2 blocks + mean of patches"], x)
    conv = torch.nn.Conv2d(3, 5, 4, 4)
    x = block_features(conv, images)
    assert x.shape == (3, 5) and choices(conv, 5)[0].columns == slice(0, 5)
