"""What a call costs beside its kernels, with any option: launches, and operators that PyTorch dispatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import repo_loss
from repo_kernels.backends import choice
from tests.support.kernels.operations import Operations, profiled_operations
from tests.support.kernels.option_sets import CALLS, make_call

MOST_LAUNCHES, MOST_OPERATORS = 5, 20
# Operators that start no kernel on a GPU: they allocate, or look at memory in another way.
WITHOUT_A_KERNEL = {
    "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "resolve_conj",
    "resolve_neg", "reshape", "select", "slice", "view",
}  # fmt: skip


class Call:
    """Forward and backward of a loss, whose upstream gradient is given."""

    def __init__(self, layout: str, options: str, backend: str) -> None:
        logits, self.arguments = make_call(layout, options)
        self.leaf, self.backend = logits.requires_grad_(), backend
        self.upstream = torch.full_like(self.loss(), 0.5)
        self()  # what is done once in a process is done

    def loss(self) -> Tensor:
        self.leaf.grad = None
        return repo_loss(self.leaf, **self.arguments, backend=self.backend).loss

    def __call__(self) -> None:
        self.loss().backward(self.upstream)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the Triton kernels that are launched; they do not run."""
    pytest.importorskip("triton", reason="triton is not installed")
    from repo_kernels.backends.triton import launch

    kinds: list[str] = []
    monkeypatch.setattr(launch, "launch", lambda variant, device, programs, *arguments: kinds.append(variant.kind))
    return kinds


@pytest.mark.parametrize(("layout", "options"), CALLS)
def test_a_call_makes_at_most_five_launches_and_dispatches_twenty_operators_in_triton(
    layout: str, options: str, launched: list[str]
) -> None:
    call = Call(layout, options, "triton")
    launched.clear()
    operators = [name.removeprefix("aten::") for name in profiled_operations(call)]
    kernels = [name for name in operators if name not in WITHOUT_A_KERNEL]
    assert launched.count("fused") == 1
    assert len(launched) + len(kernels) <= MOST_LAUNCHES, (launched, kernels)
    assert len(operators) <= MOST_OPERATORS, operators


@pytest.mark.parametrize(("layout", "options"), CALLS)
def test_a_call_dispatches_at_most_twenty_operators_in_cpp(layout: str, options: str) -> None:
    if not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    operators = profiled_operations(Call(layout, options, "cpu"))
    assert len(operators) <= MOST_OPERATORS, operators


@pytest.mark.parametrize(("layout", "options"), CALLS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.pairwise
def test_a_call_that_is_looked_at_dispatches_at_most_twenty_operators(
    layout: str, options: str, backend: str, launched: list[str]
) -> None:
    call = Call(layout, options, backend)
    launched.clear()
    with Operations() as operations:
        call()
    assert [name for name in operations.seen if "repo_kernels" in name]
    assert len(operations.seen) <= MOST_OPERATORS, operations.seen
    assert len(launched) <= MOST_LAUNCHES


def test_what_is_counted_is_counted() -> None:
    """An operator that calls others counts once, wherever it is called."""
    x = torch.ones(4, requires_grad=True)
    assert profiled_operations(lambda: x.double() + 1) == ["aten::to", "aten::add"]
    names = profiled_operations(lambda: (x * 2).backward(torch.ones(4)))
    assert names.count("aten::mul") == 2
    with Operations() as operations:
        (x * 2).detach()
    assert operations.seen == ["aten.mul.Tensor", "aten.detach.default"]


def test_no_gradient_takes_no_launch_for_it(launched: list[str]) -> None:
    logits, arguments = make_call("padded", "plain")
    with torch.no_grad():
        repo_loss(logits, **arguments, backend="triton")
    assert launched == ["prepare", "fused", "reduce"]


def test_an_empty_batch_launches_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from repo_kernels.backends.triton import launch

    programs: list[tuple[str, int]] = []
    run = launch.launch

    def counted(variant: Any, device: torch.device, count: int, *arguments: Any) -> None:
        programs.append((variant.kind, count))
        run(variant, device, count, *arguments)

    monkeypatch.setattr(launch, "launch", counted)
    logits = torch.zeros(0, 7, requires_grad=True)
    out = repo_loss(logits, torch.zeros(0, dtype=torch.int64), None, torch.zeros(0), backend="triton")
    out.loss.backward(torch.tensor(0.5))
    assert dict(programs) == {"prepare": 1, "fused": 0, "reduce": 1, "scale": 0}
    assert out.loss == 0
    assert out.stats.tensor.tolist() == [0.0] * 16 + [1.0, 1.0]
    assert logits.grad.shape == (0, 7)
