"""Flat rows for the Triton kernels, and their fp64 oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repo_kernels.backends import interface
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.eager import terms
from repo_kernels.backends.interface import SCALARS, TOKENS, VALUES, Code, LossRows, gradient_buffer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
PIECES = 64  # of 16 bytes in a block, in most tests
BLOCK = {dtype: PIECES * 16 // dtype.itemsize for dtype in DTYPES}
PLAIN = Code(interface.COST_NONE, interface.KL_NONE, kl_importance_weighted=False, normalize=False, on_policy=False)
KL = ("none", "k1", "k2", "k3", "full")


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)
    return error.item()


def placed(values: Tensor, stride: int | None = None, offset: int = 0) -> Tensor:
    """(n, V) values at a row stride and a base of the caller's choice; what lies between the rows is NaN."""
    count, columns = values.shape
    stride = columns if stride is None else stride
    storage = torch.full((offset + count * stride + 16,), torch.nan, dtype=values.dtype)
    view = storage.as_strided((count, columns), (stride, 1), offset)
    return view.copy_(values)


def random_logits(count: int, columns: int, dtype: torch.dtype, seed: int = 0, spread: float = 2.0) -> Tensor:
    return (torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def make_rows(logits: Tensor, code: Code = PLAIN, softcap: float = 0.0, entropy: int = 0, **scalars: float) -> LossRows:
    """A loss over the rows of (n, V) logits; old and reference log-probabilities are near the current ones."""
    count, columns = logits.shape
    generator = torch.Generator().manual_seed(columns)
    ids = torch.randint(columns, (count,), generator=generator)
    noise = torch.randn(len(VALUES), count, generator=generator)
    coefficients = {"lam": 0.7, "beta": 0.3, "eps_low": 0.2, "eps_high": 0.25, "entropy_coef": 0.2 * (entropy > 1)}
    coefficients |= {"temperature": 1.0, "grad_scale": 1.0, "dual_clip": torch.inf} | scalars
    vector = torch.tensor([coefficients[name] for name in SCALARS])
    logps = statistics_of(logits.double(), None, ids, vector.double(), softcap)[0].float()
    values = dict(zip(VALUES, noise, strict=True))
    values["old_logps"] = torch.where(logps.isfinite(), logps, -3.0) + 0.3 * noise[VALUES.index("old_logps")]
    values["ref_logps"] = torch.where(logps.isfinite(), logps, -3.0) + 0.5 * noise[VALUES.index("ref_logps")]
    for name in ("importance_weights", "weights"):
        values[name] = values[name].abs() + 0.1
    return LossRows(ids, torch.stack([values[name] for name in VALUES]), vector, code.pack(), softcap, entropy)


def statistics_of(
    logits: Tensor, ref: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, full KL), each (n,), of (n, V) logits in their own dtype."""

    def log_probs(z: Tensor) -> Tensor:
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return torch.log_softmax(z / scalars[SCALARS.index("temperature")], -1)

    def mean(weights: Tensor, values: Tensor) -> Tensor:
        return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)

    log_p = log_probs(logits)
    p = log_p.exp()
    kl = torch.zeros_like(log_p[:, 0]) if ref is None else mean(p, log_p - log_probs(ref))
    return log_p.gather(1, ids[:, None]).squeeze(1), -mean(p, log_p), kl


@dataclass(frozen=True)
class Expected:
    """What a loss gives, in fp64: losses (n,), tokens (13, n), gradient (n, V), slopes (3, n)."""

    losses: Tensor
    tokens: Tensor
    grad: Tensor
    slopes: Tensor


def oracle(logits: Tensor, ref: Tensor | None, rows: LossRows) -> Expected:
    """Live rows through fp64 autograd of the statistics, with the scalars of terms.py; dead rows are 0."""
    live = rows.ids != interface.IGNORED
    count, columns = logits.shape
    losses, tokens = torch.zeros(count).double(), torch.zeros(len(TOKENS), count).double()
    grad, slopes = torch.zeros(count, columns).double(), torch.zeros(3, count).double()
    if not live.any():
        return Expected(losses, tokens, grad, slopes)
    z = logits[live].double().requires_grad_()
    scalars, code = rows.scalars.double(), Code.unpack(rows.code)
    ref64 = None if ref is None else ref[live].double()
    logps, entropy, kl = statistics_of(z, ref64, rows.ids[live], scalars, rows.softcap)
    inputs = terms.token_inputs(rows.values[:, live].double(), scalars, code)
    chosen = entropy.detach() if rows.entropy else None
    found = terms.token_terms(
        inputs, logps.detach(), chosen, None if ref is None else kl.detach(), terms.coefficients(scalars),
        KL[code.kl], code.kl_importance_weighted,
    )  # fmt: skip
    scale = scalars[SCALARS.index("grad_scale")]
    slopes_live = torch.stack([found.g_logp, found.g_entropy, found.g_kl]) * scale
    finite = torch.where(logps.isfinite(), logps, 0.0)
    (slopes_live[0] * finite + slopes_live[1] * entropy + slopes_live[2] * kl).sum().backward()
    assert z.grad is not None
    lost = ~logps.isfinite()
    if lost.any():  # log_softmax at -inf has no derivative: g_logp (1[v = y] - p_v)
        p = torch.softmax(z.detach()[lost] / scalars[SCALARS.index("temperature")], -1)
        target = torch.nn.functional.one_hot(rows.ids[live][lost], columns)
        z.grad[lost] = slopes_live[0][lost][:, None] * (target - p) / scalars[SCALARS.index("temperature")]
    losses[live], grad[live], slopes[:, live] = found.loss, z.grad, slopes_live
    tokens[:, live] = terms.token_rows(found, inputs.unsafe, logps.detach(), chosen)
    return Expected(losses, tokens, grad, slopes)


def check(losses: Tensor, tokens: Tensor, grad: Tensor | None, expected: Expected, dtype: torch.dtype) -> None:
    """Assert losses, values by token and gradient within tolerance of the oracle."""
    torch.testing.assert_close(losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.double(), expected.tokens, rtol=1e-5, atol=1e-5)
    for name in ("logp", "entropy"):
        row = TOKENS.index(name)
        finite = expected.tokens[row].isfinite()
        assert relative(tokens[row][finite], expected.tokens[row][finite]) <= 1e-6, name
    if grad is not None:
        least = 2.0**-14 if dtype == torch.float16 else 0.0
        large = expected.grad.abs() >= least
        assert relative(grad[large], expected.grad[large]) <= GRADIENT_TOLERANCE[dtype]
        assert grad.isfinite().all()


def run_and_check(logits: Tensor, rows: LossRows, ref: Tensor | None = None) -> Tensor:
    """fused, out of place, against the oracle."""
    grad = gradient_buffer(logits)
    losses, tokens = gpu.fused(logits, ref, rows, grad)
    check(losses, tokens, grad, oracle(logits, ref, rows), logits.dtype)
    return grad


def kill(rows: LossRows, dead: list[int]) -> LossRows:
    """Rows whose id is -100 and whose values are not numbers."""
    ids, values = rows.ids.clone(), rows.values.clone()
    ids[dead] = interface.IGNORED
    values[:, dead] = torch.nan
    values[0, dead[0]] = torch.inf
    return replace(rows, ids=ids, values=values)
