"""Tensors whose memory may not be read as it stands: fake ones, subclasses, and those that are negated lazily."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.operations import Operations
from tests.support.kernels.option_sets import make_call
from tests.support.kernels.tensor_kinds import Wrapper, held, negated

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

TENSORS = ("reward_advantages", "costs", "cost_limit", "old_logps", "ref_logps", "importance_weights")


def full_call() -> tuple[Tensor, dict[str, Any]]:
    """A call with every argument; its dead rows hold numbers."""
    logits, arguments = make_call("padded", "k3, entropy, importance weights, dual clip")
    numbers = {name: x.nan_to_num(0.1, 0.2, -0.3) for name, x in arguments.items() if is_floating(x)}
    arguments |= {**numbers, "cost_limit": torch.tensor([0.1, -0.2, 0.3])}
    return logits.nan_to_num(0.0), arguments


def is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def results(logits: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Loss, statistics, values by token and the gradient, unwrapped."""
    leaf = logits.detach().requires_grad_()
    out = repo_loss(leaf, **arguments)
    out.loss.backward(torch.full_like(out.loss, 0.3))
    return [held(x) for x in (out.loss.detach(), out.stats.tensor, out.logps, out.entropy, out.kl, leaf.grad)]


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine.resolve_neg(), other)
    assert expected[-1].any()


@pytest.mark.parametrize("name", ["logits", *TENSORS, "everything"])
@pytest.mark.parametrize("kind", [Wrapper, negated], ids=["subclass", "negated"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_out_of_place_the_results_are_those_of_plain_tensors(loss_agg_mode: str, kind: Any, name: str) -> None:
    logits, arguments = full_call()
    arguments["loss_agg_mode"] = loss_agg_mode
    expected = results(logits, arguments)
    changed = dict(arguments)
    for argument in TENSORS if name == "everything" else [name] if name != "logits" else []:
        changed[argument] = kind(arguments[argument])
    other = kind(logits) if name in ("logits", "everything") else logits
    assert_same_bits(results(other, changed), expected)


@pytest.mark.parametrize("kind", [Wrapper, negated], ids=["subclass", "negated"])
@pytest.mark.parametrize("name", ["logits", "costs", "lam"])
def test_in_place_is_refused_by_name_and_nothing_is_written(name: str, kind: Any) -> None:
    logits, arguments = full_call()
    arguments["lam"] = torch.tensor(0.5)
    if name != "logits":
        arguments[name] = kind(arguments[name])
    before, buffer = logits.clone(), logits.requires_grad_() * 1
    scores = kind(buffer) if name == "logits" else buffer
    with pytest.raises(ValueError, match=r"^inplace=True .* got logits of type .*; use inplace=False$"):
        repo_loss(scores, **arguments, inplace=True)
    assert torch.equal(held(scores).resolve_neg(), before)


def test_in_place_is_refused_within_a_dispatch_mode() -> None:
    logits, arguments = full_call()
    scores = logits.requires_grad_() * 1
    with Operations(), pytest.raises(ValueError, match=r"^inplace=True .*dispatch mode"):
        repo_loss(scores, **arguments, inplace=True)
    assert torch.equal(scores, logits)


@pytest.mark.parametrize("name", ["lam", "temperature"])
def test_a_scalar_that_is_negated_lazily_has_its_own_sign(name: str) -> None:
    logits, arguments = full_call()
    arguments[name] = torch.tensor(0.75)
    expected = results(logits, arguments)
    assert_same_bits(results(logits, {**arguments, name: negated(torch.tensor(0.75))}), expected)


@pytest.mark.parametrize("form", ["direct", "retained", "in place", "operator", "linear", "log-probs"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_an_upstream_gradient_that_is_negated_lazily_has_its_own_sign(loss_agg_mode: str, form: str) -> None:
    logits, arguments = full_call()
    arguments["loss_agg_mode"] = loss_agg_mode
    gradients = []
    for lazily in (False, True):
        leaf = logits.clone().requires_grad_()
        if form == "linear":
            loss = linear_repo_loss(leaf, torch.eye(37), **arguments).loss
        elif form == "log-probs":
            ids = torch.where(arguments["response_mask"], arguments["token_ids"], -100).clamp(max=36)
            loss = selective_log_softmax(leaf, ids)
        elif form == "operator":
            with Operations():
                loss = repo_loss(leaf, **arguments).loss
        else:
            loss = repo_loss(leaf * 1, **arguments, inplace=form == "in place").loss
        upstream = torch.full_like(loss, 0.3)
        loss.backward(negated(upstream) if lazily else upstream, retain_graph=form == "retained")
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


def fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("layout", ["padded", "packed", "tokens"])
@pytest.mark.parametrize(
    "options", ["plain", "full KL, softcap, temperature", "per-token losses", "scalars as tensors"]
)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_fake_tensors_give_the_shapes_types_and_strides_of_real_ones(inplace: bool, layout: str, options: str) -> None:
    logits, arguments = make_call(layout, options, torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    out = repo_loss(leaf * 1, **arguments, inplace=inplace)
    out.loss.sum().backward()
    with FakeTensorMode() as mode:
        other = fake(mode, logits).requires_grad_()
        given = {name: fake(mode, value) for name, value in arguments.items()}
        found = repo_loss(other * 1, **given, inplace=inplace)
        found.loss.sum().backward()
    pairs = [(leaf.grad, other.grad), (out.stats.tensor, found.stats.tensor)]
    pairs += [(getattr(out, name), getattr(found, name)) for name in ("loss", "logps", "entropy", "kl")]
    for real, pretended in pairs:
        assert (real is None) == (pretended is None)
        if real is not None:
            assert isinstance(pretended, FakeTensor)
            assert (pretended.shape, pretended.dtype, pretended.stride()) == (real.shape, real.dtype, real.stride())


def test_fake_tensors_of_the_other_functions() -> None:
    with FakeTensorMode():
        hidden = torch.empty(3, 5, 6, requires_grad=True)
        weight = torch.empty(37, 6, requires_grad=True)
        ids, ones = torch.zeros(3, 5, dtype=torch.int64), torch.ones(3)
        loss = linear_repo_loss(hidden, weight, ids, None, ones).loss
        logps, entropy = linear_selective_log_softmax(hidden, weight, ids, return_entropy=True)
        dense = selective_log_softmax(hidden @ weight.T, ids)
        (loss + logps.sum() + entropy.sum() + dense.sum()).backward()
    assert (hidden.grad.shape, weight.grad.shape) == (hidden.shape, weight.shape)
    assert (loss.shape, logps.shape, dense.shape) == ((), (3, 5), (3, 5))


@pytest.mark.parametrize("kind", [Wrapper, negated], ids=["subclass", "negated"])
def test_the_linear_loss_takes_arguments_that_are_not_plain(kind: Any) -> None:
    logits, arguments = full_call()
    gradients = []
    for changed in (arguments, {**arguments, **{name: kind(arguments[name]) for name in TENSORS}}):
        leaf = logits.clone().requires_grad_()
        loss = linear_repo_loss(leaf, torch.eye(37), **changed).loss
        loss.backward(torch.full_like(loss, 0.3))
        gradients.append(held(leaf.grad))
    assert torch.equal(*gradients)
    assert gradients[0].any()
