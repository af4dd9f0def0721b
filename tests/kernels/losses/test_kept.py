"""Kept-token sets against the softmax over the set, written out in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repo_kernels import LoraHead, linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from repo_kernels.losses.heads.kept import kept_products, kept_products_gradient
from tests.support.kernels.cases import make_batch

V, H, K = 19, 6, 5
SOFTCAP, TEMPERATURE = 3.0, 0.7


def make_sets(ids: Tensor, sizes: Tensor, seed: int = 0) -> Tensor:
    """Sets of `sizes` distinct ids with the token among them, -1 in the rest, in no order. Ids may be -100."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for token, size in zip(ids.flatten().tolist(), sizes.flatten().tolist(), strict=True):
        others = [x for x in torch.randperm(V, generator=generator).tolist() if x != token][: size - 1]
        row = torch.tensor([max(token, 0), *others, *[-1] * (K - size)])
        rows.append(row[torch.randperm(K, generator=generator)])
    return torch.stack(rows).view(*ids.shape, K)


def case(dtype: torch.dtype, leading: tuple[int, ...] = (3, 5)) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(hidden states, weight, arguments of the loss); dead rows hold NaN, and ids of no meaning."""
    batch = make_batch(5, vocabulary=V, leading=leading, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*leading, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    live = batch.response_mask & (batch.token_ids != -100)
    hidden[~live] = math.nan
    kept = make_sets(batch.token_ids, torch.randint(1, K + 1, leading, generator=generator))
    kept[~live] = 10**9
    arguments = {"token_ids": batch.token_ids, "response_mask": batch.response_mask, "kept": kept}
    return hidden, weight, arguments | {"old_logps": batch.old_logps, "reward_advantages": torch.ones(leading[0])}


def live_of(arguments: dict[str, Any]) -> Tensor:
    return arguments["response_mask"] & (arguments["token_ids"] != -100)


def written_out(logits: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(logps, entropies) of the rows one by one, 0 on dead ones, with softcap and temperature."""
    logps, entropies = (torch.zeros(logits.shape[:-1], dtype=logits.dtype) for _ in range(2))
    for at in live_of(arguments).nonzero().tolist():
        at = tuple(at)
        kept = [x for x in arguments["kept"][at].tolist() if x >= 0]
        row = SOFTCAP * torch.tanh(logits[at][kept] / SOFTCAP) / TEMPERATURE
        of_set = row - torch.logsumexp(row, 0)
        logps[at] = of_set[kept.index(arguments["token_ids"][at].item())]
        entropies[at] = -(of_set.exp() * of_set).sum()
    return logps, entropies


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_log_probabilities_and_entropy_are_those_of_the_set(form: str, dtype: torch.dtype, backend: str) -> None:
    hidden, weight, arguments = case(dtype)
    live = live_of(arguments)
    exact = torch.where(live[..., None], hidden, 0.0).double().requires_grad_()
    head = weight.double().requires_grad_()
    logits = exact @ head.t()
    options = {"softcap": SOFTCAP, "temperature": TEMPERATURE, "return_entropy": True, "backend": backend}
    how = {"kept": arguments["kept"], **options}
    ids = arguments["token_ids"].masked_fill(~live, -100)
    if form == "logits":
        rounded = torch.where(live[..., None], (hidden @ weight.t()), math.nan)
        logits = torch.where(live[..., None], rounded, 0.0).double().requires_grad_()
        given, other = rounded.clone().requires_grad_(), None
        logps, entropy = selective_log_softmax(given, ids, **how)
        wanted: list[Tensor] = [logits]
    else:
        given, other = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logps, entropy = linear_selective_log_softmax(given, other, ids, **how, chunk_tokens=4)
        wanted = [exact, head]
    expected = written_out(logits, arguments)
    tolerance = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close((logps.double(), entropy.double()), expected, **tolerance)
    slopes = torch.linspace(-1.0, 1.0, logps.numel()).view(logps.shape)
    grads = torch.autograd.grad((expected[0] * slopes + expected[1]).sum(), wanted)
    (logps * slopes + entropy).sum().backward()
    rounding = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 2e-3}
    for got, right in zip([given, other], grads, strict=False):
        torch.testing.assert_close(got.grad.double(), right, **rounding)
        assert got.grad.isfinite().all()


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("options", [{}, {"surrogate": "cispo"}, {"ratio_level": "sequence"}, {"kl_estimator": "full"}])
def test_a_loss_over_sets_is_the_loss_of_their_log_probabilities(form: str, options: dict[str, Any]) -> None:
    hidden, weight, arguments = case(torch.float64)
    live = live_of(arguments)
    logits = torch.where(live[..., None], hidden @ weight.t(), math.nan)
    kept = torch.where(live[..., None], arguments["kept"], -1)
    place = (kept == arguments["token_ids"][..., None]).int().argmax(-1)
    exact = torch.where(live[..., None], logits, 0.0).requires_grad_()

    def narrow(whole: Tensor) -> Tensor:
        capped = SOFTCAP * torch.tanh(whole.gather(-1, kept.clamp_min(0)) / SOFTCAP)
        return torch.where(kept < 0, -math.inf, capped)

    arguments = arguments | options | {"temperature": TEMPERATURE, "entropy_coef": 0.1, "grad_scale": 2.0}
    reference, narrow_reference, of_form = {}, {}, {}
    if "kl_estimator" in options:
        reference = {"ref_logits": 0.5 * logits, "beta": 0.3}
        narrow_reference = {"ref_logits": narrow(0.5 * exact.detach()), "beta": 0.3}
        of_form = {"ref_hidden": 0.5 * hidden, "ref_weight": weight, "beta": 0.3}
    without = {name: x for name, x in arguments.items() if name != "kept"}
    without["token_ids"] = torch.where(live, place, -100)
    arguments["softcap"] = SOFTCAP
    expected = repo_loss(narrow(exact), **without, **narrow_reference)
    expected.loss.backward()
    if form == "logits":
        given = logits.clone().requires_grad_()
        out = repo_loss(given, **arguments, **reference)
        wanted = exact.grad
    else:
        given = hidden.clone().requires_grad_()
        out = linear_repo_loss(given, weight, **arguments, **of_form, chunk_bytes=1)
        wanted = exact.grad @ weight / 2  # which divides grad_scale out itself
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logps, expected.logps)
    torch.testing.assert_close(out.stats.tensor, expected.stats.tensor)
    torch.testing.assert_close(given.grad, wanted)


