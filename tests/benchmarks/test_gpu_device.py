"""Lines of `make gpu` that a rehearsal cannot reach, run with stand-ins for the device and for QuACK."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.bench_loss import make_problem
from benchmarks.gpu import call, losses
from benchmarks.gpu.plan import REHEARSAL
from benchmarks.harness import launches, timing
from benchmarks.harness.cases import disagreement
from benchmarks.harness.timing import Turns


class Device:
    """Stands in for torch.cuda: it writes down what it is asked for, and an event lies 2 ms after the one before."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.events = 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                device.events += 1
                self.at = 2.0 * device.events
                device.said.append("event")

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                device.said.append("wait")

        class Graph:
            def replay(self) -> None:
                device.said.append("replay")

        parts = {
            "is_available": lambda: True,
            "synchronize": lambda: self.said.append("synchronize"),
            "_sleep": lambda cycles: self.said.append("sleep" if cycles > 0 else "no sleep"),
            "Event": Event,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": Graph,
            "graph": lambda graph: contextlib.nullcontext(),
        }
        for name, part in parts.items():
            patch.setattr(torch.cuda, name, part)
        empty = torch.empty
        patch.setattr(torch, "empty", lambda *size, device=None, **more: empty(4, **more))
        timing._cycles_per_second.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A stand-in for the GPU."""
    return Device(monkeypatch)


def test_a_call_is_timed_between_two_events_with_the_host_ahead(device: Device) -> None:
    made: list[str] = []
    turns = Turns({"a": lambda: device.said.append("call")}, "a", {"a": lambda: made.append("reset")})
    turns.time_others()
    turns.time_subject()
    device.said.clear()
    turns.time_subject()
    assert turns.seconds["a"] == [0.002, 0.002]
    assert device.said == ["synchronize", "sleep", "event", "call", "event", "synchronize"]
    assert len(made) == 4  # before both calls that measure the host, and before each timed one
    device.said.clear()
    timing.clocked(lambda: None)
    assert "sleep" not in device.said


def test_a_graph_is_captured_once_and_replayed(device: Device) -> None:
    calls = []
    replay = call.in_graph(lambda: calls.append(1) or (torch.ones(2),))
    assert torch.equal(replay()[0], torch.ones(2))
    replay()
    assert len(calls) == 4  # three before the capture
    assert device.said.count("replay") == 2


def test_the_host_is_timed_in_a_loop_that_waits_once(device: Device) -> None:
    clock = call.clock(REHEARSAL)
    assert clock(lambda: device.said.append("call"), 0.0) > 0
    assert device.said == ["synchronize", *["call"] * REHEARSAL.repeats, "synchronize"]


def test_launches_are_the_kernels_alone(device: Device, monkeypatch) -> None:
    on, host = DeviceType.CUDA, DeviceType.CPU
    kinds = [("_fused", on), ("vectorized_elementwise_kernel", on), ("Memcpy DtoD (Device -> Device)", on),
             ("Memset (Device)", on), ("cudaLaunchKernel", host)]  # fmt: skip
    events = [SimpleNamespace(name=name, device_type=kind) for name, kind in kinds]

    class Profile:
        def __init__(self, activities: list) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            device.said.append("profiled")

        def events(self) -> list:
            return events if device.said.count("profiled") > 1 else events[:1]

    monkeypatch.setattr(launches, "profile", Profile)
    assert launches.count_launches(lambda: None) == 2


def test_quack_is_called_as_its_version_0_6_5_takes_it_and_compared_as_a_cross_entropy(monkeypatch) -> None:
    stub = ModuleType("quack.cross_entropy")

    def cross_entropy_fwd(x, target, target_logit=None, weight=None, ignore_index=-100, return_lse=False,
                          return_dx=False, inplace_backward=False):  # fmt: skip
        assert return_dx
        leaf = x.detach().float().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0].to(x.dtype)

    def cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean",
                      inplace_backward=False):  # fmt: skip
        assert reduction == "none"
        return torch.nn.functional.cross_entropy(x.float(), target, reduction="none")

    stub.cross_entropy_fwd, stub.cross_entropy = cross_entropy_fwd, cross_entropy
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", stub)
    monkeypatch.setattr(losses, "missing", lambda package: None)
    setup = losses.setup("bf16", 8, 67, compiled=False, copied=1024)
    names = [name for name in setup.ways if name.startswith("QuACK")]
    assert len(names) == 2
    for name in names:
        error, reason = disagreement(name, setup.ways[name], ())
        assert reason is None
        assert 0 < error < 1e-2


def test_liger_gets_one_advantage_for_each_sequence() -> None:
    p = make_problem("fp32", 8, 5, 0.0, False)
    by_sequence = p.advantages.view(4, -1)
    assert torch.equal(by_sequence, by_sequence[:, :1].expand_as(by_sequence))
    assert losses.for_liger(p).shape == (4, 3, 5)
