"""Random rows with a loss over them, and what float64 says of it: for the backends' functions over flat rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from repo_kernels.backends.eager.terms import coefficients, token_inputs, token_rows, token_terms
from repo_kernels.backends.interface import (
    COST_GIVEN,
    ENTROPY_NONE,
    KL_FULL,
    KL_K3,
    KL_NAMES,
    SCALARS,
    VALUES,
    Code,
    LossRows,
    gradient_buffer,
)


@dataclass(frozen=True)
class Case:
    """Logits (T, V) or (B, L, V), a reference of the same shape, and a loss over their rows."""

    logits: Tensor
    ref_logits: Tensor
    rows: LossRows

    @property
    def live(self) -> Tensor:
        """(N,) bool."""
        return self.rows.ids != -100

    @property
    def reference(self) -> Tensor | None:
        """The reference where the loss is of the full KL."""
        return self.ref_logits if Code.unpack(self.rows.code).kl == KL_FULL else None

    def exact_logps(self) -> Tensor:
        """(N, V) log-probabilities of the logits in float64."""
        z = flat(self.logits).double()
        if self.rows.softcap:
            z = self.rows.softcap * torch.tanh(z / self.rows.softcap)
        return torch.log_softmax(z / self.rows.scalars[SCALARS.index("temperature")].double(), -1)

    def loss(self, backend: ModuleType, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """losses (N,), tokens (13, N), gradient (N, V) of the backend's fused loss."""
        logits = self.logits
        if inplace:
            logits = gradient_buffer(self.logits).copy_(self.logits)
        grad = logits if inplace else gradient_buffer(logits).fill_(math.nan)
        losses, tokens = backend.fused(logits, self.ref_logits, self.rows, grad)
        return losses, tokens, flat(grad)


def flat(matrix: Tensor) -> Tensor:
    """(T, V) or (B, L, V) -> (N, V)."""
    return matrix.reshape(-1, matrix.shape[-1])


def relative(got: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    got, exact = got.double(), exact.double()
    return ((got - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def make_case(
    seed: int,
    leading: tuple[int, ...] = (12,),
    vocabulary: int = 1000,
    dtype: torch.dtype = torch.float32,
    code: Code | None = None,
    softcap: float = 0.0,
    entropy: int = ENTROPY_NONE,
    dead: float = 0.25,
    scale: float = 2.0,
    logits: Tensor | None = None,
    **scalars: float,
) -> Case:
    """Random rows with ratios of about exp(N(0, 0.3)); every option's values are there, NaN where a row is dead."""
    g = torch.Generator().manual_seed(seed)
    if logits is None:
        logits = (torch.randn(*leading, vocabulary, generator=g) * scale).to(dtype)
    count, vocabulary = logits[..., 0].numel(), logits.shape[-1]
    ref_logits = (logits.float() + 0.5 * torch.randn(logits.shape, generator=g)).to(logits.dtype)
    ids = torch.randint(0, vocabulary, (count,), generator=g)
    gone = torch.rand(count, generator=g) < dead
    ids[gone] = -100
    named = {
        **dict.fromkeys(SCALARS, 0.0),
        "temperature": 1.0,
        "eps_low": 0.2,
        "eps_high": 0.3,
        "grad_scale": 1.0,
        "dual_clip": math.inf,
    }
    vector = torch.tensor([{**named, **scalars}[name] for name in SCALARS])
    rows = LossRows(ids, torch.zeros(len(VALUES), count), vector, 0, softcap, entropy)
    case = Case(logits, ref_logits, rows)
    logps = case.exact_logps().gather(1, ids.clamp_min(0)[:, None])[:, 0].float()
    values = torch.randn(len(VALUES), count, generator=g)
    values[VALUES.index("old_logps")] = logps + 0.3 * torch.randn(count, generator=g)
    values[VALUES.index("ref_logps")] = logps + 0.5 * torch.randn(count, generator=g)
    values[VALUES.index("importance_weights")] = 0.5 + torch.rand(count, generator=g)
    values[VALUES.index("weights")] = 0.5 + torch.rand(count, generator=g)
    values[:, gone] = math.nan
    code = code or Code(COST_GIVEN, KL_K3, True, False, False)
    return Case(logits, ref_logits, replace(rows, values=values, code=code.pack()))


@dataclass(frozen=True)
class Expected:
    """Float64: losses (N,), tokens (13, N), gradient (N, V)."""

    losses: Tensor
    tokens: Tensor
    grad: Tensor


def oracle(case: Case) -> Expected:
    """log_softmax in float64, terms.py for the loss, autograd for the gradient of its slopes."""
    live, rows, code = case.live, case.rows, Code.unpack(case.rows.code)
    scalars, values = rows.scalars.double(), rows.values[:, case.live].double()
    coef = coefficients(scalars)
    z = flat(case.logits)[live].double().requires_grad_()
    q = flat(case.ref_logits)[live].double()

    def log_probs(x: Tensor) -> Tensor:
        if rows.softcap:
            x = rows.softcap * torch.tanh(x / rows.softcap)
        return torch.log_softmax(x / coef.temperature, -1)

    logp = log_probs(z)
    impossible = logp.detach().exp() == 0
    entropy = kl = None
    if rows.entropy != ENTROPY_NONE:
        entropy = -(logp.exp() * logp.masked_fill(impossible, 0.0)).sum(-1)
    if code.kl == KL_FULL:
        kl = (logp.exp() * (logp - log_probs(q)).masked_fill(impossible, 0.0)).sum(-1)
    logps = logp.gather(1, rows.ids[live, None])[:, 0]
    inputs = token_inputs(values, scalars, code)
    detached = [None if t is None else t.detach() for t in (logps, entropy, kl)]
    terms = token_terms(
        inputs, detached[0], detached[1], detached[2], coef, KL_NAMES[code.kl], code.kl_importance_weighted
    )
    total = (terms.g_logp * logps.clamp_min(-1e30)).sum()
    for slope, value in ((terms.g_entropy, entropy), (terms.g_kl, kl)):
        if value is not None:
            total = total + (slope * value).sum()
    (grad,) = torch.autograd.grad(total * coef.grad_scale, z)
    columns = token_rows(terms, inputs.unsafe, detached[0], detached[1])

    def spread(value: Tensor) -> Tensor:
        out = torch.zeros(live.numel(), *value.shape[1:], dtype=torch.float64)
        out[live] = value
        return out

    return Expected(spread(terms.loss), spread(columns.T.contiguous()).T, spread(grad))