def test_the_set_of_all_tokens_is_no_set_and_the_set_of_one_is_certain() -> None:
    hidden, weight, arguments = case(torch.float64)
    live = live_of(arguments)
    ids = arguments["token_ids"].where(live, 0)
    logits = torch.where(live[..., None], hidden @ weight.t(), 0.0)
    everything = torch.randperm(V).expand(3, 5, V)
    torch.testing.assert_close(selective_log_softmax(logits, ids, kept=everything), selective_log_softmax(logits, ids))
    one = selective_log_softmax(logits.requires_grad_(), ids, kept=ids[..., None])
    assert not one.any()
    one.sum().backward()
    assert not logits.grad.any()


@given(st.integers(0, 10**6))
def test_the_order_of_a_set_and_ids_outside_of_it_change_nothing(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (7,), generator=generator)
    kept = make_sets(ids, torch.randint(1, K + 1, (7,), generator=generator), seed)
    logits = torch.randn(7, V, dtype=torch.float64, generator=generator)
    inside = torch.zeros(7, V + 1, dtype=torch.bool).scatter(1, kept.where(kept >= 0, V), True)[:, :V]
    logps = selective_log_softmax(logits, ids, kept=kept)
    torch.testing.assert_close(selective_log_softmax(logits.where(inside, 1e4), ids, kept=kept.flip(1)), logps)
    masked = logits.masked_fill(~inside, -math.inf).log_softmax(1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(logps, masked)


@pytest.mark.parametrize("leading", [(0, 4), (1, 1), (6,)])
@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_empty_batches_one_row_and_nothing_live(form: str, leading: tuple[int, ...]) -> None:
    ids, mask = torch.zeros(leading, dtype=torch.int64), torch.zeros(leading)
    given = torch.full((*leading, H if form == "hidden" else V), math.nan, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    call, head = (repo_loss, ()) if form == "logits" else (linear_repo_loss, (weight,))
    kept = torch.full((*leading, K), -7)
    out = call(given, *head, ids, None, torch.ones(leading[0]), response_mask=mask, kept=kept)
    out.loss.backward()
    assert out.loss == 0
    assert not given.grad.any()
    assert weight.grad is None or not weight.grad.any()


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_gradients_in_fp64(form: str) -> None:
    hidden, weight, arguments = case(torch.float64, (2, 3))
    live = live_of(arguments)
    hidden, bias = torch.where(live[..., None], hidden, 0.0), torch.linspace(-1, 1, V, dtype=torch.float64)
    ids = arguments["token_ids"].masked_fill(~live, -100)
    if form == "logits":
        inputs: tuple[Tensor, ...] = (hidden @ weight.t(),)
        function: Any = lambda z: selective_log_softmax(z, ids, kept=arguments["kept"], softcap=2.0)  # noqa: E731
    else:
        inputs = (hidden, weight, bias)
        function = lambda h, w, b: linear_selective_log_softmax(  # noqa: E731
            h, w, ids, bias=b, kept=arguments["kept"], chunk_tokens=2
        )
    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in inputs])


