"""Decoding in static buffers: the logits of a growing cache in every way, graphs that stay, rows that leave.

Without a GPU a graph is stubbed by computing the step again: Recomputed.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from repo.config.schema import ModelConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.policy import Policy, load_policy
from repo.rollout import sample as sampling
from repo.rollout.decoding import describe_decoding
from repo.rollout.graphs import choice, decoder, held
from repo.rollout.graphs.buffers import COLUMNS, SPARE, Buffers
from repo.rollout.graphs.choice import NAMES, choose_step, compute_dtype, make_step, make_weights, try_step
from repo.rollout.graphs.decoder import Graphs, StaticDecoder, bucket
from repo.rollout.graphs.held import graph_decoder
from repo.rollout.kv_cache import Decoder, GrowingDecoder
from repo.rollout.sample import Rollout, sample
from repo_kernels.layers import decode_attention, decode_layer
from tests.support.tiny import QUESTIONS, save_tiny_model

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FUSED, ATTENTION, MASKED = NAMES
SMALL = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: dict[str, tuple[PretrainedConfig, str, str]] = {
    "llama": (LlamaConfig(**SMALL, head_dim=16, attention_bias=True), FUSED, ""),
    "mistral": (MistralConfig(**SMALL, head_dim=16, sliding_window=None), FUSED, ""),
    "qwen2": (Qwen2Config(**SMALL, head_dim=16), FUSED, ""),
    "qwen3": (Qwen3Config(**SMALL, head_dim=16), FUSED, ""),
    "another activation": (
        LlamaConfig(**SMALL, head_dim=16, hidden_act="gelu"), ATTENTION, "no fused layers: its logits would differ by",
    ),
    "other modules": (
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2), ATTENTION,
        "no fused layers: its modules are not those of Llama",
    ),
    "windows": (Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8), "", "not every layer has full attention"),
    "distances": (
        FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True), "",
        "no 4-D mask",
    ),
    "a length": (
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "",
        "its rotary embedding looks at the length",
    ),
}  # fmt: skip
BATCHES = [[[5, 6, 7, 8, 9, 10, 11], [12, 13]], [[20, 21, 22]], [[30, 31, 32, 33, 34], [40, 41, 42]]]


class Recomputed(Graphs):
    """Steps that are computed again in place of a replay, into the logits of their capture."""

    def capture(self, rows: int, step: Callable[[], Tensor]) -> None:
        logits = step().clone()
        self.by_rows[rows] = lambda: logits.copy_(step()), logits


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return load_policy(str(tiny_model), CPU, trainable=True)


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    return tokenize_prompts([Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)], policy.tokenizer, None, 200).kept


@pytest.fixture(autouse=True)
def _nothing_held() -> Iterator[None]:
    yield
    held._held.clear()


def with_model(policy: Policy, config: PretrainedConfig, device: torch.device = CPU) -> Policy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    return dataclasses.replace(policy, model=model, device=device)


def static(policy: Policy, name: str, rows: int, length: int, graphs: Graphs | None = None) -> StaticDecoder:
    model = policy.model
    buffers = Buffers(rows, length, compute_dtype(model), policy.device)
    return StaticDecoder(model, make_step(name, model, make_weights(name, model)), buffers, graphs)


def largest_difference(policy: Policy, one: Decoder, other: Decoder, batches: list[list[list[int]]]) -> float:
    """Between the logits of two decoders fed the same tokens, of which rows leave, relative to the largest logit."""
    worst = 0.0
    for ids in batches:
        prefix = make_sequences(ids, [[]] * len(ids), policy.pad_id).to(policy.device)
        a, b = (decoder.start(prefix, 3) for decoder in (one, other))
        for step in range(6):
            assert a.shape == b.shape
            worst = max(worst, float((a - b).abs().max() / a.abs().max()))
            tokens = torch.randint(0, 380, (len(a),), generator=torch.Generator().manual_seed(step)).to(policy.device)
            kept = torch.arange(len(a) % 2, len(a), 2, device=policy.device)
            if step == 2 and other.keep(kept):
                assert one.keep(kept)
                tokens = tokens[kept]
            a, b = (decoder.step(tokens) for decoder in (one, other))
    return worst


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_each_model_takes_the_fastest_way_that_gives_its_logits(
    name: str, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "LEAST_ROWS", 2)
    config, chosen, why = CONFIGS[name]
    other = with_model(policy, config)
    assert choose_step(other).name == chosen
    assert choose_step(other).why.startswith(why) or (not chosen and why in choose_step(other).why)
    for way in NAMES[NAMES.index(chosen) :] if chosen else ():
        growing, one = GrowingDecoder(other.model, 6), static(other, way, 6, 13, Recomputed())
        assert largest_difference(other, growing, one, BATCHES) < 1e-5
        assert one.graphs is not None
        assert set(one.graphs.by_rows) == {6, 3, 2}


def test_a_softcap_or_another_argument_that_a_kernel_does_not_apply_is_found(policy: Policy) -> None:
    """Gemma 2 bounds its scores; its windows are made full, so that it can be tried."""
    config = Gemma2Config(**SMALL, head_dim=16, attn_logit_softcapping=2.0, layer_types=["full_attention"] * 2)
    other = with_model(policy, config)
    difference, most = try_step(other, ATTENTION)
    assert difference < most


def test_buckets_are_powers_of_two_and_three_quarters_of_them() -> None:
    assert sorted({bucket(n, 100) for n in range(1, 101)}) == [8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(n <= bucket(n, 100) <= max(8, 1.5 * n) for n in range(1, 101))
    assert bucket(3, 5) == 5


def test_a_full_batch_leaves_nothing_behind_for_a_smaller_one(policy: Policy) -> None:
    for way in NAMES:
        used, fresh = static(policy, way, 6, 13), static(policy, way, 6, 13)
        with torch.no_grad():
            used.start(make_sequences(BATCHES[0], [[], []], 0), 3)
            for _ in range(5):
                used.step(torch.arange(6))
            assert largest_difference(policy, used, fresh, BATCHES[1:]) == 0


@torch.no_grad()
def test_a_capture_leaves_no_trace_in_a_batch_that_fills_the_buffers(policy: Policy) -> None:
    width = COLUMNS - SPARE - 6
    growing, one = GrowingDecoder(policy.model, 6), static(policy, ATTENTION, 6, width + 6, Recomputed())
    assert one.buffers.length == COLUMNS
    longest = [[5 + i % 300 for i in range(width)], [20, 21, 22]]
    assert largest_difference(policy, growing, one, [longest, BATCHES[1]]) < 1e-5


def test_keys_and_values_follow_autocast(tmp_path: Path) -> None:
    half = load_policy(str(save_tiny_model(tmp_path / "model")), CPU, True, ModelConfig(dtype="bfloat16"))
    assert half.autocast == torch.bfloat16
    with torch.no_grad(), half.running():
        assert choose_step(half) == choice.Choice(FUSED, "")
        for way in NAMES:
            growing, one = GrowingDecoder(half.model, 6), static(half, way, 6, 13)
            assert largest_difference(half, growing, one, BATCHES) < 0.05
            assert one.buffers.layers[0][0].dtype == torch.bfloat16


@contextmanager
def in_graphs(policy: Policy, rows: int, width: int, limit: int) -> Iterator[StaticDecoder]:
    """running_decoder of a GPU, without one."""
    with graph_decoder(policy, rows, width, limit, Recomputed) as decoder:
        yield decoder


def rollout(policy: Policy, prompts: list[Prompt], **config: int) -> Rollout:
    return sample(policy, prompts, 4, RolloutConfig(**{"max_response_tokens": 40, **config}), seed=0, step=0)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_rollouts_are_those_of_a_growing_cache(
    batch_size: int, policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = dataclasses.replace(policy, eos_ids=tuple(range(1, 30)))  # so that most rows leave early
    expected, sizes = rollout(policy, prompts, batch_size=batch_size), []
    step = StaticDecoder.step
    monkeypatch.setattr(StaticDecoder, "step", lambda self, tokens: (sizes.append(self.rows), step(self, tokens))[1])
    monkeypatch.setattr(sampling, "running_decoder", in_graphs)
    got = rollout(policy, prompts, batch_size=batch_size)
    assert got.texts == expected.texts
    torch.testing.assert_close(got.logps, expected.logps, rtol=0, atol=2e-5)
    assert sorted(set(sizes)) == ([4] if batch_size == 4 else [8, 12, 16, 24])


def test_a_second_rollout_uses_the_graphs_of_the_first_with_the_present_weights(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    first = rollout(policy, prompts)
    monkeypatch.setattr(sampling, "running_decoder", in_graphs)
    assert rollout(policy, prompts).texts == first.texts
    kept = held._held[policy.model]
    graphs, addresses = dict(kept.graphs.by_rows), [x.data_ptr() for pair in kept.buffers.layers for x in pair]
    with torch.no_grad():
        policy.model.model.layers[0].self_attn.q_proj.weight.mul_(0.2)
        policy.model.model.layers[1].mlp.down_proj.weight.mul_(0.2)
    second = rollout(policy, prompts[:4])
    assert held._held[policy.model] is kept
    assert kept.graphs.by_rows.items() >= graphs.items()
    assert [x.data_ptr() for pair in kept.buffers.layers for x in pair] == addresses
    monkeypatch.undo()
    assert second.texts == rollout(policy, prompts[:4]).texts != first.texts[:16]


def test_what_is_kept_is_made_anew_when_something_moves_or_grows(policy: Policy) -> None:
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model))

    def kept(rows: int, width: int, **changes: object) -> held.Held:
        changed = dataclasses.replace(policy, **changes)
        with torch.no_grad(), changed.running(), in_graphs(changed, rows, width, 20):
            return held._held[policy.model]

    first = kept(8, 50)
    assert kept(4, 60) is first
    assert kept(8, COLUMNS - SPARE - 20) is first
    more_rows = kept(9, 50)
    assert more_rows is not first
    longer = kept(4, COLUMNS, autocast=None)
    assert (longer.buffers.rows, longer.buffers.length) == (9, 2 * COLUMNS)
    norm = policy.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.clone())
    moved = kept(4, 50)
    assert moved is not longer
    assert moved.buffers.rows == 4
    assert kept(4, 50, autocast=torch.bfloat16).buffers.dtype == torch.bfloat16


def test_nothing_is_kept_of_a_model_that_is_gone_or_that_takes_too_much(
    policy: Policy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = dataclasses.replace(policy, model=copy.deepcopy(policy.model))

    @contextmanager
    def eager(policy: Policy, rows: int, width: int, limit: int) -> Iterator[StaticDecoder]:
        with graph_decoder(policy, rows, width, limit, lambda: None) as decoder:  # type: ignore[arg-type, return-value]
            yield decoder

    monkeypatch.setattr(sampling, "running_decoder", eager)
    rollout(policy, prompts[:1], max_response_tokens=2)
    (kept,) = held._held.values()
    sizes = 2 * 2 * 4 * COLUMNS * 2 * 16  # keys and values, layers, rows, columns, heads, dims
    assert kept.bytes == 4 * (sizes + 2 * (64 * 128 + 2 * 96 * 64))
    del kept
    monkeypatch.setattr(held, "_most", lambda device: 1e5)
    rollout(policy, prompts[:1], max_response_tokens=2)
    assert not held._held
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "running_decoder", eager)
    rollout(policy, prompts[:1], max_response_tokens=2)
    assert len(held._held) == 1
    del policy
    gc.collect()
    assert not held._held


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_decode_as_pytorch_does(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter."""
    launched = []

    def usable(backend: str | None, *_: object) -> bool:
        launched.append(backend)
        return True

    other = with_model(policy, CONFIGS["qwen3"][0])
    for module in (decode_attention, decode_layer):
        monkeypatch.setattr(module, "usable", usable)
    for way, calls in ((FUSED, 8 * 2 + 3), (ATTENTION, 2)):
        launched.clear()
        difference, _ = try_step(other, way)
        assert difference < 1e-5
        assert len(launched) >= calls


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", NAMES)
def test_a_captured_step_gives_the_logits_of_an_eager_one(way: str, dtype: str, tmp_path: Path) -> None:
    device = torch.device("cuda")
    policy = load_policy(str(save_tiny_model(tmp_path / "model")), device, True, ModelConfig(dtype=dtype))
    assert describe_decoding(policy) == f"decoding: CUDA graphs over a static KV cache, {FUSED}"
    with torch.no_grad(), policy.running():
        captured, eager = (static(policy, way, 6, 13, graphs) for graphs in (Graphs(), None))
        assert largest_difference(policy, captured, eager, BATCHES) < 1e-5


@GPU
@pytest.mark.gpu
def test_rollouts_on_a_gpu_are_those_of_the_growing_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(save_tiny_model(tmp_path / "model")), torch.device("cuda"), trainable=True)
    questions = [Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)]
    kept = tokenize_prompts(questions, policy.tokenizer, None, 200).kept
    captured = [rollout(policy, kept, batch_size=size) for size in (8, 24)]

    @contextmanager
    def growing(policy: Policy, rows: int, width: int, limit: int) -> Iterator[GrowingDecoder]:
        yield GrowingDecoder(policy.model, limit)

    monkeypatch.setattr(sampling, "running_decoder", growing)
    expected = rollout(policy, kept)
    for got in captured:
        assert got.texts == expected.texts
        assert float((got.logps - expected.logps).abs().max()) < 1e-4
