"""A temperature for each row: what is refused, by name, and what becomes of values that cannot be looked at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from repo_kernels import (
    LinearRepoLoss,
    LossOptions,
    RepoLoss,
    linear_repo_loss,
    linear_selective_log_softmax,
    repo_loss,
    selective_log_softmax,
)
from repo_kernels.backends import choice
from repo_kernels.backends.codes import ENTROPY_GRADIENT, ENTROPY_NONE, IGNORED, KL_FULL, KL_NONE
from tests.support.kernels.row_cases import make_case, make_code

V, B, L = 7, 3, 4
LOGITS, WEIGHT, IDS = torch.randn(B, L, V), torch.eye(V), torch.arange(B * L).reshape(B, L) % V
MASK = torch.arange(L).expand(B, L) < torch.tensor([4, 2, 0])[:, None]
TAIL = None, torch.ones(B)


def of_loss(temperature: Any, **more: Any) -> Tensor:
    return repo_loss(LOGITS, IDS, *TAIL, response_mask=MASK, temperature=temperature, **more).loss


def of_linear(temperature: Any, **more: Any) -> Tensor:
    return linear_repo_loss(LOGITS, WEIGHT, IDS, *TAIL, response_mask=MASK, temperature=temperature, **more).loss


def of_module(temperature: Any, **more: Any) -> Tensor:
    return RepoLoss()(LOGITS, IDS, *TAIL, response_mask=MASK, temperature=temperature, **more).loss


def of_linear_module(temperature: Any, **more: Any) -> Tensor:
    return LinearRepoLoss()(LOGITS, WEIGHT, IDS, *TAIL, response_mask=MASK, temperature=temperature, **more).loss


def of_logps(temperature: Any) -> Any:
    return selective_log_softmax(LOGITS, IDS.masked_fill(~MASK, -100), temperature=temperature)


def of_linear_logps(temperature: Any) -> Any:
    return linear_selective_log_softmax(LOGITS, WEIGHT, IDS.masked_fill(~MASK, -100), temperature=temperature)


CALLS = [of_loss, of_linear, of_module, of_linear_module, of_logps, of_linear_logps]


def ones(*shape: int, **values: float) -> Tensor:
    """Ones but for the entries given as "row_column" (or "row"), for example _0_1=2.0."""
    made = torch.ones(shape)
    for place, value in values.items():
        made[tuple(map(int, place.strip("_").split("_")))] = value
    return made


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "match", "temperature"),
    [
        (ValueError, r"^temperature must have shape \(3, 4\) or \(3,\); got float32 of shape \(4,\)", ones(L)),
        (ValueError, r"^temperature must have shape \(3, 4\) or \(3,\); got .* \(12,\)", ones(B * L)),
        (ValueError, r"^temperature must have shape .*; got .* \(1,\)", ones(1)),
        (ValueError, r"^temperature must have shape .*; got .* \(4,", ones(L, 1)),
        (TypeError, r"^temperature must be a tensor of float32 or bfloat16 .*; got int64 of", ones(B).long()),
        (TypeError, r"^temperature must be a tensor of float32 .*; got bool of", ones(B, L).bool()),
        (TypeError, r"^temperature must be a tensor of float32 .*; got complex64 of", ones(B).to(torch.complex64)),
        (ValueError, r"^temperature must be on cpu .*; got .* on meta", ones(B).to("meta")),
        (TypeError, r"^temperature must be a dense tensor; got one of layout sparse_coo", ones(B, L).to_sparse()),
        (ValueError, r"^temperature gets no gradient; .* pass temperature\.detach\(\)$", ones(B).requires_grad_()),
        (ValueError, r"^temperature gets no gradient; got", torch.tensor(1.0).requires_grad_()),
        (ValueError, r"^temperature of live rows must be > 0 .*; got nan$", ones(B, L, _1_1=math.nan)),
        (ValueError, r"^temperature of live rows must be > 0 .*; got 0$", ones(B, L, _0_0=0.0)),
        (ValueError, r"^temperature of live rows must be > 0 .*; got -2$", ones(B, _1=-2.0)),
        (ValueError, r"^temperature of live rows must be > 0 .*; got inf$", ones(B, 1, _1_0=math.inf)),
        (ValueError, r"^temperature of live rows must be > 0 .*; got 5.87747e-39$", ones(B, _1=2.0**-127)),
        (TypeError, r"^temperature must be a float or a 0-d tensor, > 0; got \[1.0, 1.0, 1.0\] \(list\)", [1.0] * 3),
        (ValueError, r"^temperature must be > 0 and a normal number in float32; got 0.0", 0.0),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(call: Any, error: type[Exception], match: str, temperature: Any) -> None:
    with pytest.raises(error, match=match):
        call(temperature)


@pytest.mark.parametrize("call", CALLS)
def test_dead_rows_and_sequences_may_hold_anything(call: Any) -> None:
    for bad in (math.nan, 0.0, -1.0, math.inf):
        for given in (ones(B, L, _1_3=bad), ones(B, _2=bad)):
            assert torch.equal(call(given), call(ones(B)))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_dtype_and_any_strides_are_taken(call: Any, dtype: torch.dtype) -> None:
    values = 0.5 + torch.arange(B * L).reshape(B, L) / 8  # exact in all of them
    for given in (values, values[:, 0]):
        strided = torch.stack((given, given + 9), -1)[..., 0]
        assert torch.equal(call(given.to(dtype)), call(given))
        assert torch.equal(call(strided), call(given))


def test_without_a_gradient_to_record_one_that_requires_grad_is_taken() -> None:
    by = torch.full((B,), 0.5, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(of_loss(by), of_loss(0.5))
        assert torch.equal(of_logps(by), of_logps(0.5))


def test_packed_sequences_give_theirs_to_their_rows() -> None:
    bounds, ids, logits = torch.tensor([1, 3, 3, 6], dtype=torch.int32), torch.arange(7), torch.randn(7, V)
    rewards = torch.ones(7)
    how: dict[str, Any] = {"cu_seqlens": bounds}
    by = torch.tensor([0.5, math.nan, 2.0])  # of two rows, none and three; rows 0 and 6 are in no sequence
    spread = torch.tensor([math.nan, 0.5, 0.5, 2.0, 2.0, 2.0, math.nan])
    for backend in ("eager", "cpu", "triton"):
        each = [repo_loss(logits, ids, None, rewards, temperature=x, **how, backend=backend) for x in (by, spread)]
        assert torch.equal(each[0].logps, each[1].logps)
        expected = torch.log_softmax(logits[1:6] / spread[1:6, None], -1)[range(5), ids[1:6]]
        torch.testing.assert_close(each[0].logps[1:6], expected)
    with pytest.raises(ValueError, match=r"must have shape \(7,\) or \(3,\)"):
        repo_loss(logits, ids, None, rewards, temperature=torch.ones(4), **how)
    with pytest.raises(ValueError, match=r"of live rows must be > 0 .*; got 0$"):
        repo_loss(logits, ids, None, rewards, temperature=torch.tensor([1.0, 1.0, 0.0]), **how)


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(3, 1), torch.ones(1)])
def test_options_take_scalars_alone_and_name_the_call(value: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^temperature of LossOptions must be a float or .*: pass .* to the call$"):
        LossOptions(temperature=value)


def test_fake_tensors_have_no_values_to_refuse() -> None:
    with FakeTensorMode():
        logits, ids = torch.randn(B, L, V), torch.zeros(B, L, dtype=torch.int64)
        for shape in ((B, L), (B,)):
            assert repo_loss(logits, ids, *(None, torch.ones(B)), temperature=torch.zeros(shape)).loss.shape == ()
            assert selective_log_softmax(logits, ids, temperature=torch.zeros(shape)).shape == (B, L)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
@pytest.mark.parametrize("name", ["eager", "cpu"])
def test_an_unusable_value_of_a_live_row_is_refused_before_anything_is_written(name: str, bad: float) -> None:
    kernels, case = choice.load(name), make_case(3, (4,), 7, dead=0)
    by = torch.tensor([0.5, 1.0, bad, 2.0])
    grad = torch.full_like(case.logits, 9.0)
    with pytest.raises(ValueError, match=r"^temperature of live rows must be > 0 .*; got"):
        case.replace(temperatures=by).into(kernels, case.logits, grad)
    assert (grad == 9).all()
    with pytest.raises(ValueError, match=r"^temperature of live rows must be > 0 .*; got"):
        kernels.statistics(case.logits, case.ids, by, 0.0, ENTROPY_NONE)
    ids = case.ids.masked_fill(by != 2, IGNORED)
    case.replace(temperatures=by, token_ids=ids).into(kernels, case.logits, grad)
    assert kernels.statistics(case.logits, ids, by, 0.0, ENTROPY_NONE).isfinite().all()


def test_under_a_transform_it_is_refused_too() -> None:
    with pytest.raises(ValueError, match="temperature of live rows must be > 0 .*; got -2"):
        torch.func.grad(lambda z: repo_loss(z, IDS, *TAIL, temperature=ones(B, _1=-2.0)).loss)(LOGITS)
    with pytest.raises(ValueError, match="temperature of live rows must be > 0 .*; got -2"):
        torch.func.grad(lambda z: selective_log_softmax(z, IDS, temperature=ones(B, _1=-2.0)).sum())(LOGITS)


def test_triton_which_does_not_look_makes_its_row_nan_and_no_other() -> None:
    kernels = choice.load("triton")
    by = torch.tensor([0.5, math.nan, 0.0, -0.7, math.inf, -math.inf, math.nan, 2.0])
    good, bad, dead = [0, 7], [1, 2, 3, 4, 5], 6
    for vocabulary, kl in ((1, KL_NONE), (37, KL_NONE), (37, KL_FULL)):
        case = make_case(3, (8,), vocabulary, code=make_code(kl=kl), entropy=ENTROPY_GRADIENT, entropy_coef=0.1, dead=0)
        case = case.replace(token_ids=case.ids.masked_fill(torch.arange(8) == dead, IGNORED))
        losses, tokens, grad = case.replace(temperatures=by).run(kernels)
        usable = case.replace(temperatures=torch.where(by > 0, by, 1.0).clamp_max(9.0)).run(kernels)
        assert losses[bad].isnan().all()
        assert tokens[0, bad].isnan().all()
        assert grad[bad].isnan().all()
        assert not losses[dead]
        assert not grad[dead].any()
        assert torch.equal(losses[good], usable[0][good])
        assert torch.equal(grad[good], usable[2][good])
        state = kernels.statistics(case.logits, case.ids, by, 0.0, ENTROPY_GRADIENT)
        assert state[:2, bad].isnan().all()
        assert not state[:, dead].any()
        out = torch.zeros_like(case.logits)
        kernels.apply(case.logits, case.ids, state, torch.ones(3, 8), by, 0.0, out)
        assert out[bad].isnan().all()
        assert out[good].isfinite().all()


@pytest.mark.parametrize("name", ["eager", "cpu", "triton"])
def test_so_does_one_value_of_all_rows(name: str) -> None:
    for bad in (-0.7, 0.0, math.inf):
        losses, _, grad = make_case(3, (2,), 5, dead=0, temperature=1.0).replace(temperature=bad).run(choice.load(name))
        assert losses.isnan().all()
        assert grad.isnan().all()
