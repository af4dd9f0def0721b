"""Attention over packed rows: equal to eager attention on each sequence alone, for every family, without mixing."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    BloomConfig,
    GPTNeoConfig,
    GptOssConfig,
    MambaConfig,
    PhimoeConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from repo.attention.packed import IMPLEMENTATION, packed_attention, recompute_contexts, using_packed
from repo.data.packing import flat, pack
from repo.data.segments import make_segments
from repo.data.sequences import make_sequences
from repo.models.layout import choose_attention
from repo_kernels.backends import cpu
from tests.support.packed_models import (
    CPU,
    FAMILIES,
    IDS,
    SMALL,
    assert_close,
    build,
    gradients,
    packed_states,
    separate_states,
    sequences,
)

UNPACKABLE = {
    "state space": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **IDS),
    "position bias": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS),
    "local layers": lambda: GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8, **IDS
    ),
    "sinks": lambda: GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "window not told": lambda: PhimoeConfig(**SMALL, sliding_window=64, num_local_experts=2),
}


@pytest.mark.parametrize("share", [True, False], ids=["shared prompt", "own prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_states_and_gradients_are_those_of_eager_attention_on_each_sequence(family, share):
    batch = sequences()
    packed = pack(batch, torch.arange(7), share)
    weights = flat(packed, torch.randn(7, 13, generator=torch.Generator().manual_seed(1)))
    model, eager = build(FAMILIES[family]), build(FAMILIES[family], "eager")
    states, expected = packed_states(model.base_model, packed), separate_states(eager.base_model, batch, packed.order)
    assert_close(states, expected)
    got, wanted = gradients(model, states, weights), gradients(eager, expected, weights)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(got[name], wanted[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_packed(family):
    model = build(FAMILIES[family])
    before = model.config._attn_implementation
    chosen = choose_attention(model, CPU, torch.float32)
    assert chosen.packs
    assert model.config._attn_implementation == before
    if cpu.available() and "heads of 16" in family:
        assert chosen.describe() == "attention: C++ varlen, packed"
    else:
        computed_by = "softcapped softmax" if family == "gemma2" else "SDPA"
        assert chosen.describe() == f"attention: PyTorch {computed_by} per sequence, packed (FlashAttention needs CUDA)"
    assert choose_attention(model.base_model, CPU, torch.bfloat16).packs  # by autocast


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("state space", "layers of linear_attention"),
        ("position bias", "does not accept a custom attention function"),
        ("local layers", "does not accept a custom attention function"),
        ("sinks", "packed rows change the states"),
        ("window not told", "does not pass the windows of its layers to its attention function"),
    ],
)
def test_a_model_that_cannot_be_packed_is_recognised(kind, why):
    chosen = choose_attention(build(UNPACKABLE[kind]), CPU, torch.float32)
    assert not chosen.packs
    assert chosen.describe().startswith("attention: padded batches, the model's own ")
    assert why in chosen.why


def test_a_model_that_fails_on_packed_rows_is_padded_with_its_error():
    model = build(FAMILIES["llama"])
    layer = model.base_model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *inputs, **options: 1 / 0 if "segments" in options else own(*inputs, **options)
    assert choose_attention(model, CPU, torch.float32).why.endswith("ZeroDivisionError: division by zero")


def test_attention_does_not_leak_across_a_boundary():
    """The naive way, an all-ones mask over the same packed row, does leak, which shows that the check can fail."""
    trunk, batch = build(FAMILIES["llama"]).base_model, sequences()
    packed = pack(batch, torch.tensor([0, 1, 2, 4]), True)
    assert packed.order.tolist() == [2, 0, 1, 4]
    ids = packed.input_ids.clone()
    ids[0, packed.rows[13 + 1 : 13 + 9]] = 2  # the response of row 0 is others' words now

    def kept(states):
        return torch.cat((states[:13], states[22:]))

    before, after = (
        packed_states(trunk, SimpleNamespace(**{**vars(packed), "input_ids": x})) for x in (packed.input_ids, ids)
    )
    assert torch.equal(kept(after), kept(before))
    assert (after - before)[14:22].abs().max() > 0.1
    mask = torch.ones_like(ids)
    naive = [
        trunk(input_ids=x, position_ids=packed.position_ids, attention_mask=mask).last_hidden_state[0, packed.rows]
        for x in (packed.input_ids, ids)
    ]
    assert (kept(naive[1]) - kept(naive[0])).abs().max() > 0.01
    assert (naive[0] - before).abs().max() > 0.01


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else (out,)
        self.numel = max([self.numel, *(x.numel() for x in found if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_of_the_whole_row_is_built(family):
    trunk = build(FAMILIES[family]).base_model
    packed = pack(make_sequences([[5] * 6] * 40, [[6] * 7] * 40, 0), torch.arange(40), True)
    assert packed.tokens == 40 * 12
    with Largest() as made, torch.no_grad():
        packed_states(trunk, packed)
    assert made.numel < packed.tokens**2
    with Largest() as made, torch.no_grad():
        trunk(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False)
    assert made.numel >= packed.tokens**2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputed_layers_attend_as_they_did(family):
    """Without recompute_contexts they would find the model's own attention, which torch notices by what it saves."""
    model, packed = build(FAMILIES[family]), pack(sequences(), torch.arange(7), True)
    weights = torch.linspace(-1, 1, len(packed.rows))
    expected = gradients(model, packed_states(model.base_model, packed), weights)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for options in ({}, {"context_fn": partial(recompute_contexts, model)}):
        for layer in layers:
            layer.forward = partial(checkpoint, type(layer).forward.__get__(layer), use_reentrant=False, **options)
        states = packed_states(model.base_model, packed)
        if not options:
            with pytest.raises(CheckpointError):
                gradients(model, states, weights)
    for _ in range(2):
        model.zero_grad()
        (states * weights[:, None]).sum().backward(retain_graph=True)
        for name, p in model.named_parameters():
            assert name not in expected or torch.equal(p.grad, expected[name])


def test_adapters_are_packed_too():
    peft = pytest.importorskip("peft")
    model, packed = build(FAMILIES["llama"]), pack(sequences(), torch.arange(7), True)
    model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    model.eval()
    assert choose_attention(model, CPU, torch.float32).packs
    assert_close(packed_states(model.base_model, packed), separate_states(model.base_model, sequences(), packed.order))


def test_the_own_attention_is_back_after_a_packed_forward_also_after_an_error():
    model = build(FAMILIES["gemma2"])
    with using_packed(model):
        with pytest.raises(ValueError, match="segments must be given .* got None"), using_packed(model):
            model(input_ids=torch.tensor([[5, 6]]))
        assert model.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == "eager"


def test_dropout_in_attention_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    segments = make_segments(*torch.tensor([[3], [0], [0]]))
    with pytest.raises(ValueError, match="dropout must be 0 .* got 0.1"):
        packed_attention(torch.nn.Identity(), q, q, q, None, segments=segments, dropout=0.1)
