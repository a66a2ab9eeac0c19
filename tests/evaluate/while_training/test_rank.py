"""RankMe and LiDAR count directions."""

import math

import pytest
import torch

from dinofast.evaluate.while_training.rank import lidar, rankme


def spread(n: int, scales: list[float], seed: int = 0) -> torch.Tensor:
    """n points, orthogonal columns of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(scales), dtype=torch.float64, generator=generator)
    q, _ = torch.linalg.qr(x)
    return q * torch.tensor(scales, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_rankme_counts_equal_directions(k):
    features = spread(50, [2.0] * k + [0.0] * (8 - k))
    turned = features @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert rankme(turned.float()) == pytest.approx(k, rel=1e-3)


def test_rankme_is_the_entropy_of_the_singular_values():
    p = torch.tensor([0.5, 0.3, 0.2])
    entropy = -(p * p.log()).sum().item()
    assert rankme(spread(20, p.tolist())) == pytest.approx(math.exp(entropy), rel=1e-4)
    assert rankme(100 * spread(20, p.tolist())) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_collapsed_features_have_the_lowest_rank():
    assert rankme(torch.zeros(10, 4)) == pytest.approx(1.0, abs=1e-4)
    assert rankme(torch.ones(10, 4)) == pytest.approx(1.0, abs=1e-4)
    assert lidar(torch.ones(5, 2, 4)) == pytest.approx(1.0, abs=1e-4)


def test_lidar_counts_what_tells_images_apart():
    """Noise within an image has as many directions as there are; the images differ in three."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(400, 1, 16)
    images[..., :3] = torch.randn(400, 1, 3, generator=generator)
    noise = torch.randn(400, 2, 16, generator=generator)
    found = lidar(images + 0.01 * noise)
    assert found == pytest.approx(3, abs=0.2)
    assert rankme((images + 0.5 * noise).flatten(0, 1)) > 10  # which counts the noise too
    assert lidar(images + 0.01 * noise, ridge=1e-8) == pytest.approx(found, rel=0.05)


def test_lidar_by_the_formula():
    x = torch.randn(30, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[..., 2:] *= 0.1
    means = x.mean(1)
    between, within = torch.zeros(4, 4).double(), 1e-4 * torch.eye(4).double()
    for m in means:
        between += torch.outer(m - means.mean(0), m - means.mean(0)) / 29
    for i in range(30):
        for view in x[i]:
            within += torch.outer(view - means[i], view - means[i]) / (30 * 2)
    eigenvalues = torch.linalg.eigvals(torch.linalg.solve(within, between)).real
    p = eigenvalues / eigenvalues.sum()
    assert lidar(x) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-4)


@pytest.mark.parametrize("n, dim", [(6, 40), (40, 6)])
def test_lidar_of_few_images_in_many_directions_and_the_other_way_round(n, dim):
    x = torch.randn(n, 2, dim, generator=torch.Generator().manual_seed(2)).double()
    means = x.mean(1)
    inside = (x - means[:, None]).flatten(0, 1)
    within = inside.t() @ inside / n + 1e-4 * torch.eye(dim)
    values = torch.linalg.eigvals(torch.linalg.solve(within, means.t().cov())).real.clamp(min=0)
    p = values / values.sum() + 1e-7
    assert lidar(x) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


def test_lidar_of_what_has_no_inverse_is_no_number():
    """Rather than an error that ends a run."""
    x = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(3))
    assert math.isnan(lidar(1e20 * x)) and math.isnan(lidar(torch.full((3, 2, 4), math.nan)))


@pytest.mark.parametrize("shape", [(1, 2, 4), (5, 1, 4)])
def test_lidar_needs_two_of_each(shape):
    with pytest.raises(ValueError, match="two views or more of two images or more"):
        lidar(torch.ones(shape))
