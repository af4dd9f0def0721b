"""The interface of a backend: the flat form of a loss, and the functions that compute it.

The leading dimensions of the logits are flattened to N rows; options that act once per row are packed into one integer.
`backends.eager` defines what each function computes; `backends.cpu` and `backends.triton` compute the same in C++ and
Triton. A row is dead when its token is masked or ignored: its id is then -100, its logits and values are never read,
and its outputs and its gradient are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100

# Rows of the `values` matrix (9, N). An absent argument is filled with what changes nothing: cost_baselines 0, costs
# -inf (safe, hinge 0), cost_limits 0, importance_weights 1. Backends read cost_advantages, old_logps and ref_logps only
# if the code says so. `weights` are the aggregation weights.
VALUES = (
    "reward_advantages",
    "cost_advantages",
    "costs",
    "cost_limits",
    "cost_baselines",
    "old_logps",
    "ref_logps",
    "importance_weights",
    "weights",
)

# Entries of the `scalars` vector (8,). dual_clip is inf when there is none.
SCALARS = ("lam", "beta", "eps_low", "eps_high", "entropy_coef", "temperature", "grad_scale", "dual_clip")

# Rows of the `tokens` matrix (13, N), which the loss returns beside the per-token losses. All but `logp` are summed for
# the statistics. kl: the chosen estimator without the factor rho, 0 without a reference. entropy: 0 unless computed.
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

# Rows of the `state` matrix (7, N), which `statistics` computes and `apply` reads. With c = log2(e) / temperature and
# t_v = fma(z_v, c, -max2), where max2 = fl(c max z): p_v = exp2(t_v - log2_sum). ref_*: the same of the reference.
STATE = ("logp", "entropy", "kl", "max2", "log2_sum", "ref_max2", "ref_log2_sum")

# Rows of the matrix (3, N) of gradient scalars that `apply` takes. grad_scale has been multiplied in.
SLOPES = ("g_logp", "g_entropy", "g_kl")

# code = cost | kl << 2 | kl_importance_weighted << 5 | normalize << 6 | on_policy << 7
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
    """

    cost: int
    kl: int
    kl_importance_weighted: bool
    normalize: bool
    on_policy: bool

    def pack(self) -> int:
        """Pack the options into one integer."""
        flags = self.kl_importance_weighted << 5 | self.normalize << 6 | self.on_policy << 7
        return self.cost | self.kl << 2 | flags

    @staticmethod
    def unpack(code: int) -> Code:
        """Read the options from one integer."""
        return Code(code & 3, code >> 2 & 7, bool(code >> 5 & 1), bool(code >> 6 & 1), bool(code >> 7 & 1))


@dataclass(frozen=True)
class LossRows:
    """A loss over N rows, without its logits. Floating-point tensors are fp32, or fp64 for fp64 logits.

    Args:
        ids: (N,) int64, -100 on dead rows.
        values: (9, N) by VALUES, contiguous.
        scalars: (8,) by SCALARS, on the logits' device.
        code: a packed `Code`.
        softcap: 0.0 for none.
        entropy: ENTROPY_NONE, ENTROPY_VALUE or ENTROPY_GRADIENT.
    """

    ids: Tensor
    values: Tensor
    scalars: Tensor
    code: int
    softcap: float
    entropy: int


class Backend(Protocol):
    """A backend: a module with these functions, which `choice.load` returns.

    logits, ref_logits: (T, V) or (B, L, V) with any row strides and unit column stride; ids: (N,) with N = T or B * L.
    """

    def new_gradient(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, bool]:
        """Allocate dL/dlogits, shaped like the logits, whose rows have these ids.

        Returns:
            The tensor, and whether it is filled with zeros, which the caller passes on as `zeroed`.
        """

    def fused(
        self, logits: Tensor, ref_logits: Tensor | None, rows: LossRows, grad: Tensor | None, zeroed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted loss of each row and, if `grad` is given, its gradient.

        Args:
            logits: see the class.
            ref_logits: like logits, for KL_FULL.
            rows: everything else that the loss reads.
            grad: receives dL/dlogits times grad_scale; may be `logits` itself. None: only the forward runs.
            zeroed: `grad` is filled with zeros, so that dead rows need not be written.

        Returns:
            losses (N,) and tokens (13, N) by TOKENS.

        Raises:
            IndexError: a live id is outside [0, V) (cpu and eager; Triton gives NaN in that row).
        """

    def statistics(
        self, logits: Tensor, ref_logits: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float, entropy: int
    ) -> Tensor:
        """Compute the state (7, N) by STATE: log-probability of the id, entropy, full KL, and what `apply` needs."""

    def apply(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        ids: Tensor,
        state: Tensor,
        slopes: Tensor,
        scalars: Tensor,
        softcap: float,
        grad: Tensor,
        zeroed: bool = False,
    ) -> None:
        """Write dL/dlogits into `grad`, which may be `logits`, from the state (7, N) and the slopes (3, N)."""

    def scale_rows(self, grad: Tensor, upstream: Tensor) -> None:
        """Multiply each row of `grad` by its entry of `upstream` (N,), in place, with one rounding."""


def device_scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a 0-d tensor of dtype on the device.

    A kernel fills in a float, since copying one from the host would wait for the device.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)


def row_strides(matrix: Tensor) -> tuple[int, int, int]:
    """Return (L, stride of b, stride of t) of (T, V) or (B, L, V) logits: flat row r is b = r // L, t = r % L."""
    if matrix.ndim == 2:
        return max(matrix.shape[0], 1), 0, matrix.stride(0)
    return max(matrix.shape[1], 1), matrix.stride(0), matrix.stride(1)


def gradient_layout(logits: Tensor) -> tuple[tuple[int, ...], int, int]:
    """Lay out the gradient of the logits: (strides, storage offset, elements of the storage).

    Its rows lie relative to 16-byte boundaries as the rows of the logits do: each stride is the smallest one with the
    same remainder. A kernel that starts a row of logits at its first boundary then meets the gradient's boundary too.
    """
    step = max(16 // logits.element_size(), 1)
    strides, reach = [1], logits.shape[-1]
    for size, stride in zip(reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True):
        strides.append(reach if logits.is_contiguous() else reach + (stride - reach) % step)
        reach = strides[-1] * max(size, 1)
    offset: int = logits.storage_offset() % step  # type: ignore[assignment]  # SymInt while tracing
    return tuple(reversed(strides)), offset, offset + reach


def gradient_buffer(logits: Tensor) -> Tensor:
    """Allocate dL/dlogits, uninitialised; contiguous if the logits are and begin at a 16-byte boundary."""
    strides, offset, elements = gradient_layout(logits)
    if logits.is_contiguous() and offset == 0:
        return logits.new_empty(logits.shape)
    return logits.new_empty(elements).as_strided(logits.shape, strides, offset)
