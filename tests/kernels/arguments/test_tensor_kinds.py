"""Whatever kind of tensor an argument is, a call gives the right result or an error that names an argument.

Examples run in a child process: one that kills it fails its test, and the others go on in a new child.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repo_kernels import (
    LoraHead,
    linear_repo_loss,
    linear_selective_log_softmax,
    repo_loss,
    repo_loss_from_logps,
    selective_log_softmax,
)
from tests.support.kernels.tensor_kinds import EQUAL, KINDS, Example, examples

ROOT = Path(__file__).parents[3]


class Child:
    """A process that runs examples."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.support.kernels.tensor_kinds"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def check(self, example: Example) -> str:
        """Run an example; return what happened, or raise AssertionError."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(example) + "\n")
        answer = self.process.stdout.readline()
        assert answer, f"the process died, code {self.process.wait()}, of {example}"
        happened = json.loads(answer)
        assert not happened.startswith("failed"), f"{example} {happened}"
        return happened

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Children:
    """One child after the other."""

    def __init__(self) -> None:
        self.child = Child()

    def check(self, example: Example) -> str:
        """Run an example in the child that lives."""
        if self.child.process.poll() is not None:
            self.child.close()
            self.child = Child()
        return self.child.check(example)


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    """Made once, since a child takes seconds to begin."""
    made = Children()
    yield made
    made.child.close()


@settings(max_examples=300, deadline=None)
@given(example=st.sampled_from(examples()))
def test_a_call_gives_the_right_result_or_names_an_argument(children: Children, example: Example) -> None:
    children.check(example)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_logits_of_every_kind(children: Children, inplace: bool, kind: str) -> None:
    happened = children.check(("repo_loss", "logits", kind, inplace, "packed", None, False))
    assert (happened == "equal") == (kind in EQUAL and not (inplace and kind == "wrapper"))
    assert happened.split(":")[0] in ("equal", "refused", "there is no such tensor")


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("function", ["repo_loss", "linear_repo_loss", "selective_log_softmax"])
def test_calls_of_shapes_alone_give_shapes(children: Children, function: str, kind: str) -> None:
    example = (function, "all", kind, False, "padded", None, False)
    # a scalar on the meta device has no value
    assert children.check(example).startswith("shapes" if kind == "fake" else "refused: ")


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_meta_logits_give_shapes(inplace: bool) -> None:
    logits = torch.empty(2, 3, 7, device="meta", dtype=torch.bfloat16, requires_grad=True)
    ids, ones = torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.ones(2, device="meta")
    out = repo_loss(logits * 1, ids, None, ones, costs=ones, lam=0.5, inplace=inplace)
    out.loss.backward()
    assert (out.loss.shape, out.logps.shape, logits.grad.shape) == ((), (2, 3), (2, 3, 7))
    assert (out.loss.device.type, logits.grad.dtype) == ("meta", torch.bfloat16)


def on_meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=grad)


HIDDEN, IDS = {"grad": True}, {"dtype": torch.int64}
META = {
    "linear": lambda: (
        linear_repo_loss(on_meta(5, 4, **HIDDEN), on_meta(9, 4), on_meta(5, **IDS), on_meta(5), on_meta(5)).logps
    ),
    "LoRA": lambda: (
        linear_repo_loss(
            on_meta(5, 4, **HIDDEN),
            LoraHead(on_meta(9, 4), on_meta(2, 4, **HIDDEN), on_meta(9, 2, **HIDDEN), 0.5),
            on_meta(5, **IDS),
            None,
            on_meta(5),
        ).logps
    ),
    "linear logps": lambda: linear_selective_log_softmax(on_meta(5, 4, **HIDDEN), on_meta(9, 4), on_meta(5, **IDS)),
    "logps": lambda: selective_log_softmax(on_meta(5, 9, **HIDDEN), on_meta(5, **IDS)),
    "from logps": lambda: repo_loss_from_logps(on_meta(5, **HIDDEN), on_meta(5), on_meta(5)).logps,
    "sequence ratio": lambda: (
        repo_loss(on_meta(5, 9, **HIDDEN), on_meta(5, **IDS), on_meta(5), on_meta(5), ratio_level="sequence").logps
    ),
    "per row temperature": lambda: (
        repo_loss(on_meta(5, 9, **HIDDEN), on_meta(5, **IDS), on_meta(5), on_meta(5), temperature=on_meta(5)).logps
    ),
    "kept": lambda: (
        repo_loss(on_meta(5, 9, **HIDDEN), on_meta(5, **IDS), on_meta(5), on_meta(5), kept=on_meta(5, 2, **IDS)).logps
    ),
}


@pytest.mark.parametrize("call", META.values(), ids=META)
def test_every_form_gives_shapes_on_the_meta_device(call: Callable[[], Tensor]) -> None:
    logps = call()
    assert (logps.device.type, logps.shape) == ("meta", (5,))


@pytest.mark.parametrize("size", [0, 7 * 4 * 4 - 1])
def test_a_storage_that_was_freed_or_shrunk_is_named(size: int) -> None:
    weight = torch.randn(7, 4)
    weight.untyped_storage().resize_(size)
    with pytest.raises(ValueError, match=r"^weight must be a tensor with memory; got one of shape \(7, 4\) whose st"):
        linear_repo_loss(torch.randn(3, 4), weight, torch.arange(3), None, torch.ones(3))


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
def test_logits_whose_storage_ends_too_early_are_named(inplace: bool) -> None:
    logits = torch.randn(4, 8)[1:, :5]  # the last element is number 8 + 2 * 8 + 4 of the storage
    arguments = (torch.arange(3), None, torch.ones(3))
    logits.untyped_storage().resize_(4 * 29)
    assert repo_loss(logits, *arguments, inplace=inplace).loss.isfinite()
    logits.untyped_storage().resize_(4 * 28)
    with pytest.raises(ValueError, match="^logits must be a tensor with memory; .* freed or shrunk"):
        repo_loss(logits, *arguments, inplace=inplace)
