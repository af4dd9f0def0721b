"""Forward-mode derivatives, vmap and other transforms of torch.func agree with reverse mode, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.cases import make_batch
from tests.support.kernels.option_sets import CALLS, make_call

IDS, ADVANTAGES = torch.tensor([1, 0, 4]), torch.tensor([1.0, -1.0, 0.5])
OLD, WEIGHT = torch.tensor([-1.0, -2.0, -1.5]), torch.linspace(-1, 1, 20).reshape(5, 4).sin()
BIAS = torch.linspace(0, 0.4, 5)
# function of x (3, 5) logits or (3, 4) hidden states
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda z: repo_loss(z, IDS, OLD, ADVANTAGES, entropy_coef=0.1).loss,
    "losses per token": lambda z: repo_loss(z, IDS, OLD, ADVANTAGES, loss_agg_mode="none").loss,
    "log-probs": lambda z: selective_log_softmax(z, IDS, temperature=0.7),
    "entropy": lambda z: selective_log_softmax(z, IDS, return_entropy=True)[1],
    "linear loss": lambda h: linear_repo_loss(h, WEIGHT.to(h), IDS, OLD, ADVANTAGES, bias=BIAS.to(h)).loss,
    "linear losses per token": lambda h: (
        linear_repo_loss(h, WEIGHT.to(h), IDS, OLD, ADVANTAGES, loss_agg_mode="none").loss
    ),
    "linear log-probs": lambda h: linear_selective_log_softmax(h, WEIGHT.to(h), IDS),
}


def point(form: str, count: int = 1, seed: int = 0) -> Tensor:
    width = 4 if form.startswith("linear") else 5
    return torch.randn(count, 3, width, generator=torch.Generator().manual_seed(seed)).squeeze(0)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The rows of reverse mode, one upstream gradient at a time."""
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    rows = [torch.autograd.grad(o, leaf, retain_graph=True)[0] for o in out.reshape(-1)]
    return torch.stack(rows).reshape(*out.shape, *x.shape)


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_the_derivative_that_was_zero_has_its_value() -> None:
    z, t = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    _, tangent = torch.func.jvp(lambda z: selective_log_softmax(z, torch.tensor([0])), (z,), (t,))
    torch.testing.assert_close(tangent, torch.tensor([1 - 0.09003057]))


@pytest.mark.parametrize("form", FORMS)
def test_forward_mode_gives_the_derivative(form: str) -> None:
    f, x, t = FORMS[form], point(form), point(form, seed=1)
    expected = (jacobian(f, x) * t).sum((-1, -2))
    value, tangent = torch.func.jvp(f, (x,), (t,))
    torch.testing.assert_close(value, f(x), rtol=1e-5, atol=1e-6)
    assert_near(tangent, expected)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t)))
        assert_near(dual.tangent, expected)
    _, tangents = torch.func.vmap(lambda t: torch.func.jvp(f, (x,), (t,)))(torch.stack((t, 2 * t)))
    assert_near(tangents, torch.stack((expected, 2 * expected)))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_forward_mode_through_the_head(name: str) -> None:
    hidden, value = point("linear"), {"weight": WEIGHT, "bias": BIAS}[name]

    def f(x: Tensor) -> Tensor:
        head = {"weight": WEIGHT, "bias": BIAS} | {name: x}
        return linear_repo_loss(hidden, head["weight"], IDS, OLD, ADVANTAGES, bias=head["bias"]).loss

    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf)
    _, tangent = torch.func.jvp(f, (value,), (torch.ones_like(value) * value.cos(),))
    assert_near(tangent, (gradient * value.cos()).sum())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transform", ["grad", "jacfwd", "jacrev", "compiled"])
def test_transforms_agree_with_reverse_mode(transform: str, form: str) -> None:
    f, x = FORMS[form], point(form)
    if transform in ("jacfwd", "jacrev"):
        assert_near(getattr(torch.func, transform)(f)(x), jacobian(f, x))
        return
    step = torch.func.grad(lambda x: f(x).sum())
    if transform == "compiled":
        torch._dynamo.reset()
        step = torch.compile(step, backend="eager", fullgraph=True)
    assert_near(step(x), jacobian(lambda x: f(x).sum(), x))


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_those_of_finite_differences(form: str) -> None:
    f, x, t = FORMS[form], point(form).double(), point(form, seed=1).double()

    def g(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: f(x).sum())(x)

    _, curvature = torch.func.jvp(g, (x,), (t,))
    expected = (g(x + 1e-5 * t) - g(x - 1e-5 * t)) / 2e-5
    torch.testing.assert_close(curvature, expected, rtol=1e-4, atol=1e-7)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_vmap_is_a_loop(form: str) -> None:
    f, x = FORMS[form], point(form, 4)
    assert_near(torch.func.vmap(f)(x), torch.stack([f(one) for one in x]))
    gradients = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x)
    assert_near(gradients, torch.stack([jacobian(lambda x: f(x).sum(), one) for one in x]))


