"""Launches of the kernels of a decode step. Arguments were checked by the callers in repo_kernels.layers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..launch import DTYPES, launch, phase, target_of
from . import variants

LEAST_COLUMNS = 128  # that are worth a program of their own
EVERY_COLUMN = 2**30  # window of attention without a window


@functools.cache
def wanted_programs(device: torch.device) -> int:
    """Return how many programs of the attention fill the device: four a multiprocessor; 12 in the interpreter."""
    if device.type != "cuda":
        return 12
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def splits_of(cells: int, length: int, device: torch.device) -> int:
    """Return into how many parts the columns are split, for so many rows times key heads and columns at most."""
    return max(1, min(wanted_programs(device) // max(cells, 1), -(-length // LEAST_COLUMNS)))


def attend(
    query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, column: Tensor, scale: float, window: int | None,
    softcap: float,
) -> Tensor:  # fmt: skip
    """Compute decode_attention; see repo_kernels.layers.decode_attention."""
    rows, heads, columns = query.shape
    key_heads, length = keys.shape[1:3]
    group, cells, device, dtype = heads // key_heads, rows * key_heads, query.device, DTYPES[query.dtype]
    splits = splits_of(cells, length, device)
    out = torch.empty_like(query)
    if splits > 1:
        memory = torch.empty(cells * splits * group, columns + 2, dtype=torch.float32, device=device).view(-1)
        parts, maxima, totals = memory.split([len(memory) // (columns + 2) * n for n in (columns, 1, 1)])
    else:
        parts = maxima = totals = torch.empty(0, dtype=torch.float32, device=device)
    target = target_of(device)
    launch(
        variants.attend_variant(dtype, columns, group, softcap != 0, splits > 1, target), device, cells * splits,
        query, keys, values, starts, column, out, parts, maxima, totals, length, key_heads, splits,
        min(window or EVERY_COLUMN, EVERY_COLUMN), scale, softcap,
    )  # fmt: skip
    if splits > 1:
        joined = variants.join_variant(dtype, columns, group, target)
        launch(joined, device, cells, parts, maxima, totals, out, splits)
    return out


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute sample_tokens without top_p; see repo_kernels.layers.sampling."""
    device = logits.device
    rows, columns = logits.shape
    blocks = -(-columns // variants.BLOCK)
    sums = torch.empty(rows, 2, blocks, dtype=torch.float64, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logps = torch.empty(rows, dtype=torch.float32, device=device)
    aligned = not any(phase(logits)) and columns * logits.element_size() % 16 == 0
    of_blocks, of_rows = variants.sampling_variants(DTYPES[logits.dtype], blocks, aligned, target_of(device))
    launch(of_blocks, device, rows * blocks, logits, sums, logits.stride(0), columns, blocks, temperature)
    launch(
        of_rows, device, rows, logits, sums, uniforms, tokens, logps, logits.stride(0), uniforms.stride(0), columns,
        blocks, temperature,
    )  # fmt: skip
    return tokens, logps


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Compute add_norm; see repo_kernels.layers.decode_layer."""
    device = hidden.device
    rows, width = hidden.shape
    out = torch.empty(rows, width, dtype=dtype, device=device)
    variant = variants.norm_variant(DTYPES[hidden.dtype], DTYPES[dtype], width, delta is not None, target_of(device))
    launch(variant, device, rows, hidden, out if delta is None else delta, weight, out, width, epsilon)
    return out


def place_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
    column: Tensor, heads: int, epsilon: float,
) -> Tensor:  # fmt: skip
    """Compute place_heads; see repo_kernels.layers.decode_layer."""
    rows, device = len(qkv), qkv.device
    key_heads, length, columns = keys.shape[1:]
    query = torch.empty(rows, heads, columns, dtype=qkv.dtype, device=device)
    q_norm, k_norm = (cos, cos) if norms is None else norms
    variant = variants.place_variant(
        DTYPES[qkv.dtype], DTYPES[cos.dtype], DTYPES[q_norm.dtype], columns, norms is not None, target_of(device)
    )
    launch(
        variant, device, rows * (heads + 2 * key_heads), qkv, cos, sin, q_norm, k_norm, query, keys, values, column,
        heads, key_heads, length, epsilon,
    )  # fmt: skip
    return query


def gate(gate_up: Tensor) -> Tensor:
    """Compute gate; see repo_kernels.layers.decode_layer."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    blocks = -(-width // variants.LANES)
    launch(
        variants.gate_variant(DTYPES[gate_up.dtype], target_of(gate_up.device)), gate_up.device, rows * blocks,
        gate_up, out, width, blocks,
    )  # fmt: skip
    return out
