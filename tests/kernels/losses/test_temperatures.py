"""A temperature for each row or sequence, against logits that are divided before the call and against scalar calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from repo_kernels import (
    LinearRepoLoss,
    LoraHead,
    LossOptions,
    RepoLoss,
    linear_repo_loss,
    linear_selective_log_softmax,
    repo_loss,
    selective_log_softmax,
)
from tests.support.kernels.cases import Batch, loss_arguments, make_batch

V, H, RANK = 11, 6, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"leading": (3, 5)},
    "packed": {"lengths": [4, 0, 6]},
    "tokens": {"leading": (9,)},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "k3, entropy, importance weights": {
        "reference": "k3", "beta": 0.3, "lam": 1.0, "entropy_coef": 0.1, "importance_weights": True, "grad_scale": 4.0,
    },
    "full KL, softcap": {"reference": "full", "beta": 0.2, "softcap": 3.0, "return_entropy": True},
    "per token": {"loss_agg_mode": "none", "on_policy": True, "entropy_coef": 0.1},
    "sequence ratio": {"ratio_level": "sequence", "entropy_coef": 0.1, "softcap": 3.0},
    "CISPO": {"surrogate": "cispo", "reference": "k3", "beta": 0.1},
}  # fmt: skip
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def rows_of(temperature: Tensor, batch: Batch) -> Tensor:
    """(..., 1) of the leading shape: what logits are divided by; 1 on dead rows."""
    given = temperature if tuple(temperature.shape) == batch.leading else temperature[batch.sequence_of]
    return given.reshape(batch.leading).masked_fill(batch.dead, 1.0)[..., None].double()


def transformed(logits: Tensor, by: Tensor, softcap: float | None) -> Tensor:
    """The logits as the loss reads them."""
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / by


def live_leaf(values: Tensor, batch: Batch) -> Tensor:
    """A leaf without the NaN of dead rows."""
    return values.detach().masked_fill(batch.dead[..., None], 0.0).requires_grad_()


def make_head(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Hidden states (..., H), NaN on dead rows, and [weight, bias, lora_A, lora_B], in fp64."""
    g = torch.Generator().manual_seed(11)
    hidden = torch.randn(*batch.leading, H, generator=g, dtype=torch.float64)
    shapes = ((V, H), (V,), (RANK, H), (V, RANK))
    leaves = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    return hidden.masked_fill(batch.dead[..., None], math.nan).requires_grad_(), leaves


@pytest.mark.parametrize("each", ["rows", "sequences"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_loss_of_logits_that_were_divided(layout: str, form: str, each: str) -> None:
    batch = make_batch(1, vocabulary=V, **LAYOUTS[layout])
    arguments = loss_arguments(batch, temperature=each, **FORMS[form])
    softcap, by = arguments.get("softcap"), rows_of(arguments["temperature"], batch)
    given, exact = batch.logits.clone().requires_grad_(), live_leaf(batch.logits, batch)
    out = repo_loss(given, **arguments)
    divided = {name: x for name, x in arguments.items() if name not in ("temperature", "softcap")}
    if "ref_logits" in divided:
        divided["ref_logits"] = transformed(live_leaf(batch.ref_logits, batch), by, softcap).detach()
    expected = repo_loss(transformed(exact, by, softcap), **divided)
    for one in (out, expected):
        one.loss.backward(torch.full_like(one.loss, 0.3))
    for name in ("loss", "logps", "entropy", "kl"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), **CLOSE)
    torch.testing.assert_close(out.stats.tensor, expected.stats.tensor, **CLOSE)
    torch.testing.assert_close(given.grad, exact.grad, **CLOSE)
    assert given.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["dense", "LoRA", "kept"])
