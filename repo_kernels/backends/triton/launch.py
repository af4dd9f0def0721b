"""Launches of the kernels: which variant runs, with which grid and arguments.

A loss takes three launches, whatever its options: `prepare`, `fused` and `reduce`. Its backward is one more, `scale`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codes import SLOPES, STATE, STATS
from ..interface import ALL_ROWS, Loss, RowArguments, RowRange, RowResults
from ..memory_layout import gradient_buffer, gradient_layout, row_strides
from .columns import Columns, split_scalars
from .device import loss_arguments as bits
from .forms import PERSISTENT, LaunchForm, Target
from .variants import (
    Variant,
    apply_variant,
    fused_variant,
    make_variant,
    scale_variant,
    sequence_variant,
    statistics_variant,
)

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SCALE_PROGRAMS = 2048  # enough to fill a GPU, few enough to end at once where nothing has to be scaled


@functools.cache
def target_of(device: torch.device) -> Target:
    """Return the target that Triton compiles for on this device; that of a Hopper GPU in the interpreter."""
    if torch.version.hip:
        return Target(64)
    return Target(32, device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10)


def launch(variant: Variant, device: torch.device, programs: int, *args: Any) -> None:
    """Launch so many programs on the device; nothing for none."""
    if programs:
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            variant.kernel[(programs,)](*args, **variant.constexprs, **variant.options)


def resident_programs(form: LaunchForm, device: torch.device) -> int:
    """Return how many programs of at most 64 registers a thread run on the device at once; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count * (32 // form.warps)


def phase(matrix: Tensor, step: int = 16) -> tuple[int, ...]:
    """Return how rows lie relative to boundaries every `step` bytes: remainders of base and strides that count."""
    strides = [s for s, n in zip(matrix.stride()[:-1], matrix.shape[:-1], strict=True) if n > 1]
    return matrix.data_ptr() % step, *(s * matrix.element_size() % step for s in strides)


def in_step(grad: Tensor, logits: Tensor) -> bool:
    """Return whether the kernels can split rows of the gradient at the same columns as rows of the logits.

    A narrower gradient comes with buffers of our own (`losses.heads.linear.chunk_buffer`), with rows at boundaries.
    """
    if grad.dtype != logits.dtype:
        return not any(phase(grad)) and not any(phase(logits, 32))
    return phase(grad) == phase(logits)


def in_phase(matrix: Tensor, logits: Tensor) -> Tensor:
    """Return `matrix`, or a copy of it whose rows lie relative to 16-byte boundaries as the rows of the logits do.

    A kernel splits a row and its gradient or reference at the same columns, which is possible only if they lie alike.
    Copies are rare: logits and reference logits of one shape, straight from their heads, lie alike.
    """
    if phase(matrix) == phase(logits):
        return matrix
    return empty_in_phase(logits).copy_(matrix)


def empty_in_phase(logits: Tensor) -> Tensor:
    """Allocate a tensor of the logits' shape that is in phase with them, also if their base is not aligned."""
    buffer = gradient_buffer(logits)
    if phase(buffer) == phase(logits):
        return buffer
    strides, _, elements = gradient_layout(logits)
    step = 16 // logits.element_size()
    base = logits.new_empty(elements + step)
    offset = (logits.data_ptr() - base.data_ptr()) // logits.element_size() % step
    return base.as_strided(logits.shape, strides, offset)


def new_gradient(logits: Tensor, arguments: RowArguments | None) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits in phase with the logits; False: it is not filled with zeros."""
    return gradient_buffer(logits), False


@dataclass(frozen=True, eq=False)
class Prepared:
    """What all rows of a loss share.

    Args:
        columns: the arguments.
        shared: (SHARED,) fp32, the scalars and the divisor of the aggregation weights.
        counts: (S,) fp32, live tokens of each sequence, at least 1; filled for the mean over a sequence's tokens.
        sequence_of: (N,) int32, the sequence of each packed row, -1 outside the bounds; filled with cu_seqlens.
    """

    columns: Columns
    shared: Tensor
    counts: Tensor
    sequence_of: Tensor


def one_or_each(value: Tensor) -> tuple[Tensor, int]:
    """Return a tensor, 0-d or (N,), with its stride by row: 0 for one value of all rows."""
    return value, value.stride(0) if value.ndim else 0


def prepare(logits: Tensor, loss: Loss) -> Prepared:
    """Gather the scalars and count live tokens, on the device."""
    arguments, device = loss.arguments, logits.device
    sequences, count = arguments.sequences, arguments.token_ids.numel()
    # one allocation each for what is fp32 and what is int32
    numbers = torch.empty(bits.SHARED + sequences, dtype=torch.float32, device=device)
    sequence_of = torch.empty(max(count, 1), dtype=torch.int32, device=device)
    shared, counts = numbers[: bits.SHARED], numbers[bits.SHARED :]
    columns = Columns.of(loss, numbers, sequence_of)
    floats, tensors, which = split_scalars(loss.scalars, numbers)
    launch(
        sequence_variant("prepare", count, sequences, target_of(device)), device, 1, *floats, *tensors, which,
        *columns.ids, *columns.mask, columns.bounds, shared, counts, sequence_of, count, columns.length, sequences,
        loss.code, columns.given,
    )  # fmt: skip
    return Prepared(columns, shared, counts, sequence_of)


def fused(
    logits: Tensor,
    ref_logits: Tensor | None,
    loss: Loss,
    prepared: Prepared,
    results: RowResults,
    grad: Tensor | None,
    where: RowRange = ALL_ROWS,
    upstream: Tensor | None = None,
    zeroed: bool = False,
    form: LaunchForm | None = None,
) -> None:
    """Write ROWS and flags of the rows `where`, and dL/dlogits times grad_scale into `grad` if it is given.

    form: another launch form than that of the table, to measure it; for losses without softcap and full KL.
    """
    count, columns = logits.shape[:-1].numel(), logits.shape[-1]
    ref = logits if ref_logits is None else in_phase(ref_logits, logits)
    out = logits if grad is None else grad if in_step(grad, logits) else empty_in_phase(logits)
    variant = fused_variant(
        DTYPES[logits.dtype], DTYPES[out.dtype], columns, loss.entropy, loss.softcap != 0, ref_logits is not None,
        target_of(logits.device),
    )  # fmt: skip
    programs = count
    if form is not None:
        switches = {"ENTROPY": loss.entropy, "SOFTCAP": False, "FULL_KL": False}
        variant = make_variant("fused", variant.dtype, form, target_of(logits.device), variant.grad_dtype, **switches)
        if form.rows == PERSISTENT:
            programs = min(count, resident_programs(form, logits.device))
    length, *strides = row_strides(logits)
    of, index = prepared.columns, where.index
    given = (
        of.given | (bits.UPSTREAM.value if upstream is not None else 0) | (bits.INDEX.value if index is not None else 0)
    )
    launch(
        variant, logits.device, programs, logits, ref, out, *of.ids, *of.mask, prepared.sequence_of, *of.values,
        prepared.shared if upstream is None else upstream.contiguous(), of.ids[0] if index is None else index,
        prepared.shared, prepared.counts, results.rows, results.flags, where.first, count, results.flags.shape[0],
        of.length, length, *strides, *row_strides(ref)[1:], *row_strides(out)[1:], columns, loss.code, given,
        loss.softcap, loss.entropy, int(grad is not None),
    )  # fmt: skip
    if grad is not None and out is not grad:
        grad.copy_(out)


def reduce(loss: Loss, prepared: Prepared, results: RowResults) -> tuple[Tensor, Tensor]:
    """Return the loss, 0-d, and the statistics (18,) by STATS."""
    of, device = prepared.columns, results.rows.device
    count, sequences = results.flags.shape[0], loss.arguments.sequences
    variant = sequence_variant("reduce", count, sequences, target_of(device))
    value = torch.empty((), dtype=torch.float32, device=device)
    stats = torch.empty(len(STATS), dtype=torch.float32, device=device)
    launch(
        variant, device, 1, results.rows, results.flags, *of.costs(), of.bounds, prepared.shared, value, stats, count,
        of.length, sequences, of.given,
    )  # fmt: skip
    return value, stats


def whole(
    logits: Tensor, ref_logits: Tensor | None, loss: Loss, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor, RowResults]:
    """Compute the loss, its statistics and its rows, and write dL/dlogits into `grad` if it is given."""
    prepared = prepare(logits, loss)
    results = RowResults.allocate(logits, loss.arguments.token_ids.numel())
    fused(logits, ref_logits, loss, prepared, results, grad, zeroed=zeroed)
    return *reduce(loss, prepared, results), results


def statistics(logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int) -> Tensor:
    """Compute the STATE (7, N) of the rows; 0 on dead rows."""
    count = ids.shape[0]
    state = temperature.new_empty(len(STATE), count)
    variant = statistics_variant(DTYPES[logits.dtype], entropy, softcap != 0, target_of(logits.device))
    length, *strides = row_strides(logits)
    launch(
        variant, logits.device, count, logits, ids.contiguous(), *one_or_each(temperature), state, count, length,
        *strides, logits.shape[-1], softcap, entropy,
    )  # fmt: skip
    return state


def apply(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, grad: Tensor
) -> None:
    """Write dL/dlogits into `grad`, which may be the logits, from the STATE (7, N) and the SLOPES (3, N)."""
    count = ids.shape[0]
    assert slopes.shape == (len(SLOPES), count)
    out = grad if in_step(grad, logits) else empty_in_phase(logits)
    variant = apply_variant(DTYPES[logits.dtype], DTYPES[out.dtype], softcap != 0, target_of(logits.device))
    length, *strides = row_strides(logits)
    launch(
        variant, logits.device, count, logits, out, ids.contiguous(), state.contiguous(), slopes.contiguous(),
        *one_or_each(temperature), count, length, *strides, *row_strides(out)[1:], logits.shape[-1], softcap,
    )  # fmt: skip
    if out is not grad:
        grad.copy_(out)


def scale_rows(grad: Tensor, upstream: Tensor, flags: Tensor | None) -> None:
    """Multiply the rows of `grad` by `upstream`, 0-d or (N,), in place, with one rounding.

    A row whose factor is 1, or whose flags are 0, is not touched.
    """
    length, *strides = row_strides(grad)
    count = grad.shape[:-1].numel()
    programs, given = min(count, SCALE_PROGRAMS), 0 if flags is None else bits.FLAGS.value
    launch(
        scale_variant(DTYPES[grad.dtype], target_of(grad.device)), grad.device, programs, grad,
        *one_or_each(upstream), upstream.view(torch.int32) if flags is None else flags, count,
        length, *strides, grad.shape[-1], given,
    )  # fmt: skip
