"""Linear layers through a convolution: the same function and gradients as PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

import linear as linear_file
from linear import Linear, linear


@pytest.fixture(autouse=True)
def no_size_is_small(monkeypatch):
    monkeypatch.setattr(linear_file, "SMALL", 0)


@pytest.mark.parametrize("shape", [(1, 7, 6), (3, 5, 6), (2, 3, 4, 6), (6,)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_same_as_pytorch(shape, contiguous):
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if not contiguous else torch.randn(shape)
    x.requires_grad_(True)
    layer = Linear(6, 5)
    for bias in (layer.bias, None):
        out, expected = linear(x, layer.weight, bias), F.linear(x, layer.weight, bias)
        assert out.shape == expected.shape and out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        weights = [x, layer.weight]
        gradients = (torch.autograd.grad(y.square().sum(), weights) for y in (out, expected))
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))


def test_other_precisions():
    layer, x = Linear(6, 5), torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
