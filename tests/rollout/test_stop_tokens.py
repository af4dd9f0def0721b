"""Stop tokens: those of the model, the one that the chat template ends a turn by, and those of the configuration."""

import dataclasses

import pytest
import torch

from repo.common.errors import UserError
from repo.config.schema import RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.policy import load_policy
from repo.rollout.sample import sample
from repo.rollout.stop_tokens import closing_id, with_stop_tokens
from tests.support.tiny import QUESTIONS


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), torch.device("cpu"), trainable=False)


def ending_with(policy, end: str):
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("<|end|>", end)
    return policy


def test_a_template_that_ends_a_turn_with_the_end_token_adds_nothing(policy):
    stopped, line = with_stop_tokens(policy, [])
    assert stopped.eos_ids == policy.eos_ids
    assert line is None


def test_the_token_that_the_template_puts_after_an_answer_is_added_and_named(policy):
    stopped, line = with_stop_tokens(ending_with(policy, "<|system|>\\n"), [])
    added = policy.tokenizer.convert_tokens_to_ids("<|system|>")
    assert stopped.eos_ids == (*policy.eos_ids, added)
    assert line == f"stop tokens: '<|system|>' ({added}) added, which the chat template puts after an answer"


@pytest.mark.parametrize("end", ["", "\\n\\n", "</turn>"])
def test_plain_text_after_an_answer_is_no_stop_token(policy, end):
    assert closing_id(ending_with(policy, end).tokenizer) is None


def test_a_template_that_fails_is_reported(policy):
    policy.tokenizer.chat_template = "{{ raise_exception('no answers here') }}"
    stopped, line = with_stop_tokens(policy, [])
    assert stopped.eos_ids == policy.eos_ids
    assert "no answers here" in line


def test_stop_tokens_are_ids_or_texts_of_one_token(policy):
    stopped, _ = with_stop_tokens(policy, ["<|user|>", 9])
    assert stopped.eos_ids == (*policy.eos_ids, policy.tokenizer.convert_tokens_to_ids("<|user|>"), 9)
    for token, reason in (
        ("What is bread?", "must be one token"),
        (100000, r"must be in 0\.\.\d+"),
        (-1, "must be in 0"),
    ):
        with pytest.raises(UserError, match=f"rollout.stop_tokens: .*{reason}"):
            with_stop_tokens(policy, [token])


def test_responses_end_at_every_stop_token(policy):
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS], policy.tokenizer, None, 200).kept
    plain = sample(policy, prompts, 2, RolloutConfig(max_response_tokens=12), seed=0, step=0).sequences.token_lists()
    token = next(ids[3] for _, ids in plain if len(ids) > 4)
    stopped, _ = with_stop_tokens(policy, [token])
    again = sample(stopped, prompts, 2, RolloutConfig(max_response_tokens=12), seed=0, step=0).sequences.token_lists()
    assert plain != again
    for (_, ids), (_, cut) in zip(plain, again, strict=True):
        end = ids.index(token) + 1 if token in ids else len(ids)
        assert cut == ids[:end]
    assert dataclasses.replace(stopped, eos_ids=policy.eos_ids) == policy


def test_a_template_that_takes_parts_shows_how_it_ends_an_answer(policy):
    parts = "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("{{ m['content'] }}", parts)
    closing = closing_id(ending_with(policy, "<|system|>").tokenizer)
    assert closing == policy.tokenizer.convert_tokens_to_ids("<|system|>")
