"""Arguments go to the backends as the caller has them: any strides, a value for each token or for each sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import repo_loss
from tests.support.kernels.cases import AGGREGATIONS, Batch, make_batch
from tests.support.kernels.oracle import oracle_gradient, oracle_loss

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

VOCABULARY = 23
SWITCHES = {"lam": 0.7, "beta": 0.3, "dual_clip": 3.0, "entropy_coef": 0.1, "return_entropy": True}
LAYOUTS: dict[str, dict[str, Any]] = {"padded": {"leading": (3, 5)}, "packed": {"lengths": [4, 0, 5, 1]}}
Arguments = dict[str, Tensor | None]


def make_arguments(
    leading: tuple[int, ...] = (), lengths: list[int] | None = None, cost_form: str = "hinge", per_sequence: bool = True
) -> tuple[Batch, Arguments]:
    """A batch of numbers, and all tensors of a loss of which some rows are dead.

    cost_form "hinge" has baselines, "given" has cost advantages.
    """
    batch = make_batch(3, leading, VOCABULARY, lengths, torch.float32, dead=0.0)
    shared = (
        "reward_advantages",
        "costs",
        "cost_limit",
        "cost_baselines" if cost_form == "hinge" else "cost_advantages",
    )
    arguments: Arguments = {
        "token_ids": batch.token_ids.masked_fill(batch.old_logps > -1.3, -100),
        "response_mask": batch.importance_weights < 1.7,
        "cu_seqlens": batch.cu_seqlens,
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "importance_weights": batch.importance_weights,
        **{name: batch.sequence_values(per_sequence) for name in shared},
    }
    return batch, arguments


def results(logits: Tensor, arguments: Arguments, **options: Any) -> list[Tensor]:
    """Loss, statistics, values by token and the gradient."""
    leaf = logits.clone().requires_grad_()
    out = repo_loss(leaf, **arguments, **SWITCHES, **options)
    out.loss.backward(torch.full_like(out.loss, 0.3))
    return [out.loss, out.stats.tensor, out.logps, out.entropy, out.kl, leaf.grad]


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)
        assert mine.isfinite().all()


def sliced(x: Tensor) -> Tensor:
    """The same values before others: x[:, :-1]."""
    return torch.cat((x, x[..., :1]), -1)[..., :-1]


def shifted(x: Tensor) -> Tensor:
    """The same values behind others: x[:, 1:]."""
    return torch.cat((x[..., :1], x), -1)[..., 1:]


def transposed(x: Tensor) -> Tensor:
    """The same values; of one dimension, a column of a matrix."""
    return x.t().contiguous().t() if x.ndim == 2 else torch.stack((x, x), 1)[:, 1]


def every_second(x: Tensor) -> Tensor:
    """The same values with others between them."""
    return torch.stack((x, x), -1).flatten(-2)[..., ::2]


def expanded(x: Tensor) -> Tensor:
    """The first value of a sequence, or of all packed rows, without memory of its own for the others."""
    return x[..., :1].expand(x.shape)


VIEWS = {view.__name__: view for view in (sliced, shifted, transposed, every_second, expanded)}


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean", "none"])
@pytest.mark.parametrize("per_sequence", [True, False], ids=["per sequence", "per token"])
@pytest.mark.parametrize("cost_form", ["hinge", "given"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_the_bits_of_contiguous_copies(
    view: str, layout: str, cost_form: str, per_sequence: bool, loss_agg_mode: str
) -> None:
    batch, arguments = make_arguments(**LAYOUTS[layout], cost_form=cost_form, per_sequence=per_sequence)
    bounds = arguments["cu_seqlens"]
    views = {name: None if x is None else VIEWS[view](x) for name, x in arguments.items()}
    if bounds is not None:
        views["cu_seqlens"] = every_second(bounds)
    copies = {name: None if x is None else x.contiguous() for name, x in views.items()}
    strided = [name for name, x in views.items() if x is not None and not x.is_contiguous()]
    assert len(strided) >= (1 if view in ("sliced", "shifted") else 5)
    got = results(batch.logits, views, loss_agg_mode=loss_agg_mode)
    assert_same_bits(got, results(batch.logits, copies, loss_agg_mode=loss_agg_mode))
    assert got[-1].any()


@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int32_ids_give_the_bits_of_int64(layout: str, ids: torch.dtype) -> None:
    batch, arguments = make_arguments(**LAYOUTS[layout])
    cast = {**arguments, "token_ids": transposed(arguments["token_ids"].to(ids))}
    assert_same_bits(results(batch.logits, cast), results(batch.logits, arguments))


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean", "none"])
@pytest.mark.parametrize("cost_form", ["hinge", "given"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_value_for_each_sequence_is_that_of_each_of_its_tokens(
    layout: str, cost_form: str, loss_agg_mode: str
) -> None:
    batch, by_sequence = make_arguments(**LAYOUTS[layout], cost_form=cost_form)
    spread = {
        name: x[batch.sequence_of].view(batch.leading) if x is not None and x.shape == (batch.sequences,) else x
        for name, x in by_sequence.items()
    }
    assert [x.shape for x in by_sequence.values() if x is not None] != [
        x.shape for x in spread.values() if x is not None
    ]
    got, expected = (results(batch.logits, x, loss_agg_mode=loss_agg_mode) for x in (by_sequence, spread))
    assert_same_bits(got, expected)


def agree_with_the_oracle(batch: Batch, arguments: Arguments, **options: Any) -> None:
    got = results(batch.logits, arguments, **options)
    exact = batch.logits.double().requires_grad_()
    expected = oracle_loss(exact, **arguments, **SWITCHES, **options)
    upstream = torch.full_like(expected.loss, 0.3).detach()
    torch.testing.assert_close(got[0].double(), expected.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[-1].double(), oracle_gradient(expected, exact, upstream), rtol=1e-4, atol=1e-6)
    for value, exact_value in zip(got[1], expected.stats.values(), strict=False):
        assert value.isfinite(), exact_value


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_with_as_many_sequences_as_tokens_a_value_is_that_of_a_token(loss_agg_mode: str) -> None:
    batch, arguments = make_arguments(lengths=[2, 0, 3, 0, 1, 0])
    assert batch.leading == (batch.sequences,)
    options = {"loss_agg_mode": loss_agg_mode, "max_length": 9 if loss_agg_mode.endswith("norm") else None}
    agree_with_the_oracle(batch, arguments, **options)
    # as values of the sequences they would have been others
    bounds = torch.tensor([0, 2, 2, 5, 5, 6], dtype=torch.int32)
    sequences = {name: x[:5] if x is not None and x.shape == (6,) else x for name, x in arguments.items()}
    whole = ("token_ids", "response_mask", "old_logps", "ref_logps", "importance_weights")
    sequences |= {name: arguments[name] for name in whole} | {"cu_seqlens": bounds}
    assert not torch.equal(
        results(batch.logits, sequences, **options)[0], results(batch.logits, arguments, **options)[0]
    )


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("cost_form", ["hinge", "given"])
def test_sequences_of_length_0_change_no_row(loss_agg_mode: str, cost_form: str) -> None:
    options = {"loss_agg_mode": loss_agg_mode, "max_length": 9 if loss_agg_mode.endswith("norm") else None}
    batch, arguments = make_arguments(lengths=[0, 3, 0, 0, 4, 2, 0], cost_form=cost_form)
    agree_with_the_oracle(batch, arguments, **options)
    kept = torch.tensor([1, 4, 5])
    without = {name: x[kept] if x is not None and x.shape == (7,) else x for name, x in arguments.items()}
    without["cu_seqlens"] = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    (loss, stats, *rows), (expected, expected_stats, *expected_rows) = (
        results(batch.logits, x, **options) for x in (arguments, without)
    )
    assert_same_bits(rows, expected_rows)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize(
    ("leading", "lengths"),
    [((0, 5), None), ((4, 0), None), ((0, 0), None), ((), []), ((), [0, 0, 0])],
    ids=["B = 0", "L = 0", "B = L = 0", "no sequences", "empty sequences"],
)
def test_nothing_gives_loss_zero_with_every_argument(
    leading: tuple[int, ...], lengths: list[int] | None, loss_agg_mode: str
) -> None:
    options = {"loss_agg_mode": loss_agg_mode, "max_length": 9 if loss_agg_mode.endswith("norm") else None}
    for cost_form in ("hinge", "given"):
        batch, arguments = make_arguments(leading, lengths, cost_form)
        loss, stats, *rows, gradient = results(batch.logits, arguments, **options)
        assert loss.shape == (batch.leading if loss_agg_mode == "none" else ())
        assert not loss.any()
        assert stats.tolist() == [0.0] * 16 + [1.0, 1.0]
        assert all(row.shape == batch.leading for row in rows)
        assert gradient.shape == batch.logits.shape
