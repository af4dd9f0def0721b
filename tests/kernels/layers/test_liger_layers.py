"""Norms, rotary embeddings and SwiGLU by Liger: where they are called, with functions in PyTorch in Liger's place."""

import importlib.util
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from repo_kernels.backends.cpu import layers as cpu
from repo_kernels.layers import liger_layers
from repo_kernels.layers.fused_layers import fused_layers

LAYERS = 2
needs_liger = pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="Liger is not installed")


def half_turn(x):
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


@pytest.fixture
def calls(monkeypatch):
    """Play a GPU on the CPU: Liger's functions in PyTorch, of which each call is counted."""
    seen = Counter()

    def counted(name, function):
        def apply(*arguments):
            seen[name] += 1
            return function(*arguments)

        return SimpleNamespace(apply=apply)

    def norm(x, weight, epsilon, offset, casting, in_place):
        assert (offset, casting, in_place) == (0.0, "llama", False)
        return weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()

    def rope(q, k, cos, sin):
        return tuple(x * cos[:, None] + half_turn(x) * sin[:, None] for x in (q, k))

    swiglu = counted("swiglu", lambda gate, up: nn.functional.silu(gate) * up)
    functions = SimpleNamespace(norm=counted("norm", norm), swiglu=swiglu, rope=counted("rope", rope))
    monkeypatch.setattr(liger_layers, "functions", lambda: functions)
    monkeypatch.setattr(liger_layers, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(liger_layers, "DTYPES", (torch.float64,))
    return seen


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gradients(model):
    logits = model(input_ids=torch.arange(14).view(2, 7), use_cache=False).logits
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]


def test_each_layer_calls_each_function_and_the_results_are_the_models_own(model, calls):
    expected = gradients(model)
    with fused_layers(model, liger=True):
        found = gradients(model)
    assert calls == {"norm": 2 * LAYERS + 1, "swiglu": LAYERS, "rope": LAYERS}
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()  # transformers computes norms in fp32


def test_without_the_wish_and_for_other_types_the_layers_stay(model, calls, monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    with fused_layers(model):
        gradients(model)
    monkeypatch.setattr(liger_layers, "DTYPES", (torch.bfloat16,))
    with fused_layers(model, liger=True):
        gradients(model)
    assert not calls
    assert not liger_layers.fits(torch.zeros(2), torch.zeros(2).double())
    assert not liger_layers.fits(torch.zeros(0, dtype=torch.bfloat16))


def test_a_missing_package_has_its_reason(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel")

    def broken():
        raise ImportError("libcuda.so.1: no such file")

    monkeypatch.setattr(liger_layers, "functions", missing)
    assert liger_layers.why_not() == "is not installed"
    monkeypatch.setattr(liger_layers, "functions", broken)
    assert liger_layers.why_not() == "cannot be imported: libcuda.so.1: no such file"


@needs_liger
def test_the_installed_liger_has_the_functions_with_these_arguments():
    assert liger_layers.why_not() == ""
    found = liger_layers.functions()
    code = {name: getattr(found, name).forward for name in ("norm", "swiglu", "rope")}
    names = {name: getattr(f, "__wrapped__", f).__code__.co_varnames for name, f in code.items()}
    assert names["norm"][1:7] == ("X", "W", "eps", "offset", "casting_mode", "in_place")
    assert names["swiglu"][1:3] == ("a", "b")
    assert names["rope"][1:5] == ("q", "k", "cos", "sin")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_gives_on_a_gpu_what_the_model_gives(model, dtype):
    model = model.to("cuda", dtype)
    ids = torch.arange(14, device="cuda").view(2, 7)
    results = []
    for liger in (False, True):
        with fused_layers(model, liger=liger):
            logits = model(input_ids=ids, use_cache=False).logits.float()
        results.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    limit = 1e-4 if dtype == torch.float32 else 0.05
    for plain, fused in zip(*results, strict=True):
        assert (plain - fused).norm() <= limit * plain.norm()
