"""The responses of a group share the computation of their prompt, and nothing else changes."""

import itertools
import logging

import pytest
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

pytest.importorskip("trl", reason="the extra `trl` is not installed")
from repo_kernels.integrations.trl.shared_prompts import states_before, why_not_shared

from .trainers import LORA

SIZES = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=3)),
    "checkpointed": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)),
}
PROMPT, RESPONSE = 6, 5


def rows(order=(0, 1, 0, 2, 1, 0)):
    """Make prompts in this order, one of them padded on the left, with responses padded on the right."""
    draw, count = torch.Generator().manual_seed(0), len(order)
    prompts = torch.randint(90, (3, PROMPT), generator=draw)
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[1, :2] = 0
    ids = torch.cat((prompts[list(order)], torch.randint(90, (count, RESPONSE), generator=draw)), 1)
    masks = torch.cat((mask[list(order)], torch.ones(count, RESPONSE, dtype=torch.long)), 1)
    masks[0, -2:] = masks[-1, -RESPONSE + 1 :] = 0
    return ids, masks


def counted(decoder):
    """Note the shape of every call's tokens."""
    shapes = []
    decoder.register_forward_pre_hook(
        lambda _, __, keywords: shapes.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, RESPONSE])
def test_values_and_gradients_are_those_of_whole_rows(name, count):
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    if name == "checkpointed":
        model.gradient_checkpointing_enable()
    decoder, (ids, mask) = model.base_model, rows()
    if count < RESPONSE:
        ids, mask = ids[:, : PROMPT + count], mask[:, : PROMPT + count]
    weights = torch.randn(6, count, 32, dtype=torch.float64) * mask[:, -count:, None]
    shapes, found = counted(decoder), []
    for share in (True, False):
        model.zero_grad()
        states = states_before(decoder, ids, mask, count, share)
        (states * weights).sum().backward()
        found.append((states.detach(), [p.grad.clone() for p in decoder.parameters()]))
    whole = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, -count - 1 : -1]
    live = mask[:, -count:, None] > 0
    torch.testing.assert_close(found[0][0] * live, whole.detach() * live, rtol=1e-5, atol=1e-5)  # norms are in fp32
    for shared, own in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(shared, own, rtol=0, atol=1e-5 * float(own.abs().max()))
    parts = [(3, PROMPT)] + [(6, count - 1)] * (count > 1)
    assert shapes[: len(parts)] == (parts if name != "checkpointed" else [(6, PROMPT + count - 1)] * len(parts))


def test_different_prompts_are_computed_in_one_pass():
    model = MODELS["llama"]()
    shapes = counted(model.base_model)
    ids, mask = rows(order=(0, 1, 2))
    states_before(model.base_model, ids, mask, RESPONSE, share=True)
    assert shapes == [(3, PROMPT + RESPONSE - 1)]
    mask[2] = mask[1]
    ids[2, :PROMPT] = ids[1, :PROMPT]
    mask[2, 0] = 1 - mask[1, 0]  # the same tokens, of which another counts
    states_before(model.base_model, ids, mask, RESPONSE, share=True)
    assert shapes[1:] == [(3, PROMPT + RESPONSE - 1)]


def test_a_recurrent_state_is_not_shared():
    sizes = {"vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "state_size": 4}
    model = FalconMambaForCausalLM(FalconMambaConfig(**sizes))
    assert why_not_shared(model) == "FalconMambaForCausalLM caches in LinearAttentionLayer"
    assert why_not_shared(MODELS["window"]()) is None


@pytest.mark.parametrize(("fields", "end"), [({}, "once"), ({"share_prompts": False}, "share_prompts is False")])
def test_the_log_says_how_prompts_are_computed(make, caplog, fields, end):
    caplog.set_level(logging.INFO)
    trainer = make(**fields)
    assert next(r.getMessage() for r in caplog.records if "linear_repo_loss" in r.getMessage()).endswith(end)
    assert trainer.shares_prompts == (end == "once")


@pytest.mark.parametrize("lora", [False, True])
def test_a_trainer_computes_each_prompt_once(make, lora):
    fields = {"beta": 0.1, "max_steps": 1, "steps_per_generation": 2, "num_iterations": 2}
    if lora:
        fields["peft_config"] = pytest.importorskip("peft").LoraConfig(**LORA)
    trainer = make(**fields)
    model = trainer.accelerator.unwrap_model(trainer.model)
    shapes = counted((model.get_base_model() if lora else model).base_model)
    trainer.train()
    scored = [b for a, b in itertools.pairwise(shapes) if b[0] == 4 and a[0] == 1 and b[1] > 1]
    assert len(scored) >= 2  # a prompt alone, then its four responses
