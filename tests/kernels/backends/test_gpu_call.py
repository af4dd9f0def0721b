"""The call around the kernel on a GPU: launches, waits, graphs, and the same bits again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.launches import count_launches
from repo_kernels import repo_loss, selective_log_softmax
from tests.support.kernels.cases import loss_arguments, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a GPU and TRITON_INTERPRET=0 (`make test-gpu`)",
    ),
]

MOST_LAUNCHES = 5  # counts of live tokens, the fused kernel, sums and statistics, the upstream gradient, one to spare
VOCABULARY = 4099
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on-policy, no costs": {"on_policy": True, "cost_form": "none"},
    "hinge with baselines, k1": {"cost_form": "baselines", "reference": "k1", "beta": 0.1, "lam": 0.5},
    "split, per token": {"mode": "split", "cost_form": "given", "per_sequence": False, "lam": 2.0, "normalize": True},
    "lagrangian, k2": {"mode": "lagrangian", "cost_form": "bare", "reference": "k2", "beta": 0.1, "lam": 1.0},
    "k3, entropy, importance weights": {
        "reference": "k3", "beta": 0.3, "lam": 1.0, "entropy_coef": 0.1, "importance_weights": True, "dual_clip": 3.0,
    },
    "full KL, softcap": {"reference": "full", "beta": 0.2, "softcap": 8.0, "temperature": 0.7},
    "a temperature for each row": {"reference": "k3", "beta": 0.1, "entropy_coef": 0.1, "temperature": "rows"},
    "sequence means": {"loss_agg_mode": "seq-mean-token-mean", "reference": "k3", "beta": 0.1},
    "sequence sums by length": {"loss_agg_mode": "seq-mean-token-sum-norm", "divisor": 7.5},
    "token sum": {"loss_agg_mode": "token-sum"},
    "per-token losses": {"loss_agg_mode": "none", "reference": "k3", "beta": 0.1},
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {"padded": {"leading": (3, 7)}, "packed": {"lengths": [4, 0, 9, 8]}}


class Call:
    """A loss on the device, forward and backward, whose upstream gradient is given.

    logits: leaf, (B, L, V) or (T, V), with NaN in dead rows. Calling it returns [loss, logps, statistics, gradient].
    """

    def __init__(self, layout: str, form: str, inplace: bool = False, **more: Any) -> None:
        batch = make_batch(5, vocabulary=VOCABULARY, dtype=torch.bfloat16, **LAYOUTS[layout])
        arguments = loss_arguments(batch, **OPTIONS[form]) | more
        self.arguments = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        self.inplace, self.original = inplace, batch.logits.cuda()
        self.logits = self.original.clone().requires_grad_()
        per_token = OPTIONS[form].get("loss_agg_mode") == "none"
        self.upstream = torch.full(batch.leading if per_token else (), 0.5, device="cuda")
        self()  # compiles

    def __call__(self) -> list[Tensor]:
        if self.inplace:
            self.logits = self.original.clone().requires_grad_()
        out = repo_loss(self.logits, **self.arguments, inplace=self.inplace)
        (grad,) = torch.autograd.grad(out.loss, self.logits, self.upstream)
        return [out.loss.detach(), out.logps, out.stats.tensor, grad]


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Make every wait of the host for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    """Compare as bytes, so that equal NaN count as equal."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", OPTIONS)
def test_forward_and_backward_are_a_handful_of_launches(form: str, layout: str) -> None:
    assert count_launches(Call(layout, form)) <= MOST_LAUNCHES


@pytest.mark.parametrize("form", ["plain", "sequence means"])
def test_the_loss_in_place_makes_no_launch_more(form: str) -> None:
    call = Call("padded", form, inplace=True)
    assert count_launches(call) <= MOST_LAUNCHES + 1  # the copy that the call overwrites


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", OPTIONS)
def test_the_host_waits_for_nothing(form: str, layout: str, inplace: bool) -> None:
    call = Call(layout, form, inplace)
    with refusing_waits():
        call()
        call.arguments["lam"] = torch.full((), 0.75, device="cuda") if "lam" in OPTIONS[form] else 0.0
        call()


def test_log_probabilities_and_their_gradient_wait_for_nothing() -> None:
    logits = torch.randn(5, VOCABULARY, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.arange(5, device="cuda")

    def call() -> None:
        logps, _ = selective_log_softmax(logits, ids, temperature=0.7, return_entropy=True)
        torch.autograd.grad(logps, logits, torch.ones_like(logps))

    call()
    with refusing_waits():
        call()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", OPTIONS)
def test_twenty_calls_give_the_same_bits(form: str, layout: str) -> None:
    call = Call(layout, form)
    first = call()
    for _ in range(19):
        assert_same_bits(call(), first)


def test_sums_over_many_rows_give_the_same_bits() -> None:
    rows = 4096
    logits = torch.randn(rows, 512, device="cuda", requires_grad=True)
    ids, advantages = torch.randint(0, 512, (rows,), device="cuda"), torch.randn(rows, device="cuda")

    def call() -> list[Tensor]:
        out = repo_loss(logits, ids, None, advantages, costs=advantages, lam=0.5)
        return [out.loss.detach(), out.stats.tensor, torch.autograd.grad(out.loss, logits)[0]]

    first = call()
    for _ in range(49):
        assert_same_bits(call(), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", OPTIONS)
def test_in_place_gives_the_bits_of_out_of_place(form: str, layout: str) -> None:
    assert_same_bits(Call(layout, form, inplace=True)(), Call(layout, form)())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", OPTIONS)
def test_a_graph_of_forward_and_backward_gives_the_bits_of_the_call(form: str, layout: str) -> None:
    call = Call(layout, form)
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert_same_bits(captured, expected)
    with torch.no_grad():
        call.logits.copy_(call.logits.flip(-1))  # a replay reads what the logits hold now
    graph.replay()
    replayed = [x.clone() for x in captured]
    assert_same_bits(replayed, call())
    assert not torch.equal(replayed[1], expected[1])
