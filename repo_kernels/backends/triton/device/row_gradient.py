"""The gradient of one row from its statistics and three scalars.

    dL/dz_v = [g_logp (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_kl p_v (log p_v - log q_v - KL)] / T * slope_v

With p_v = 2^t_v / s, everything but the term of the target is 2^t_v (constant + linear t_v + cross (t_v - t'_v)).
"""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .row_statistics import FLOOR
from .scalar_math import LN2, exp, expm1, softcap_logits


@triton.jit
def factors(state, slopes, inverse_sum, temperature, ENTROPY: tl.constexpr, FULL_KL: tl.constexpr):
    """Compute (constant, linear, cross) of a row from its STATE and SLOPES (backends/interface.py)."""
    _, entropy, kl, _, log2_sum, _, ref_log2_sum = state
    g_logp, g_entropy, g_kl = slopes
    share = inverse_sum / temperature
    constant, linear, cross = -g_logp, 0.0, 0.0
    if ENTROPY:
        constant -= g_entropy * (entropy - LN2 * log2_sum)
        linear = -g_entropy * LN2 * share
    if FULL_KL:
        constant -= g_kl * (kl + LN2 * (log2_sum - ref_log2_sum))
        cross = g_kl * LN2 * share
    return constant * share, linear, cross


@triton.jit
def column_gradient(z, slope, ref_z, factor, max2, ref_max2, scale, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
                    FULL_KL: tl.constexpr):  # fmt: skip
    """Compute dL/dz of columns that are not the target, any shape, fp32."""
    constant, linear, cross = factor
    t = tl.fma(z, scale, -max2)
    inner = constant
    if ENTROPY:
        inner = tl.fma(t, linear, inner)
    if FULL_KL:
        inner = tl.fma(t - tl.fma(ref_z, scale, -ref_max2), cross, inner)
    gradient = tl.exp2(t) * inner
    return gradient * slope if SOFTCAP else gradient


@triton.jit
def target_gradient(z, ref_z, state, slopes, softcap, scale, temperature, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
                    FULL_KL: tl.constexpr):  # fmt: skip
    """Compute dL/dz of the target, scalar fp32; 1 - p_y = -expm1(log p_y) does not cancel when p_y -> 1."""
    logp, entropy, kl, _, _, ref_max2, ref_log2_sum = state
    g_logp, g_entropy, g_kl = slopes
    gradient = -g_logp * expm1(logp)
    if ENTROPY or FULL_KL:
        finite_logp = tl.where(logp < FLOOR, FLOOR, logp)
        p = exp(tl.where(logp < -200.0, -200.0, logp))
        gradient -= g_entropy * p * (finite_logp + entropy)
        if FULL_KL:
            ref_logp = LN2 * (tl.fma(ref_z, scale, -ref_max2) - ref_log2_sum)
            gradient += g_kl * p * (finite_logp - tl.where(ref_logp < FLOOR, FLOOR, ref_logp) - kl)
    if SOFTCAP:
        _, slope = softcap_logits(z, softcap, 1 / softcap)
        gradient *= slope
    return gradient / temperature
