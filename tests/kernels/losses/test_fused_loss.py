"""`repo_loss` under autograd: the direct call and its operator, the gradient's buffer, and bits that stay the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import linear_repo_loss, repo_loss
from repo_kernels.backends import choice
from repo_kernels.losses import loss as loss_module
from tests.support.kernels.cases import loss_arguments, make_batch
from tests.support.kernels.operations import Operations
from tests.support.kernels.option_sets import CALLS, make_call

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]


def results(logits: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Every output and the gradient, NaN nowhere."""
    leaf = logits.clone().requires_grad_()
    out = repo_loss(leaf, **arguments)
    out.loss.backward(torch.full_like(out.loss, 0.3))
    found = [out.loss.detach(), out.logps, out.entropy, out.kl, out.stats.tensor, leaf.grad]
    return [x for x in found if x is not None]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    for mine, other in zip(first, second, strict=True):
        assert torch.equal(mine, other)
        assert mine.isfinite().all()
        assert mine.stride() == other.stride()


@pytest.mark.parametrize(("layout", "options"), CALLS)
def test_the_direct_call_and_its_operator_give_the_same_bits(
    layout: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, arguments = make_call(layout, options)
    with Operations() as operations:
        looked_at = results(logits, arguments)
    assert "repo_kernels.fused_loss.default" in operations.seen
    monkeypatch.setattr(loss_module, "fused_loss", None)
    assert_same_bits(results(logits, arguments), looked_at)


@pytest.mark.parametrize("parameter", [False, True], ids=["tensor", "Parameter"])
@pytest.mark.parametrize("view", ["contiguous", "[:, :-1]", "transposed"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_a_leaf_takes_the_buffer_of_its_gradient_without_a_copy(
    loss_agg_mode: str, view: str, parameter: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(50, (3, 5), 16, dtype=torch.float32, dead=0.0)
    base = batch.normal(3, 6, 16)
    logits = {"contiguous": base[:, 1:].clone(), "[:, :-1]": base[:, :-1], "transposed": base[:, 1:].clone()}[view]
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode)
    if view == "transposed":
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    leaf = torch.nn.Parameter(logits) if parameter else logits.requires_grad_()
    buffers: list[int] = []
    kernels = choice.load(backend)
    allocate = kernels.new_gradient

    def spied(*given: Any) -> tuple[Tensor, bool]:
        grad, zeroed = allocate(*given)
        buffers.append(grad.data_ptr())
        return grad, zeroed

    monkeypatch.setattr(kernels, "new_gradient", spied)
    loss = repo_loss(leaf, **arguments).loss
    loss.backward(torch.full_like(loss, 0.3))
    (buffer,) = buffers
    assert leaf.grad.shape == leaf.shape
    # autograd copies a gradient that does not lie as its leaf if that one is dense
    assert (leaf.grad.data_ptr() == buffer) == (view != "transposed")
    first = leaf.grad.clone()
    loss = repo_loss(leaf, **arguments).loss
    loss.backward(torch.full_like(loss, 0.3))
    assert torch.equal(leaf.grad, 2 * first)  # and adds the next one to it


@pytest.mark.parametrize("looked_at", [False, True], ids=["direct", "operator"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_a_retained_graph_gives_the_same_bits_and_keeps_its_buffer(loss_agg_mode: str, looked_at: bool) -> None:
    batch = make_batch(51, (3, 5), 16, dtype=torch.float32)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode, entropy_coef=0.1)
    leaf = batch.logits.clone().requires_grad_()

    def gradients() -> list[Tensor]:
        loss = repo_loss(leaf, **arguments).loss
        upstream = torch.full_like(loss, 0.3)
        found = [torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0] for _ in range(3)]
        assert len({x.data_ptr() for x in found}) == 3
        found[0].zero_()  # what one caller does with his gradient is nothing to the next
        return [*found[1:], *torch.autograd.grad(loss, leaf, upstream)]

    if looked_at:
        with Operations():
            first, *others = gradients()
    else:
        first, *others = gradients()
    assert first.any()
    for other in others:
        assert torch.equal(first, other)


@pytest.mark.parametrize("form", ["logits", "operator", "in place", "linear"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_dead_rows_stay_zero_whatever_arrives(loss_agg_mode: str, form: str) -> None:
    batch = make_batch(52, (3, 5), 9, dtype=torch.float32)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode)
    for retain in (False, True) if form != "in place" else (False,):
        leaf = (batch.normal(3, 5, 9) if form == "linear" else batch.logits).clone().requires_grad_()
        if form == "linear":
            loss = linear_repo_loss(leaf.masked_fill(batch.dead[..., None], math.nan), torch.eye(9), **arguments).loss
        elif form == "operator":
            with Operations():
                loss = repo_loss(leaf * 1, **arguments).loss
        else:
            loss = repo_loss(leaf * 1, **arguments, inplace=form == "in place").loss
        infinite = torch.tensor(math.inf) if loss.ndim == 0 else torch.where(batch.dead, math.inf, 0.5)
        if form == "linear" and loss.ndim == 0:
            infinite = torch.tensor(2.0)  # its sums over rows are multiplied as a whole
        loss.backward(infinite, retain_graph=retain)
        assert (leaf.grad[batch.dead] == 0).all()
        assert leaf.grad[~batch.dead].any()


@pytest.mark.parametrize("form", ["direct", "operator", "in place", "linear"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_what_a_caller_writes_into_the_outputs_does_not_change_the_gradient(loss_agg_mode: str, form: str) -> None:
    batch = make_batch(53, (3, 5), 9, dtype=torch.float32, dead=0.0)
    arguments = loss_arguments(batch, reference="k3", beta=0.1, entropy_coef=0.1, lam=1.0, loss_agg_mode=loss_agg_mode)
    gradients = []
    for edit in (False, True):
        leaf = batch.logits.clone().requires_grad_()
        if form == "linear":
            out = linear_repo_loss(leaf, torch.eye(9), **arguments)
        elif form == "operator":
            with Operations():
                out = repo_loss(leaf, **arguments)
        else:
            out = repo_loss(leaf * 1, **arguments, inplace=form == "in place")
        before = out.loss.detach().clone()
        if edit:
            for output in (out.logps, out.entropy, out.kl, out.stats.tensor):
                output.fill_(math.nan)
        assert torch.equal(out.loss, before)
        loss = out.loss.mul_(2) if edit else out.loss * 2
        assert torch.equal(loss, 2 * before)
        loss.backward(torch.full_like(loss, 0.3))
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("form", ["direct", "operator", "in place", "linear", "linear operator"])
def test_only_the_loss_is_differentiable_whoever_computes_it(form: str) -> None:
    batch = make_batch(54, (3, 5), 9, dtype=torch.float32, dead=0.0)
    arguments = loss_arguments(batch, reference="k3", beta=0.1, entropy_coef=0.1)
    leaf = batch.logits.clone().requires_grad_()
    linear = "linear" in form

    def call() -> Any:
        if linear:
            return linear_repo_loss(leaf, torch.eye(9), **arguments)
        return repo_loss(leaf * 1, **arguments, inplace=form == "in place")

    if "operator" in form:
        with Operations():
            out = call()
    else:
        out = call()
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.logps, out.entropy, out.kl, out.stats.tensor))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd_the_values_are_the_same(mode: Any) -> None:
    logits, arguments = make_call("packed", "sequence means")
    *expected, _ = results(logits, arguments)
    with mode():
        out = repo_loss(logits.clone().requires_grad_(), **arguments)
    got = [x for x in (out.loss, out.logps, out.entropy, out.kl, out.stats.tensor) if x is not None]
    assert not out.loss.requires_grad
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)


def test_a_frozen_logit_tensor_gets_no_gradient_buffer(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.load(backend), "new_gradient", None)
    logits, arguments = make_call("padded", "plain")
    assert repo_loss(logits, **arguments).loss.isfinite()


REPEATS = ["plain", "sequence means", "full KL, softcap, temperature", "k3, entropy, importance weights, dual clip"]


@pytest.mark.parametrize("options", REPEATS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.leave_out(  # half a second a call in the interpreter
    lambda backend, layout, options, dtype: (
        backend == "triton"
        and (layout, dtype)
        != (("padded", torch.float32) if options == "sequence means" else ("packed", torch.bfloat16))
    )
)
def test_many_calls_give_the_same_bits(layout: str, options: str, dtype: torch.dtype, backend: str) -> None:
    logits, arguments = make_call(layout, options, dtype)
    first = results(logits, arguments)
    for _ in range(3 if backend == "triton" else 19):
        assert_same_bits(results(logits, arguments), first)


@pytest.mark.parametrize("options", [*REPEATS, "per-token losses", "token sum"])
@pytest.mark.leave_out(lambda backend: backend == "triton")  # the interpreter has one thread
def test_any_number_of_threads_gives_the_same_bits(options: str) -> None:
    logits, arguments = make_call("packed", options)
    g = torch.Generator().manual_seed(2)
    wide = torch.cat((logits, torch.randn(*logits.shape[:-1], 9000, generator=g)), -1)
    if "ref_logits" in arguments:
        arguments["ref_logits"] = wide.flip(-1)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            found.append(results(wide, arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other, found[0])
