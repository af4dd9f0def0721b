"""Sequences: rectangles of token ids with masks from lengths."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from repo.data.sequences import make_sequences

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


@given(LISTS)
def test_token_lists_are_what_the_sequences_were_made_from(lengths):
    assert build(lengths).token_lists() == [([1] * p, [2] * r) for p, r in lengths]
