"""How many tokens per second does the rollout sample, beside transformers' generate?

    make bench

Batches of 16 and 32 (4 and 8 prompts x 4 samples), 40 new tokens, the embedded model in fp32. A decode step reads the
weights once, 538 MB, and multiplies by them: 269 MFLOP per row. At batch 16 the first bounds the rate on two cores, at
batch 32 the second.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from repo.assets import ensure
from repo.config import RolloutConfig
from repo.data import Prompt, load_prompts, tokenize_prompts
from repo.policy import Policy, load_policy
from repo.rollout import sample
from repo.sequences import make_sequences

TOKENS, SAMPLES = 40, 4


@pytest.fixture(scope="module", params=[4, 8], ids=["batch 16", "batch 32"])
def setting(request) -> tuple[Policy, list[Prompt]]:
    """The embedded policy, which never stops early, so that both sample as many tokens, and 4 or 8 training prompts."""
    folder = ensure()
    policy = load_policy(str(folder / "policy"), torch.device("cpu"), trainable=False)
    found = load_prompts(folder / "prompts" / "train.jsonl")[: request.param]
    prompts = tokenize_prompts(found, policy.tokenizer, None, 256).kept
    return dataclasses.replace(policy, eos_ids=(-1,)), prompts


def report(benchmark, rows: int) -> None:
    """Tokens per second beside the times."""
    benchmark.extra_info["tokens/s"] = round(rows * TOKENS / benchmark.stats["median"], 1)


def test_rollout(benchmark, setting) -> None:
    """Our sampler."""
    policy, prompts = setting
    config = RolloutConfig(max_new_tokens=TOKENS)
    benchmark.pedantic(lambda: sample(policy, prompts, SAMPLES, config, 0, 0), rounds=3, warmup_rounds=1)
    report(benchmark, len(prompts) * SAMPLES)


def test_generate(benchmark, setting) -> None:
    """transformers' generate on the same rows."""
    policy, prompts = setting
    ids = [p.token_ids for p in prompts for _ in range(SAMPLES)]
    rows = make_sequences(ids, [[]] * len(ids), policy.pad_id)
    width = rows.prompt_width
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}

    def generate() -> None:
        policy.model.generate(
            input_ids=rows.input_ids[:, :width],
            attention_mask=rows.attention_mask[:, :width].to(torch.int64),
            **arguments,
        )

    benchmark.pedantic(generate, rounds=3, warmup_rounds=1)
    report(benchmark, len(ids))
