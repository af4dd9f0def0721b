"""Kernels for sequences of different lengths in one row: what they are given, and which one is taken."""

import sys
from types import SimpleNamespace

import pytest
import torch

from repo.data.packing import pack
from repo.data.segments import make_segments
from repo.models import attention, varlen
from repo.models.layout import choose_attention
from repo.models.varlen import first_that_agrees, flash_kernel, per_run, torch_kernel
from tests.support.packed_models import (
    CPU,
    FAMILIES,
    WINDOW,
    assert_close,
    build,
    packed_states,
    separate_states,
    sequences,
)


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
