"""The matrix products of the linear forms: in which type the factors enter and in which the sums leave.

Sums are fp32 (fp64 for fp64 hidden states). On CUDA bf16 and fp16 factors stay as they are and the GEMM itself returns
fp32 where it can (`out_dtype`); elsewhere its rounded product is added to an fp32 sum. On other devices, where a GEMM
in half precision is slower than one in fp32 or does not add in fp32, factors become fp32; where MKL is slow they are
multiplied by oneDNN.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..layers import onednn_linear

HALF = (torch.bfloat16, torch.float16)
BLOCK_ROWS = 2048  # what a block needs beside its factors stays in the caches


def factor_dtype(source: torch.dtype, device: torch.device, result: torch.dtype) -> torch.dtype:
    """The type in which hidden states of type `source`, and what they meet, enter a GEMM whose sums are `result`."""
    return source if source in HALF and device.type == "cuda" and result == torch.float32 else result


@functools.cache
def returns_fp32(device: torch.device, factors: torch.dtype) -> bool:
    """Whether the device's GEMM of these factors can return fp32 sums; tried once on a small one."""
    square = torch.zeros(16, 16, dtype=factors, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(square, square, out_dtype=torch.float32, out=total)
        torch.addmm(total, square, square, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # not on this device, or not in this PyTorch
        return False
    return True


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b; a, b: of the factors' type; out: of the sums' type, unit column stride."""
    if onednn_linear.multiplies(a.device, a.dtype):
        for part, found in _by_onednn(a, b):
            out[part] = found
            del found  # before the next block's
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif returns_fp32(a.device, a.dtype):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def allocates(device: torch.device, factors: torch.dtype) -> bool:
    """Whether the fastest product cannot write into given memory: `new_product` then."""
    return onednn_linear.multiplies(device, factors)


def new_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in memory of its own."""
    return onednn_linear.product(a, b.t())


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, types as in `product`."""
    if onednn_linear.multiplies(a.device, a.dtype):
        for part, found in _by_onednn(a, b):
            out[part] += found
            del found
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out)
    elif returns_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out += torch.mm(a, b)


def _by_onednn(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, their a @ b), a block after the other: oneDNN's operator returns new memory, and copies a transposed a."""
    for start in range(0, a.shape[0], BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield part, onednn_linear.product(a[part], b.t())


def fp16_scale(sizes: Tensor) -> Tensor:
    """0-d power of two that brings the largest of |sizes| into (1/2, 1]; 1 where that is 0 or not finite.

    sizes: the factors of the rows' gradients. Divided by the number of tokens they would underflow in fp16.
    """
    largest = torch.cat((sizes.reshape(-1), sizes.new_zeros(1))).abs().max()
    scale = torch.exp2(-torch.ceil(torch.log2(largest)))
    return torch.where((largest > 0) & largest.isfinite(), scale.clamp(2.0**-60, 2.0**60), 1.0)
