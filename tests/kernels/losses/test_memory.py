"""The losses' memory, as the process sees it: at most one gradient beside the logits, and in place nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from repo_kernels.backends import choice

MEGABYTE = 1 << 20
PROGRAM = """
import re, sys
import torch
from repo_kernels import repo_loss, selective_log_softmax

what, dtype, rows, vocabulary = sys.argv[1], getattr(torch, sys.argv[2]), 512, 50257

def memory(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read())[1]) * 1024

def step(count):
    logits = torch.zeros(count, vocabulary, dtype=dtype)
    logits[:, ::7] = 1.5
    logits.requires_grad_()
    ids = torch.arange(count)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is the present from here on
    before = memory("VmRSS")
    if what == "log-probs":
        selective_log_softmax(logits.detach(), ids, return_entropy=True)
    else:
        out = repo_loss(logits, ids, torch.full((count,), -11.0), torch.ones(count), inplace=what == "in place")
        torch.autograd.grad(out.loss, logits, torch.tensor(0.5))
    return memory("VmHWM") - before, logits.numel() * logits.element_size()

step(2)  # imports, threads
extra, size = step(rows)
print(extra, size)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak")
@pytest.mark.parametrize(
    ("what", "gradients", "dtype"),
    [
        ("out of place", 1, "float32"),
        ("out of place", 1, "bfloat16"),
        ("in place", 0, "float32"),
        ("in place", 0, "float16"),
        ("log-probs", 0, "bfloat16"),
    ],
)
def test_the_peak_is_one_gradient_or_nothing(what: str, gradients: int, dtype: str) -> None:
    if not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    done = subprocess.run([sys.executable, "-c", PROGRAM, what, dtype], capture_output=True, text=True, check=True)
    extra, size = map(int, done.stdout.split())
    assert extra <= gradients * size + 4 * MEGABYTE, f"{extra / MEGABYTE:.0f} MB beside {size / MEGABYTE:.0f} of logits"
    assert extra >= gradients * size * 0.9
