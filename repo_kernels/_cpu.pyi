"""The extension module of csrc/module.cpp."""

from torch import Tensor

def fused(
    logits: Tensor,
    ref_logits: Tensor | None,
    grad: Tensor | None,
    zeroed: bool,
    ids: Tensor,
    values: Tensor,
    scalars: Tensor,
    code: int,
    softcap: float,
    with_entropy: bool,
    losses: Tensor,
    tokens: Tensor,
    threads: int,
) -> None:
    """Writes losses (N,), tokens (13, N) and grad, but for the dead rows of a zeroed one."""

def statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    scalars: Tensor,
    softcap: float,
    with_entropy: bool,
    state: Tensor,
    threads: int,
) -> None:
    """Writes state (7, N)."""

def apply(
    logits: Tensor,
    ref_logits: Tensor | None,
    grad: Tensor,
    zeroed: bool,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    scalars: Tensor,
    softcap: float,
    threads: int,
) -> None:
    """Writes grad, but for the dead rows of a zeroed one."""

def scale_rows(grad: Tensor, factors: Tensor, threads: int) -> None:
    """Multiplies the rows of grad whose factor is not 1."""

def transpose(source: Tensor, to: Tensor, threads: int) -> None:
    """Writes the transposed matrix of source (r, c) into to (c, r), contiguous; fp32."""

def isa() -> str:
    """The instruction set in use."""

def _isas() -> list[str]:
    """Those this machine has, the best one first."""

def _set_isa(name: str) -> None:
    """Use another one of them (for tests)."""

def _exp2(t: Tensor, out: Tensor) -> None:
    """The kernels' 2^t of (n,), 0 below -127."""

def _soft_cap(z: Tensor, value: Tensor, slope: Tensor, cap: float) -> None:
    """The kernels' cap tanh(z / cap) of (n,) and its derivative."""
