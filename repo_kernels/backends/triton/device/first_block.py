"""The first block of a row apart from the rest, for launch forms that keep it or load it ahead of its turn.

Such forms have neither softcap nor full KL.
"""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .row_layout import aligned, block_pointers, live_pieces
from .row_statistics import accumulate, prepare
from .row_sweeps import gradient_of, load_block, store_block


@triton.jit
def load_first(pointer, head, pieces, R: tl.constexpr, E: tl.constexpr):
    """Load the first block (R, E) of a row, the piece of its target included; -inf where there is no piece."""
    pointers = block_pointers(aligned(pointer, head), R, E)
    return load_block(pointers, 0, live_pieces(0, -1, pieces, R), "evict_last")


@triton.jit
def rest_of(place, R: tl.constexpr, E: tl.constexpr):
    """Return the place of a row without its first block."""
    pointer, head, pieces, hole, target = place
    return (
        pointer,
        head + tl.minimum(pieces, R) * E,
        tl.maximum(pieces - R, 0),
        tl.where(hole >= R, hole - R, -1),
        target,
    )


@triton.jit
def first_statistics(lanes, x, place, scale, ENTROPY: tl.constexpr):
    """Accumulate the first block into the lanes."""
    _, _, pieces, hole, _ = place
    live = live_pieces(0, hole, pieces, x.shape[0])
    z, _ = prepare(tl.where(live[:, None], x.to(tl.float32), float("-inf")), None, 0.0, 0.0, False, ENTROPY)
    return accumulate(lanes, z, z, scale, ENTROPY, False)


@triton.jit
def first_gradient(x, place, grad_pointer, factor, max2, scale, R: tl.constexpr, E: tl.constexpr,
                   IN_GRADIENT: tl.constexpr):  # fmt: skip
    """Write the gradient of the first block."""
    _, head, pieces, hole, _ = place
    pointers = block_pointers(aligned(grad_pointer, head), R, E)
    values = gradient_of(x, x, factor, max2, max2, scale, 0.0, 0.0, IN_GRADIENT, False, False)
    store_block(pointers, 0, live_pieces(0, hole, pieces, R), values)
