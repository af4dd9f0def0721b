"""Truncated importance weights against the ratio written out, and their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repo_kernels import repo_loss_from_logps, truncated_importance_weights

OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -1.0, -9.0]], dtype=torch.float64)
ROLLOUT = torch.tensor([[-1.5, -2.5, -0.25], [-0.5, -1.5, math.nan]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_tokens_have_their_ratio_up_to_the_cap() -> None:
    out = truncated_importance_weights(OLD, ROLLOUT, 1.5, response_mask=MASK)
    half = math.exp(0.5)
    expected = [[min(half, 1.5)] * 2 + [math.exp(-0.25)], [1 / half, min(half, 1.5), 1.0]]
    torch.testing.assert_close(out.weights, torch.tensor(expected, dtype=torch.float64))
    assert (out.cut, out.counted) == (3, 5)
    assert out.cut_fraction == pytest.approx(0.6)


def test_sequences_have_the_product_of_their_live_tokens() -> None:
    out = truncated_importance_weights(OLD, ROLLOUT, 1.5, level="sequence", response_mask=MASK)
    assert out.weights.tolist() == [[1.5] * 3, [1.0] * 3]  # exp(0.75) is cut, and exp(-0.5 + 0.5) is 1
    assert (out.cut, out.counted) == (1, 2)


def test_packed_sequences_are_the_padded_ones() -> None:
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    packed = [x.flatten()[:5] for x in (OLD, ROLLOUT)]
    for level in ("token", "sequence"):
        out = truncated_importance_weights(*packed, 1.5, level=level, cu_seqlens=bounds)
        padded = truncated_importance_weights(OLD, ROLLOUT, 1.5, level=level, response_mask=MASK)
        torch.testing.assert_close(out.weights, padded.weights.flatten()[:5])
        assert (out.cut, out.counted) == (padded.cut, padded.counted)


@given(
    st.lists(st.tuples(st.floats(-50, 0), st.floats(-50, 0), st.booleans()), min_size=1, max_size=12),
    st.sampled_from(["token", "sequence"]),
    st.floats(0.5, 10),
)
def test_weights_lie_between_0_and_the_cap_and_are_1_where_both_agree(tokens, level, cap) -> None:
    old, rollout, live = (torch.tensor(x).view(1, -1) for x in zip(*tokens, strict=True))
    out = truncated_importance_weights(old, rollout, cap, level=level, response_mask=live)
    assert ((out.weights > 0) & (out.weights <= max(cap, 1.0) + 1e-6)).all()
    assert 0 <= out.cut <= out.counted == (live.sum() if level == "token" else live.any())
    same = truncated_importance_weights(old, old.clone(), max(cap, 1.0), level=level, response_mask=live)
    assert (same.weights == 1).all()
    assert same.cut == 0


def test_impossible_tokens_give_no_nan() -> None:
    old, rollout = torch.tensor([[-math.inf, -math.inf, 0.0]]), torch.tensor([[-math.inf, 0.0, -math.inf]])
    weights = truncated_importance_weights(old, rollout, 2.0).weights
    assert weights[0].tolist() == pytest.approx([1.0, math.exp(-20), 2.0])
    dead = truncated_importance_weights(old, rollout, 2.0, level="sequence", response_mask=torch.zeros(1, 3))
    assert (dead.weights == 1).all()
    assert dead.cut_fraction == 0
    assert not truncated_importance_weights(old, rollout, 2.0, level="sequence").weights.isnan().any()


def test_the_logarithm_of_a_sequence_is_clamped_like_a_token_s() -> None:
    far = torch.full((1, 3), -30.0, dtype=torch.float64)
    out = truncated_importance_weights(torch.zeros_like(far), far, 1e30, level="sequence")
    assert out.weights.tolist() == [[pytest.approx(math.exp(20))] * 3]
    assert truncated_importance_weights(far, torch.zeros_like(far), 1e30, level="sequence").weights[0, 0] > 1e-9


def test_a_loss_takes_them() -> None:
    old = OLD.clone().requires_grad_()
    weights = truncated_importance_weights(old.detach(), ROLLOUT, 1.5, response_mask=MASK).weights
    out = repo_loss_from_logps(old, OLD, torch.ones(2), response_mask=MASK, importance_weights=weights)
    out.loss.backward()
    torch.testing.assert_close(old.grad, -weights * MASK / 5)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, r"^old_logps must be a tensor of float32 or float64; got", {"old_logps": [0.0]}),
        (ValueError, r"^rollout_logps must have shape \(2, 3\); got", {"rollout_logps": torch.zeros(2)}),
        (ValueError, r"^is_cap must be > 0 and", {"is_cap": 0.0}),
        (ValueError, r"^level must be .*got 'word'", {"level": "word"}),
        (ValueError, r"^response_mask must hold 0 and 1 alone", {"response_mask": 2 * MASK}),
        (ValueError, r"^cu_seqlens is for packed", {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(error: type[Exception], match: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"old_logps": OLD, "rollout_logps": ROLLOUT, "is_cap": 2.0, **changed}
    with pytest.raises(error, match=match):
        truncated_importance_weights(**given)
