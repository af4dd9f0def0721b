"""fp64 gradcheck of every differentiable output in every differentiable input, option by option.

The inputs are away from kinks (C = d, rho = 1 +- eps, the clamp at 20), which test_numerics takes one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.cases import AGGREGATIONS, Batch, loss_arguments, make_batch

pytestmark = pytest.mark.pairwise

OPTIONS: dict[str, dict[str, Any]] = {
    "reward only": {"cost_form": "none"},
    "hinge in the loss": {"lam": 1.5},
    "hinge with baselines": {"lam": 1.5, "cost_form": "baselines"},
    "hinge per token": {"lam": 1.5, "cost_form": "baselines", "per_sequence": False},
    "hinge above a limit": {"lam": 1.5, "cost_limit": 0.75},
    "rectified with cost advantages": {"lam": 1.5, "cost_form": "bare"},
    "split": {"lam": 1.5, "mode": "split", "cost_form": "given"},
    "lagrangian": {"lam": 1.5, "mode": "lagrangian", "cost_form": "bare"},
    "lagrangian with costs": {"lam": 1.5, "mode": "lagrangian", "cost_form": "given"},
    "normalize": {"lam": 1.5, "normalize": True},
    "dual clip": {"lam": 1.5, "dual_clip": 1.05},
    "narrow clip": {"eps_low": 0.01, "eps_high": 0.0},
    "asymmetric clip": {"eps_low": 0.1, "eps_high": 0.5},
    "importance weights": {"importance_weights": True, "reference": "k3", "beta": 0.5, "entropy_coef": 0.2},
    "entropy": {"entropy_coef": 0.3},
    "entropy penalty": {"entropy_coef": -0.3},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.6},
    "softcap, temperature and entropy": {"softcap": 3.0, "temperature": 1.7, "entropy_coef": 0.3},
    "softcap, temperature and full KL": {"softcap": 3.0, "temperature": 0.6, "reference": "full", "beta": 0.5},
    "all terms": {
        "lam": 1.5,
        "mode": "split",
        "cost_form": "given",
        "normalize": True,
        "importance_weights": True,
        "reference": "full",
        "beta": 0.4,
        "entropy_coef": 0.1,
        "dual_clip": 1.3,
        "temperature": 0.8,
        "softcap": 5.0,
    },
}
KL = [("k1", True), ("k2", True), ("k2", False), ("k3", True), ("k3", False), ("full", True), ("full", False)]
LAYOUTS = {"padded": {"leading": (2, 4)}, "packed": {"lengths": [3, 0, 4, 1]}}


def clean_batch(seed: int, layout: str, vocabulary: int = 5) -> Batch:
    """A batch whose dead rows hold finite logits, since gradcheck perturbs every entry."""
    batch = make_batch(seed, vocabulary=vocabulary, dead=0.3, **LAYOUTS[layout])
    filler = batch.normal(*batch.leading, vocabulary).double()
    batch.logits = torch.where(batch.dead[..., None], filler, batch.logits)
    assert 0 < batch.dead.sum() < batch.dead.numel()
    return batch


def check_logits(batch: Batch, arguments: dict[str, Any]) -> None:
    """gradcheck of repo_loss's loss in the logits, at a point where the gradient is not all zero."""
    logits = batch.logits.clone().requires_grad_()
    loss = repo_loss(logits, **arguments).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.abs().max() > 1e-4
    assert gradcheck(lambda z: repo_loss(z, **arguments).loss, (logits,), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_in_the_logits_with(name: str, layout: str) -> None:
    batch = clean_batch(1, layout)
    check_logits(batch, loss_arguments(batch, **OPTIONS[name]))


@pytest.mark.parametrize(("estimator", "kl_importance_weighted"), KL)
def test_gradient_of_the_kl_term(estimator: str, kl_importance_weighted: bool) -> None:
    batch = clean_batch(2, "padded")
    check_logits(
        batch, loss_arguments(batch, reference=estimator, kl_importance_weighted=kl_importance_weighted, beta=0.7)
    )


@pytest.mark.parametrize("mode", ["rectified", "split", "lagrangian"])
@pytest.mark.parametrize(("estimator", "kl_importance_weighted"), KL)
def test_on_policy_has_the_gradient_of_a_ratio_whose_base_is_the_same_policy_held_still(
    estimator: str, kl_importance_weighted: bool, mode: str
) -> None:
    """The value of rho = 1 is constant, so finite differences see nothing: old log-probs are written out instead."""
    batch = clean_batch(2, "padded")
    options = {
        "mode": mode,
        "cost_form": "given",
        "lam": 1.5,
        "reference": estimator,
        "kl_importance_weighted": kl_importance_weighted,
    }
    arguments = loss_arguments(batch, **options, beta=0.7, on_policy=True, importance_weights=True)
    implied, written_out = (batch.logits.clone().requires_grad_() for _ in range(2))
    (got,) = torch.autograd.grad(repo_loss(implied, **arguments).loss, implied)
    arguments["old_logps"] = repo_loss(batch.logits, **arguments).logps
    (expected,) = torch.autograd.grad(repo_loss(written_out, **arguments).loss, written_out)
    assert got.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("divisor", [None, 3.5])
@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_gradient_of_each_aggregation(loss_agg_mode: str, divisor: float | None, layout: str) -> None:
    if divisor is not None and loss_agg_mode in ("token-sum", "none"):
        divisor = None
    batch = clean_batch(3, layout)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode, divisor=divisor, reference="k3", beta=0.5, lam=2.0)
    check_logits(batch, arguments)


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_grad_scale_multiplies_the_gradient_of_the_logits_and_nothing_else(loss_agg_mode: str) -> None:
    batch = clean_batch(4, "packed")
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode, reference="full", beta=0.5, entropy_coef=0.1)
    logits = batch.logits.clone().requires_grad_()
    plain, scaled = repo_loss(logits, **arguments), repo_loss(logits, **arguments, grad_scale=256.0)
    assert torch.equal(plain.loss, scaled.loss)
    assert torch.equal(plain.stats.tensor, scaled.stats.tensor)
    (once,) = torch.autograd.grad(plain.loss.sum(), logits)
    (many,) = torch.autograd.grad(scaled.loss.sum(), logits)
    assert once.abs().max() > 0
    assert torch.equal(256 * once, many)


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_grad_scale_is_divided_out_of_every_gradient_of_the_linear_form(loss_agg_mode: str) -> None:
    batch = clean_batch(4, "packed")
    leaves = linear_leaves(batch)
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode, reference="k3", beta=0.5)
    plain = torch.autograd.grad(linear_loss(arguments)(*leaves).sum(), leaves)
    scaled = torch.autograd.grad(linear_loss({**arguments, "grad_scale": 256.0})(*leaves).sum(), leaves)
    for once, many in zip(plain, scaled, strict=True):
        assert once.abs().max() > 0
        assert torch.equal(once, many)


