"""Scalar functions accurate to fp32, for the few values per row for which `tl.exp` and `tl.log2` are too coarse.

Those are lowered to approximations of the hardware, and Triton's math library does not run in the interpreter.
"""

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2.0))
LOG2E = tl.constexpr(1.0 / math.log(2.0))
LOG2E_LOW = tl.constexpr(1.925963033500e-08)  # log2(e) minus its fp32 rounding


@triton.jit
def exp(x):
    """Compute e^x for finite x; the rounding error of x log2(e) is added back."""
    t = x * LOG2E
    low = tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E, -t))
    power = tl.exp2(t)
    return tl.fma(power, low * LN2, power)


@triton.jit
def expm1(x):
    """Compute e^x - 1 with relative accuracy also near 0; -inf gives -1."""
    x = tl.where(x < -100.0, -100.0, x)
    # the series x (1 + x/2! + x^2/3! + ...) for |x| < 1/2, where the next term is 2e-9
    p = tl.fma(x, 1 / 40320.0, 1 / 5040.0)
    p = tl.fma(x, p, 1 / 720.0)
    p = tl.fma(x, p, 1 / 120.0)
    p = tl.fma(x, p, 1 / 24.0)
    p = tl.fma(x, p, 1 / 6.0)
    p = tl.fma(x, p, 0.5)
    return tl.where(tl.abs(x) < 0.5, tl.fma(x * x, p, x), exp(x) - 1)


@triton.jit
def twice_atanh(w):
    """Compute 2 atanh(w) = log((1 + w) / (1 - w)) for |w| <= 1/3."""
    square = w * w
    p = tl.fma(square, 1 / 15.0, 1 / 13.0)
    p = tl.fma(square, p, 1 / 11.0)
    p = tl.fma(square, p, 1 / 9.0)
    p = tl.fma(square, p, 1 / 7.0)
    p = tl.fma(square, p, 1 / 5.0)
    p = tl.fma(square, p, 1 / 3.0)
    return 2 * tl.fma(w * square, p, w)


@triton.jit
def log1p(x):
    """Compute log(1 + x) for 0 <= x <= 1."""
    return twice_atanh(x / (2 + x))


@triton.jit
def log2(x):
    """Compute log2 of a positive normal number; NaN and inf are returned as they are."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # x = 2^exponent f, f in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    result = tl.fma(twice_atanh((f - 1) / (f + 1)), LOG2E, exponent.to(tl.float32))
    return tl.where(x < float("inf"), result, x)


@triton.jit
def softcap_logits(z, cap, inverse_cap):
    """Compute (y, dy/dz) of y = cap tanh(z / cap), any shape.

    The slope 1 - tanh^2 is computed as 4 e / (1 + e)^2 with e = exp(-2 |z / cap|), which does not cancel at the cap,
    and tanh near 0 as a polynomial, which does not cancel there. The sign bit is copied from z.
    """
    u = tl.abs(z * inverse_cap)
    decay = tl.exp2(u * (-2 * LOG2E))
    root = tl.rsqrt(1 + decay)  # squared: one instruction where a division takes eight
    inverse = root * root
    share = decay * inverse
    square = u * u
    # (tanh(u) / u - 1) / u^2 as a polynomial in u^2: tanh to 1e-10 for u < 0.55
    p = tl.fma(square, 0.00252848, -0.00852792)
    p = tl.fma(square, p, 0.02181887)
    p = tl.fma(square, p, -0.05396475)
    p = tl.fma(square, p, 0.13333324)
    p = tl.fma(square, p, -0.33333333)
    magnitude = tl.where(u < 0.55, tl.fma(u * square, p, u), tl.fma(share, -2.0, 1.0))
    y = (cap * magnitude).to(tl.int32, bitcast=True) | (z.to(tl.int32, bitcast=True) & -0x80000000)
    return y.to(tl.float32, bitcast=True), 4 * share * inverse
