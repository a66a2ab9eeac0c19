import copy

import golden
import pytest
import torch

from dinofast import DINOHead

CASES = {
    "frozen_g": {},
    "free_g": {"norm_last_layer": False},
    "one_layer": {"nlayers": 1},
    "bn": {"use_bn": True},
}


@pytest.mark.parametrize("name", CASES)
def test_official_outputs_and_gradients(name):
    case = golden.load("head.npz", f"{name}.")
    head = DINOHead(48, 96, hidden_dim=64, bottleneck_dim=24, **CASES[name])
    head.load_state_dict(
        {k.removeprefix("state."): v for k, v in case.items() if k.startswith("state.")}
    )
    x = case["x"].requires_grad_()
    y = head(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, case["y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, case["dx"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        head.last_layer.weight_v.grad, case["d_weight_v"], rtol=1e-4, atol=1e-6
    )
    assert head.last_layer.weight_g.requires_grad == (name == "free_g")


def test_prototypes_start_with_norm_one_and_stay_there_when_frozen():
    head = DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4)
    assert (head.last_layer.weight_g == 1).all() and not head.last_layer.weight_g.requires_grad
    out = head(torch.randn(5, 8))
    assert out.abs().max() <= 1 + 1e-6  # cosines


def test_tiny_features_do_not_vanish_in_half_precision():
    head = DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4).half()
    head.last_layer.float()
    out = head(torch.full((2, 8), 1e-6, dtype=torch.float16))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_head_trains_in_other_dtypes(dtype):
    torch.manual_seed(0)
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8)
    x = torch.randn(4, 12)
    expected = head(x)
    half = copy.deepcopy(head).to(dtype)
    out = half(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.02)
    out.sum().backward()
    assert all(p.grad.dtype == dtype for p in half.parameters() if p.requires_grad)
