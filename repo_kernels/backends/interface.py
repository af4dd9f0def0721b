"""The flat form in which every backend takes a loss: N rows, values by row, scalars in one vector, options in one code.

A backend is a module with the functions `new_gradient`, `fused`, `statistics`, `apply` and `scale_rows` (eager.py is
the definition; cpu/ and gpu/ are the same in C++ and Triton). Rows are the leading dimensions of the logits, flattened.
A dead row (masked or ignored) has id -100: its logits and values are never read, its outputs and its gradient are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100

# Rows of the `values` matrix (9, N). Absent ones hold what changes nothing: cost_baselines 0, costs -inf (safe, hinge
# 0), cost_limits 0, is_weights 1; cost_advantages, old_logps and ref_logps are not read unless the code says so.
VALUES = (
    "reward_advantages",
    "cost_advantages",
    "costs",
    "cost_limits",
    "cost_baselines",
    "old_logps",
    "ref_logps",
    "is_weights",
    "weights",
)

# Entries of the `scalars` vector (8,). dual_clip is inf when there is none.
SCALARS = ("lam", "beta", "eps_low", "eps_high", "entropy_coef", "temperature", "grad_scale", "dual_clip")

# Rows of the `tokens` matrix (13, N) that the loss returns beside the per-token loss. All but `logp` are summed for
# the statistics. kl: the chosen estimator without rho, 0 without a reference. entropy: 0 unless computed.
TOKENS = (
    "logp",
    "entropy",
    "kl",
    "tokens",  # 1 on live rows
    "tokens_unsafe",  # 1 where C > d
    "clipped_low_safe",
    "clipped_low_unsafe",
    "clipped_high_safe",
    "clipped_high_unsafe",
    "ratio",
    "ratio_square",
    "kl_old_k1",  # -log rho
    "kl_old_k3",  # expm1(log rho) - log rho
)

# Rows of the `state` matrix (7, N): what `statistics` finds and `apply` reads. With c = log2(e) / temperature and
# t_v = fma(z_v, c, -max2), where max2 = fl(c max z): p_v = exp2(t_v - log2_sum). ref_* are the reference's.
STATE = ("logp", "entropy", "kl", "max2", "log2_sum", "ref_max2", "ref_log2_sum")

# Rows of the matrix (3, N) of gradient scalars that `apply` takes, grad_scale already multiplied in.
SLOPES = ("g_logp", "g_entropy", "g_kl")

# code = cost | kl << 2 | kl_ratio << 5 | normalize << 6 | on_policy << 7
COST_NONE, COST_GIVEN, COST_GATED, COST_HINGE = range(4)
KL_NONE, KL_K1, KL_K2, KL_K3, KL_FULL = range(5)
KL_NAMES = ("none", "k1", "k2", "k3", "full")

# How much of the entropy a launch computes.
ENTROPY_NONE, ENTROPY_VALUE, ENTROPY_GRADIENT = range(3)


@dataclass(frozen=True)
class Code:
    """The options that act once per row.

    cost: COST_NONE, COST_GIVEN (cost_advantages), COST_GATED (cost_advantages where C > d) or COST_HINGE
    ({C - d}^+ - cost_baselines). kl: KL_NONE ... KL_FULL. on_policy: no old_logps, rho = 1 with its gradient.
    """

    cost: int
    kl: int
    kl_ratio: bool
    normalize: bool
    on_policy: bool

    def pack(self) -> int:
        """As one integer."""
        return self.cost | self.kl << 2 | self.kl_ratio << 5 | self.normalize << 6 | self.on_policy << 7

    @staticmethod
    def unpack(code: int) -> Code:
        """From one integer."""
        return Code(code & 3, code >> 2 & 7, bool(code >> 5 & 1), bool(code >> 6 & 1), bool(code >> 7 & 1))


@dataclass(frozen=True)
class LossRows:
    """One loss over N rows. fp32 (fp64 for fp64 logits).

    ids: (N,) int64, -100 on dead rows. values: (9, N) by VALUES, contiguous. scalars: (8,) by SCALARS, on the device.
    code: packed Code. softcap: 0.0 for none. entropy: ENTROPY_NONE, ENTROPY_VALUE or ENTROPY_GRADIENT.
    """

    ids: Tensor
    values: Tensor
    scalars: Tensor
    code: int
    softcap: float
    entropy: int


def device_scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d tensor of dtype on the device. A float is filled in by a kernel: copying it would wait for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)


def row_strides(matrix: Tensor) -> tuple[int, int, int]:
    """(L, stride of b, stride of t) of (T, V) or (B, L, V) logits: flat row r starts at r // L, r % L."""
    if matrix.ndim == 2:
        return max(matrix.shape[0], 1), 0, matrix.stride(0)
    return max(matrix.shape[1], 1), matrix.stride(0), matrix.stride(1)


def gradient_layout(logits: Tensor) -> tuple[tuple[int, ...], int, int]:
    """(strides, storage offset, elements of the storage) of the logits' gradient.

    Its rows lie to 16-byte boundaries exactly as the logits' rows do, so that a kernel that peels a logits row to its
    first boundary has peeled the gradient's too: each stride is the smallest one with the same remainder.
    """
    step = max(16 // logits.element_size(), 1)
    strides, reach = [1], logits.shape[-1]
    for size, stride in zip(reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True):
        strides.append(reach if logits.is_contiguous() else reach + (stride - reach) % step)
        reach = strides[-1] * max(size, 1)
    offset: int = logits.storage_offset() % step  # type: ignore[assignment]  # SymInt while tracing
    return tuple(reversed(strides)), offset, offset + reach


def gradient_buffer(logits: Tensor) -> Tensor:
    """An uninitialised gradient of the logits; contiguous where they are and begin at a 16-byte boundary."""
    strides, offset, elements = gradient_layout(logits)
    if logits.is_contiguous() and offset == 0:
        return logits.new_empty(logits.shape)
    return logits.new_empty(elements).as_strided(logits.shape, strides, offset)
