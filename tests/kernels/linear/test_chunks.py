"""The chunks of the linear losses: how many rows, what they take, and that the caller decides if he wants."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from repo_kernels import LinearRepoLoss, linear_repo_loss, linear_selective_log_softmax
from repo_kernels.backends import choice
from repo_kernels.losses.heads import linear
from repo_kernels.losses.heads.chunks import CPU_BYTES, GPU_BYTES, GPU_ROWS, Budget, HeadSizes, row_stride

V, H = 151_936, 4096
HALF_HEAD = HeadSizes(V, H, torch.bfloat16, torch.float32)
HALF_ROW = 6 * row_stride(V) + 4 * H


@pytest.mark.parametrize(
    ("live", "head", "budget", "size"),
    [
        # on a CPU 64 MB: 325 rows of fp32 logits would fit, which makes four even chunks, not three and a rest
        (1024, HeadSizes(49_136, 0, torch.float32, torch.float32), Budget("cpu"), 256),
        (1024, HeadSizes(49_136, 0, torch.float32, torch.float32, sides=2), Budget("cpu"), 147),
        (10, HeadSizes(49_136, 0, torch.float32, torch.float32), Budget("cpu"), 10),
        (10, HeadSizes(10**9, 0, torch.float32, torch.float32), Budget("cpu"), 1),
        (0, HeadSizes(1, 0, torch.float32, torch.float32), Budget("cpu"), 1),
        # the caller's number of rows, or of bytes
        (10, HeadSizes(1, 0, torch.float32, torch.float32), Budget("cpu", tokens=3), 3),
        (10, HeadSizes(1, 0, torch.float32, torch.float32), Budget("cuda", tokens=30), 10),
        (10, HeadSizes(1, 4, torch.float32, torch.float32), Budget("cuda", size=5 * (64 + 16)), 5),
        (10, HeadSizes(1, 4, torch.float32, torch.float32), Budget("cpu", size=1), 1),
        # processes that divide the vocabulary share the default, not what the caller gives to each
        (1024, HeadSizes(49_136 // 2, 0, torch.float32, torch.float32), Budget("cpu", processes=2), 256),
        (10, HeadSizes(1, 4, torch.float32, torch.float32), Budget("cpu", size=5 * (64 + 16), processes=2), 5),
        (8192, HeadSizes(V, 0, torch.float32, torch.float32, with_weight=False), Budget("cuda", processes=8), 1024),
        # on a GPU 1 GB or twice dL/dweight, whichever is more, and at least 1024 rows
        (8192, HALF_HEAD, Budget("cuda"), 8192 // -(-8192 // (2 * 4 * V * H // HALF_ROW))),
        (8192, HeadSizes(V, 64, torch.bfloat16, torch.float32), Budget("cuda"), 1024),
        (8192, HeadSizes(V, H, torch.bfloat16, torch.float32, with_weight=False), Budget("cuda"), 1024),
        (8192, HeadSizes(1000, 64, torch.bfloat16, torch.float32), Budget("cuda"), 8192),
    ],
)
def test_chunks_fill_the_budget_evenly(live: int, head: HeadSizes, budget: Budget, size: int) -> None:
    assert budget.rows(live, head) == size
    if budget.tokens is None and size > (1 if budget.device == "cpu" else GPU_ROWS):
        limit = budget.size or (CPU_BYTES if budget.device == "cpu" else max(GPU_BYTES, 2 * head.weight_bytes))
        assert size * head.row_bytes <= limit
    assert [stop for _, stop in linear.chunks(live, size)][-1:] == ([live] if live else [])


def test_the_reference_and_the_gradient_share_the_budget() -> None:
    one, vocabulary = 4 * row_stride(50_257), 50_257
    whole = {"vocabulary": vocabulary, "width": 8, "factors": torch.float32, "result": torch.float32}
    assert HeadSizes(**whole, sides=2, with_gradient=False).row_bytes == 2 * one
    assert HeadSizes(**whole).row_bytes == one + 4 * 8
    half = HeadSizes(**{**whole, "factors": torch.bfloat16})
    assert half.row_bytes == one + 2 * row_stride(vocabulary) + 4 * 8
    assert half.weight_bytes == 4 * vocabulary * 8
    assert half.peak_bytes(100, 7) == 7 * half.row_bytes + 4 * 8 * 100 + half.weight_bytes
    for columns in (1, 15, 16, 17, 49_152, 50_257):
        assert row_stride(columns) >= columns
        assert row_stride(columns) % 32 == 16  # aligned, and no multiple of a power of two


@pytest.fixture
def chunk_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every chunk whose logits are formed."""
    sizes: list[int] = []
    logits = linear.LinearHead.logits

    def counted(self: linear.LinearHead, x: Tensor, out: Tensor | None) -> Tensor:
        sizes.append(x.shape[0])
        return logits(self, x, out)

    monkeypatch.setattr(linear.LinearHead, "logits", counted)
    return sizes


