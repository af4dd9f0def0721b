"""A LoRA head in whole graphs, operator checks, transforms, under autocast, and in second backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from repo_kernels import LoraHead, linear_repo_loss, linear_selective_log_softmax
from repo_kernels.losses.heads.operators import linear_loss_gradient, linear_slopes_gradient, linear_statistics
from tests.support.kernels.cases import loss_arguments, make_batch
from tests.support.kernels.operations import Operations

from ..compilation.test_recompilation import MOST_GRAPHS, count_graphs
from .test_linear import FORMS, make_arguments
from .test_linear_ops import without_nan
from .test_lora import RANK, SCALING, VOCABULARY, WIDTH, make_leaves


def both(
    arguments: dict[str, Any], ids: Tensor, base: Tensor, hidden: Tensor, bias: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """A sum of the losses, the log-probabilities and the entropies."""
    head = LoraHead(base, a, b, SCALING)
    loss = linear_repo_loss(hidden, head, bias=bias, **arguments).loss.sum()
    logps, entropy = linear_selective_log_softmax(hidden, head, ids, bias=bias, return_entropy=True)
    return loss + (0.1 * logps).sum() + (0.2 * entropy).sum()


@pytest.mark.parametrize(
    ("form", "compiler"), [("k3", "inductor"), ("full KL", "aot_eager"), ("per token", "aot_eager")]
)
def test_a_whole_graph_gives_what_the_plain_call_gives(form: str, compiler: str) -> None:
    batch = make_batch(80, (3, 4), VOCABULARY, dtype=torch.float32)
    base, leaves = make_leaves(batch)
    mine, _ = make_arguments(batch, **FORMS[form])
    ids = batch.token_ids.masked_fill(batch.dead, -100)
    torch._dynamo.reset()
    results = []
    for function in (both, torch.compile(both, backend=compiler, fullgraph=True)):
        loss = function(mine, ids, base, *leaves)
        results.append((loss, *torch.autograd.grad(loss * 0.3, leaves)))
    for plain, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, plain, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("given", ["scaling", "head"])
def test_twelve_values_of_the_scaling_compile_at_most_two_graphs(given: str) -> None:
    batch = make_batch(81, (3, 4), VOCABULARY, dtype=torch.float32, dead=0.0)
    base, (hidden, _, a, b) = make_leaves(batch)
    arguments = loss_arguments(batch)

    def step(x: Tensor, head: Any) -> Tensor:
        head = LoraHead(base, a, b, head) if given == "scaling" else head
        return (
            linear_repo_loss(x, head, **arguments).loss + linear_selective_log_softmax(x, head, batch.token_ids).sum()
        )

    values = [2.0, 1.0, 0.5, 0.0, 0.25, -3.0, 0.125, 1e-3, 7.5, 0.75, 1e3, 2.5]
    calls = [(hidden, value if given == "scaling" else LoraHead(base, a, b, value)) for value in values]
    assert count_graphs(step, calls) <= MOST_GRAPHS


def test_other_weights_of_the_adapter_compile_no_graph() -> None:
    batch = make_batch(82, (3, 4), VOCABULARY, dtype=torch.float32, dead=0.0)
    heads = [make_leaves(batch) for _ in range(3)]
    arguments = loss_arguments(batch)

    def step(x: Tensor, head: LoraHead) -> Tensor:
        return linear_repo_loss(x, head, **arguments).loss

    calls = [(leaves[0], LoraHead(base, *leaves[2:], SCALING)) for base, leaves in heads]
    assert count_graphs(step, calls) == 1


@pytest.mark.parametrize("advantage", [-9.0, 9.0])
@pytest.mark.parametrize("form", ["full KL", "per token"])
def test_operator_checks(form: str, advantage: float) -> None:
    batch = make_batch(83, (3, 4), VOCABULARY, dtype=torch.float32)
    base, leaves = make_leaves(batch)
    leaves = [x.detach().nan_to_num(0.0).requires_grad_() for x in leaves]
    mine, _ = make_arguments(batch, **FORMS[form])
    # the checker reads the sums after a backward with the sign of the loss
    mine["reward_advantages"] = torch.full_like(mine["reward_advantages"], advantage)
    hidden, bias, a, b = leaves
    with Operations() as operations:
        linear_repo_loss(hidden, LoraHead(base, a, b, SCALING), bias=bias, **mine, chunk_tokens=5)
    operator = torch.ops.repo_kernels.linear_loss.default
    scaling, *rest = (without_nan(x) for x in operations.arguments_of(operator)[5:])
    head = hidden, base, bias, a, b, scaling
    torch.library.opcheck(operator, (*head, *rest))
    if form == "per token":
        *reference, arguments, scalars, code, softcap, entropy, wanted, tokens, size, backend = rest
        how = wanted, tokens, size, backend
        head = tuple(x.detach() for x in head)
        ids = batch.token_ids.masked_fill(batch.dead, -100).reshape(-1)
        upstream, temperature, slopes = torch.rand(ids.numel()), torch.tensor(0.8), torch.randn(3, ids.numel())
        torch.library.opcheck(
            linear_loss_gradient, (*head, *reference, arguments, scalars, upstream, code, softcap, entropy, *how)
        )
        trained = hidden, base, bias, a, b, scaling
        torch.library.opcheck(linear_statistics, (*trained, ids, temperature, 0.0, 1, *how))
        state = linear_statistics(*head, ids, temperature, 0.0, 1, *how)
        torch.library.opcheck(linear_slopes_gradient, (*head, ids, temperature, state, slopes, 0.0, *how))


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_forward_mode_torch_func_and_batched_upstreams_agree_with_the_merged_weight(loss_agg_mode: str) -> None:
    batch = make_batch(84, (6,), VOCABULARY, dead=0.0)
    base, leaves = make_leaves(batch, torch.float64)
    hidden, bias, a, b = (x.detach() for x in leaves)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode)

    def adapted(w: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_repo_loss(h, LoraHead(w, a, b, SCALING), bias=bias, **arguments).loss.sum()

    def merged(w: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_repo_loss(h, w + SCALING * b @ a, bias=bias, **arguments).loss.sum()

    point = base, hidden, a, b
    tangents = tuple(torch.randn_like(x) for x in point)
    values = []
    for f in (adapted, merged):
        gradients = torch.func.grad(f, argnums=(1, 2, 3))(*point)
        jvp = torch.func.jvp(f, point, tangents)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(f(base, hidden, a, forward_ad.make_dual(b, tangents[3]))).tangent
        many = torch.func.vmap(torch.func.grad(f, 2), (None, None, 0, None))(base, hidden, torch.stack((a, 2 * a)), b)
        values.append((*gradients, *jvp, dual, many))
    for got, expected in zip(*values, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 1e-4
    leaf = a.clone().requires_grad_()
    loss, ups = adapted(base, hidden, leaf, b), torch.tensor([1.0, -2.0]).double()
    (batched,) = torch.autograd.grad(loss, leaf, ups, is_grads_batched=True)
    torch.testing.assert_close(batched, ups[:, None, None] * values[1][1])


def test_a_gradient_of_the_base_is_refused_in_a_transform() -> None:
    hidden, base = torch.randn(3, WIDTH), torch.randn(VOCABULARY, WIDTH)
    a, b, ids = torch.randn(RANK, WIDTH), torch.randn(VOCABULARY, RANK), torch.arange(3)

    def loss(w: Tensor) -> Tensor:
        return linear_selective_log_softmax(hidden, LoraHead(w, a, b, SCALING), ids).sum()

    with pytest.raises(ValueError, match=r"weight\.base must be frozen"):
        torch.func.grad(loss)(base)


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_a_retained_graph_gives_the_same_twice_and_second_derivatives_are_refused(loss_agg_mode: str) -> None:
    batch = make_batch(85, (2, 4), VOCABULARY, dtype=torch.float32)
    base, leaves = make_leaves(batch)
    hidden, bias, a, b = leaves
    head, arguments = LoraHead(base, a, b, SCALING), loss_arguments(batch, loss_agg_mode=loss_agg_mode)
    loss = linear_repo_loss(hidden, head, bias=bias, **arguments).loss.sum()
    first = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(3 * loss, leaves)
    assert all(torch.equal(x, y) and x.abs().max() > 0 for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(linear_repo_loss(hidden, head, **arguments).loss.sum(), a, create_graph=True)
    logps = linear_selective_log_softmax(hidden, head, batch.token_ids.masked_fill(batch.dead, -100))
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(logps.sum(), b, create_graph=True)


def test_autocast_and_inference_tensors_change_nothing() -> None:
    batch = make_batch(86, (3, 4), VOCABULARY, dtype=torch.float32, dead=0.0)
    base, (hidden, _, a, b) = make_leaves(batch)
    arguments = loss_arguments(batch, reference="k3", beta=0.3)
    with torch.inference_mode():
        frozen = base.clone().bfloat16()
    results = []
    for enabled, weight in ((False, base.bfloat16()), (True, base.bfloat16()), (False, frozen)):
        trunk = hidden.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            head = LoraHead(weight, a, b, torch.tensor(SCALING))
            loss = linear_repo_loss(trunk, head, **arguments).loss
            loss = loss + linear_selective_log_softmax(trunk, head, arguments["token_ids"]).sum()
            results.append((loss, *torch.autograd.grad(loss, (trunk, a, b))))
    for others in results[1:]:
        for plain, other in zip(results[0], others, strict=True):
            assert plain.dtype == other.dtype
            assert torch.equal(plain, other)
