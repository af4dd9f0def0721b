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

from ...backends.cpu import layers as cpu
from ...layers import onednn_linear

HALF = (torch.bfloat16, torch.float16)
BLOCK_ROWS = 2048  # rows per call of oneDNN, whose copies and result then stay in the caches
BLOCK_COLUMNS = 512  # logits per thread and call of MKL, whose copy of the weight then stays small and in the caches
THIN_RANK = 48  # largest rank for which the C++ backend passes over the logits faster than a GEMM


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


def column_blocks(device: torch.device, factors: torch.dtype, columns: int) -> Iterator[slice]:
    """Yield the blocks of columns in which `product` forms a wide result fastest; where it can be whole, one block."""
    blocked = device.type == "cpu" and not onednn_linear.multiplies(device, factors)
    width = BLOCK_COLUMNS * torch.get_num_threads() if blocked else max(columns, 1)
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


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


def add_outer(z: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out += z @ b^T over the large out (c, V). z: (c, r); b: (V, r); dtypes as in `product`."""
    if _passes(z, b) and out.stride(1) == 1:
        cpu.add_outer(z.contiguous(), b.contiguous(), out)
    else:
        add_thin_product(z, b.t(), out)


def add_inner(d: Tensor, z: Tensor, out: Tensor) -> None:
    """Compute out += d^T @ z over the large d (c, V). z: (c, r); out: (V, r), contiguous; dtypes as in `product`."""
    if _passes(z, out) and d.stride(1) == 1:
        cpu.add_inner(d, z.contiguous(), out)
    else:
        add_thin_product(d.t(), z, out)


def _passes(z: Tensor, other: Tensor) -> bool:
    """Tell whether the C++ backend multiplies by z (c, r)."""
    fp32 = z.dtype == other.dtype == torch.float32
    return fp32 and z.device.type == "cpu" and 0 < z.shape[1] <= THIN_RANK and z.shape[0] > 0 and cpu.available()


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
