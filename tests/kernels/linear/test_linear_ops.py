"""The linear forms as operators: whole graphs, dynamic shapes, operator checks, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from repo_kernels import linear_repo_loss, linear_selective_log_softmax
from repo_kernels.losses.heads import operators
from repo_kernels.losses.heads.operators import linear_loss_gradient, linear_slopes_gradient, linear_statistics
from tests.support.kernels.cases import loss_arguments, make_batch
from tests.support.kernels.operations import Operations

from .test_linear import FORMS, VOCABULARY, WIDTH, make_arguments, make_head


@pytest.mark.parametrize(
    ("form", "compiler"), [("k3", "inductor"), ("full KL", "aot_eager"), ("per token", "aot_eager")]
)
def test_a_whole_graph_gives_what_the_plain_call_gives(form: str, compiler: str) -> None:
    batch = make_batch(65, (3, 4), VOCABULARY, dtype=torch.float32)
    leaves = make_head(batch)
    mine, _ = make_arguments(batch, **FORMS[form])
    ids = batch.token_ids.masked_fill(batch.dead, -100)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        loss = linear_repo_loss(hidden * 1, weight, bias=bias, **mine).loss.sum()
        logps, entropy = linear_selective_log_softmax(hidden, weight, ids, bias=bias, return_entropy=True)
        return loss + (0.1 * logps).sum() + (0.2 * entropy).sum()

    torch._dynamo.reset()
    results = []
    for function in (both, torch.compile(both, backend=compiler, fullgraph=True)):
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss * 0.3, leaves)))
    for plain, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, plain, rtol=2e-6, atol=1e-7, equal_nan=True)


def test_other_lengths_do_not_recompile() -> None:
    counter = CompileCounter()

    def step(hidden: Tensor, weight: Tensor, ids: Tensor, reward: Tensor) -> Tensor:
        loss = linear_repo_loss(hidden, weight, ids, None, reward).loss
        return loss + linear_selective_log_softmax(hidden, weight, ids).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    for rows in (5, 7, 12, 2):
        hidden, ids = torch.randn(rows, WIDTH, requires_grad=True), torch.randint(0, VOCABULARY, (rows,))
        assert torch.allclose(
            compiled(hidden, weight, ids, torch.ones(rows)), step(hidden, weight, ids, torch.ones(rows))
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("advantage", [-9.0, 9.0])
@pytest.mark.parametrize("form", ["full KL", "per token"])
def test_operator_checks(form: str, advantage: float) -> None:
    batch = make_batch(66, (3, 4), VOCABULARY, dtype=torch.float32)
    leaves = [x.detach().nan_to_num(0.0).requires_grad_() for x in make_head(batch)]
    mine, _ = make_arguments(batch, **FORMS[form])
    # the checker reads the sums after a backward with the sign of the loss
    mine["reward_advantages"] = torch.full_like(mine["reward_advantages"], advantage)
    with Operations() as operations:
        linear_repo_loss(*leaves[:2], bias=leaves[2], **mine, chunk_tokens=5)
    operator = torch.ops.repo_kernels.linear_loss.default
    rest = [without_nan(x) for x in operations.arguments_of(operator)[3:]]
    torch.library.opcheck(operator, (*leaves, *rest))
    lora, reference = rest[:3], rest[3:6]
    arguments, scalars, code, softcap, entropy, wanted, *tail = rest[6:]
    head, tail = [x.detach() for x in leaves], (wanted, *tail)
    if form == "per token":
        ids = batch.token_ids.masked_fill(batch.dead, -100).reshape(-1)
        upstream = torch.rand(ids.numel())
        torch.library.opcheck(
            linear_loss_gradient,
            (*head, *lora, *reference, arguments, scalars, upstream, code, softcap, entropy, *tail),
        )
        temperature = torch.tensor(0.8)
        torch.library.opcheck(linear_statistics, (*leaves, *lora, ids, temperature, 0.0, 1, *tail))
        state = linear_statistics(*head, *lora, ids, temperature, 0.0, 1, *tail)
        slopes = torch.randn(3, ids.numel())
        torch.library.opcheck(linear_slopes_gradient, (*head, *lora, ids, temperature, state, slopes, 0.0, *tail))


def without_nan(value: Any) -> Any:
    """A tensor, or each of a list, with zeros for NaN; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [without_nan(x) for x in value]
    return value.detach().nan_to_num(0.0) if isinstance(value, Tensor) and value.is_floating_point() else value


def test_autocast_changes_nothing_for_a_half_trunk_with_an_fp32_head() -> None:
    batch = make_batch(67, (3, 4), VOCABULARY, dtype=torch.float32, dead=0.0)
    hidden, weight, _ = make_head(batch)
    arguments = loss_arguments(batch, reference="k3", beta=0.3)
    results = []
    for enabled in (False, True):
        trunk = hidden.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = linear_repo_loss(trunk, weight, **arguments).loss
            loss = loss + linear_selective_log_softmax(trunk, weight, arguments["token_ids"]).sum()
            results.append((loss, *torch.autograd.grad(loss, (trunk, weight))))
    for plain, cast in zip(*results, strict=True):
        assert plain.dtype == cast.dtype
        assert torch.equal(plain, cast)


def test_backward_scales_the_sums_in_place_unless_somebody_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: list[Tensor] = []
    scale = operators.scale_all
    monkeypatch.setattr(operators, "scale_all", lambda total, *rest: (scaled.append(total), scale(total, *rest)))
    hidden, weight = torch.randn(6, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    ids, ones = torch.randint(0, VOCABULARY, (6,)), torch.ones(6)
    (-2.0 * linear_repo_loss(hidden, weight, ids, None, ones).loss).backward()
    assert len(scaled) == 5  # no copy of dL/dweight
    with Operations() as operations:
        linear_repo_loss(hidden, weight, ids, None, ones)
    operator = torch.ops.repo_kernels.linear_loss.default
    found = operator(hidden, weight, *operations.arguments_of(operator)[2:])
    before, plain = [x.clone() for x in found[3:]], weight.grad.clone()
    weight.grad = None
    (-2.0 * found[0]).backward()
    assert len(scaled) == 5
    assert all(torch.equal(x, y) for x, y in zip(found[3:], before, strict=True))
    assert torch.equal(weight.grad, plain)
