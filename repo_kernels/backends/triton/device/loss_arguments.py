"""The arguments of a loss inside a kernel: a value for each token or for each sequence, at any strides.

`given` says which optional tensors exist. A pointer to one that does not is never read.
"""

import triton
import triton.language as tl

from ... import codes

IGNORED = tl.constexpr(codes.IGNORED)

# Bits of `given`.
MASK, BOUNDS, PACKED, COSTS, COST_LIMITS, BASELINES, IMPORTANCE, UPSTREAM, INDEX, FLAGS, TEMPERATURES = (
    tl.constexpr(1 << place) for place in range(11)
)

# Indices into the vector that `prepare` fills: the scalars, and behind them the divisor of all aggregation weights.
LAM = tl.constexpr(codes.SCALARS.index("lam"))
BETA = tl.constexpr(codes.SCALARS.index("beta"))
EPS_LOW = tl.constexpr(codes.SCALARS.index("eps_low"))
EPS_HIGH = tl.constexpr(codes.SCALARS.index("eps_high"))
ENTROPY_COEF = tl.constexpr(codes.SCALARS.index("entropy_coef"))
TEMPERATURE = tl.constexpr(codes.SCALARS.index("temperature"))
GRAD_SCALE = tl.constexpr(codes.SCALARS.index("grad_scale"))
DUAL_CLIP = tl.constexpr(codes.SCALARS.index("dual_clip"))
COST_LIMIT = tl.constexpr(codes.SCALARS.index("cost_limit"))
DIVISOR = tl.constexpr(codes.SCALARS.index("divisor"))
MAX_LENGTH = tl.constexpr(codes.SCALARS.index("max_length"))
TOTAL = tl.constexpr(len(codes.SCALARS))
SHARED = len(codes.SCALARS) + 1

TOKEN_MEAN = tl.constexpr(codes.TOKEN_MEAN)
TOKEN_SUM = tl.constexpr(codes.TOKEN_SUM)
SEQ_TOKEN_MEAN = tl.constexpr(codes.SEQ_TOKEN_MEAN)
SEQ_TOKEN_SUM_NORM = tl.constexpr(codes.SEQ_TOKEN_SUM_NORM)
NO_AGGREGATION = tl.constexpr(codes.NO_AGGREGATION)


@triton.jit
def at(column, sequence, token):
    """Return the pointer to the value of a token. column: (pointer, stride of sequences, stride of tokens)."""
    pointer, by_sequence, by_token = column
    return pointer + (sequence.to(tl.int64) * by_sequence + token.to(tl.int64) * by_token)


@triton.jit
def place_of(row, sequences, length, given, exists):
    """Return (sequence, token within it) of a row; the token of packed rows is the row. Sequence -1: out of bounds."""
    sequence, token = row // length, row % length
    if given & PACKED != 0:
        token = row
        sequence = row
        if given & BOUNDS != 0:
            sequence = tl.load(sequences + row, mask=exists, other=-1)
    return sequence, token


@triton.jit
def bounds_of(sequence, valid, bounds, count, length, given):
    """Return (first row, row after the last) of sequences, any shape; both 0 where not valid."""
    # By mask and not by a branch, which Triton 3.4 to 3.7 cannot translate for gfx942 in tiles of one column.
    bounded = tl.where(valid, given & BOUNDS, 0) != 0
    begin = tl.load(bounds + sequence, mask=bounded, other=0)
    end = tl.load(bounds + sequence + 1, mask=bounded, other=0)
    begin, end = tl.where(bounded, begin, sequence * length), tl.where(bounded, end, (sequence + 1) * length)
    begin = tl.minimum(tl.maximum(begin, 0), count)
    end = tl.minimum(tl.maximum(end, 0), count)
    return tl.where(valid, begin, 0), tl.where(valid, end, 0)


@triton.jit
def usable(temperature):
    """Return a temperature; NaN if it is not positive and finite."""
    return tl.where((temperature > 0) & (temperature < float("inf")), temperature, float("nan"))


@triton.jit
def row_temperature(temperatures, shared, sequence, token, given):
    """Load the temperature of one live row."""
    temperature = tl.load(shared + TEMPERATURE)
    if given & TEMPERATURES != 0:
        temperature = tl.load(at(temperatures, sequence, token))
    return usable(temperature)


@triton.jit
def hinge(cost, limit):
    """Compute {C - d}^+, any shape; NaN stays NaN."""
    excess = cost - limit
    return tl.where(excess < 0, 0.0, excess)