def test_the_operators_pass_opcheck() -> None:
    hidden, weight = torch.randn(4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    index = make_sets(torch.arange(4), torch.tensor([1, 2, 3, 5]))
    torch.library.opcheck(kept_products, (hidden, weight, None, index, [True, True, False], None, None))
    upstream = torch.randn(4, K)
    inputs = (upstream, hidden.detach(), weight.detach(), index, [True, False, True], 2, None)
    torch.library.opcheck(kept_products_gradient, inputs)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_it_compiles_to_one_graph_and_not_again_for_other_values(form: str) -> None:
    hidden, weight, arguments = case(torch.float32)
    hidden = torch.where(hidden.isnan(), 0.0, hidden)
    other = torch.where(live_of(arguments)[..., None], make_sets(arguments["token_ids"], torch.full((3, 5), 3)), 0)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()

    def loss(x: Tensor, kept: Tensor) -> Tensor:
        if form == "logits":
            return repo_loss(x @ weight.t(), **arguments | {"kept": kept}).loss
        return linear_repo_loss(x, weight, **arguments | {"kept": kept}).loss

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for scale, kept in ((1.0, arguments["kept"]), (0.5, other)):
        torch.testing.assert_close(compiled(scale * hidden, kept), loss(scale * hidden, kept))
    assert counter.frame_count == 1


def test_transforms_of_torch_func_see_the_same_gradient() -> None:
    hidden, weight, arguments = case(torch.float64)
    given = hidden.clone().requires_grad_()
    linear_repo_loss(given, weight, **arguments).loss.backward()
    of_func = torch.func.grad(lambda h: linear_repo_loss(h, weight, **arguments).loss)(hidden)
    torch.testing.assert_close(of_func, given.grad)


@pytest.mark.parametrize("transformed", [False, True])
def test_a_lora_head_is_its_merged_weight(transformed: bool) -> None:
    hidden, weight, arguments = case(torch.float64)
    a, b = (0.1 * torch.arange(2.0 * n, dtype=torch.float64).sin() for n in (H, V))

    def gradients(merged: bool) -> tuple[Tensor, ...]:
        def value(h: Tensor, a: Tensor, b: Tensor) -> Tensor:
            head = (
                weight + 0.5 * b.view(V, 2) @ a.view(2, H)
                if merged
                else LoraHead(weight, a.view(2, H), b.view(V, 2), 0.5)
            )
            return linear_repo_loss(h, head, **arguments).loss

        if transformed:
            return torch.func.grad(value, argnums=(0, 1, 2))(hidden, a, b)
        leaves = [x.clone().requires_grad_() for x in (hidden, a, b)]
        return torch.autograd.grad(value(*leaves), leaves)

    torch.testing.assert_close(gradients(merged=False), gradients(merged=True))


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, r"^kept must be a tensor of int64 or int32, shape \(3, 'K'\); got", {"kept": torch.zeros(3, 2)}),
        (ValueError, r"^kept must have shape \(3, 'K'\) with K >= 1", {"kept": torch.zeros(2, 2, dtype=torch.int32)}),
        (ValueError, r"^kept must have shape \(3, 'K'\) with K >= 1; got", {"kept": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, r"with K >= 1; got", {"kept": torch.zeros(3, 0, dtype=torch.int64)}),
        (IndexError, r"^kept of live rows must be in \[0, 4\) or -1; got 4", {"kept": torch.tensor([[0, 4]] * 3)}),
        (IndexError, r"got -2", {"kept": torch.tensor([[0, -2]] * 3)}),
        (ValueError, r"^kept must hold the token of each live row; row 1 lacks its token 0", {
            "kept": torch.tensor([[0, 1], [2, 1], [0, -1]])}),
        (ValueError, r"^kept must hold an id once in a row; got 3 twice", {"kept": torch.tensor([[3, 0, 3]] * 3)}),
        (ValueError, r"^inplace=True is for the whole vocabulary", {"inplace": True}),
    ],
)  # fmt: skip
def test_wrong_sets_are_named(error: type[Exception], match: str, changed: dict[str, Any]) -> None:
    given = {"kept": torch.zeros(3, 1, dtype=torch.int64)} | changed
    with pytest.raises(error, match=match):
        repo_loss(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.ones(3), **given)


def test_an_id_below_0_is_no_member_of_a_padded_set() -> None:
    ids, kept = torch.tensor([-1]), torch.tensor([[2, -1]])
    with pytest.raises(ValueError, match="row 0 lacks its token -1"):
        selective_log_softmax(torch.zeros(1, 4), ids, kept=kept)