@pytest.mark.parametrize("by", ["function", "module", "log-probs"])
def test_chunk_bytes_bound_the_logits_of_a_chunk(by: str, chunk_sizes: list[int]) -> None:
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(33, 6, requires_grad=True)
    ids, ones = torch.arange(10), torch.ones(10)
    row = HeadSizes(33, 6, torch.float32, torch.float32).row_bytes
    gradients = []
    for chunk_bytes, expected in ((None, [10]), (4 * row, [4, 4, 2]), (5 * row - 1, [4, 4, 2]), (1, [1] * 10)):
        chunk_sizes.clear()
        if by == "function":
            loss = linear_repo_loss(hidden, weight, ids, None, ones, chunk_bytes=chunk_bytes).loss
        elif by == "module":
            loss = LinearRepoLoss(chunk_bytes=chunk_bytes)(hidden, weight, ids, None, ones).loss
        else:
            loss = linear_selective_log_softmax(hidden, weight, ids, chunk_bytes=chunk_bytes).sum()
            # forward has no gradient of the hidden states beside the logits
            expected = [5, 5] if chunk_bytes == 5 * row - 1 else expected
        assert chunk_sizes == expected
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for others in gradients[1:]:
        for first, other in zip(gradients[0], others, strict=True):
            assert torch.allclose(first, other, rtol=1e-5, atol=1e-6)


def test_both_bounds_of_a_chunk_are_refused() -> None:
    hidden, weight, ids = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    for call in (
        lambda **bounds: linear_repo_loss(hidden, weight, ids, None, torch.ones(2), **bounds),
        lambda **bounds: linear_selective_log_softmax(hidden, weight, ids, **bounds),
        lambda **bounds: LinearRepoLoss(**bounds),
    ):
        with pytest.raises(ValueError, match="give chunk_tokens or chunk_bytes, not both; got 3 and 1000"):
            call(chunk_tokens=3, chunk_bytes=1000)
        with pytest.raises(ValueError, match="chunk_bytes must be an int >= 1 or None; got 0"):
            call(chunk_bytes=0)
        with pytest.raises(TypeError, match="chunk_bytes must be an int >= 1 or None; got 1.5"):
            call(chunk_bytes=1.5)
        with pytest.raises(TypeError, match="chunk_bytes must be an int >= 1 or None; got True"):
            call(chunk_bytes=True)


MEMORY_PROGRAM = """
import re, sys
import torch
from repo_kernels import linear_repo_loss, linear_selective_log_softmax

width, vocabulary = 64, 50_257

def memory(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read())[1]) * 1024

def step(what, count):
    hidden = torch.randn(count, width, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width)).requires_grad_(what != "frozen head")
    ids, one = torch.arange(count), torch.ones(count)
    if what == "half of the rows":
        ids[::2] = -100
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is the present from here on
    before = memory("VmRSS")
    if what == "log-probs":
        loss = linear_selective_log_softmax(hidden, weight, ids).sum()
    else:
        loss = linear_repo_loss(hidden, weight, ids, -11 * one, one).loss
    (0.5 * loss).backward()
    gradients = sum(x.numel() * 4 for x in (hidden, weight) if x.requires_grad)
    compacted = 4 * width * int((ids >= 0).sum()) if what == "half of the rows" else 0
    return memory("VmHWM") - before, gradients + compacted

step("trained head", 2)  # imports, threads
for what in sys.argv[2:]:
    print(*step(what, int(sys.argv[1])))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak")
def test_the_peak_is_one_chunk_beside_the_gradients() -> None:
    """1500 rows of logits would be 302 MB."""
    if not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    cases = ("trained head", "frozen head", "half of the rows", "log-probs")
    command = [sys.executable, "-c", MEMORY_PROGRAM, "1500", *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    for what, line in zip(cases, done.stdout.splitlines(), strict=True):
        extra, gradients = map(int, line.split())
        assert extra <= CPU_BYTES + gradients + 8_000_000, f"{what}: {extra / 1e6:.0f} MB"
        assert extra >= 40_000_000
