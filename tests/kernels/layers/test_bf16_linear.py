"""Linear layers in bfloat16: results and gradients of fp64 within its rounding, and copies that follow the weights."""

import pytest
import torch
from torch import nn

from repo_kernels.layers.bf16_linear import Bf16Linear, _copies, bf16_linears, forget_copies, rounded

ROUNDING = 2.0**-8  # of a product of two rounded factors, which is rounded itself: 3 x 2^-9 at most, less in norm


@pytest.mark.parametrize("shape", [(1, 7, 64), (5, 64), (64,), (2, 3, 4, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_fp64_within_the_rounding(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(64, 96, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 192)[..., ::2]
    with bf16_linears(layer):
        out = layer(x)
    assert type(out.grad_fn).__name__.startswith("Bf16Linear")
    inputs = [x, *layer.parameters()]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = nn.functional.linear(*exact)
    assert out.dtype == torch.float32
    assert 0 < (out - expected).norm() <= ROUNDING * expected.norm()
    found = torch.autograd.grad(out, inputs, upstream)
    for got, value in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert got.shape == value.shape
        assert got.dtype == torch.float32
        assert (got - value).norm() <= ROUNDING * value.norm()


def test_a_rounded_product_of_rounded_factors_is_exact():
    """Small integers are bfloat16 numbers, and so are their sums of products."""
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = (torch.arange(64 * 64).view(64, 64) % 3 - 1.0).requires_grad_()
    x = (torch.arange(3 * 64).view(3, 64) % 5 - 2.0).requires_grad_()
    with bf16_linears(layer):
        out = layer(x)
    assert torch.equal(out, x @ layer.weight.t())


def test_copies_follow_the_weights():
    layer = nn.Linear(64, 64)
    first = rounded(layer.weight)
    assert rounded(layer.weight) is first
    torch.optim.SGD(layer.parameters(), lr=1.0).step()  # no gradients, no change
    assert rounded(layer.weight) is first
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(rounded(layer.weight), layer.weight.bfloat16())
    layer.weight.data.mul_(2)  # a change that no version counts
    forget_copies(layer.parameters())
    assert torch.equal(rounded(layer.weight), layer.weight.bfloat16())
    held = len(_copies)
    del layer
    assert len(_copies) == held - 1


def test_narrow_half_and_empty_ones_go_the_ordinary_way_and_layers_are_as_before_afterwards():
    model = nn.Sequential(nn.Linear(64, 63), nn.Linear(63, 64), nn.Linear(64, 64).bfloat16(), nn.Linear(64, 64))
    with bf16_linears(model):
        with bf16_linears(model):
            pass
        assert ["forward" in m.__dict__ for m in model] == [False, False, False, True]
        assert model[3](torch.zeros(0, 64)).shape == (0, 64)
        assert model[3](torch.zeros(2, 64, dtype=torch.float32)).grad_fn is not None
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_frozen_weights_get_no_gradient_and_the_gradient_of_a_gradient_is_refused():
    layer = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(2, 64, requires_grad=True)
    with bf16_linears(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    (grad,) = torch.autograd.grad(Bf16Linear.apply(x, layer.weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
