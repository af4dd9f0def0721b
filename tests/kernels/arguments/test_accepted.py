"""What a call takes beside the plainest form: masks of numbers, columns, numpy's scalars, rows outside of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from repo_kernels import LossOptions, linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.option_sets import make_call


def gradients(logits: Tensor, **arguments: Any) -> list[Tensor]:
    """Loss, statistics, rows and the gradient."""
    leaf = logits.clone().requires_grad_()
    out = repo_loss(leaf, **arguments)
    out.loss.sum().backward()
    return [out.loss.detach(), out.stats.tensor, out.logps, leaf.grad]


def assert_same(mine: list[Tensor], other: list[Tensor]) -> None:
    for x, y in zip(mine, other, strict=True):
        assert torch.equal(x, y)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_mask_may_hold_zeros_and_ones_of_any_dtype(layout: str, dtype: torch.dtype) -> None:
    logits, arguments = make_call(layout, "plain")
    mask = arguments.pop("response_mask")
    assert_same(gradients(logits, **arguments, response_mask=mask.to(dtype)),
                gradients(logits, **arguments, response_mask=mask))  # fmt: skip


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan")])
def test_a_mask_of_other_numbers_is_refused(value: float) -> None:
    logits, arguments = make_call("padded", "plain")
    mask = arguments["response_mask"].to(torch.int64 if isinstance(value, int) else torch.float32)
    mask[1, 2] = value
    with pytest.raises(ValueError, match=rf"^response_mask must hold 0 and 1 alone; got {value}$"):
        repo_loss(logits, **{**arguments, "response_mask": mask})


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", ["reward_advantages", "costs", "cost_baselines", "cost_limit", "cost_advantages"])
def test_a_column_is_one_value_per_sequence(name: str, layout: str) -> None:
    options = "lagrangian, k2" if name == "cost_advantages" else "hinge with baselines, k1"
    logits, arguments = make_call(layout, options)
    if name == "cost_limit":
        arguments[name] = torch.tensor([0.1, -0.2, 0.3])
    assert arguments[name].shape == (3,)
    assert_same(gradients(logits, **{**arguments, name: arguments[name][:, None]}), gradients(logits, **arguments))


def test_a_column_is_not_taken_for_values_of_tokens() -> None:
    logits, arguments = make_call("tokens", "plain")
    for name in ("old_logps", "response_mask"):
        with pytest.raises(ValueError, match=rf"^{name} must have shape \(9,\); got .* of shape \(9, 1\)"):
            repo_loss(logits, **{**arguments, name: arguments[name][:, None]})


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numpy_scalars_are_numbers(kind: type[np.floating]) -> None:
    logits, arguments = make_call("padded", "k3, entropy, importance weights, dual clip")
    values = {"lam": 0.5, "beta": 0.25, "eps_low": 0.125, "eps_high": 0.25, "entropy_coef": 0.5, "dual_clip": 3.0,
              "cost_limit": 0.5, "divisor": 7.0, "grad_scale": 2.0, "temperature": 0.75, "softcap": 8.0}  # fmt: skip
    other = {name: kind(value) for name, value in values.items()}
    assert_same(gradients(logits, **arguments | other), gradients(logits, **arguments | values))
    assert type(LossOptions(eps_high=kind(0.25)).eps_high) is float
    with pytest.raises(ValueError, match=r"^lam must be >= 0"):
        repo_loss(logits, **arguments | {"lam": kind(-1.0)})


def test_numpy_scalars_of_the_other_functions() -> None:
    logits, ids, weight = torch.randn(3, 5), torch.arange(3), torch.eye(5)
    half = selective_log_softmax(logits, ids, temperature=0.5)
    assert torch.equal(selective_log_softmax(logits, ids, temperature=np.float32(0.5)), half)
    logps = linear_selective_log_softmax(logits, weight, ids, temperature=np.float32(0.5), chunk_tokens=np.int64(2))
    torch.testing.assert_close(logps, half)
    options = {"loss_agg_mode": "seq-mean-token-sum-norm", "max_length": np.int64(4)}
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    linear_repo_loss(logits, weight, ids, None, torch.ones(3), cu_seqlens=bounds, **options)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bounds", [[0, 4, 10], [2, 4, 10], [3, 3, 3], [5, 12]])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_rows_outside_of_all_bounds_are_dead(mode: str, bounds: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(12, 37, generator=generator), torch.randint(0, 37, (12,), generator=generator)
    old, advantages = torch.randn(12, generator=generator) - 3, torch.randn(len(bounds) - 1, generator=generator)
    inside = torch.zeros(12, dtype=torch.bool)
    inside[bounds[0] : bounds[-1]] = True
    logits[~inside], old[~inside] = torch.nan, torch.nan
    cuts = torch.tensor(bounds, dtype=torch.int32)
    got = gradients(logits, token_ids=ids, old_logps=old, reward_advantages=advantages, cu_seqlens=cuts,
                    loss_agg_mode=mode)  # fmt: skip
    trimmed = gradients(logits[inside], token_ids=ids[inside], old_logps=old[inside], reward_advantages=advantages,
                        cu_seqlens=cuts - bounds[0], loss_agg_mode=mode)  # fmt: skip
    torch.testing.assert_close(got[0], trimmed[0])
    torch.testing.assert_close(got[1], trimmed[1])
    torch.testing.assert_close(got[3][inside], trimmed[3])
    assert not got[3][~inside].any()
    hidden = linear_repo_loss(logits, torch.eye(37), ids, old, advantages, cu_seqlens=cuts, loss_agg_mode=mode)
    torch.testing.assert_close(hidden.loss, got[0])


def test_bounds_need_no_values_in_fake_mode_or_compiled() -> None:
    logits, arguments = make_call("packed", "sequence means")
    short = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    arguments["cu_seqlens"] = short
    compiled = torch.compile(lambda z: repo_loss(z, **arguments).loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits), repo_loss(logits, **arguments).loss)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        assert repo_loss(mode.from_tensor(logits), **fakes).loss.shape == ()


def test_messages_say_what_to_pass_instead() -> None:
    hidden, ids, head = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.nn.Linear(4, 7)
    with pytest.raises(TypeError, match=r"^weight must be a tensor; got a module, Linear: pass its weight, and its"):
        linear_selective_log_softmax(hidden, head, ids)
    with pytest.raises(ValueError, match=r"^weight must have shape \(V, 4\) .* of shape \(0,\).*partitioned \(Ze"):
        linear_selective_log_softmax(hidden, torch.zeros(0), ids)
    rows = torch.nested.nested_tensor([torch.zeros(2, 5), torch.zeros(3, 5)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^logits must be a dense tensor; got a nested one: pass its values\(\) as"):
        selective_log_softmax(rows, ids)
    with pytest.raises(TypeError) as caught:
        repo_loss(hidden, ids, None, list(range(10_000)))
    assert len(str(caught.value)) < 400


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bounds", [[0, 0, 3, 3], [0, 1, 2, 3], [0, 1, 1, 2], [1, 1, 1, 3], [0, 0, 0, 0]])
def test_a_column_is_one_value_per_sequence_where_there_are_as_many_as_rows(bounds: list[int]) -> None:
    torch.manual_seed(0)
    logits, ids, old, cu_seqlens = torch.randn(3, 5), torch.arange(3), torch.full((3,), -1.5), torch.tensor(bounds)
    per_sequence = {
        "reward_advantages": torch.tensor([10.0, 3.0, -2.0]),
        "costs": torch.tensor([1.0, -1.0, 2.0]),
        "cost_limit": torch.tensor([0.5, 0.0, 3.0]),
        "cost_advantages": torch.tensor([1.0, 2.0, 4.0]),
        "temperature": torch.tensor([0.7, 1.0, 1.4]),
    }
    counts = cu_seqlens.diff()
    inside = {name: x.repeat_interleave(counts) for name, x in per_sequence.items()}
    by_token = {name: torch.ones(3) for name in per_sequence}
    for name, values in inside.items():
        by_token[name][bounds[0] : bounds[-1]] = values
    rest = {"token_ids": ids, "old_logps": old, "lam": 0.5, "cu_seqlens": cu_seqlens.int()}
    column = {name: x[:, None] for name, x in per_sequence.items()}
    assert_same(gradients(logits, **rest, **column), gradients(logits, **rest, **by_token))