def linear_leaves(batch: Batch, width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias that require grad."""
    vocabulary = batch.logits.shape[-1]
    shapes = ((*batch.leading, width), (vocabulary, width), (vocabulary,))
    hidden, weight, bias = (batch.normal(*shape).double().requires_grad_() for shape in shapes)
    return hidden, weight, bias


def linear_loss(arguments: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """linear_repo_loss's loss as a function of hidden, weight and bias."""

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_repo_loss(hidden, weight, bias=bias, **arguments).loss

    return loss


@pytest.mark.parametrize("name", ["hinge with baselines", "dual clip", "entropy", "softcap, temperature and entropy"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean", "none"])
def test_gradient_of_the_linear_form_in_hidden_weight_and_bias(name: str, loss_agg_mode: str) -> None:
    batch = clean_batch(6, "packed")
    arguments = loss_arguments(batch, loss_agg_mode=loss_agg_mode, **OPTIONS[name])
    assert gradcheck(linear_loss({**arguments, "chunk_tokens": 2}), linear_leaves(batch), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("estimator", "kl_importance_weighted"), KL)
def test_gradient_of_the_kl_term_in_the_linear_form(estimator: str, kl_importance_weighted: bool) -> None:
    batch = clean_batch(7, "padded")
    arguments = loss_arguments(batch, reference=estimator, kl_importance_weighted=kl_importance_weighted, beta=0.7)
    if arguments.pop("ref_logits", None) is not None:
        arguments |= {
            "ref_hidden": batch.normal(*batch.leading, 2).double(),
            "ref_weight": batch.normal(5, 2).double(),
            "ref_bias": batch.normal(5).double(),
        }
    assert gradcheck(linear_loss({**arguments, "chunk_tokens": 3}), linear_leaves(batch), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "none"])
def test_a_frozen_part_of_the_head_leaves_the_other_gradients_as_they_were(frozen: str, loss_agg_mode: str) -> None:
    batch = clean_batch(8, "packed")
    loss = linear_loss(loss_arguments(batch, loss_agg_mode=loss_agg_mode, lam=1.0, reference="k3", beta=0.1))
    leaves = linear_leaves(batch)
    expected = torch.autograd.grad(loss(*leaves).sum(), leaves)
    names = ("hidden", "weight", "bias")
    partly = [x.detach().requires_grad_(name not in frozen) for name, x in zip(names, leaves, strict=True)]
    loss(*partly).sum().backward()
    for name, leaf, gradient in zip(names, partly, expected, strict=True):
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_selective_log_softmax_and_its_entropy(layout: str, softcap: float | None) -> None:
    batch = clean_batch(9, layout)
    ids = batch.token_ids.masked_fill(batch.dead, -100)
    logits = batch.logits.clone().requires_grad_()
    keywords = {"temperature": 0.7, "softcap": softcap}
    assert gradcheck(lambda z: selective_log_softmax(z, ids, return_entropy=True, **keywords), (logits,))
    assert gradcheck(lambda z: selective_log_softmax(z, ids, **keywords), (logits,))
    assert gradcheck(lambda z: selective_log_softmax(z, ids, return_entropy=True, **keywords)[1], (logits,))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradient_of_linear_selective_log_softmax_and_its_entropy(with_bias: bool, softcap: float | None) -> None:
    batch = clean_batch(10, "padded")
    ids = batch.token_ids.masked_fill(batch.dead, -100)
    leaves = linear_leaves(batch)[: 3 if with_bias else 2]

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_selective_log_softmax(
            hidden, weight, ids, bias=bias, temperature=0.7, softcap=softcap, return_entropy=True, chunk_tokens=3
        )

    assert gradcheck(outputs, leaves)


def test_only_the_loss_is_differentiable() -> None:
    batch = clean_batch(12, "padded")
    logits = batch.logits.clone().requires_grad_()
    arguments = loss_arguments(batch, reference="k3", beta=0.1, return_entropy=True)
    out = repo_loss(logits, **arguments)
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (out.logps, out.entropy, out.kl, out.stats.tensor))


def test_reference_and_data_get_no_gradient() -> None:
    batch = clean_batch(13, "padded")
    arguments = loss_arguments(batch, reference="full", beta=0.4, cost_form="given", lam=1.0, importance_weights=True)
    constants = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    for tensor in constants:
        tensor.requires_grad_()
    logits = batch.logits.clone().requires_grad_()
    repo_loss(logits, **arguments).loss.backward()
    assert logits.grad.abs().max() > 0
    assert len(constants) >= 6
    assert all(tensor.grad is None for tensor in constants)
