"""Supervised examples: the template's own tokens up to the end of the answer."""

import pytest

from repo.common.errors import UserError
from repo.data.prompts import encode_prompt, load_prompts, tokenize_examples
from tests.support.prompts import ANSWER, CHAT, load
from tests.support.tiny import make_tokenizer


def test_examples_are_the_templates_own_tokens_up_to_the_end_of_the_turn(tokenizer, tmp_path):
    prompts = load(tmp_path, {"messages": [*CHAT, ANSWER]}, {"prompt": "bread", "response": "Flour."})
    found = tokenize_examples(prompts, tokenizer, None, 99)
    for prompt, example in zip(prompts, found.kept, strict=True):
        turns = [*prompt.conversation, {"role": "assistant", "content": prompt.response}]
        assert [*example.prompt_ids, *example.response_ids] == tokenizer.apply_chat_template(turns)["input_ids"]
        assert list(example.prompt_ids) == encode_prompt(tokenizer, prompt)
        assert tokenizer.decode(example.response_ids) == f"{prompt.response}<|end|>"


def test_what_a_template_writes_after_the_end_of_a_turn_is_no_part_of_the_response(tmp_path):
    chatml = make_tokenizer()
    chatml.chat_template = chatml.chat_template.replace("<|end|>", "<|end|>\n")
    (example,) = tokenize_examples(load(tmp_path, {"prompt": "bread", "response": "Food."}), chatml, None, 99).kept
    assert chatml.decode(example.prompt_ids) == "<|user|>bread<|end|>\n<|assistant|>"
    assert chatml.decode(example.response_ids) == "Food.<|end|>"


@pytest.mark.parametrize("template", [None, "{{ messages | length }} {{ messages[0]['content'] }}"])
def test_without_a_template_that_continues_the_prompt_the_response_is_its_text_and_an_end(template, tmp_path):
    other = make_tokenizer()
    other.chat_template = template
    prompts = load(tmp_path, {"prompt": "bread", "response": "Food."})
    (example,) = tokenize_examples(prompts, other, None, 99).kept
    assert list(example.prompt_ids) == encode_prompt(other, prompts[0])
    assert other.decode(example.response_ids) == "Food.<|end|>"
    pad = other.pad_token_id
    assert tokenize_examples(prompts, other, None, 99, [pad]).kept[0].response_ids == (*example.response_ids[:-1], pad)


def test_any_of_the_models_end_tokens_ends_a_response(tmp_path):
    gemma = make_tokenizer()
    prompts = load(tmp_path, {"prompt": "bread", "response": "Food."})
    end, gemma.eos_token = gemma.eos_token_id, "<|pad|>"
    (example,) = tokenize_examples(prompts, gemma, None, 99, [gemma.eos_token_id, end]).kept
    assert gemma.decode(example.response_ids) == "Food.<|end|>"


def test_examples_are_limited_as_a_whole_and_counted_by_pair(tokenizer, tmp_path):
    short = {"prompt": "bread", "response": "Food."}
    records = [short, short, {**short, "response": "Flour."}, {**short, "response": "water " * 40}]
    found = tokenize_examples(load(tmp_path, *records), tokenizer, None, 30)
    assert len(found.kept) == 2
    assert found.report() == "dropped: 1 repeated, 1 longer than 30 tokens"
    longest = max(len(e.prompt_ids) + len(e.response_ids) for e in found.kept)
    assert len(tokenize_examples(load(tmp_path, *records), tokenizer, None, longest).kept) == 2
    assert len(tokenize_examples(load(tmp_path, *records), tokenizer, None, longest - 1).kept) < 2


@pytest.mark.parametrize("response", [None, ""])
def test_an_example_without_a_response_is_named(response, tokenizer, tmp_path):
    with pytest.raises(UserError, match="prompt 'x' has no `response`"):
        tokenize_examples(load(tmp_path, {"id": "x", "prompt": "a", "response": response}), tokenizer, None, 99)


def test_a_response_that_is_no_text_matters_to_supervised_examples_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": ["b"]}\n')
    prompts = load_prompts(path)
    assert prompts[0].response is None
    with pytest.raises(UserError, match="has no `response`, which a supervised example needs"):
        tokenize_examples(prompts, make_tokenizer(), None, 99)
