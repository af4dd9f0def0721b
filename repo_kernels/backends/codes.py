"""Names and codes that the three backends share: scalars, rows, statistics, and options packed into an integer.

csrc/losses/codes.h holds the same for C++.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

IGNORED = -100

# Scalars of a loss and what an absent one is. cost_limit: d where it is the same for all rows. divisor and max_length
# are read if the code says so.
ABSENT_SCALARS = {
    "lam": 0.0,
    "beta": 0.0,
    "eps_low": 0.0,
    "eps_high": 0.0,
    "entropy_coef": 0.0,
    "temperature": 1.0,
    "grad_scale": 1.0,
    "dual_clip": math.inf,
    "cost_limit": 0.0,
    "divisor": 1.0,
    "max_length": 1.0,
}
SCALARS = tuple(ABSENT_SCALARS)

# Rows of the matrix (5, N) that a loss returns. loss: times the aggregation weight. kl: the chosen estimator without
# the factor rho, 0 without a reference. entropy: 0 unless computed. log_ratio: log rho, clamped.
ROWS = ("loss", "logp", "entropy", "kl", "log_ratio")

# Bits of the flags (N,) of a row; 0 on dead rows. Unsafe: C > d.
LIVE, UNSAFE, CLIPPED_LOW, CLIPPED_HIGH = 1, 2, 4, 8

# Statistics of a loss (18,): sums over live tokens, then over sequences with a live token, then extremes of rho.
STATS = (
    "entropy_sum",
    "kl_ref_sum",
    "tokens",
    "tokens_unsafe",
    "clipped_low_safe",
    "clipped_low_unsafe",
    "clipped_high_safe",
    "clipped_high_unsafe",
    "ratio_sum",
    "ratio_square_sum",
    "kl_old_k1_sum",  # of -log rho
    "kl_old_k3_sum",  # of expm1(log rho) - log rho
    "sequences",
    "sequences_unsafe",
    "rectified_cost_sum",
    "penalty_sum",
    "ratio_min",
    "ratio_max",
)

# Rows of the `state` matrix (7, N), which `statistics` computes and `apply` reads. With c = log2(e) / temperature and
# t_v = fma(z_v, c, -max2), where max2 = fl(c max z): p_v = exp2(t_v - log2_sum). ref_*: the same of the reference.
STATE = ("logp", "entropy", "kl", "max2", "log2_sum", "ref_max2", "ref_log2_sum")

# Rows of the matrix (3, N) of gradient scalars that `apply` takes. grad_scale has been multiplied in.
SLOPES = ("g_logp", "g_entropy", "g_kl")

# How the losses of live tokens become one number.
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "none",
)
TOKEN_MEAN, TOKEN_SUM, SEQ_TOKEN_MEAN, SEQ_TOKEN_SUM, SEQ_TOKEN_SUM_NORM, NO_AGGREGATION = range(6)

# code = cost | kl << 2 | kl_importance_weighted << 5 | normalize << 6 | on_policy << 7 | aggregation << 8
#        | divisor << 11 | cispo << 12 | sequence_ratio << 13; the last two only in losses of given log-probabilities
COST_NONE, COST_GIVEN, COST_GATED, COST_HINGE = range(4)
KL_NONE, KL_K1, KL_K2, KL_K3, KL_FULL = range(5)
KL_NAMES = ("none", "k1", "k2", "k3", "full")

# How much of the entropy a launch computes.
ENTROPY_NONE, ENTROPY_VALUE, ENTROPY_GRADIENT = range(3)


@dataclass(frozen=True)
class Code:
    """The options that act once per row.

    Args:
        cost: COST_NONE, COST_GIVEN (cost_advantages), COST_GATED (cost_advantages where C > d) or COST_HINGE
            ({C - d}^+ - cost_baselines).
        kl: KL_NONE, KL_K1, KL_K2, KL_K3 or KL_FULL.
        kl_importance_weighted: multiply k1 and k3 by rho.
        normalize: divide the combined advantage by 1 + lam.
        on_policy: there are no old_logps; rho is 1 and has a gradient.
        aggregation: index into AGGREGATIONS.
        divisor: the scalar of that name replaces the outer count.
        cispo: the surrogate is CISPO's and not PPO's.
        sequence_ratio: rho is that of the sequence.
    """

    cost: int
    kl: int
    kl_importance_weighted: bool
    normalize: bool
    on_policy: bool
    aggregation: int
    divisor: bool
    cispo: bool = False
    sequence_ratio: bool = False

    def pack(self) -> int:
        """Pack the options into one integer."""
        flags = self.kl_importance_weighted << 5 | self.normalize << 6 | self.on_policy << 7
        return (
            self.cost
            | self.kl << 2
            | flags
            | self.aggregation << 8
            | self.divisor << 11
            | self.cispo << 12
            | self.sequence_ratio << 13
        )

    @staticmethod
    def unpack(code: int) -> Code:
        """Read the options from one integer."""
        weighted, normalize, on_policy, *rest = (bool(code >> place & 1) for place in (5, 6, 7, 11, 12, 13))
        return Code(code & 3, code >> 2 & 7, weighted, normalize, on_policy, code >> 8 & 7, *rest)
