"""Attention over packed rows in C++: softmax in fp64 over each segment's keys, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_kernels.backends.cpu import extension as cpu
from repo_kernels.layers.packed_attention import attention, available

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ backend was not built"),
    pytest.mark.usefixtures("isa"),
]
LENGTHS = st.tuples(st.integers(1, 70), st.sampled_from([0, 0, 1, 15, 40]))  # queries, and keys before them


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(segments, heads, key_heads, columns):
    """q, k, v, query and key bounds of segments (queries, keys before them)."""
    torch.manual_seed(0)
    query_bounds, key_bounds = bounds([q for q, _ in segments]), bounds([q + more for q, more in segments])
    q = torch.randn(int(query_bounds[-1]), heads, columns)
    k, v = torch.randn(2, int(key_bounds[-1]), key_heads, columns)
    return [x.requires_grad_() for x in (q, k, v)], (query_bounds, key_bounds)


def exact(q, k, v, bounds, scale, window):
    """One segment after the other."""
    found = []
    for (q0, q1), (k0, k1) in zip(*(b.tolist() for b in (x.unfold(0, 2, 1) for x in bounds)), strict=True):
        a = q[q0:q1].transpose(0, 1)
        b, c = (x[k0:k1].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        hidden = (distance < 0) | (distance >= (window or k1))
        found.append(((a @ b.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(found)


@settings(deadline=None, max_examples=25)
@given(
    segments=st.lists(LENGTHS, min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    columns=st.sampled_from([16, 32, 48, 64, 80]),
    window=st.sampled_from([None, 1, 5, 37]),
    scale=st.sampled_from([0.05, 0.5]),
)
def test_outputs_and_gradients_are_those_of_fp64(segments, heads, columns, window, scale):
    given, by = inputs(segments, *heads, columns)
    doubles = [x.detach().double().requires_grad_() for x in given]
    outputs = [
        (attention(*given, *by, scale, window), given),
        (exact(*given, by, scale, window), given),
        (exact(*doubles, by, scale, window), doubles),
    ]
    upstream = torch.randn(columns, *given[0].shape[:2]).permute(1, 2, 0)  # no unit stride
    results = [(out, *torch.autograd.grad(out, x, upstream.to(out.dtype))) for out, x in outputs]
    largest = min(x.norm() for x in (results[2][0], results[2][3]))  # of q and k it is 0 where a query sees one key
    for found, eager, value in zip(*results, strict=True):
        assert (found - value).norm() <= 2e-6 * largest + 4 * (eager - value).norm()


def test_layouts_of_heads_before_tokens_are_read_in_place():
    (q, k, v), by = inputs([(9, 0), (4, 9)], 4, 2, 16)
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert torch.equal(attention(*swapped, *by, 0.25, None), attention(q, k, v, *by, 0.25, None))


def test_bits_depend_neither_on_threads_nor_on_neighbours():
    segments = [(90, 0), (40, 90), (300, 17), (1, 0)]
    given, by = inputs(segments, 6, 2, 64)

    def run(given, by, threads=1):
        torch.set_num_threads(threads)
        out = attention(*given, *by, 0.125, None)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    before = torch.get_num_threads()
    try:
        first = run(given, by)
        for threads in (2, 3, 8):
            assert all(torch.equal(a, b) for a, b in zip(first, run(given, by, threads), strict=True))
        parts = zip(given, (40, 130, 130), strict=True)
        alone = [x[90 : 90 + count].detach().requires_grad_() for x, count in parts]
        found = run(alone, (bounds([40]), bounds([130])))
        assert all(torch.equal(a, b[90 : 90 + len(a)]) for a, b in zip(found, first, strict=True))
    finally:
        torch.set_num_threads(before)


def test_large_scores_and_nan_are_handled():
    (q, k, v), by = inputs([(8, 0), (5, 0)], 1, 1, 16)
    out = attention(q * 1e4, k * 1e4, v, *by, 1.0, None)
    assert torch.allclose(out, exact(q.double() * 1e4, k.double() * 1e4, v.double(), by, 1.0, None).float(), atol=1e-5)
    k = k.detach().clone()
    k[9] = torch.nan
    out = attention(q, k, v, *by, 1.0, None)
    assert out[:9].isfinite().all()
    assert out[9:].isnan().all()


def test_what_it_does_not_take_is_refused():
    cpu_device = torch.device("cpu")
    assert available(cpu_device, torch.float32, 64)
    assert not available(cpu_device, torch.float32, 8)
    assert not available(cpu_device, torch.bfloat16, 64)
    assert not available(torch.device("cuda"), torch.float32, 64)
    (q, k, v), (query_bounds, key_bounds) = inputs([(4, 0), (3, 2)], 4, 2, 16)
    for message, arguments in {
        "multiple of 16": (q[..., :8], k[..., :8], v[..., :8], query_bounds, key_bounds),
        "divide": (q[:, :3], k, v, query_bounds, key_bounds),
        "matching shapes": (q, k, v[:-1], query_bounds, key_bounds),
        "from 0 to the length": (q[:-1], k, v, query_bounds, key_bounds),
        "ascend": (q, k, v, query_bounds, torch.tensor([0, 10, 9], dtype=torch.int32)),
        "equally many": (q, k, v, query_bounds, bounds([9])),
        "at least as many keys": (q, k, v, query_bounds, bounds([3, 6])),
    }.items():
        with pytest.raises(ValueError, match=message):
            attention(*arguments, 1.0, None)
    with pytest.raises(ValueError, match="window"):
        attention(q, k, v, query_bounds, key_bounds, 1.0, -1)
