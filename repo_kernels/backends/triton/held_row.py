"""A row held in registers: read once, and kept as 32-bit words until its gradient is written.

A 16-bit value takes a whole register; two to a word, a row of 49 152 logits fits. The words are unpacked behind a
branch each time, since the compiler would keep the fp32 values otherwise.
"""
# ruff: noqa: N803, N806 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .row_layout import block_pointers, live_pieces
from .row_statistics import accumulate, prepare
from .row_sweeps import gradient_of, store_block

# words whose values are all -inf
INFINITE_FP32, INFINITE_BF16, INFINITE_FP16 = tl.constexpr(-0x800000), tl.constexpr(-0x7F0080), tl.constexpr(-0x3FF0400)


@triton.jit
def unpack(words, DTYPE: tl.constexpr):
    """Unpack words (R, 4) into logits (R, E) in fp32."""
    if tl.float32 == DTYPE:
        x = words.to(tl.float32, bitcast=True)
    else:
        if tl.bfloat16 == DTYPE:
            low = (words << 16).to(tl.float32, bitcast=True)
            high = (words & -0x10000).to(tl.float32, bitcast=True)
        else:
            low = words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
            high = (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        x = tl.join(low, high).reshape(words.shape[0], 8)
    return x


@triton.jit
def hold_block(pointers, block, hole, pieces, FILL: tl.constexpr):
    """Load the words (R, 4) of a block; -inf where there is no piece."""
    R: tl.constexpr = pointers.shape[0]
    live = live_pieces(block, hole, pieces, R)
    return tl.load(pointers + block * (R * 4), mask=live[:, None], other=FILL, eviction_policy="evict_first")


@triton.jit
def hold(middle, hole, pieces, R: tl.constexpr, HELD: tl.constexpr):
    """Load the first HELD blocks of the row; always returns three, of which the others repeat the first."""
    DTYPE: tl.constexpr = middle.dtype.element_ty
    FILL: tl.constexpr = (
        INFINITE_FP32 if tl.float32 == DTYPE else INFINITE_BF16 if tl.bfloat16 == DTYPE else INFINITE_FP16
    )
    pointers = block_pointers(tl.multiple_of(middle.to(tl.pointer_type(tl.int32)), [16]), R, 4)
    x0 = hold_block(pointers, 0, hole, pieces, FILL)
    x1, x2 = x0, x0
    if HELD == 3:
        x1 = hold_block(pointers, 1, hole, pieces, FILL)
        x2 = hold_block(pointers, 2, hole, pieces, FILL)
    return x0, x1, x2


@triton.jit
def held_statistics(lanes, words, scale, DTYPE: tl.constexpr, ENTROPY: tl.constexpr):
    """Accumulate a held block into the lanes."""
    z, _ = prepare(unpack(words, DTYPE), None, 0.0, 0.0, False, ENTROPY)
    return accumulate(lanes, z, z, scale, ENTROPY, False)


@triton.jit
def store_held(grad_pointers, words, block, hole, pieces, factor, max2, scale):
    """Write the gradient of a held block."""
    x = unpack(words, grad_pointers.dtype.element_ty)
    values = gradient_of(x, x, factor, max2, max2, scale, 0.0, 0.0, False, False, False)
    store_block(grad_pointers, block, live_pieces(block, hole, pieces, x.shape[0]), values)