def test_every_argument_of_a_vmap_may_vary() -> None:
    batch = make_batch(3, (4, 6))
    costs, lam = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits, ids, old = batch.logits.nan_to_num(0, 0, 0), batch.token_ids, batch.old_logps.nan_to_num(-1, -1, -1)
    given = (logits, ids, old, batch.response_mask, costs, lam)

    def f(z: Tensor, ids: Tensor, old: Tensor, mask: Tensor, cost: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        out = repo_loss(z[None], ids[None], old[None], torch.ones(1), costs=cost[None], lam=lam,
                        response_mask=mask[None], loss_agg_mode="seq-mean-token-mean")  # fmt: skip
        return out.loss, out.stats.tensor

    losses, stats = torch.func.vmap(f)(*given)
    for i, one in enumerate(zip(*given, strict=True)):
        loss, stat = f(*one)
        assert_near(losses[i], loss)
        torch.testing.assert_close(stats[i], stat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "options"), CALLS)
def test_composed_losses_are_those_of_the_kernels(layout: str, options: str) -> None:
    logits, arguments = make_call(layout, options)
    leaf = logits.clone().requires_grad_()
    kernels = repo_loss(leaf, **arguments)
    kernels.loss.sum().backward()

    def f(z: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        out = repo_loss(z, **arguments)
        rows = tuple(x for x in (out.logps, out.entropy, out.kl) if x is not None)
        return out.loss.sum(), (out.loss, out.stats.tensor, rows)

    gradient, (loss, stats, rows) = torch.func.grad(f, has_aux=True)(logits)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, kernels.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats, kernels.stats.tensor, rtol=1e-5, atol=1e-5)
    expected = [x for x in (kernels.logps, kernels.entropy, kernels.kl) if x is not None]
    for mine, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", FORMS)
def test_batched_upstream_gradients_are_a_loop(form: str) -> None:
    f, leaf = FORMS[form], point(form).requires_grad_()
    out = f(leaf)
    upstream = torch.randn(4, *out.shape, generator=torch.Generator().manual_seed(2))
    (batched,) = torch.autograd.grad(out, leaf, upstream, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, leaf, one, retain_graph=True)[0] for one in upstream]
    assert_near(batched, torch.stack(single))


def test_batched_upstream_gradients_in_place() -> None:
    leaf = point("loss").requires_grad_()
    out = repo_loss(leaf * 1, IDS, OLD, ADVANTAGES, inplace=True).loss
    (batched,) = torch.autograd.grad(out, leaf, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    (single,) = torch.autograd.grad(repo_loss(leaf, IDS, OLD, ADVANTAGES).loss, leaf)
    assert_near(batched, torch.stack((single, 2 * single)))


def test_in_place_is_refused_within_a_transform() -> None:
    x = point("loss")
    with pytest.raises(ValueError, match=r"^inplace=True .*no transform"):
        torch.func.grad(lambda z: repo_loss(z * 1, IDS, OLD, ADVANTAGES, inplace=True).loss)(x)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"^inplace=True .*no transform"):
        repo_loss(forward_ad.make_dual(x, x), IDS, OLD, ADVANTAGES, inplace=True)


def test_an_id_out_of_range_is_an_error_or_not_a_number() -> None:
    x, ids = point("loss"), torch.tensor([1, 5, 2])
    with pytest.raises(IndexError, match=r"^token_ids of live rows must be in \[0, 5\) or -100; got 5"):
        torch.func.grad(lambda z: repo_loss(z, ids, OLD, ADVANTAGES).loss)(x)
    logps = torch.func.vmap(lambda z, i: selective_log_softmax(z[None], i[None]))(x, ids)
    assert logps[:, 0].isnan().tolist() == [False, True, False]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", ["loss", "per token", "log-probs", "linear", "linear per token", "linear log-probs"])
@pytest.mark.parametrize("masked", [False, True])
def test_inputs_made_in_inference_mode_are_constants(masked: bool, form: str) -> None:
    def run(make: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = point("linear" if form.startswith("linear") else form).requires_grad_()
        ids, old, advantages, weight = (make(x) for x in (IDS, OLD, ADVANTAGES, WEIGHT))
        options: dict[str, Any] = {"response_mask": make(torch.tensor([True, False, True]))} if masked else {}
        options["loss_agg_mode"] = "none" if "per token" in form else "token-mean"
        if form == "log-probs":
            out = selective_log_softmax(leaf, ids, temperature=make(torch.tensor(0.7)))
        elif form == "linear log-probs":
            out = linear_selective_log_softmax(leaf, weight, ids, bias=make(BIAS))
        elif form.startswith("linear"):
            options |= {"ref_hidden": make(point("linear", seed=5)), "ref_weight": weight, "ref_bias": make(BIAS)}
            out = linear_repo_loss(leaf, weight, ids, old, advantages, kl_estimator="full", beta=0.3, **options).loss
        else:
            out = repo_loss(leaf, ids, old, advantages, **options).loss
        (gradient,) = torch.autograd.grad(out.sum() * 0.5, leaf)
        return gradient

    def in_inference_mode(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return x.clone()

    assert torch.equal(run(in_inference_mode), run(torch.clone))


def test_a_copy_is_kept_of_ids_made_in_inference_mode() -> None:
    with torch.inference_mode():
        ids = IDS.clone()
    leaf = point("log-probs").requires_grad_()
    logps = selective_log_softmax(leaf, ids)
    with torch.inference_mode():
        ids.zero_()
    (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    (expected,) = torch.autograd.grad(selective_log_softmax(leaf, IDS).sum(), leaf)
    assert torch.equal(gradient, expected)
