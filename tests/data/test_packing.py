"""Packing: what each state sees, and how rows are split by token budget."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo.data.micro_batches import micro_batches
from repo.data.packing import MULTIPLE, flat, pack, pad, unflat
from repo.data.sequences import make_sequences

GROUPS = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), min_size=1, max_size=5)), max_size=5)
GROUPS = GROUPS.filter(bool)


def build(groups):
    """Sequences whose every token is another, but for the prompt of a group."""
    fresh = itertools.count(1)
    prompts, responses, group = [], [], []
    for number, (prompt, lengths) in enumerate(groups):
        ids = list(itertools.islice(fresh, prompt))
        for length in lengths:
            prompts.append(ids)
            responses.append(list(itertools.islice(fresh, length)))
            group.append(number)
    return make_sequences(prompts, responses, 0, torch.tensor(group))


def seen(packed):
    """By query of the packed row, the tokens that it attends to, itself last, and their positions."""
    segments = packed.segments
    keys = torch.arange(packed.tokens) if segments.keys is None else segments.keys
    found = []
    for q0, q1, k0, k1 in zip(segments.cu_q, segments.cu_q[1:], segments.cu_k, segments.cu_k[1:], strict=False):
        for query in range(q1 - q0):
            visible = keys[k0 : k1 - (q1 - q0) + query + 1]
            found.append((packed.input_ids[0, visible].tolist(), packed.position_ids[0, visible].tolist()))
    return found


def rounded(tokens):
    """With the filler."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def test_responses_of_a_group_follow_one_copy_of_their_prompt():
    s = make_sequences([[1, 2], [3], [1, 2]], [[4, 5], [6, 7], [8, 9, 10]], 0, torch.tensor([0, 1, 0]))
    packed = pack(s, torch.arange(3), share_prefix=True)
    assert packed.input_ids[:, :7].tolist() == [[1, 2, 8, 9, 4, 3, 6]]
    assert packed.position_ids[:, :7].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert packed.tokens == 8
    assert packed.rows.tolist() == [1, 2, 3, 1, 4, 5, 6]
    assert packed.token_ids.tolist() == [8, 9, 10, 4, 5, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert packed.order.tolist() == [2, 0, 1]
    assert packed.lengths == (3, 2, 2)
    assert packed.segments.cu_q.tolist() == [0, 2, 4, 5, 7, 8]
    assert packed.segments.cu_k.tolist() == [0, 2, 6, 9, 11, 12]
    assert packed.segments.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]


@given(GROUPS, st.booleans(), st.booleans(), st.randoms())
@settings(max_examples=150, deadline=None)
def test_the_state_that_predicts_a_token_has_seen_exactly_what_comes_before_it(groups, share, with_last, random):
    s = build(groups)
    rows = random.sample(range(len(s.group)), random.randint(1, len(s.group)))
    packed = pack(s, torch.tensor(rows), share, with_last)
    texts, context = s.token_lists(), seen(packed)
    assert sorted(packed.order.tolist()) == sorted(rows)
    assert len(context) == packed.tokens >= 1
    place = 0
    for row, length in zip(packed.order.tolist(), packed.lengths, strict=True):
        prompt, response = texts[row]
        assert length == len(response)
        for t in range(length):
            before = prompt + response[:t]
            assert context[packed.rows[place]] == (before, list(range(len(before))))
            assert packed.token_ids[place] == response[t]
            if with_last:
                assert context[packed.inputs[place]][0] == [*before, response[t]]
            place += 1
    assert place == len(packed.rows) == packed.cu_seqlens[-1]
    laid = {int(s.group[row]) if share else row: len(texts[row][0]) for row in rows if texts[row][1]}
    own = sum(max(0, len(texts[row][1]) - (not with_last)) for row in rows)
    used = sum(laid.values()) + own or len(texts[packed.order[0]][0])
    assert packed.tokens == rounded(used)
    assert packed.segments.cu_q[-1] == packed.tokens
    for filler in range(used, packed.tokens):
        assert len(context[filler][0]) == filler - used + 1


