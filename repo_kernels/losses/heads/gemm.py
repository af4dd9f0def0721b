"""Matrix products of the linear losses, and the dtypes of their factors and sums.

Sums are fp32 (fp64 for fp64 hidden states). On CUDA, bf16 and fp16 factors stay as they are and the GEMM returns fp32
if it can (`out_dtype`); if it cannot, its rounded product is added to an fp32 sum. On other devices, where a GEMM in
half precision is slower than in fp32 or does not add in fp32, the factors are cast to fp32. oneDNN multiplies where MKL
is slow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...layers import onednn_linear

HALF = (torch.bfloat16, torch.float16)
BLOCK_ROWS = 2048  # rows per call of oneDNN, whose copies and result then stay in the caches


def factor_dtype(source: torch.dtype, device: torch.device, result: torch.dtype) -> torch.dtype:
    """Return the dtype in which hidden states of dtype `source`, and their factors, enter a GEMM with `result` sums."""
    return source if source in HALF and device.type == "cuda" and result == torch.float32 else result


@functools.cache
def returns_fp32(device: torch.device, factors: torch.dtype) -> bool:
    """Return whether the device's GEMM of such factors can return fp32; tried once on a small one."""
    square = torch.zeros(16, 16, dtype=factors, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(square, square, out_dtype=torch.float32, out=total)
        torch.addmm(total, square, square, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # not on this device, or not in this PyTorch
        return False
    return True


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a @ b. a, b: dtype of the factors; out: dtype of the sums, unit column stride."""
    if onednn_linear.multiplies(a.device, a.dtype):
        for part, block in _by_onednn(a, b):
            out[part] = block
            del block  # freed before the next one is allocated
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif returns_fp32(a.device, a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def allocates(device: torch.device, factors: torch.dtype) -> bool:
    """Return whether the fastest product allocates its result; use `new_product` then."""
    return onednn_linear.multiplies(device, factors)


def new_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in new memory."""
    return onednn_linear.product(a, b.t())


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out += a @ b, dtypes as in `product`."""
    if onednn_linear.multiplies(a.device, a.dtype):
        for part, block in _by_onednn(a, b):
            out[part] += block
            del block  # freed before the next one is allocated
    else:
        add_thin_product(a, b, out)


def add_thin_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out += a @ b, dtypes as in `product`, where one dimension of a or b is a rank.

    Passing over the large factors takes the time, so that no block is copied.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    elif returns_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b)


def _by_onednn(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of a @ b as (rows, block).

    Blocks bound the memory: oneDNN's operator allocates its result and copies a transposed `a`.
    """
    for start in range(0, a.shape[0], BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield part, onednn_linear.product(a[part], b.t())


def fp16_scale(sizes: Tensor) -> Tensor:
    """Return the power of two that brings the largest of |sizes| into (1/2, 1], 0-d; 1 if that is 0 or not finite.

    Gradients are divided by the number of tokens, which would make them underflow in fp16.

    Args:
        sizes: factors of the rows' gradients, any shape.
    """
    largest = torch.cat((sizes.reshape(-1), sizes.new_zeros(1))).abs().max()
    scale = torch.exp2(-torch.ceil(torch.log2(largest)))
    return torch.where((largest > 0) & largest.isfinite(), scale.clamp(2.0**-60, 2.0**60), 1.0)
