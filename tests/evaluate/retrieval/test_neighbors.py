"""Nearest neighbors: mean average precision against scikit-learn's, who is whose neighbor, and the
command on folders of images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinofast import cli
from dinofast.evaluate import frozen as frozen_module
from dinofast.evaluate.retrieval import neighbors as retrieval_module
from dinofast.evaluate.retrieval.contact_sheet import OTHER, SAME
from dinofast.evaluate.retrieval.neighbors import neighbors, ranks_of, retrieve, retrieve_classes


def average_precision_score(relevant: torch.Tensor, similarity: torch.Tensor) -> float:
    """Of scikit-learn, where no two similarities are equal."""
    metrics = pytest.importorskip("sklearn.metrics")
    return metrics.average_precision_score(relevant, similarity)


def labeled(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 6, generator=generator)
    return noise + torch.nn.functional.one_hot(labels, 6), labels


@pytest.mark.parametrize("elements", [2**24, 100])
def test_agrees_with_scikit_learn(monkeypatch, elements):
    monkeypatch.setattr(retrieval_module, "CHUNK_ELEMENTS", elements)  # 100: two queries at a time
    (queries, own), (gallery, labels) = labeled(23, 4), labeled(47, 4, 1)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    averages = [
        average_precision_score(labels == label, row)
        for label, row in zip(own, cosine, strict=True)
    ]
    nearest = labels[cosine.argsort(dim=1, descending=True)] == own[:, None]
    found = retrieve_classes(queries * 3, own, gallery, labels)
    assert found.mean_average_precision == pytest.approx(100 * np.mean(averages), rel=1e-6)
    for k in (1, 5, 10):
        share = 100 * nearest[:, :k].double().mean()
        assert found.precision_at[k] == pytest.approx(float(share))
    assert found[3:] == (23, 0)


@pytest.mark.parametrize("elements", [2**24, 100])
def test_nobody_finds_itself(monkeypatch, elements):
    monkeypatch.setattr(retrieval_module, "CHUNK_ELEMENTS", elements)
    features, labels = labeled(31, 3)
    averages = []
    for i in range(31):
        others = torch.arange(31) != i
        cosine = torch.nn.functional.cosine_similarity(features[i], features[others])
        averages.append(average_precision_score(labels[others] == labels[i], cosine))
    found = retrieve_classes(features, labels, features, labels, leave_one_out=True)
    assert found.mean_average_precision == pytest.approx(100 * np.mean(averages), rel=1e-6)


def test_by_hand():
    """Relevant at ranks 1 and 3: (1 / 1 + 2 / 3) / 2. Of equal cosines the first comes first."""
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    found = retrieve_classes(
        torch.tensor([[2.0, 0.0]]), torch.tensor([5]), gallery, torch.tensor([5, 1, 5, 2])
    )
    assert found.mean_average_precision == pytest.approx(100 * 5 / 6)
    assert found.precision_at == {1: 100.0} and found.chance == 50
    twins = torch.ones(3, 2)
    for labels, average in (([0, 1, 1], 100), ([1, 0, 1], 50)):
        one = retrieve_classes(twins[:1], torch.tensor([0]), twins, torch.tensor(labels))
        assert one.mean_average_precision == pytest.approx(average)


@pytest.mark.parametrize("values", [3, 10**6])  # of which most are equal, or none
def test_ranks_of_twins(values):
    rng = np.random.default_rng(0)
    for _ in range(20):
        similarity = rng.integers(0, values, 50).astype(np.float32)
        relevant = rng.random(50) < 0.3
        order = sorted(range(50), key=lambda i: -similarity[i])  # noqa: B023
        expected = [rank for rank, i in enumerate(order) if relevant[i]]
        assert ranks_of(similarity, relevant).tolist() == expected


def test_a_class_of_one_image_does_not_count():
    features, labels = labeled(10, 2)
    labels[3] = 7
    found = retrieve_classes(features, labels, features, labels, leave_one_out=True)
    assert (found.n_queries, found.skipped) == (9, 1)
    with pytest.raises(ValueError, match="no image has another one of its class"):
        retrieve_classes(features, torch.arange(10), features, torch.arange(10), True)


def test_neighbors_without_some():
    gallery = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 2.0]])
    values, rows = neighbors(gallery, gallery, 2, [[0], [1], [0, 2]])
    assert rows[:, 0].tolist() == [1, 0, 1] and rows[0, 1] == 2
    torch.testing.assert_close(values[0], torch.tensor([0.5**0.5, 0.0]))
    assert values[2, 1] == -torch.inf
    assert neighbors(gallery, gallery, 9)[1].shape == (3, 3)


# ---- images
class MeanPixel(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def mean_pixel(monkeypatch):
    monkeypatch.setattr(frozen_module, "load_backbone", lambda *args: MeanPixel())
    monkeypatch.setattr(frozen_module, "arguments", lambda path: {"global_crops_size": 14})
    return {"pretrained_weights": "none.pth", "num_workers": 0, "device": "cpu"}


def images(root: Path, *classes: str, n: int = 4) -> Path:
    """Every class a color, of which each image has its own shade."""
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            color = [10, 10, 10 + 2 * i]
            color[c] += 180
            Image.new("RGB", (20, 20), tuple(color)).save(root / name / f"{i}.png")
    return root


def test_the_command_on_class_folders(tmp_path, mean_pixel, capsys):
    data, out = images(tmp_path / "data", "cat", "dog"), tmp_path / "found.json"
    (data / "dog" / "1.png").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    line = ["retrieve", str(data), "--pretrained_weights", "none.pth", "--num_workers", "0"]
    line += ["--device", "cpu", "--n_queries", "2", "--n_neighbors", "4", "-o", str(sheet)]
    assert cli.main([*line, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert (
        "mean average precision 100.0 % (chance 42.9 %), precision 100.0 at 1, 51.4 at 5;" in said
    )
    assert "1.png (empty file)" in said and f"2 queries in '{sheet}', a row each" in said
    found = json.loads(out.read_text())
    assert found["mean_average_precision"] == pytest.approx(100) and found["n_queries"] == 7
    assert [q["path"] for q in found["queries"]] == [f"{data}/cat/1.png", f"{data}/dog/2.png"]
    cat, dog = found["queries"]
    assert [n["class"] for n in cat["neighbors"]] == ["cat", "cat", "cat", "dog"]
    assert [n["class"] for n in dog["neighbors"]] == ["dog", "dog", "cat", "cat"]
    assert all(q["path"] not in {n["path"] for n in q["neighbors"]} for q in (cat, dog))
    similar = [n["similarity"] for n in cat["neighbors"]]
    assert similar == sorted(similar, reverse=True) and similar[0] > 0.999
    pixels = np.asarray(Image.open(sheet)).reshape(-1, 3)
    frames = [(pixels == color).all(1).sum() for color in (SAME, OTHER)]
    assert frames[0] * 3 == frames[1] * 5  # 3 + 2 of the class, 1 + 2 of another


def test_val_looks_for_train(tmp_path, mean_pixel, capsys):
    data = images(tmp_path / "train", "cat", "dog").parent
    images(tmp_path / "val", "cat", "dog", n=2)
    sheet = tmp_path / "s.png"
    found = retrieve(data_path=data, sheet=sheet, n_queries=9, n_neighbors=9, **mean_pixel)
    assert found["mean_average_precision"] == pytest.approx(100) and found["chance"] == 50
    assert len(found["queries"]) == 4 and len(found["queries"][0]["neighbors"]) == 8
    assert "/val/" in found["queries"][0]["path"]
    assert all("/train/" in n["path"] for n in found["queries"][0]["neighbors"])
    assert "4 queries (val/) among 8 images (train/)" in capsys.readouterr().out


def test_queries_from_anywhere_in_a_flat_folder(tmp_path, mean_pixel):
    """One that is among the images, by another name, does not find itself."""
    data = images(tmp_path / "data", "cat")
    images(tmp_path / "more", "cow", n=1)
    (tmp_path / "link.png").symlink_to(data / "cat" / "2.png")
    queries = [tmp_path / "link.png", tmp_path / "more" / "cow" / "0.png"]
    found = retrieve(
        data_path=data / "cat", sheet=tmp_path / "s.png", queries=queries, **mean_pixel
    )
    assert found.keys() == {"queries"}
    first, second = ([n["path"][-5:] for n in q["neighbors"]] for q in found["queries"])
    assert sorted(first) == ["0.png", "1.png", "3.png"] and second[0] == "0.png"
    assert len(second) == 4 and found["queries"][0]["class"] is None


def test_a_query_among_classes_has_its_class(tmp_path, mean_pixel):
    data = images(tmp_path / "data", "cat", "dog")
    query = data / "dog" / "0.png"
    found = retrieve(data_path=data, sheet=tmp_path / "s.png", queries=[query], **mean_pixel)
    assert found["queries"][0]["class"] == "dog"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n_queries": 0}, "`n_queries` is 0: give 1 to 100"),
        ({"n_neighbors": 101}, "`n_neighbors` is 101"),
        ({"queries": ["none.png"]}, "`queries`: there is no file 'none.png'"),
        ({"sheet": "none/x.png"}, "but there is no folder"),
        ({"sheet": "data/cat/0.png"}, "a file among the images, which would be lost"),
        ({"batch_size_per_gpu": 0}, "`batch_size_per_gpu` is 0"),
    ],
)
def test_options_that_cannot_be(tmp_path, mean_pixel, monkeypatch, more, words):
    images(tmp_path / "data", "cat")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        retrieve(data_path="data", **{**mean_pixel, **more})


def test_one_image_has_no_neighbor(tmp_path, mean_pixel):
    data = images(tmp_path / "data", "cat", n=1)
    with pytest.raises(ValueError, match="has one readable image: give two or more"):
        retrieve(data_path=data, sheet=tmp_path / "s.png", **mean_pixel)


def test_sizes_of_a_protocol_are_not_those_of_k_nn(tmp_path, capsys):
    line = ["retrieve", str(tmp_path), "--pretrained_weights", "x", "--protocol", "roxford"]
    assert cli.main([*line, "--crop", "64"]) == 2
    assert "--crop has no part in --protocol: give --imsize" in capsys.readouterr().err
    assert cli.main(line) == 2
    assert "holds neither roxford5k/gnd_roxford5k.pkl nor gnd_" in capsys.readouterr().err
