"""The decoding kernels of the C++ backend: weights packed for few rows, and a step through all layers.

A weight is packed in fp32 or rounded to bfloat16, and then so are the inputs of its product; sums are in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .extension import _cpu

COLUMNS = 16  # outputs of a panel of a packed weight


def panels_of(outputs: int) -> int:
    """Return the number of panels of a packed weight."""
    return -(-outputs // COLUMNS)


def new_memory(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate memory of fp32 or bfloat16, in large pages where the system has them."""
    memory = torch.empty(elements, dtype=dtype)
    _cpu.ask_for_large_pages(memory)
    return memory


def packed_view(memory: Tensor, depth: int) -> Tensor:
    """Shape memory for a weight with k = depth: fp32 (panels, k, 16) or bfloat16 (panels, k / 2, 32)."""
    half = memory.dtype == torch.bfloat16
    return memory.view(-1, depth // 2, 2 * COLUMNS) if half else memory.view(-1, depth, COLUMNS)


def pack(weight: Tensor, packed: Tensor) -> None:
    """Pack a fp32 matrix (n, k) into a `packed_view`, contiguous; outputs beyond the last are zeros.

    In bfloat16 k must be a multiple of 16.
    """
    _cpu.pack_weight(weight.detach().contiguous(), packed, torch.get_num_threads())


def multiply(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """Compute x @ weight^T + bias; a row's result does not depend on the other rows.

    Args:
        x: (..., k), fp32.
        packed: the weight as `pack` left it; in bfloat16 x is rounded to it too.
        outputs: rows of the weight that was packed.
        bias: (outputs,) or None.
    """
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    out = rows.new_empty(len(rows), outputs)
    _cpu.multiply_packed(rows, packed, None if bias is None else bias.detach(), out, torch.get_num_threads())
    return out.view(*x.shape[:-1], outputs)


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw a token of each row by inverting its cumulative distribution, with sums in fp64.

    Args:
        logits: (B, V), fp32.
        uniforms: (B,), fp64 in [0, 1).
        temperature: divides the logits.

    Returns:
        Tokens (B,) int64 and their log-probabilities (B,) fp32 in nats.
    """
    rows = logits.detach().contiguous()
    tokens, logps = torch.empty(len(rows), dtype=torch.int64), rows.new_empty(len(rows))
    _cpu.sample_rows(rows, uniforms.contiguous(), temperature, tokens, logps, torch.get_num_threads())
    return tokens, logps


def make_model(*sizes_and_weights: Any) -> Any:
    """Make what `step` runs: heads, key heads, columns of a head, inner width, epsilon, scale, layers, norm, head, V.

    A layer is a tuple of tensors or None, see csrc/decoding/bindings.cpp.
    """
    return _cpu.DecoderModel(*sizes_and_weights)


def step(
    model: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    vocabulary: int,
) -> Tensor:
    """Append the tokens' keys and values, and return the logits (B, V).

    Args:
        x: (B, H) fp32, overwritten.
        cos, sin: (B, D).
        keys: (layers, places, key heads, D, capacity); values: (layers, places, key heads, capacity, D).
        slots, lengths: (B,) int32.
    """
    logits = x.new_empty(len(x), vocabulary)
    cache = keys.flatten(0, 2), values.flatten(0, 2)
    model.step(x, cos, sin, slots, lengths, *cache, logits, torch.get_num_threads())
    return logits
