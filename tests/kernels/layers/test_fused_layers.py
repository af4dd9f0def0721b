"""Fused layers: what the models' own layers give, in fp64, and the same bits however many threads there are."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from repo_kernels.backends.cpu import layers as cpu
from repo_kernels.layers import fused_layers
from repo_kernels.layers.fused_layers import RmsNorm, Rotary, SwiGlu

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ backend was not built"),
    pytest.mark.usefixtures("isa"),
]
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 257]))
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "initializer_range": 0.2,
}
EVERYTHING = {"rms_norm", "gated_mlp", "forward"}
MODELS = {
    "llama": (LlamaConfig, {}, EVERYTHING),
    "mistral": (MistralConfig, {}, EVERYTHING),
    "qwen2": (Qwen2Config, {}, EVERYTHING),
    "qwen3": (Qwen3Config, {"head_dim": 10}, EVERYTHING),
    "gelu": (LlamaConfig, {"hidden_act": "gelu"}, EVERYTHING - {"gated_mlp"}),
    "gemma2": (Gemma2Config, {"head_dim": 8}, {"forward"}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8}, {"forward"}),
}


def rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3))


def check(fused, exact, *inputs):
    """Output and gradients of `fused` are those of `exact` in fp64, where fp32 can tell: few columns cancel."""
    inputs = [x.requires_grad_() for x in inputs]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    outputs = [(fused(*inputs), inputs), (exact(*inputs), inputs), (exact(*doubles), doubles)]
    upstream = torch.randn(*outputs[0][0].shape[:-1], 2 * outputs[0][0].shape[-1])[..., ::2]
    found = [(out, *torch.autograd.grad(out, given, upstream.to(out.dtype))) for out, given in outputs]
    for got, eager, value in zip(*found, strict=True):
        assert got.shape == value.shape
        assert (got - value).norm() <= 1e-6 * value.norm() + 4 * (eager - value).norm()


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(st.integers(0, 40), st.sampled_from([256, 341])),
    st.one_of(st.integers(0, 140), st.sampled_from([1023, 1024, 2049, 3000])),
    st.integers(0, 5),
    st.integers(1, 3),
)
def test_a_transposed_copy_is_the_matrix_whatever_its_edges(rows, columns, apart, threads):
    base = torch.arange(rows * (columns + apart), dtype=torch.float32).view(rows, columns + apart)
    matrix, before = base[:, apart:], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = cpu.transposed(matrix)
    finally:
        torch.set_num_threads(before)
    assert found.is_contiguous()
    assert torch.equal(found, matrix.t())


@settings(deadline=None, max_examples=40)
@given(rows=SIZES, columns=st.integers(3, 70), strided=st.booleans(), scale=st.sampled_from([1e-4, 1.0, 1e4]))
def test_rms_norm_is_that_of_fp64(rows, columns, strided, scale):
    torch.manual_seed(0)
    x = torch.randn(columns, rows).t() if strided else torch.randn(1, rows, columns)
    check(lambda x, weight: RmsNorm.apply(x, weight, 1e-3), rms_norm, x * scale, torch.randn(columns))


@settings(deadline=None, max_examples=40)
@given(rows=SIZES, columns=SIZES, strided=st.booleans(), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_swiglu_is_that_of_fp64(rows, columns, strided, scale):
    torch.manual_seed(0)
    gate = (torch.randn(columns, rows).t() if strided else torch.randn(rows, columns)) * scale
    check(SwiGlu.apply, lambda gate, up: silu(gate) * up, gate, torch.randn(rows, columns))


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3), tokens=SIZES, heads=st.integers(1, 4), half=st.integers(1, 36), heads_first=st.booleans()
)
def test_rotary_is_that_of_fp64(batch, tokens, heads, half, heads_first):
    torch.manual_seed(0)
    shape = (batch, heads, tokens, 2 * half) if heads_first else (batch, tokens, heads, 2 * half)
    q, k = (x if heads_first else x.transpose(1, 2) for x in torch.randn(2, *shape))
    cos, sin = torch.randn(2, 1, tokens, 2 * half)  # halves that differ, so that the transposed map shows

    def fused(q, k):
        q, k = fused_layers.rotary(apply_rotary_pos_emb, q, k, cos, sin)
        assert type(q.grad_fn).__name__ == "RotaryBackward"
        return torch.cat((q, k), 1)

    def exact(q, k):
        return torch.cat(apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype)), 1)

    check(fused, exact, q, k)


def test_values_out_of_range_are_those_of_pytorch():
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, torch.inf, -torch.inf, torch.nan, 1e-30])
    out = SwiGlu.apply(gate, torch.ones(8))
    assert torch.allclose(out, silu(gate), atol=1e-30, equal_nan=True)
    rows = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0]])
    norm = LlamaRMSNorm(2)
    with fused_layers.fused_layers(norm):
        found = norm(rows)
    assert torch.allclose(found, norm(rows), equal_nan=True)


def test_bits_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 517, 576, requires_grad=True), torch.randn(576, requires_grad=True)
    gate, up = (torch.randn(1000, 1537, requires_grad=True) for _ in range(2))
    q, k = (torch.randn(1, 900, heads, 64, requires_grad=True) for heads in (9, 3))
    angles = torch.randn(1, 1, 900, 64)

    def run(threads):
        torch.set_num_threads(threads)
        outputs = RmsNorm.apply(x, weight, 1e-5), SwiGlu.apply(gate, up)
        outputs += Rotary.apply(q.transpose(1, 2), k.transpose(1, 2), angles.cos(), angles.sin())
        loss = sum(out.square().sum() for out in outputs)
        return *outputs, *torch.autograd.grad(loss, (x, weight, gate, up, q, k))

    before = torch.get_num_threads()
    try:
        first = run(1)
        for threads in (2, 3, 7, 2):
            assert all(torch.equal(a, b) for a, b in zip(first, run(threads), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_loss_and_gradients(name):
    make, options, expected = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(**{**SMALL, **options})).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # norms whose weights are not 1
    ids = torch.randint(0, 50, (2, 11))

    def run():
        loss = model(input_ids=ids, labels=ids).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    plain, names = run(), set(model.state_dict())
    with fused_layers.fused_layers(model):
        replaced = {m.forward.__func__.__name__ for m in model.modules() if "forward" in m.__dict__}
        found, copied = run(), copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, labels=ids).loss, found[0])
        assert set(model.state_dict()) == names
    assert replaced == expected
    assert all("forward" not in m.__dict__ for m in model.modules())
    for a, b in zip(found, plain, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    copied.model.norm.weight.data.zero_()
    assert copied(input_ids=ids, labels=ids).loss != model(input_ids=ids, labels=ids).loss


def test_what_does_not_fit_runs_as_it_is():
    norm, x = LlamaRMSNorm(8), torch.randn(3, 8)
    half = LlamaRMSNorm(8).bfloat16()
    with fused_layers.fused_layers(norm), fused_layers.fused_layers(half):
        assert half(x.bfloat16()).dtype == torch.bfloat16
        assert norm(x.bfloat16()).dtype == torch.float32
        assert type(norm(x.requires_grad_()).grad_fn).__name__ == "RmsNormBackward"
        with torch.autocast("cpu", torch.bfloat16):
            assert type(norm(x).grad_fn).__name__ != "RmsNormBackward"
        assert norm(torch.zeros(0, 8)).shape == (0, 8)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with fused_layers.fused_layers(gpt2):
        assert all("forward" not in m.__dict__ for m in gpt2.modules())
    q, cos = torch.randn(1, 2, 3, 8), torch.randn(1, 3, 4)
    with pytest.raises(RuntimeError, match="size"):  # the model's own error
        fused_layers.rotary(apply_rotary_pos_emb, q, q, cos, cos)


def test_frozen_weights_get_no_gradient_and_second_order_is_refused():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6)
    (grad,) = torch.autograd.grad(RmsNorm.apply(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_memory_is_refused():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="weight must be"):
        cpu.rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ValueError, match="weight must be"):
        cpu.rms_norm(x, torch.ones(16)[::2], 1e-5)
    with pytest.raises(ValueError, match="inverse must be"):
        cpu.rms_norm_gradient(x, weight, torch.ones(2), x, True)
    with pytest.raises(ValueError, match="same shape"):
        cpu.swiglu(x, x[:2])
    with pytest.raises(ValueError, match="even number"):
        cpu.rotate(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3), False)
    with pytest.raises(ValueError, match="like a head"):
        cpu.rotate(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 1, 4), False)
    with pytest.raises(TypeError):
        cpu.swiglu(x.double(), x.double())
