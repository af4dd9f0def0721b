"""Prompts: conversations keep their turns, templates give their tokens, batches depend on the step only."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repo.common.errors import UserError
from repo.common.seeds import generator
from repo.data.prompts import Prompt, batch_at, encode_prompt, load_prompts, tokenize_prompts
from tests.support.prompts import ANSWER, CHAT, load, without_template
from tests.support.tiny import make_tokenizer


def test_a_conversation_keeps_its_turns_and_is_shown_as_a_transcript(tmp_path):
    (prompt,) = load(tmp_path, {"prompt": CHAT})
    assert prompt.conversation == CHAT
    assert prompt.text == "system: Be kind.\nuser: What is bread?\nassistant: Food.\nuser: And water?"
    assert prompt.response is None


def test_a_single_user_turn_is_the_same_prompt_as_its_text(tmp_path):
    turn = {"role": "user", "content": "What is bread?"}
    assert load(tmp_path, {"messages": [turn]}) == load(tmp_path, {"prompt": "What is bread?"})
    assert load(tmp_path, {"prompt": "What is bread?"})[0].conversation == [turn]


def test_the_column_comes_before_messages(tmp_path):
    assert load(tmp_path, {"prompt": "x", "messages": CHAT})[0].text == "x"
    assert load(tmp_path, {"prompt": None, "messages": CHAT})[0].conversation == CHAT
    assert load(tmp_path, {"prompt": "x", "chat": CHAT}, column="chat")[0].conversation == CHAT


def test_a_trailing_answer_is_the_supervised_response(tmp_path):
    (prompt,) = load(tmp_path, {"messages": [*CHAT, ANSWER]})
    assert prompt.conversation == CHAT
    assert prompt.response == "A river."
    assert load(tmp_path, {"messages": [CHAT[1], ANSWER]}) == load(
        tmp_path, {"prompt": CHAT[1]["content"], "response": "A river."}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts in"),
        ("{oops\n", ":1: not JSON: Expecting property name"),
        ('{"prompt": "a"}\n{"text": "b"}\n', ":2: `prompt` must be a non-empty string or a list of .*; got None"),
        ('{"prompt": " "}\n', ":1: `prompt` must be a non-empty string or a list of role and content; got ' '"),
        ('{"prompt": {"a": 1}}\n', "`prompt` must be .*; got {'a': 1}"),
        ('{"messages": []}\n', ":1: `messages` must be a non-empty string or a list of role and content; got "),
        ('{"messages": ["a"]}\n', "`messages` turn 1: `role` must be system, user or assistant; got None"),
        ('{"messages": [{"role": "tool", "content": "a"}]}\n', "turn 1: `role` must be .*; got 'tool'"),
        ('{"messages": [{"role": "user", "content": " "}]}\n', "turn 1: `content` must be a non-empty string; got ' '"),
        ('{"messages": [{"role": "user"}]}\n', "turn 1: `content` must be a non-empty string; got None"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "`messages` must end with a user's turn"),
        ('{"messages": [{"role": "system", "content": "a"}]}\n', "`messages` must end with a user's turn"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', ":2: same id 'x' as .*:1$"),
        ("[1]\n", r":1: must be an object with `prompt`; got \[1\]"),
    ],
)
def test_bad_lines_are_told_by_line_and_field(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(path)


def test_a_response_beside_a_trailing_answer_is_ambiguous(tmp_path):
    with pytest.raises(UserError, match="must end with a user's turn, or if there is no `response` with one answer"):
        load(tmp_path, {"messages": [*CHAT, ANSWER], "response": "Another."})


def test_a_line_in_another_encoding_is_a_sentence(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(UserError, match=":2: not JSON: 'utf-8' codec can't decode byte 0xe9"):
        load_prompts(path)


def test_line_separators_inside_a_prompt_do_not_end_the_line(tmp_path):
    assert load(tmp_path, {"prompt": "one\u2028two\u0085three", "id": None})[0].text == "one\u2028two\u0085three"


def test_missing_ids_come_from_the_text(tmp_path):
    first, second = load(tmp_path, {"prompt": "hello"}, {"prompt": "bye", "id": 7})
    assert len(first.id) == 16
    assert second.id == "7"


def test_repeated_prompts_without_ids_are_dropped_and_counted(tmp_path, tokenizer):
    prompts = load(tmp_path, {"prompt": "bread"}, {"prompt": "water"}, {"prompt": "bread"}, {"prompt": "bread"})
    found = tokenize_prompts(prompts, tokenizer, None, 20)
    assert [p.text for p in found.kept] == ["bread", "water"]
    assert found.dropped == {"repeated": 2}


def test_long_prompts_are_dropped_and_counted(tokenizer):
    prompts = [Prompt("a", "bread", ""), Prompt("b", "bread " * 50, ""), Prompt("a", "bread", "")]
    found = tokenize_prompts(prompts, tokenizer, None, 20)
    assert [p.id for p in found.kept] == ["a"]
    assert found.report() == "dropped: 1 longer than 20 tokens, 1 repeated"
    assert tokenize_prompts(prompts[:1], tokenizer, None, 20).report() == "dropped: none"
    with pytest.raises(UserError, match="no prompt is left of 3; dropped: 2 longer than 2 tokens, 1 repeated"):
        tokenize_prompts(prompts, tokenizer, None, 2)


def test_prompts_end_where_the_response_begins(tokenizer):
    (prompt,) = tokenize_prompts([Prompt("a", "bread", "")], tokenizer, "Be kind.", 99).kept
    assert tokenizer.decode(prompt.token_ids) == "<|system|>Be kind.<|end|><|user|>bread<|end|><|assistant|>"


def test_tokenising_changes_nothing_but_the_tokens(tokenizer, tmp_path):
    (prompt,) = load(tmp_path, {"messages": [*CHAT, ANSWER], "category": "food"})
    (tokenized,) = tokenize_prompts([prompt], tokenizer, None, 99).kept
    assert dataclasses.replace(tokenized, token_ids=()) == prompt


def test_a_conversation_goes_through_the_template_whole_and_keeps_its_own_system_message(tokenizer, tmp_path):
    own, none = load(tmp_path, {"messages": CHAT}, {"messages": CHAT[1:]})
    rest = "<|user|>What is bread?<|end|><|assistant|>Food.<|end|><|user|>And water?<|end|><|assistant|>"
    assert tokenizer.decode(encode_prompt(tokenizer, own, "Be brief.")) == f"<|system|>Be kind.<|end|>{rest}"
    assert tokenizer.decode(encode_prompt(tokenizer, none, "Be brief.")) == f"<|system|>Be brief.<|end|>{rest}"
    assert tokenizer.decode(encode_prompt(tokenizer, none)) == rest


def test_without_a_template_a_question_is_bare_and_a_conversation_a_transcript(tmp_path):
    plain = without_template()
    question, chat = load(tmp_path, {"prompt": "What is bread?"}, {"messages": CHAT[1:]})
    assert plain.decode(encode_prompt(plain, question)) == "What is bread?"
    assert plain.decode(encode_prompt(plain, question, "Be kind.")) == "Be kind.\nWhat is bread?"
    turns = "user: What is bread?\nassistant: Food.\nuser: And water?\nassistant:"
    assert plain.decode(encode_prompt(plain, chat)) == turns
    assert plain.decode(encode_prompt(plain, chat, "Be kind.")) == f"system: Be kind.\n{turns}"


def test_a_template_that_refuses_a_prompt_is_a_sentence(tmp_path):
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(UserError, match="the model's chat template refuses a prompt: .*no system message"):
        tokenize_prompts(load(tmp_path, {"messages": CHAT}), strict, None, 99)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 9), st.sampled_from(["epoch", "ptx"]))
def test_batches_visit_every_item_once_per_epoch_and_depend_on_the_step_only(count, size, seed, stream):
    items = list(range(count))
    steps = -(-3 * count // size)
    batches = [batch_at(items, step, size, seed, stream) for step in range(steps)]
    assert batches == [batch_at(items, step, size, seed, stream) for step in reversed(range(steps))][::-1]
    seen = [item for batch in batches for item in batch]
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == items


def test_prompts_come_in_the_order_of_their_stream():
    def order(stream, epoch):
        return torch.randperm(10, generator=generator(3, stream, epoch)).tolist()

    items = range(10)
    assert [i for step in range(5) for i in batch_at(items, step, 4, 3)] == order("epoch", 0) + order("epoch", 1)
    assert batch_at(items, 0, 10, 3, "ptx") == order("ptx", 0) != order("epoch", 0)