@pytest.mark.parametrize("form", FORMS)
def test_hidden_states_and_a_head_give_the_loss_of_their_logits(form: str, kind: str) -> None:
    batch = make_batch(2, (3, 5), V)
    arguments = loss_arguments(batch, temperature="rows", **FORMS[form] | {"grad_scale": 1.0})
    hidden, (weight, bias, a, b) = make_head(batch)
    if kind == "kept":
        ids = batch.token_ids.masked_fill(batch.dead, 0)
        arguments["kept"] = torch.stack((ids, (ids + 1) % V, (ids + 4) % V, torch.full_like(ids, -1)), -1)
    head = LoraHead(weight.detach(), a, b, 0.7) if kind == "LoRA" else weight
    reference = {}
    linear = dict(arguments)
    if linear.pop("ref_logits", None) is not None:
        hidden_ref, weight_ref = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(V, 4, dtype=torch.float64)
        reference = {"ref_hidden": hidden_ref, "ref_weight": weight_ref}
        arguments["ref_logits"] = hidden_ref @ weight_ref.t()
    out = linear_repo_loss(hidden, head, bias=bias, chunk_tokens=4, **linear, **reference)
    exact = live_leaf(hidden, batch)
    product = exact @ (weight + 0.7 * b @ a if kind == "LoRA" else weight).t() + bias
    expected = repo_loss(product, **arguments)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    leaves = (bias, a, b) if kind == "LoRA" else (weight, bias)
    got = torch.autograd.grad(out.loss.sum(), (hidden, *leaves))
    torch.testing.assert_close(got, torch.autograd.grad(expected.loss.sum(), (exact, *leaves)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"surrogate": "cispo"}, {"kl_estimator": "full"}])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_rows_one_by_one_with_a_scalar_give_the_rows_of_the_batch(form: str, options: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) for n in (7, V))
    ids, by = torch.randint(V, (7,), generator=g), 0.5 + torch.rand(7, generator=g)
    rewards, old = torch.randn(7, generator=g), -2 - torch.rand(7, generator=g)
    common: dict[str, Any] = {"loss_agg_mode": "none", "entropy_coef": 0.1, "softcap": 4.0, **options}
    if "kl_estimator" in options:
        common["beta"] = 0.3

    def call(x: Tensor, rows: slice, temperature: Any) -> Tensor:
        values = ids[rows], old[rows], rewards[rows]
        reference = {"ref_hidden": x.detach().flip(1), "ref_weight": weight} if "kl_estimator" in options else {}
        if form == "hidden":
            return linear_repo_loss(x, weight, *values, temperature=temperature, **common, **reference).loss
        if reference:
            reference = {"ref_logits": reference["ref_hidden"] @ weight.t()}
        return repo_loss(x @ weight.t(), *values, temperature=temperature, **common, **reference).loss

    whole, single = (hidden.clone().requires_grad_() for _ in range(2))
    batch = call(whole, slice(None), by)
    alone = torch.cat([call(single[i : i + 1], slice(i, i + 1), by[i].item()) for i in range(7)])
    torch.testing.assert_close(batch, alone, **CLOSE)
    batch.sum().backward()
    alone.sum().backward()
    torch.testing.assert_close(whole.grad, single.grad, **CLOSE)


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_log_probabilities_and_entropy_have_the_temperature_of_their_row(form: str, backend: str) -> None:
    batch = make_batch(4, (3, 5), 37, dtype=torch.float32)
    ids = batch.token_ids.masked_fill(batch.dead, -100)
    for by in (batch.temperatures(False), batch.temperatures(True), batch.temperatures(True)[:, None].half()):
        exact = live_leaf(batch.logits, batch).detach().double().requires_grad_()
        logp = torch.log_softmax(exact / rows_of(by.squeeze(1) if by.shape[1:] == (1,) else by, batch), -1)
        expected = logp.gather(-1, ids.clamp_min(0)[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
        expected = tuple(x.masked_fill(batch.dead, 0.0) for x in expected)
        given = batch.logits.clone().requires_grad_()
        call = [given] if form == "logits" else [given, torch.eye(37)]
        more = {} if form == "logits" else {"chunk_tokens": 4}
        function = selective_log_softmax if form == "logits" else linear_selective_log_softmax
        got = function(*call, ids, temperature=by, return_entropy=True, backend=backend, **more)
        torch.testing.assert_close(tuple(x.double() for x in got), expected, rtol=1e-5, atol=2e-6)
        for logps, entropy in (got, expected):
            (logps.sum() + 0.5 * entropy.square().sum()).backward()
        torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_kernels_agree_with_fp64(backend: str, dtype: torch.dtype, inplace: bool) -> None:
    batch = make_batch(6, vocabulary=301, lengths=[3, 0, 5], dtype=torch.float32)
    batch.logits, batch.ref_logits = batch.logits.to(dtype), batch.ref_logits.to(dtype)
    form: dict[str, Any] = {"beta": 0.2, "entropy_coef": 0.1, "softcap": 8.0, "reference": "full"}
    for each in ("rows", "sequences"):
        arguments = loss_arguments(batch, temperature=each, **form)
        exact = batch.logits.double().requires_grad_()
        expected = repo_loss(exact, **arguments | {"ref_logits": batch.ref_logits.double()})
        expected.loss.backward()
        leaf = batch.logits.clone().requires_grad_()
        out = repo_loss(leaf * 1, **arguments, backend=backend, inplace=inplace)
        out.loss.backward()
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
        error = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < (2e-6 if dtype == torch.float32 else 2**-8)
        assert not leaf.grad[batch.dead].any()


def test_equal_temperatures_have_the_bits_of_the_scalar() -> None:
    batch = make_batch(7, (3, 5), 301, dtype=torch.float32)
    arguments = loss_arguments(batch, entropy_coef=0.1)
    for backend in ("eager", "cpu", "triton"):
        grads = []
        for by in (0.7, torch.full((3, 5), 0.7), torch.full((3,), 0.7)):
            leaf = batch.logits.clone().requires_grad_()
            repo_loss(leaf, **arguments, temperature=by, backend=backend).loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(grads[0], grads[1])
        assert torch.equal(grads[0], grads[2])


def test_impossible_tokens_keep_the_probability_0() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [2.0, -math.inf, 0.0]], dtype=torch.float64)
    by, ids = torch.tensor([0.5, 2.0]), torch.tensor([0, 2])
    for backend in ("eager", "cpu", "triton"):
        leaf = logits.to(torch.float32).requires_grad_()
        logps, entropy = selective_log_softmax(leaf, ids, temperature=by, return_entropy=True, backend=backend)
        expected = torch.log_softmax(logits / by[:, None], -1)
        torch.testing.assert_close(logps.double(), expected[[0, 1], ids], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).nansum(-1), rtol=1e-6, atol=1e-6)
        (logps.sum() + entropy.sum()).backward()
        assert leaf.grad.isfinite().all()
        assert leaf.grad[0, 2] == leaf.grad[1, 1] == 0


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("leading", [(0, 4), (1, 1), (1,), (0,), (2, 3)])
def test_empty_batches_one_row_and_nothing_live(leading: tuple[int, ...], backend: str) -> None:
    ids = torch.zeros(leading, dtype=torch.int64)
    for shape in {leading, leading[:1]}:
        for live in (False, True):
            fill = math.nan if not live else 0.5
            hidden, weight = torch.full((*leading, 3), 1.0 if live else math.nan).requires_grad_(), torch.ones(V, 3)
            how: dict[str, Any] = {"temperature": torch.full(shape, fill), "backend": backend}
            tail = ids, None, torch.ones(leading[0])
            mask = torch.full(leading, live)
            losses = [
                repo_loss(hidden @ weight.t(), *tail, response_mask=mask, **how),
                linear_repo_loss(hidden, weight.requires_grad_(), *tail, response_mask=mask, **how),
            ]
            for out in losses:
                grad = torch.autograd.grad(out.loss, hidden if live else (weight if out is losses[1] else hidden))[0]
                assert out.loss == (-1.0 if live and ids.numel() else 0.0)
                assert live or out is losses[0] or not grad.any()


