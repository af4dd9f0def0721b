"""Passes over the logits: counted in Triton's interpreter, and from DRAM in a model of an H100's L2.

The counter and the model are themselves tested on cases small enough to work out by hand.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks import roofline
from benchmarks.compiled import traffic
from benchmarks.l2_model import L2, MEGABYTE, SEGMENT, Access, replay
from benchmarks.compiled.recorder import Recorder
from benchmarks.workloads import peers
from repo_kernels.backends.interface import IGNORED

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

needs_interpreter = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):  # noqa: N803
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + lanes, mask=lanes < count, eviction_policy="evict_last")
    tl.store(target + lanes, values, mask=lanes < count, eviction_policy="evict_first")
    tl.store(target + 2 * tl.arange(0, 2), tl.load(source + 1))


@needs_interpreter
def test_counter_leaves_masked_lanes_out_and_keeps_order_and_hints() -> None:
    source, target = torch.arange(16.0), torch.zeros(16)
    with Recorder(source=source) as recorder:
        copy_kernel[(2,)](source, target, 10, BLOCK=8)
    # Ten of sixteen lanes, and one element by each of the two programs.
    assert recorder.bytes("source", store=False) == 10 * 4 + 2 * 4
    # The target was not named but is as large; two elements that do not touch are two accesses.
    assert recorder.bytes("target", store=True) == 10 * 4 + 2 * 2 * 4
    (launch,) = recorder.launches
    assert launch.kernel == "copy_kernel"
    assert launch.programs[1, 0, 0] == [
        Access("source", False, 32, 8, "evict_last"),
        Access("target", True, 32, 8, "evict_first"),
        Access("source", False, 4, 4),
        Access("target", True, 0, 4),
        Access("target", True, 8, 4),
    ]
    # Seen from the second half of the tensors as a row, without the small accesses.
    assert recorder.row_programs(1, 32, at_least=8) == [
        [[Access("source", False, 0, 8, "evict_last"), Access("target", True, 0, 8, "evict_first")]]
    ]


@needs_interpreter
def test_nothing_is_recorded_after_the_context() -> None:
    source, target = torch.arange(16.0), torch.zeros(16)
    with Recorder(source=source) as recorder:
        pass
    copy_kernel[(2,)](source, target, 10, BLOCK=8)
    assert not recorder.launches
    assert target[9] == 9


def touch(cache: L2, *segments: int, store: bool = False, priority: int = 1) -> None:
    for segment in segments:
        cache.touch(segment, SEGMENT, store, priority)


def test_l2_evicts_the_least_recently_used_segment() -> None:
    cache = L2(2 * SEGMENT)
    touch(cache, 0, 1, 0, 2, 0)  # 2 takes the place of 1
    assert cache.read == 3 * SEGMENT
    touch(cache, 1)
    assert cache.read == 4 * SEGMENT


def test_l2_hints_decide_before_recency() -> None:
    for hints, misses in ((True, 3), (False, 4)):
        cache = L2(2 * SEGMENT, hints)
        touch(cache, 0, priority=2)
        touch(cache, 1, priority=0)
        touch(cache, 2, 0)  # takes the place of 1 by the hints, of 0 by recency
        assert cache.read == misses * SEGMENT


def test_l2_writes_a_dirty_segment_back_once_and_does_not_read_it() -> None:
    cache = L2(2 * SEGMENT)
    touch(cache, 0, store=True)
    touch(cache, 0, store=True)
    touch(cache, 0)
    assert (cache.read, cache.written) == (0, 0)
    touch(cache, 1, 2)
    assert (cache.read, cache.written) == (2 * SEGMENT, SEGMENT)
    cache.flush()
    assert cache.written == SEGMENT


def sweep(store: bool = False, tensor: str = "logits", hint: str = "evict_normal") -> list[Access]:
    """A row of four segments from its start to its end."""
    return [Access(tensor, store, i * SEGMENT, SEGMENT, hint) for i in range(4)]


def passes(program: list[Access], **options: int) -> tuple[float, float]:
    found = replay([[program]], 4 * SEGMENT, **options)
    return found.read, found.written


def test_replay_of_a_second_sweep_that_fits_reads_once() -> None:
    assert passes(sweep() + sweep(), rows=3, resident=1, capacity=4 * SEGMENT) == (1, 0)


def test_replay_of_a_second_sweep_that_does_not_fit() -> None:
    # Forward twice: each segment is gone when it comes up again. In reverse the last two are there.
    assert passes(sweep() + sweep(), rows=3, resident=1, capacity=2 * SEGMENT) == (2, 0)
    assert passes(sweep() + sweep()[::-1], rows=3, resident=1, capacity=2 * SEGMENT) == (1.5, 0)


def test_replay_shares_the_cache_between_resident_rows() -> None:
    program = sweep() + sweep()[::-1]
    assert passes(program, rows=2, resident=1, capacity=4 * SEGMENT) == (1, 0)
    # Two rows in turn: four of the eight segments are there when the sweeps turn.
    assert passes(program, rows=2, resident=2, capacity=4 * SEGMENT) == (1.5, 0)


def test_replay_keeps_the_row_by_hints_while_the_gradient_leaves() -> None:
    first, second = sweep(hint="evict_last"), sweep(hint="evict_first")
    stores = sweep(store=True, tensor="grad", hint="evict_first")
    program = first + [access for pair in zip(second, stores, strict=True) for access in pair]
    # Room for the row and one more segment. By recency the stores push the row out before it is read again.
    assert passes(program, rows=3, resident=1, capacity=5 * SEGMENT) == (1, 1)
    assert passes(program, rows=3, resident=1, capacity=5 * SEGMENT, hints=False)[0] > 1


def test_replay_counts_the_bytes_of_a_short_last_segment() -> None:
    program = [Access("logits", False, 0, SEGMENT + 512)]
    found = replay([[program]], SEGMENT + 512, rows=2, resident=2, capacity=MEGABYTE)
    assert (found.read, found.written) == (1, 0)


def test_replay_runs_launches_one_after_the_other() -> None:
    # Two rows of four segments; the second launch finds nothing of the first in a cache of four.
    found = replay([[sweep()], [sweep()]], 4 * SEGMENT, rows=2, resident=1, capacity=4 * SEGMENT)
    assert found.read == 2


def issued(call, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> tuple[float, int]:
    """(passes, launches)."""
    found = traffic.measure("", call, vocabulary, dtype, models=())
    return found.issued, found.launches


@needs_interpreter
@pytest.mark.parametrize(("vocabulary", "most"), [(32000, 2.01), (49152, 2.01), (151936, 3.01)])
def test_fused_loss_and_gradient_in_one_launch(vocabulary: int, most: float) -> None:
    found, launches = issued(traffic.fused, vocabulary)
    assert found <= most
    assert launches == 1


@needs_interpreter
def test_fused_with_the_gradient_of_the_entropy() -> None:
    found, launches = issued(lambda logits: traffic.fused(logits, entropy=2), 32000)
    assert found <= 3.01
    assert launches == 1


@needs_interpreter
@pytest.mark.parametrize("vocabulary", [32000, 151936])
def test_dead_rows_cost_the_zeros_of_their_gradient(vocabulary: int) -> None:
    from repo_kernels.backends import triton as gpu

    logits = torch.randn(2, vocabulary).bfloat16()
    grad, rows = torch.ones_like(logits), traffic.loss_rows(2, entropy=0)
    rows.ids[1] = IGNORED
    with Recorder(logits=logits, grad=grad) as recorder:
        gpu.fused(logits, None, rows, grad)
    start = vocabulary * 2
    assert not [a for a in recorder.accesses() if a.tensor == "logits" and a.start >= start]
    assert sum(a.size for a in recorder.accesses() if a.tensor == "grad" and a.start >= start) == vocabulary * 2
    assert not grad[1].any()


@needs_interpreter
def test_an_upstream_gradient_of_one_costs_no_traffic() -> None:
    from repo_kernels.backends import triton as gpu

    grad = torch.randn(2, 32000).bfloat16()
    with Recorder(grad=grad) as recorder:
        gpu.scale_rows(grad, torch.tensor([1.0, 0.5]))
    assert len(recorder.launches) == 1
    assert {a.start // 64000 for a in recorder.accesses()} == {1}
    assert recorder.total_bytes() == 2 * 64000


@needs_interpreter
@pytest.mark.parametrize("vocabulary", [32000, 151936])
def test_statistics_read_the_logits_once(vocabulary: int) -> None:
    assert issued(traffic.statistics, vocabulary) == (pytest.approx(1, abs=0.01), 1)


# Passes and launches.
PEERS = {
    "Liger `triton_grpo_loss`": (3, 2),
    "Liger `triton_grpo_loss`, by sequence": (4, 3),
    "Liger `fused_selective_log_softmax`": (1, 1),
    "Liger cross-entropy": (3, 1),
    "TRL `selective_log_softmax_and_entropy`": (3, 2),
    "TRL, with the entropy's gradient": (3, 2),
}


@needs_interpreter
@pytest.mark.parametrize(("package", "title", "call"), peers.CALLS, ids=[title for _, title, _ in peers.CALLS])
def test_passes_and_launches_of_the_peers(package: str, title: str, call) -> None:
    if reason := peers.missing(package):
        pytest.skip(reason)
    passes, launches = PEERS[title]
    assert issued(call, 151936) == (pytest.approx(passes, abs=0.01), launches)


def test_rooflines_know_every_computation_that_has_a_kernel_of_its_own() -> None:
    own = set(roofline.our_kernels(32000, 32))
    # The forward alone runs the fused kernel without its second half, of which the machine code knows nothing.
    assert own == {title for title, _ in traffic.OURS} - {"fused, forward only"}
    assert set(roofline.PEERS) == {title for _, title, _ in peers.CALLS}
    assert {against for _, against in roofline.PEERS.values()} <= own


@needs_interpreter
def test_figures_of_a_machine_with_its_own_cache_and_units() -> None:
    found = traffic.measure("fused", traffic.fused, 151936, models=(), machines=["sm_80", "sm_100"])
    entry = traffic.as_json(found)
    assert entry["issued_loaded"] == pytest.approx(2, abs=0.01)
    assert entry["dram"] == []
    # 108 rows of 304 KB in 40 MB, 148 in 126 MB: both hold a row from its first sweep to its second.
    assert set(entry["machines"]) == {"sm_80", "sm_100"}
    for dram in entry["machines"].values():
        assert dram["read"] + dram["written"] == pytest.approx(2, abs=0.05)
    assert json.loads(json.dumps(entry)) == entry


@needs_interpreter
def test_modelled_dram_traffic_of_the_swept_rows(record_property) -> None:
    found = traffic.measure("fused", traffic.fused, 151936)
    for (size, hints), dram in found.dram.items():
        label = f"modelled DRAM NVe, {size} MB, {'hints' if hints else 'strict LRU'}"
        print(f"{label}: {dram.read:.3f} read + {dram.written:.3f} written")
        record_property(label, dram.total)
    assert found.dram[50, True].total <= 2.1
