"""Numerics, cases 11 to 13: whole graphs, dynamic shapes, operator checks, no recompilation, no host sync."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from repo_kernels import repo_loss, selective_log_softmax
from repo_kernels.losses.ops import fused_loss, row_gradient, row_statistics, scaled_rows
from tests.support.kernels.cases import loss_arguments, make_batch
from tests.support.kernels.operations import Operations

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything sampled": {
        "reference": "k3",
        "beta": 0.3,
        "lam": 1.0,
        "entropy_coef": 0.1,
        "softcap": 8.0,
        "importance_weights": True,
        "normalize": True,
        "dual_clip": 3.0,
    },
    "full KL": {"reference": "full", "beta": 0.2, "loss_agg_mode": "seq-mean-token-mean"},
    "per token": {"reference": "k2", "beta": 0.2, "loss_agg_mode": "none", "mode": "split", "cost_form": "given"},
}


def outputs(logits: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """Every output of the loss, without the absent ones."""
    out = repo_loss(logits, **arguments)
    return tuple(x for x in (out.loss, out.logps, out.entropy, out.kl, out.stats.tensor) if x is not None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
# one form is enough for the code generator: the kernels are opaque to it
@pytest.mark.leave_out(lambda compiler, form: compiler == "inductor" and form != "everything sampled")
def test_case_12_a_whole_graph_gives_the_bits_of_the_plain_call(form: str, compiler: str) -> None:
    batch = make_batch(40, (3, 5), 11, dtype=torch.float32)
    arguments = loss_arguments(batch, **FORMS[form])
    torch._dynamo.reset()
    compiled = torch.compile(outputs, backend=compiler, fullgraph=True)
    results = []
    for function in (outputs, compiled):
        leaf = batch.logits.clone().requires_grad_()
        out = function(leaf * 1, arguments)
        out[0].backward(torch.full_like(out[0], 0.3))
        results.append((*out, leaf.grad))
    for plain, whole in zip(*results, strict=True):
        assert torch.allclose(plain.nan_to_num(0.0), whole.nan_to_num(0.0), rtol=2e-6, atol=1e-7)


def test_case_12_log_probabilities_in_a_whole_graph() -> None:
    batch = make_batch(41, (4, 6), 13, dtype=torch.float32, dead=0.0)

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return selective_log_softmax(logits, batch.token_ids, temperature=0.7, softcap=9.0, return_entropy=True)

    torch._dynamo.reset()
    results = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        leaf = batch.logits.clone().requires_grad_()
        logps, entropy = function(leaf * 1)
        (logps.sum() + 0.1 * entropy.square().sum()).backward()
        results.append((logps, entropy, leaf.grad))
    for plain, whole in zip(*results, strict=True):
        assert torch.equal(plain, whole)


def test_case_11_other_lengths_and_other_scalars_on_the_device_do_not_recompile() -> None:
    counter = CompileCounter()

    def step(logits: Tensor, ids: Tensor, reward: Tensor, costs: Tensor, old: Tensor, scalars: Tensor) -> Tensor:
        lam, beta, eps, temperature = scalars.unbind()
        return repo_loss(
            logits,
            ids,
            old,
            reward,
            costs=costs,
            ref_logps=old,
            lam=lam,
            beta=beta,
            eps_low=eps,
            eps_high=eps,
            temperature=temperature,
        ).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for call, (rows, length) in enumerate([(2, 3), (3, 4), (2, 9), (5, 2), (3, 7)]):
        logits = torch.randn(rows, length, 17, generator=generator).requires_grad_()
        ids = torch.randint(0, 17, (rows, length), generator=generator)
        reward, costs = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)
        old = torch.full((rows, length), -2.8)
        scalars = torch.tensor([1.0 + call, 0.1 * call, 0.2, 1.0 - 0.1 * call])
        got, expected = (f(logits, ids, reward, costs, old, scalars) for f in (compiled, step))
        assert torch.allclose(got, expected, rtol=1e-6)
    assert counter.frame_count == 1


def operator_arguments(form: dict[str, Any], dtype: torch.dtype, advantage: float) -> tuple[Any, ...]:
    """What repo_loss hands to its operator. advantage: added to those of the reward, which gives the loss its sign."""
    batch = make_batch(42, (3, 5), 11, dtype=dtype)
    arguments = loss_arguments(batch, **form)
    arguments["reward_advantages"] = arguments["reward_advantages"] + advantage
    with Operations() as operations:
        repo_loss(batch.logits.clone().requires_grad_(), **arguments)
    return operations.arguments_of(torch.ops.repo_kernels.fused_loss.default)


@pytest.mark.parametrize("advantage", [-9.0, 9.0])  # the checker's upstream gradient has the sign of the loss
@pytest.mark.parametrize("form", FORMS)
def test_case_12_operator_checks_of_the_loss(form: str, advantage: float) -> None:
    logits, *rest = operator_arguments(FORMS[form], torch.float32, advantage)
    sample = logits.detach().nan_to_num(0.0).requires_grad_()
    torch.library.opcheck(fused_loss, (sample, *rest))


@pytest.mark.parametrize("view", ["contiguous", "odd row stride", "all but the last row"])
def test_case_12_operator_checks_of_log_probabilities(view: str, backend: str) -> None:
    base = torch.randn(3, 6, 17)
    logits = {"contiguous": base, "odd row stride": base[..., 2:15], "all but the last row": base[:, :-1]}[view]
    ids = torch.randint(0, logits.shape[-1], logits.shape[:-1]).reshape(-1)
    temperature = torch.tensor(0.8)
    torch.library.opcheck(row_statistics, (logits.detach().requires_grad_(), ids, temperature, 0.0, 1, backend))
    state = row_statistics(logits, ids, temperature, 0.0, 1, backend)
    slopes = torch.randn(3, ids.numel())
    torch.library.opcheck(row_gradient, (logits, ids, state, slopes, temperature, 0.0, backend))
    flags = torch.ones(ids.numel(), dtype=torch.int32)
    for upstream in (torch.randn(ids.numel()), torch.tensor(0.3)):
        torch.library.opcheck(scaled_rows, (logits, upstream, flags, backend))


READS_A_VALUE = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "tolist", "is_nonzero")


@pytest.mark.parametrize("form", FORMS)
def test_case_13_nothing_around_the_kernels_reads_a_value_of_a_tensor(form: str) -> None:
    """Reading one on the host would wait for the device; the whole graph shows every operation there is."""
    batch = make_batch(43, (3, 5), 11, dtype=torch.float32)
    arguments = loss_arguments(batch, **FORMS[form])
    targets: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(outputs, backend=record, fullgraph=True)(batch.logits.clone().requires_grad_(), arguments)
    assert any("fused_loss" in target for target in targets)
    assert not [target for target in targets if any(name in target.split(".") for name in READS_A_VALUE)]
