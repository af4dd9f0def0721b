"""Count the kernels that a call starts on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_launches(call: Callable[[], object]) -> int:
    """Return the kernels that a call starts on the device, copies and fills by the driver not counted.

    On a CPU, where nothing is launched, the operators that the profiler sees. The call must have been made before. The
    larger of two counts, because a profiler that has just started can miss the first events.
    """
    return max(_profiled(call), _profiled(call))


def _profiled(call: Callable[[], object]) -> int:
    cuda = torch.cuda.is_available()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        call()
        synchronize()
    on = DeviceType.CUDA if cuda else DeviceType.CPU
    names = [event.name for event in seen.events() if event.device_type == on]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)
