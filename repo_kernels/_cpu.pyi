"""Types of the extension module that `csrc/module.cpp` defines; tensors are on the CPU."""

from torch import Tensor

def fused(
    logits: Tensor,
    ref_logits: Tensor | None,
    grad: Tensor | None,
    zeroed: bool,
    arguments: list[Tensor | None],
    scalars: tuple[float | Tensor, ...] | Tensor,
    code: int,
    softcap: float,
    with_entropy: bool,
    first: int,
    index: Tensor | None,
    upstream: Tensor | None,
    rows: Tensor,
    flags: Tensor,
    loss: Tensor | None,
    stats: Tensor | None,
    threads: int,
) -> None:
    """Write rows (5, N), flags (N,) and grad; with loss, 0-d, and stats (18,) their sums too. arguments: by ARGUMENTS
    of backends/interface.py. The dead rows of a zeroed grad are left alone.
    """

def reduce(
    arguments: list[Tensor | None],
    scalars: tuple[float | Tensor, ...] | Tensor,
    code: int,
    rows: Tensor,
    flags: Tensor,
    loss: Tensor,
    stats: Tensor,
) -> None:
    """Sum rows (5, N) and flags (N,) into loss, 0-d, and stats (18,)."""

def count_dead(arguments: list[Tensor | None]) -> int:
    """Count the masked and ignored rows and those outside cu_seqlens."""

def statistics(
    logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, with_entropy: bool, state: Tensor, threads: int
) -> None:
    """Write state (7, N). temperature: fp32, 0-d or (N,)."""

def apply(
    logits: Tensor,
    grad: Tensor,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    temperature: Tensor,
    softcap: float,
    threads: int,
) -> None:
    """Write grad from state (7, N) and slopes (3, N). temperature: fp32, 0-d or (N,)."""

def scale_rows(grad: Tensor, upstream: Tensor, flags: Tensor | None, threads: int) -> None:
    """Multiply the rows of grad by upstream, 0-d or (N,); rows with factor 1 or flags 0 are not touched."""

def transpose(source: Tensor, to: Tensor, threads: int) -> None:
    """Write the transpose of source (r, c) into `to` (c, r), contiguous; fp32."""

def add_outer(out: Tensor, z: Tensor, b: Tensor, threads: int) -> None:
    """Add z (n, rank) @ b (m, rank)^T to out (n, m), whose columns are consecutive; fp32."""

def add_inner(d: Tensor, z: Tensor, out: Tensor, threads: int) -> None:
    """Add d (n, m)^T @ z (n, rank) to out (m, rank); the columns of d are consecutive; fp32."""

def rms_norm(x: Tensor, weight: Tensor, y: Tensor, inverse: Tensor, epsilon: float, threads: int) -> None:
    """Write y (r, c) and inverse (r,); contiguous fp32, as the arguments of the next three."""

def rms_norm_gradient(
    x: Tensor,
    weight: Tensor,
    inverse: Tensor,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor | None,
    threads: int,
) -> None:
    """Write dx (r, c) and dweight (c,)."""

def swiglu(gate: Tensor, up: Tensor, out: Tensor, threads: int) -> None:
    """Write out."""

def swiglu_gradient(gate: Tensor, up: Tensor, grad: Tensor, of_gate: Tensor, of_up: Tensor, threads: int) -> None:
    """Write of_gate and of_up, the gradients of gate and up."""

def rotate(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, back: bool, threads: int) -> None:
    """Write y (B, heads, T, D) from x and cos, sin (B, 1, T, D); fp32, last stride 1. back: the transposed map."""

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
    """Write out, shaped like q (T, Hq, D), and log2_sums (Hq, T)."""

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
    """Write dq, dk and dv, shaped like q, k and v."""

def ask_for_large_pages(memory: Tensor) -> None:
    """Ask the system for large pages in contiguous fp32 memory that is not written yet."""

def pack_weight(weight: Tensor, to: Tensor, threads: int) -> None:
    """Write a weight (n, k), contiguous, into `to` (panels of 16 outputs, k, 16)."""

def multiply_packed(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, threads: int) -> None:
    """Write out (rows, n) = x (rows, k) weight^T + bias, the weight packed."""

def sample_rows(
    logits: Tensor, uniforms: Tensor, temperature: float, tokens: Tensor, logps: Tensor, threads: int
) -> None:
    """Write the sampled tokens (B,) int64 and their log-probabilities (B,). logits: (B, V); uniforms: (B,) fp64."""

class DecoderModel:
    """A Llama-shaped model whose weights are packed; it keeps them alive."""

    def __init__(
        self,
        heads: int,
        key_heads: int,
        columns: int,
        inner: int,
        epsilon: float,
        scale: float,
        layers: list[tuple[Tensor | None, ...]],
        norm: Tensor,
        head: Tensor,
        vocabulary: int,
    ) -> None:
        """Check and keep the weights.

        A layer: input_norm, qkv, qkv_bias, q_norm, k_norm, out, out_bias, post_norm, gate, up, down.
        """

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
        logits: Tensor,
        threads: int,
    ) -> None:
        """Append a token to each sequence and write the logits (B, V).

        x (B, H) is overwritten. cos, sin: (B, D). slots, lengths: (B,) int32. keys: (layers * places * key heads, D,
        capacity). values: (the same, capacity, D).
        """

def isa() -> str:
    """Return the name of the instruction set in use."""

def _isas() -> list[str]:
    """Return the instruction sets that this machine has, the best one first."""

def _set_isa(name: str) -> None:
    """Use another instruction set of this machine, for tests."""

def _exp2(t: Tensor, out: Tensor) -> None:
    """Write the kernels' 2^t of t (n,), which is 0 below -127."""

def _soft_cap(z: Tensor, value: Tensor, slope: Tensor, cap: float) -> None:
    """Write the kernels' cap tanh(z / cap) of z (n,) and its derivative."""
