"""Sequences, prompts and micro-batches."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo.data import Prompt, batch_at, load_prompts, tokenize_prompts
from repo.errors import UserError
from repo.sequences import make_sequences, micro_batches

from .tiny import make_tokenizer

LISTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=12)


def build(lengths):
    return make_sequences([[1] * p for p, _ in lengths], [[2] * r for _, r in lengths], pad_id=2)


def test_masks_come_from_lengths_even_where_pad_is_a_real_token():
    s = make_sequences([[5, 6], [7]], [[2, 2], [2]], pad_id=2)
    assert s.input_ids.tolist() == [[5, 6, 2, 2], [2, 7, 2, 2]]
    assert s.attention_mask.tolist() == [[True, True, True, True], [False, True, True, False]]
    assert s.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 1]]


@given(LISTS)
def test_selection_keeps_every_real_token(lengths):
    s = build(lengths)
    for rows in (torch.arange(len(lengths)), torch.arange(len(lengths)).flip(0)[: (len(lengths) + 1) // 2]):
        part = s.select(rows)
        assert part.attention_mask.sum(1).tolist() == [sum(lengths[i]) for i in rows]
        assert (part.input_ids[:, : part.prompt_width][part.attention_mask[:, : part.prompt_width]] == 1).all()
        assert (part.response_ids[part.response_mask] == 2).all()


@given(LISTS, st.integers(1, 60))
@settings(max_examples=200)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget):
    s = build(lengths)
    groups = micro_batches(s, torch.arange(len(lengths)), budget)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    for rows in groups:
        width = s.prompt_lengths[rows].max() + s.response_lengths[rows].max()
        assert len(rows) == 1 or len(rows) * width <= budget


def test_batches_visit_every_prompt_once_per_epoch_and_depend_on_the_step_only():
    prompts = [Prompt(str(i), str(i), "") for i in range(10)]
    seen = [p.id for step in range(5) for p in batch_at(prompts, step, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(p.id for p in prompts) == sorted(seen[10:20])
    assert seen[:10] != seen[10:20]
    assert [p.id for p in batch_at(prompts, 3, 4, seed=3)] == seen[12:16]


def test_long_prompts_are_dropped_and_counted():
    tokenizer = make_tokenizer()
    prompts = [Prompt("a", "bread", ""), Prompt("b", "bread " * 50, "")]
    kept, dropped = tokenize_prompts(prompts, tokenizer, None, 20)
    assert [p.id for p in kept] == ["a"]
    assert dropped == 1
    with pytest.raises(UserError, match="all 2 prompts are longer than data.max_prompt_tokens=2"):
        tokenize_prompts(prompts, tokenizer, None, 2)


def test_prompts_end_where_the_response_begins():
    tokenizer = make_tokenizer()
    kept, _ = tokenize_prompts([Prompt("a", "bread", "")], tokenizer, "Be kind.", 99)
    assert tokenizer.decode(kept[0].token_ids) == "<|system|>Be kind.<|end|><|user|>bread<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts in"),
        ("{oops\n", ":1: not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', ":2: `prompt` must be a non-empty string; got None"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', ":2: same id .* as line 1"),
        ("[1]\n", "`prompt` must be a non-empty string"),
    ],
)
def test_bad_prompt_files_are_told_by_line(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(path)


def test_missing_ids_come_from_the_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "hello"}) + "\n\n" + json.dumps({"prompt": "bye", "id": 7}) + "\n")
    first, second = load_prompts(path)
    assert len(first.id) == 16
    assert second.id == "7"


def test_line_separators_inside_a_prompt_do_not_end_the_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "one\u2028two\u0085three", "id": None}, ensure_ascii=False) + "\n")
    assert load_prompts(path)[0].text == "one\u2028two\u0085three"


def test_a_file_in_another_encoding_is_a_sentence(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"prompt": "caf\xe9"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        load_prompts(path)
