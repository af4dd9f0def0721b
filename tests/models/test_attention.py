"""Attention over packed rows: equal to eager attention on each sequence alone, for every family, without mixing."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from repo.data.packing import flat, pack
from repo.data.segments import make_segments
from repo.data.sequences import make_sequences
from repo.models import attention, varlen
from repo.models.attention import IMPLEMENTATION, choose_attention, packed_attention, recompute_contexts, using_packed
from repo.models.varlen import first_that_agrees, flash_kernel, per_run, torch_kernel
from repo_kernels.backends import cpu

CPU = torch.device("cpu")
VOCABULARY = 61
IDS = {"vocab_size": VOCABULARY, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    **IDS,
}
WINDOW = 8  # shorter than most sequences below
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "llama, heads of 16": lambda: LlamaConfig(**SMALL, head_dim=16),
    "mistral-window, heads of 16": lambda: MistralConfig(**SMALL, head_dim=16, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **IDS),
}
UNPACKABLE = {
    "state space": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **IDS),
    "position bias": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **IDS),
    "local layers": lambda: GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8, **IDS
    ),
    "sinks": lambda: GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
    "window not told": lambda: PhimoeConfig(**SMALL, sliding_window=64, num_local_experts=2),
}


def build(make_config, implementation=None):
    """A random causal LM, the same at every call."""
    torch.manual_seed(0)
    options = {} if implementation is None else {"attn_implementation": implementation}
    return AutoModelForCausalLM.from_config(make_config(), **options).eval()


def sequences(seed=0):
    """Three prompts with up to four responses, some of equal lengths, one empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(11, [9, 9, 13, 0]), (4, [6, 1]), (7, [12])]
    prompts, responses, group = [], [], []
    for number, (prompt, own) in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist()
        for length in own:
            prompts.append(ids)
            responses.append(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
            group.append(number)
    return make_sequences(prompts, responses, 0, torch.tensor(group))


def packed_states(trunk, packed, **options):
    """(N, H): the states that predict response tokens."""
    arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "segments": packed.segments}
    with using_packed(trunk):
        return trunk(**arguments, use_cache=False, **options).last_hidden_state[0, packed.rows]


def separate_states(trunk, batch, order):
    """The same from a forward for each sequence."""
    found = []
    for prompt, response in (batch.token_lists()[row] for row in order.tolist()):
        if response:
            ids = torch.tensor([prompt + response[:-1]], device=trunk.device)
            found.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(found)


def gradients(model, states, weights):
    model.zero_grad()
    (states * weights[:, None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, tolerance=1e-5):
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


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
        ("position bias", "does not take attention functions"),
        ("local layers", "does not take attention functions"),
        ("sinks", "packed rows change the states"),
        ("window not told", "does not tell its attention function the windows"),
    ],
)
def test_a_model_that_cannot_be_packed_is_recognised(kind, why):
    chosen = choose_attention(build(UNPACKABLE[kind]), CPU, torch.float32)
    assert not chosen.packs
    assert chosen.describe().startswith("attention: padded batches, the model's own ")
    assert why in chosen.why


def test_a_model_that_fails_on_packed_rows_is_padded_with_its_error():
    model = build(FAMILIES["llama"])
    model.base_model.layers[1].self_attn.forward = lambda *_, **__: 1 / 0
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


def fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap):
    """FlashAttention's varlen function by its definition, one segment and head after another."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out = []
    for q0, q1, k0, k1 in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        heads = []
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            scores = q[q0:q1, head] @ k[k0:k1, shared].T * softmax_scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
            seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[k0:k1, shared])
        out.append(torch.stack(heads, 1))
    return torch.cat(out)


class Flash:
    """flash_attn_varlen_func as version 2 has it, and as later ones that return a tuple and ask for no lengths."""

    def __init__(self):
        self.calls = []

    def two(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
        self.calls.append({"q": q, "k": k, "window": window_size, "softcap": softcap, "scale": softmax_scale})
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        assert max_seqlen_k == cu_seqlens_k.diff().max()
        return fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap)

    def four(self, q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
             window_size=(None, None), softcap=0.0):  # fmt: skip
        window = (-1, -1) if window_size == (None, None) else window_size
        self.calls.append({"q": q, "k": k, "window": window, "softcap": softcap, "scale": softmax_scale})
        return fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window, softcap), None


@pytest.mark.parametrize("version", ["two", "four"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-window"])
def test_flash_attention_gets_the_lengths_windows_and_gathered_keys(family, version, monkeypatch):
    trunk, packed, flash = build(FAMILIES[family]).base_model, pack(sequences(), torch.arange(7), True), Flash()
    expected = packed_states(trunk, packed)
    monkeypatch.setattr(attention, "varlen_kernel", lambda *_: ("fake", flash_kernel(getattr(flash, version))))
    assert_close(packed_states(trunk, packed), expected)
    windows = {"llama": [-1, -1], "gemma2": [WINDOW - 1, -1], "mistral-window": [WINDOW - 1] * 2}[family]
    assert [call["window"][0] for call in flash.calls] == windows
    assert {call["softcap"] for call in flash.calls} == {2.0 if family == "gemma2" else 0.0}
    assert {call["scale"] for call in flash.calls} == {trunk.layers[0].self_attn.scaling}
    assert {len(call["q"]) for call in flash.calls} == {packed.tokens}
    assert {len(call["k"]) for call in flash.calls} == {len(packed.segments.keys)}


def test_the_first_kernel_that_computes_the_same_is_taken(monkeypatch):
    def shifted(*args, **options):
        return Flash().four(*args, **options)[0] + 1

    def without_windows(*args, window_size=None, **options):
        return Flash().four(*args, **options)[0]

    def refusing(q, **_):
        raise RuntimeError("this head size is not supported")

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        return fake_varlen(q, k, v, cu_q, cu_k, scale, True, window_size, None)

    functions = {"shifted": shifted, "without windows": without_windows, "refusing": refusing}
    functions |= {"good": Flash().two, "varlen": varlen_attn}
    monkeypatch.setitem(sys.modules, "fakes", SimpleNamespace(**functions))
    table = [(n, "fakes", n, flash_kernel) for n in ("missing", "shifted", "without windows", "refusing")]
    table = [
        ("not installed", "no_such_package", "x", flash_kernel),
        *table,
        ("varlen", "fakes", "varlen", torch_kernel),
    ]
    monkeypatch.setattr(varlen, "_VARLEN", table)
    assert first_that_agrees(CPU, torch.float32, 8, softcap=False)[0] == "varlen"
    assert first_that_agrees(CPU, torch.float32, 8, softcap=True) is None
    monkeypatch.setattr(varlen, "_VARLEN", [*table, ("good", "fakes", "good", flash_kernel)])
    assert first_that_agrees(CPU, torch.float32, 8, softcap=True)[0] == "good"


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
        with pytest.raises(ValueError, match="segments: .* got None"), using_packed(model):
            model(input_ids=torch.tensor([[5, 6]]))
        assert model.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == "eager"


def test_dropout_in_attention_is_refused():
    q = torch.zeros(1, 2, 3, 4)
    segments = make_segments(*torch.tensor([[3], [0], [0]]))
    with pytest.raises(ValueError, match="dropout: .* got 0.1"):
        packed_attention(torch.nn.Identity(), q, q, q, None, segments=segments, dropout=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    """The real kernels, whichever are installed."""

    @pytest.mark.parametrize("share", [True, False], ids=["shared prompt", "own prompt"])
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_packed_states_are_those_of_eager_attention(self, family, share, dtype):
        batch, device = sequences(), torch.device("cuda")
        packed = pack(batch, torch.arange(7), share).to(device)
        trunk, eager = (build(FAMILIES[family], x).base_model.to(device) for x in (None, "eager"))
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            states, expected = packed_states(trunk, packed), separate_states(eager, batch, packed.order)
            assert choose_attention(trunk, device, dtype).packs
        assert_close(states, expected, 1e-4 if dtype == torch.float32 else 0.05)

    def test_nothing_waits_for_the_device(self):
        trunk, packed = build(FAMILIES["mistral-window"]).base_model.cuda(), pack(sequences(), torch.arange(7), True)
        with torch.autocast("cuda", torch.bfloat16):
            packed_states(trunk, packed.to(trunk.device))  # kernels are chosen at their first use
            torch.cuda.set_sync_debug_mode("error")
            try:
                packed_states(trunk, packed.to(trunk.device)).sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_a_varlen_kernel_computes_what_single_calls_do(self, head_dim):
        found = varlen.varlen_kernel(torch.device("cuda"), torch.bfloat16, head_dim)
        assert found is not None
        segments = make_segments(*torch.tensor([[300, 77, 77, 5], [0, 0, 0, 0], [0, 300, 300, 0]])).to(
            torch.device("cuda")
        )
        shapes = (459, 8, head_dim), (1059, 2, head_dim), (1059, 2, head_dim)
        q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        for window in (None, 100):
            results = []
            for attend in (found[1], per_run):
                out = attend(q, k, v, segments, head_dim**-0.5, window, None)
                results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
            for got, expected in zip(*results, strict=True):
                assert (got - expected).abs().max() <= 0.03 * expected.abs().max()
