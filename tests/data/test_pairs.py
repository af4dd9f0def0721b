"""Pairs of PKU-SafeRLHF's columns: which records have one, and their encoding."""

import pytest

from repo.common.errors import UserError
from repo.data.pairs import have_pairs, texts_of, tokenize_pairs, with_ids_of_pairs
from repo.data.prompts import Prompt, tokenize_prompts
from tests.support.prompts import load
from tests.support.tiny import make_tokenizer

BREAD = {"prompt": "What is bread?", "response_0": "Food.", "response_1": "I am sorry, I cannot help."}
RIVER = {"prompt": "What is bread?", "response_0": "A river.", "response_1": "Numbers."}


def encoded(tokenizer, prompts, limit=99):
    kept = tokenize_prompts(with_ids_of_pairs(prompts), tokenizer, "Be kind.", 200).kept
    return tokenize_pairs(kept, tokenizer, "Be kind.", limit)


def test_every_pair_of_a_prompt_is_kept_and_a_repeated_one_once(tmp_path, tokenizer):
    prompts = load(tmp_path, BREAD, RIVER, BREAD)
    assert have_pairs(prompts)
    done = encoded(tokenizer, prompts)
    assert [texts_of(p) for p in done.kept] == [["Food.", "I am sorry, I cannot help."], ["A river.", "Numbers."]]
    assert len({p.id for p in done.kept}) == 2


def test_an_id_of_its_own_stays(tmp_path):
    prompts = load(tmp_path, BREAD | {"id": "mine"}, RIVER)
    mine, other = with_ids_of_pairs(prompts)
    assert mine.id == "mine"
    assert other.id != prompts[1].id


def test_both_responses_follow_the_same_prompt_and_end_with_the_end_token(tmp_path, tokenizer):
    (prompt,) = encoded(tokenizer, load(tmp_path, BREAD)).kept
    for example, text in zip(prompt.pair, texts_of(prompt), strict=True):
        assert example.prompt_ids == prompt.token_ids
        assert (
            tokenizer.decode(example.prompt_ids)
            == "<|system|>Be kind.<|end|><|user|>What is bread?<|end|><|assistant|>"
        )
        assert tokenizer.decode(example.response_ids) == f"{text}<|end|>"


def test_tokens_that_only_one_answer_begins_with_are_the_responses(tmp_path):
    """A template may open a thinking block for a response that does not begin with one."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>so {% endif %}"
    )
    (prompt,) = encoded(tokenizer, load(tmp_path, BREAD | {"response_0": "so be it"})).kept
    assert prompt.pair[0].prompt_ids == prompt.pair[1].prompt_ids
    whole = [tokenizer.decode([*e.prompt_ids, *e.response_ids]) for e in prompt.pair]
    assert [text.rpartition("<|assistant|>")[2] for text in whole] == [f"{text}<|end|>" for text in texts_of(prompt)]


def test_a_pair_with_a_response_beyond_the_limit_is_dropped_and_counted(tmp_path, tokenizer):
    done = encoded(tokenizer, load(tmp_path, BREAD, RIVER), limit=8)
    assert [p.columns["response_0"] for p in done.kept] == ["A river."]
    assert done.dropped == {"longer than 8 tokens": 1}
    with pytest.raises(UserError, match="no pair is left of 2; .* rollout.max_response_tokens sets the limit"):
        encoded(tokenizer, load(tmp_path, BREAD, RIVER), limit=2)


def test_records_without_responses_have_no_pairs(tmp_path):
    assert not have_pairs(load(tmp_path, {"prompt": "What is bread?", "response": "Food."}))
    assert not have_pairs([Prompt("a", "What is bread?", "")])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"response_0": "A river."},
            r"prompts.jsonl:2: a pair needs `response_0` and `response_1`.*`response_1` is None",
        ),
        ({}, r"prompts.jsonl:2: .*`response_0` is None"),
        ({"response_0": " ", "response_1": "A"}, r"prompts.jsonl:2: .*non-empty texts; `response_0` is ' '"),
        ({"response_0": "A", "response_1": ["B"]}, r"prompts.jsonl:2: .*`response_1` is \['B'\]"),
    ],
)
def test_a_record_with_less_than_a_pair_is_named(record, message, tmp_path):
    prompts = load(tmp_path, BREAD, {"prompt": "And water?"} | record)
    with pytest.raises(UserError, match=message):
        have_pairs(prompts)