@given(GROUPS, st.booleans())
def test_padding_predicts_the_same_tokens_from_the_same_places(groups, with_last):
    s = build(groups)
    rows = torch.arange(len(s.group)).flip(0)
    padded = pad(s, rows, with_last)
    assert padded.segments is None
    ids, mask = padded.input_ids.flatten(), padded.attention_mask.flatten()
    assert mask[padded.rows].all()
    assert torch.equal(padded.token_ids, torch.tensor([t for row in rows for t in s.token_lists()[row][1]]).long())
    positions = [p + t - 1 for row in rows for p, r in [map(len, s.token_lists()[row])] for t in range(r)]
    assert padded.position_ids.flatten()[padded.rows].tolist() == positions
    if with_last:
        assert torch.equal(ids[padded.inputs], padded.token_ids)


@pytest.mark.parametrize("share", [True, False])
def test_values_come_back_to_the_places_they_were_taken_from(share):
    s = build([(3, [4, 0, 2]), (2, [1, 6])])
    values = torch.arange(5.0 * 6).view(5, 6)
    packed = pack(s, torch.tensor([4, 0, 2, 1]), share)
    out = torch.full_like(values, -1)
    unflat(packed, flat(packed, values), out)
    taken = s.response_mask & (torch.arange(5) != 3)[:, None]
    assert torch.equal(out, torch.where(taken, values, -1.0))
    assert torch.equal(flat(packed, s.response_ids), packed.token_ids)
    assert flat(packed, torch.arange(5)).tolist() == packed.order.tolist()
    with pytest.raises(ValueError, match="6 columns"):
        flat(packed, values[:, :3])


def bins_needed(sizes, capacity):
    """The fewest bins, by trying every assignment."""
    for count in itertools.count(math.ceil(sum(sizes) / capacity)):
        for places in itertools.product(range(count), repeat=len(sizes)):
            loads = [sum(s for s, place in zip(sizes, places, strict=True) if place == b) for b in range(count)]
            if max(loads) <= capacity:
                return count
    raise AssertionError


@given(GROUPS, st.integers(1, 40), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_micro_batches_hold_every_row_once_within_the_budget(groups, budget, share, with_last):
    s = build(groups)
    sets = micro_batches(s, torch.arange(len(s.group)), budget, share, with_last=with_last)
    assert sorted(torch.cat(sets).tolist()) == list(range(len(s.group)))
    for rows in sets:
        assert rows.tolist() == sorted(rows.tolist())
        alone = int((s.response_lengths[rows] > 0).sum()) <= 1
        assert alone or pack(s, rows, share, with_last).tokens <= budget


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=6), st.sampled_from([16, 24]))
@settings(max_examples=60, deadline=None)
def test_micro_batches_are_nearly_as_few_as_can_be(lengths, budget):
    s = build([(p, [r]) for p, r in lengths])
    sets = micro_batches(s, torch.arange(len(lengths)), budget, False)
    best = bins_needed([p + r - 1 for p, r in lengths], budget)
    assert len(sets) <= math.floor(11 / 9 * best + 6 / 9)


def test_no_micro_batch_is_much_smaller_than_the_others():
    s = build([(2, [30])] * 8 + [(2, [8])])
    sizes = [pack(s, rows, True).tokens for rows in micro_batches(s, torch.arange(9), 128, True)]
    assert sizes == [96, 96, 72]  # first-fit: 128, 128, 16
    s = build([(4, [10] * 9)])  # one group, cut into pieces
    sizes = [pack(s, rows, True).tokens for rows in micro_batches(s, torch.arange(9), 48, True)]
    assert sizes == [32, 32, 32]


def test_a_group_that_fits_stays_together_and_a_larger_one_has_its_prompt_in_each_piece():
    s = build([(10, [11, 11, 11]), (4, [9, 9, 9])])
    sets = micro_batches(s, torch.arange(6), 39, True)
    assert [rows.tolist() for rows in sets] == [[0, 1], [3, 4, 5], [2]]
    assert [pack(s, rows, True).tokens for rows in sets] == [32, 32, 24]


@given(GROUPS, st.integers(1, 60), st.booleans())
def test_padded_micro_batches_count_the_padding(groups, budget, with_last):
    s = build(groups)
    sets = micro_batches(s, torch.arange(len(s.group)), budget, True, padded=True, with_last=with_last)
    assert sorted(torch.cat(sets).tolist()) == list(range(len(s.group)))
    assert all(len(rows) == 1 or pad(s, rows, with_last).tokens <= budget for rows in sets)
