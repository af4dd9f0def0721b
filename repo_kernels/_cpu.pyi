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

def rms_norm(x: Tensor, weight: Tensor, y: Tensor, inverse: Tensor, epsilon: float, threads: int) -> None:
    """Writes y (r, c) and inverse (r,); all are fp32 and contiguous, as in the four below unless they say otherwise."""

def rms_norm_gradient(
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    threads: int,
) -> None:
    """Writes dx (r, c) and dweight (c,)."""

def swiglu(gate: Tensor, up: Tensor, out: Tensor, threads: int) -> None:
    """Writes out."""

def swiglu_gradient(gate: Tensor, up: Tensor, grad: Tensor, of_gate: Tensor, of_up: Tensor, threads: int) -> None:
    """Writes of_gate and of_up."""

def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, back: bool, threads: int) -> None:
    """Writes y (B, heads, T, D) from x and cos, sin (B, 1, T, D); any strides but that of D."""

def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    scale: float,
    window: int,
    out: Tensor,
    log2_sums: Tensor,
    threads: int,
) -> None:
    """Writes out, like q (T, Hq, D), and log2_sums (Hq, T)."""

def attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    scale: float,
    window: int,
    dout: Tensor,
    log2_sums: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    threads: int,
) -> None:
    """Writes dq, dk and dv, like q, k and v."""

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
