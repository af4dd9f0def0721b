"""Launches and passes over the logits, counted in Triton's interpreter; the counter itself on a case done by hand."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.compiled import traffic
from benchmarks.compiled.traffic import Access, Recorder, count_passes
from repo_kernels.backends.codes import IGNORED

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):  # noqa: N803
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + lanes, mask=lanes < count, eviction_policy="evict_last")
    tl.store(target + lanes, values, mask=lanes < count, eviction_policy="evict_first")
    tl.store(target + 2 * tl.arange(0, 2), tl.load(source + 1))


def test_counter_leaves_masked_lanes_out() -> None:
    source, target = torch.arange(16.0), torch.zeros(16)
    with Recorder(source=source) as recorder:
        copy_kernel[(2,)](source, target, 10, BLOCK=8)
    assert recorder.launches == ["copy_kernel"]
    # Ten of sixteen lanes, and one element by each of the two programs.
    assert recorder.bytes("source", store=False) == 10 * 4 + 2 * 4
    # The target was not named but is as large; two elements that do not touch are two accesses.
    assert recorder.bytes("target", store=True) == 10 * 4 + 2 * 2 * 4
    assert recorder.accesses[-5:] == [
        Access("source", False, 32, 8),
        Access("target", True, 32, 8),
        Access("source", False, 4, 4),
        Access("target", True, 0, 4),
        Access("target", True, 8, 4),
    ]


def test_nothing_is_recorded_after_the_context() -> None:
    source, target = torch.arange(16.0), torch.zeros(16)
    with Recorder(source=source) as recorder:
        pass
    copy_kernel[(2,)](source, target, 10, BLOCK=8)
    assert not recorder.launches
    assert target[9] == 9


@pytest.mark.parametrize("vocabulary", [8_000, 32_000, 49_152, 151_936])
def test_a_loss_and_its_gradient_are_three_passes_in_one_launch_of_three(vocabulary: int) -> None:
    passes = count_passes(traffic.fused, vocabulary)
    assert (passes.loaded, passes.stored) == pytest.approx((2, 1), abs=0.01)
    assert passes.launches == 3  # what the rows share, the rows, their sums


def test_fused_with_the_gradient_of_the_entropy() -> None:
    passes = count_passes(traffic.COMPUTATIONS["with the entropy's gradient"], 32_000)
    assert passes.issued <= 3.01
    assert passes.launches == 3


def test_a_loss_alone_reads_the_logits_once() -> None:
    passes = count_passes(traffic.forward, 32_000)
    assert (passes.loaded, passes.stored) == pytest.approx((1, 0), abs=0.01)


@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_dead_rows_cost_the_zeros_of_their_gradient(vocabulary: int) -> None:
    from repo_kernels.backends import triton as gpu

    logits = torch.randn(2, vocabulary).bfloat16()
    grad, loss = torch.ones_like(logits), traffic.make_loss(2, entropy=0)
    loss.arguments.token_ids[1] = IGNORED
    with Recorder(logits=logits, grad=grad) as recorder:
        gpu.whole(logits, None, loss, grad)
    second = [access for access in recorder.accesses if access.start >= vocabulary * 2]
    assert not [access for access in second if access.tensor == "logits"]
    assert sum(access.size for access in second if access.tensor == "grad") == vocabulary * 2
    assert not grad[1].any()


def test_an_upstream_gradient_of_one_costs_no_traffic() -> None:
    from repo_kernels.backends import triton as gpu

    grad = torch.randn(2, 32_000).bfloat16()
    with Recorder(grad=grad) as recorder:
        gpu.scale_rows(grad, torch.tensor([1.0, 0.5]), torch.ones(2, dtype=torch.int32))
    assert len(recorder.launches) == 1
    assert {access.start // 64_000 for access in recorder.accesses} == {1}
    assert recorder.bytes() == 2 * 64_000


@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
def test_statistics_read_the_logits_once(vocabulary: int) -> None:
    passes = count_passes(traffic.statistics, vocabulary)
    assert (passes.loaded, passes.stored) == pytest.approx((1, 0), abs=0.01)
    assert passes.launches == 1


def test_the_table_has_a_row_for_every_computation(monkeypatch) -> None:
    monkeypatch.setattr(traffic, "VOCABULARIES", (512,))
    lines = traffic.table().splitlines()[2:]
    assert len(lines) == len(traffic.COMPUTATIONS)
    assert lines[0] == "| loss and gradient | 512 | 3 | 1.98 | 1.00 |"
