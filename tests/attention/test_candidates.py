"""Kernels for sequences of different lengths in one row: what they are given, and which one is taken."""

import sys
from types import SimpleNamespace

import pytest
import torch

from repo.attention import packed as packed_module
from repo.attention.adapters import flash_kernel, torch_kernel
from repo.attention.candidates import Candidate, Choice, choose_kernel, first_that_agrees
from repo.attention.sdpa import per_run
from repo.data.packing import pack
from repo.data.segments import make_segments
from repo.models.layout import choose_attention
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
    choice = Choice("fake", flash_kernel(getattr(flash, version)), {})
    monkeypatch.setattr(packed_module, "choose_kernel", lambda *_: choice)
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

    def refusing(q, k, v, **_):
        raise RuntimeError("this head size is not supported")

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa
        return fake_varlen(q, k, v, cu_q, cu_k, scale, True, window_size, None)

    functions = {"shifted": shifted, "without windows": without_windows, "refusing": refusing}
    functions |= {"good": Flash().two, "varlen": varlen_attn}
    monkeypatch.setitem(sys.modules, "fakes", SimpleNamespace(**functions))
    names = ("missing", "shifted", "without windows", "refusing")
    table = (
        Candidate("not there", "no_such_package", "x", flash_kernel),
        *(Candidate(name, "fakes", name, flash_kernel) for name in names),
        Candidate("varlen", "fakes", "varlen", torch_kernel, traceable=True),
    )
    chosen = first_that_agrees(CPU, torch.float32, 8, False, True, table)
    assert (chosen.name, chosen.traceable) == ("varlen", True)
    assert chosen.why == (
        "not there is not installed; missing is not installed: fakes has no missing; "
        "shifted gives an output that differs from SDPA's by 1.0e+00; "
        "without windows gives an output that differs from SDPA's by 2.2e+00 with a sliding window; "
        "refusing fails: RuntimeError: this head size is not supported"
    )
    assert first_that_agrees(CPU, torch.float32, 8, False, False, table).name == "without windows"
    capped = first_that_agrees(CPU, torch.float32, 8, True, True, table)
    assert (capped.name, capped.kernel) == ("PyTorch softcapped softmax per sequence", per_run)
    assert "varlen fails: ValueError: softcap must be None for varlen_attn; got 20.0" in capped.why
    table = (*table, Candidate("good", "fakes", "good", flash_kernel))
    assert first_that_agrees(CPU, torch.float32, 8, True, True, table).name == "good"


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
        found = choose_kernel(torch.device("cuda"), torch.bfloat16, head_dim)
        assert found.kernel is not per_run, found.why
        segments = make_segments(*torch.tensor([[300, 77, 77, 5], [0, 0, 0, 0], [0, 300, 300, 0]])).to(
            torch.device("cuda")
        )
        shapes = (459, 8, head_dim), (1059, 2, head_dim), (1059, 2, head_dim)
        q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
        for window in (None, 100):
            results = []
            for attend in (found.kernel, per_run):
                out = attend(q, k, v, segments, head_dim**-0.5, window, None)
                results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
            for got, expected in zip(*results, strict=True):
                assert (got - expected).abs().max() <= 0.03 * expected.abs().max()

    def test_new_lengths_plan_nothing(self):
        """cuDNN's kernels are planned for each shape; SDPA in runs must not use them."""
        q, k, v = (torch.randn(64, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        segments = make_segments(*torch.tensor([[40, 24], [0, 0], [0, 0]])).to(torch.device("cuda"))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            per_run(q, k, v, segments, 0.125, None, None).sum().backward()
        assert not [event.name for event in seen.events() if "cudnn" in event.name.lower()]
