"""Training by oneDNN's linear layers: F.linear's results and gradients, on the CPUs where it applies."""

import pytest
import torch
from torch import nn

from repo_kernels.layers import onednn_linear
from repo_kernels.layers.onednn_linear import OneDnnLinear, onednn_linears
from repo_kernels.layers.packed_linear import available


@pytest.fixture(autouse=True)
def _applies(monkeypatch):
    if not available(nn.Linear(1, 1)):
        pytest.skip("this PyTorch has no oneDNN linear operator")
    monkeypatch.setattr(onednn_linear, "mkl_is_slow", lambda: True)


@pytest.mark.parametrize("shape", [(1, 7, 33), (5, 33), (33,), (1, 33), (2, 3, 4, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_fp64(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(33, 21, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 42)[..., ::2]
    with onednn_linears(layer):
        out = layer(x)
    assert type(out.grad_fn).__name__.startswith("OneDnnLinear")
    inputs = [x, *layer.parameters()]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = nn.functional.linear(*exact)
    assert (out - expected).norm() <= 1e-6 * expected.norm()
    found = torch.autograd.grad(out, inputs, upstream)
    for got, value in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert got.shape == value.shape
        assert (got - value).norm() <= 1e-6 * value.norm()


def test_frozen_weights_get_no_gradient_and_layers_are_as_before_afterwards():
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 2)).requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    with onednn_linears(model):
        with onednn_linears(model):
            pass
        assert "forward" in model[0].__dict__
        model(x).sum().backward()
    model[0].weight.data, expected = model[0].weight.data.clone(), x.grad
    x.grad = None
    model(x).sum().backward()
    assert torch.allclose(expected, x.grad, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_other_types_and_empty_inputs_go_the_ordinary_way():
    layer = nn.Linear(4, 5)
    with onednn_linears(layer):
        assert layer(torch.zeros(0, 4)).shape == (0, 5)
    half = nn.Linear(4, 5).bfloat16()
    with onednn_linears(half):
        assert "forward" not in half.__dict__


def test_the_gradient_of_a_gradient_is_refused():
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(OneDnnLinear.apply(x, weight, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