@pytest.mark.parametrize("kind", ["loss", "linear", "LoRA", "log-probs", "linear log-probs"])
def test_gradients_in_fp64(kind: str) -> None:
    batch = make_batch(8, (2, 3), V, dead=0.0)
    arguments = loss_arguments(batch, temperature="rows", reference="k3", beta=0.2, entropy_coef=0.1)
    ids, by = batch.token_ids, arguments["temperature"]
    hidden, (weight, bias, a, b) = make_head(batch)
    both: dict[str, Any] = {"temperature": by, "return_entropy": True}
    inputs, function = {
        "loss": ((batch.logits.requires_grad_(),), lambda z: repo_loss(z, **arguments).loss),
        "linear": ((hidden, weight, bias), lambda h, w, c: linear_repo_loss(h, w, bias=c, **arguments).loss),
        "LoRA": (
            (hidden, a, b),
            lambda h, a, b: linear_repo_loss(h, LoraHead(weight.detach(), a, b, 0.5), **arguments).loss,
        ),
        "log-probs": ((batch.logits.requires_grad_(),), lambda z: selective_log_softmax(z, ids, **both)),
        "linear log-probs": (
            (hidden, weight),
            lambda h, w: linear_selective_log_softmax(h, w, ids, chunk_tokens=4, **both),
        ),
    }[kind]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_module_takes_it_in_place_of_the_temperature_of_its_options() -> None:
    batch = make_batch(9, (3, 5), V, dtype=torch.float32)
    arguments = loss_arguments(batch)
    arguments = {name: x for name, x in arguments.items() if name not in ("cost_mode", "loss_agg_mode")}
    module, hidden = RepoLoss(LossOptions(temperature=0.6)), batch.logits
    linear = LinearRepoLoss(LossOptions(temperature=0.6), chunk_tokens=4)
    for by in (batch.temperatures(False), batch.temperatures(True), 0.9, torch.tensor(0.9)):
        expected = repo_loss(batch.logits, **arguments, temperature=by).loss
        assert torch.equal(module(batch.logits, **arguments, temperature=by).loss, expected)
        torch.testing.assert_close(linear(hidden, torch.eye(V), **arguments, temperature=by).loss, expected)
    expected = repo_loss(batch.logits, **arguments, temperature=0.6).loss
    assert torch.equal(module(batch.logits, **arguments).loss, expected)
    assert torch.equal(module(batch.logits, **arguments, temperature=None).loss, expected)


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of this process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_a_divided_vocabulary_takes_it(alone: Any, backend: str) -> None:
    dtype = torch.float64 if backend == "eager" else torch.float32
    batch = make_batch(10, (3, 5), V, dtype=dtype)
    for each in ("rows", "sequences"):
        arguments = loss_arguments(batch, temperature=each, reference="k3", beta=0.2, entropy_coef=0.1)
        grads = []
        for group in (None, alone):
            given, weight = batch.logits.clone().requires_grad_(), torch.eye(V, dtype=dtype).requires_grad_()
            how: dict[str, Any] = {"backend": backend, "group": group}
            loss = repo_loss(given, **arguments, **how).loss
            loss = loss + linear_repo_loss(given, weight, **arguments, **how, chunk_tokens=4).loss
            loss.backward()
            grads.append((loss, given.grad, weight.grad))
        torch.testing.assert_close(grads[1], grads[0])
