"""The statistics: against the oracle, merged over micro-batches, and finite on nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from repo_kernels import LossStats, repo_loss
from repo_kernels.backends.codes import STATS
from tests.support.kernels.cases import Batch, batches, loss_arguments, make_batch, options
from tests.support.kernels.oracle import oracle_loss

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

EXACT = (
    "tokens",
    "tokens_unsafe",
    "sequences",
    "sequences_unsafe",
    "clipped_low_safe",
    "clipped_low_unsafe",
    "clipped_high_safe",
    "clipped_high_unsafe",
)
SUMS = (*EXACT, "ratio_sum", "ratio_square_sum", "kl_old_k3_sum", "rectified_cost_sum", "penalty_sum")


def as_dict(stats: LossStats, expected: dict[str, float]) -> dict[str, float]:
    """The named statistics as floats."""
    return {name: getattr(stats, name).item() for name in expected}


@settings(max_examples=120, deadline=None, derandomize=True)
@given(batches(torch.float64), options())
def test_every_statistic_agrees_with_the_oracle(batch: Batch, chosen: dict[str, Any]) -> None:
    arguments = loss_arguments(batch, **chosen)
    out = repo_loss(batch.logits, **arguments, return_entropy=True)
    expected = oracle_loss(batch.logits, **arguments).stats
    got = as_dict(out.stats, expected)
    for name in EXACT:
        assert got[name] == expected[name], name
    for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=1e-11, abs=1e-11), name


def test_statistics_of_fp32_logits_are_fp32_and_agree_with_the_oracle(backend: str) -> None:
    for seed in range(1 if backend == "triton" else 5):
        batch = make_batch(seed, (6, 20), 33, dtype=torch.float32)
        arguments = loss_arguments(batch, reference="k3", lam=2.0, cost_limit=0.5)
        out = repo_loss(batch.logits, **arguments, return_entropy=True)
        expected = oracle_loss(batch.logits.double(), **arguments).stats
        assert out.stats.tensor.dtype == torch.float32
        for name, value in as_dict(out.stats, expected).items():
            assert value == pytest.approx(expected[name], rel=5e-6, abs=1e-4 if "k1" in name else 0), name


def test_counts_of_a_batch_worked_out_by_hand() -> None:
    """Two sequences, C = 1 and C = 3 against d = 2; rho = 1.5, 0.5, 1 and 1.5, 0.5, dead."""
    logits = torch.zeros(2, 3, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 1, 2], [3, 0, -100]])
    ratio = torch.tensor([[1.5, 0.5, 1.0], [1.5, 0.5, 9.0]])
    old = torch.tensor(0.25).log() - ratio.log()
    reward = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    stats = repo_loss(logits, ids, old, reward, costs=torch.tensor([1.0, 3.0]), cost_limit=2.0, lam=0.25).stats
    # A = -1 - 0.25 * 1 < 0 in the second sequence, whose rho = 1.5 is then not clipped
    expected = {
        "tokens": 5,
        "tokens_unsafe": 2,
        "sequences": 2,
        "sequences_unsafe": 1,
        "clipped_high_safe": 1,
        "clipped_high_unsafe": 0,
        "clipped_low_safe": 1,
        "clipped_low_unsafe": 1,
        "ratio_sum": 5.0,
        "ratio_square_sum": 6.0,
        "ratio_min": 0.5,
        "ratio_max": 1.5,
        "rectified_cost_sum": 1.0,
        "penalty_sum": 0.25,
        "ratio_mean": 1.0,
        "effective_sample_size": 25 / 6,
        "clip_fraction": 0.6,
        "unsafe_fraction": 0.5,
        "rectified_cost": 0.5,
    }
    for name, value in as_dict(stats, expected).items():
        assert value == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("mode", ["rectified", "split", "lagrangian"])
def test_costs_feed_the_statistics_whatever_the_mode_and_multiplier(mode: str) -> None:
    batch = make_batch(40, (4, 3), dead=0.0)
    arguments = loss_arguments(batch, mode=mode, cost_form="given", lam=0.0)
    stats = repo_loss(batch.logits, **arguments).stats
    hinges = arguments["costs"].double().clamp_min(0)
    assert 0 < stats.sequences_unsafe < 4
    assert stats.sequences_unsafe == (hinges > 0).sum()
    assert stats.rectified_cost_sum.item() == pytest.approx(hinges.sum().item(), rel=1e-12)
    assert stats.penalty_sum == 0


def test_limits_per_sequence_decide_safety_per_sequence() -> None:
    batch = make_batch(41, (3, 2), dead=0.0)
    arguments = loss_arguments(batch, lam=1.0) | {
        "costs": torch.tensor([1.0, 1.0, 1.0]),
        "cost_limit": torch.tensor([0.5, 1.0, 2.0]),
    }
    stats = repo_loss(batch.logits, **arguments).stats
    assert stats.sequences_unsafe == 1
    assert stats.tokens_unsafe == 2
    assert stats.rectified_cost_sum == 0.5


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 3, 7, 9], [0, 0, 9, 9, 9]])
def test_costs_of_a_sequence_count_once_however_long_it_is(cu_seqlens: list[int]) -> None:
    lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
    batch = make_batch(42, lengths=lengths, dead=0.0)
    arguments = loss_arguments(batch) | {"costs": torch.tensor([1.0, 100.0, 2.0, 4.0])}
    arguments["costs"][1] = 100.0 if lengths[1] == 0 else 3.0
    stats = repo_loss(batch.logits, **arguments).stats
    alive = torch.tensor(lengths) > 0
    assert stats.sequences == alive.sum()
    assert stats.rectified_cost_sum == arguments["costs"][alive].sum()


def micro_batches(batch: Batch, arguments: dict[str, Any], cuts: list[int]) -> list[LossStats]:
    """Statistics of consecutive groups of sequences of a padded batch."""
    parts = []
    for start, stop in itertools.pairwise([0, *cuts, batch.leading[0]]):
        mine = {
            name: value[start:stop] if isinstance(value, Tensor) and value.ndim else value
            for name, value in arguments.items()
        }
        parts.append(repo_loss(batch.logits[start:stop], **mine, return_entropy=True).stats)
    return parts


@pytest.mark.parametrize("cuts", [[3], [1, 2, 5], [0, 4], [6], [0, 0, 2, 2, 6]], ids=str)
def test_micro_batches_merge_to_the_whole_even_empty_ones(cuts: list[int]) -> None:
    batch = make_batch(43, (6, 5), 9, dead=0.4)
    arguments = loss_arguments(batch, reference="k3", lam=2.0, eps_low=0.1)
    # ratios all on one side of 1: an empty part that contributed its own 1 would show in the extremes
    arguments["old_logps"] = arguments["old_logps"] - 3.0
    whole = repo_loss(batch.logits, **arguments, return_entropy=True).stats
    assert whole.ratio_min > 1
    parts = micro_batches(batch, arguments, cuts)
    for order in (parts, parts[::-1]):
        merged = order[0].merge(*order[1:])
        torch.testing.assert_close(merged.tensor, whole.tensor, rtol=1e-12, atol=1e-12)
        for name in (*EXACT, "ratio_min", "ratio_max"):
            assert torch.equal(getattr(merged, name), getattr(whole, name)), name


def test_merging_does_not_depend_on_the_grouping() -> None:
    batch = make_batch(44, (6, 5), 9, dead=0.4)
    a, b, c = micro_batches(batch, loss_arguments(batch, lam=1.0), [2, 4])
    torch.testing.assert_close(a.merge(b).merge(c).tensor, a.merge(b.merge(c)).tensor, rtol=1e-13, atol=1e-13)
    assert torch.equal(a.merge().tensor, a.tensor)


def test_merging_leaves_the_parts_as_they_were() -> None:
    batch = make_batch(45, (6, 5), 9)
    parts = micro_batches(batch, loss_arguments(batch), [3])
    before = [p.tensor.clone() for p in parts]
    merged = parts[0].merge(parts[1])
    assert merged.tokens == LossStats(before[0]).tokens + LossStats(before[1]).tokens
    assert all(torch.equal(p.tensor, kept) for p, kept in zip(parts, before, strict=True))


@pytest.mark.parametrize("nothing", ["empty", "masked"])
def test_statistics_of_nothing_are_finite_with_ratio_one(nothing: str) -> None:
    batch = make_batch(46, (0, 3) if nothing == "empty" else (2, 3), dead=2.0)
    arguments = loss_arguments(batch, reference="k3", beta=1.0, lam=1.0)
    stats = repo_loss(batch.logits, **arguments, return_entropy=True).stats
    assert stats.tensor.isfinite().all()
    assert stats.ratio_mean == stats.ratio_min == stats.ratio_max == 1
    for name in (*SUMS, "entropy_sum", "kl_ref_sum", "clip_fraction", "unsafe_fraction", "rectified_cost", "kl_ref"):
        assert getattr(stats, name) == 0, name
    for name in ("kl_old", "entropy", "effective_sample_size"):
        assert getattr(stats, name) == 0, name
    merged = stats.merge(stats)
    assert merged.ratio_min == merged.ratio_max == merged.ratio_mean == 1


def test_equal_weights_have_an_effective_sample_size_of_all_tokens() -> None:
    batch = make_batch(47, (3, 4), dead=0.3)
    stats = repo_loss(batch.logits, **loss_arguments(batch, on_policy=True)).stats
    assert stats.effective_sample_size == stats.tokens > 0
    assert stats.ratio_mean == 1
    assert stats.kl_old == 0


def test_an_unknown_statistic_is_named_with_those_that_exist() -> None:
    stats = repo_loss(torch.zeros(1, 2), torch.tensor([0]), None, torch.ones(1)).stats
    with pytest.raises(AttributeError, match=r"'clip_frac'.*ratio_sum"):
        _ = stats.clip_frac


def test_printed_statistics_have_their_names() -> None:
    stats = repo_loss(torch.zeros(2, 2), torch.tensor([0, 1]), None, torch.ones(2)).stats
    shown = repr(stats)
    assert shown.startswith("LossStats(")
    assert " tokens=2, tokens_unsafe=0, " in shown
    assert [part.split("=")[0] for part in shown[10:-1].split(", ")] == list(STATS)
    assert repr(LossStats(stats.tensor.to("meta"))).startswith("LossStats(tensor(")
    several = torch.func.vmap(lambda t: (repr(LossStats(t)), t)[1])(stats.tensor.expand(3, -1))
    assert several.shape == (3, len(STATS))
