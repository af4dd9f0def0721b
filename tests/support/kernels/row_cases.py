"""Random rows with a loss over them, and what float64 says of it: for the functions of the backends over rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repo_kernels.backends.codes import (
    ABSENT_SCALARS,
    AGGREGATIONS,
    CLIPPED_HIGH,
    CLIPPED_LOW,
    COST_GIVEN,
    ENTROPY_NONE,
    IGNORED,
    KL_FULL,
    KL_K3,
    KL_NAMES,
    LIVE,
    ROWS,
    SCALARS,
    SEQ_TOKEN_MEAN,
    UNSAFE,
    Code,
)
from repo_kernels.backends.eager.dense import VALUES
from repo_kernels.backends.eager.terms import coefficients, token_flags, token_inputs, token_rows, token_terms
from repo_kernels.backends.interface import Backend, Loss, RowArguments, RowResults
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.oracle import row_weights, sequences_of

# What rows and flags say of a token; all but `logp` are summed for the statistics.
TOKENS = (
    "logp",
    "entropy",
    "kl",
    "tokens",
    "tokens_unsafe",
    "clipped_low_safe",
    "clipped_low_unsafe",
    "clipped_high_safe",
    "clipped_high_unsafe",
    "ratio",
    "ratio_square",
    "kl_old_k1",
    "kl_old_k3",
)


def token_values(results: RowResults) -> Tensor:
    """(13, N) by TOKENS, in the dtype of the rows; 0 on dead rows."""
    row, flags = dict(zip(ROWS, results.rows, strict=True)), results.flags
    unsafe, low, high = ((flags & bit) != 0 for bit in (UNSAFE, CLIPPED_LOW, CLIPPED_HIGH))
    ratio = row["log_ratio"].exp()
    bits = (low & ~unsafe, low & unsafe, high & ~unsafe, high & unsafe)
    values = torch.stack(
        (
            row["logp"],
            row["entropy"],
            row["kl"],
            *(bit.to(ratio.dtype) for bit in ((flags & LIVE) != 0, unsafe, *bits)),
            ratio,
            ratio * ratio,
            -row["log_ratio"],
            torch.expm1(row["log_ratio"]) - row["log_ratio"],
        )
    )
    return torch.where(flags != 0, values, 0.0)


def make_code(
    cost: int = COST_GIVEN,
    kl: int = KL_K3,
    kl_importance_weighted: bool = True,
    normalize: bool = False,
    on_policy: bool = False,
    aggregation: int = SEQ_TOKEN_MEAN,
    divisor: bool = True,
) -> Code:
    """Options whose weights differ from row to row: 1 / (live tokens of the sequence * divisor)."""
    return Code(cost, kl, kl_importance_weighted, normalize, on_policy, aggregation, divisor)


@dataclass(frozen=True, eq=False)
class Case:
    """Logits (T, V) or (B, L, V), a reference of the same shape, and a loss over their rows."""

    logits: Tensor
    ref_logits: Tensor
    loss: Loss

    @property
    def arguments(self) -> RowArguments:
        """The tensors of the loss."""
        return self.loss.arguments

    @property
    def ids(self) -> Tensor:
        """(N,)."""
        return self.arguments.token_ids.reshape(-1)

    @property
    def live(self) -> Tensor:
        """(N,) bool."""
        return self.ids != IGNORED

    @property
    def reference(self) -> Tensor | None:
        """The reference where the loss is of the full KL."""
        return self.ref_logits if Code.unpack(self.loss.code).kl == KL_FULL else None

    @property
    def scalars(self) -> dict[str, Tensor]:
        """0-d fp32 tensors by name."""
        return dict(zip(SCALARS, torch.tensor(self.loss.scalars, dtype=torch.float32), strict=True))

    @property
    def temperature(self) -> Tensor:
        """0-d, or (N,) where rows have their own, for `statistics` and `apply`."""
        by_row = self.arguments.temperatures
        return self.scalars["temperature"] if by_row is None else by_row.reshape(-1)

    def replace(self, **fields: Tensor | float) -> Case:
        """The case with other arguments or scalars, by name; token_ids may be (N,)."""
        numbers = dict(zip(SCALARS, self.loss.scalars, strict=True))
        numbers |= {name: fields.pop(name) for name in list(fields) if name in numbers}
        if "token_ids" in fields:
            fields["token_ids"] = fields["token_ids"].reshape(self.arguments.leading)
        arguments = replace(self.arguments, **fields)
        return replace(self, loss=replace(self.loss, arguments=arguments, scalars=tuple(numbers.values())))

    def of_rows(self, first: int, last: int) -> Case:
        """The packed case of some rows alone, each a sequence of its own with the weight 1 / divisor."""
        rows = slice(first, last)
        tensors = {
            name: value[rows].contiguous()
            for name in RowArguments.__dataclass_fields__
            if (value := getattr(self.arguments, name)) is not None and name != "cu_seqlens"
        }
        arguments = replace(self.arguments, cu_seqlens=None, **tensors)
        return Case(self.logits[rows], self.ref_logits[rows], replace(self.loss, arguments=arguments))

    def run(self, backend: Backend, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """losses (N,), values by token (13, N) and gradient (N, V) of the backend's fused loss."""
        logits = self.logits
        if inplace:
            logits = gradient_buffer(self.logits).copy_(self.logits)
        grad = logits if inplace else gradient_buffer(logits).fill_(math.nan)
        results = self.into(backend, logits, grad)
        return results.rows[0], token_values(results), flat(grad)

    def into(self, backend: Backend, logits: Tensor, grad: Tensor | None) -> RowResults:
        """The results of the backend's fused loss of these logits; the gradient goes to `grad`."""
        results = unwritten(logits, self.ids.numel())
        backend.fused(logits, self.reference, self.loss, backend.prepare(logits, self.loss), results, grad)
        return results


def unwritten(logits: Tensor, count: int) -> RowResults:
    """Results in which nothing has been written: NaN, and every bit of the flags."""
    results = RowResults.allocate(logits, count)
    results.rows.fill_(math.nan)
    results.flags.fill_(-1)
    return results


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
    ref_logits: Tensor | None = None,
    **scalars: float,
) -> Case:
    """Random rows with ratios of about exp(N(0, 0.3)); every option's values are there, NaN where a row is dead.

    Packed rows are in sequences of one to four.
    """
    g = torch.Generator().manual_seed(seed)
    if logits is None:
        logits = (torch.randn(*leading, vocabulary, generator=g) * scale).to(dtype)
    leading, vocabulary, count = logits.shape[:-1], logits.shape[-1], logits.shape[:-1].numel()
    if ref_logits is None:
        ref_logits = (logits.float() + 0.5 * torch.randn(logits.shape, generator=g)).to(logits.dtype)
    ids = torch.randint(0, vocabulary, (count,), generator=g)
    gone = torch.rand(count, generator=g) < dead
    numbers = ABSENT_SCALARS | {"eps_low": 0.2, "eps_high": 0.3, "divisor": 0.7, "max_length": 11.0} | scalars
    draw = {name: torch.randn(count, generator=g) for name in VALUES}
    logps, _, _ = exact_statistics(flat(logits).double(), None, ids, numbers["temperature"], softcap)
    near = torch.where(logps.isfinite(), logps, -3.0).float()
    draw["old_logps"] = near + 0.3 * draw["old_logps"]
    draw["ref_logps"] = near + 0.5 * draw["ref_logps"]
    draw["importance_weights"] = 0.5 + torch.rand(count, generator=g)
    arguments = RowArguments(
        token_ids=ids.masked_fill(gone, IGNORED).view(leading),
        response_mask=None,
        cu_seqlens=random_bounds(count, g) if len(leading) == 1 else None,
        temperatures=None,
        **{name: value.masked_fill(gone, math.nan).view(leading) for name, value in draw.items()},
    )
    code = make_code() if code is None else code
    return Case(logits, ref_logits, Loss(arguments, tuple(numbers.values()), code.pack(), softcap, entropy))


def random_bounds(count: int, generator: torch.Generator) -> Tensor:
    """(S + 1,) int32, bounds of sequences of one to four of `count` rows."""
    steps = torch.randint(1, 5, (count + 1,), generator=generator).cumsum(0)
    return torch.tensor([0, *steps[steps < count].tolist(), count], dtype=torch.int32)[: None if count else 1]


def exact_statistics(
    logits: Tensor, ref: Tensor | None, ids: Tensor, temperature: float | Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, full KL), each (n,), of (n, V) logits in their own dtype."""

    def log_probs(z: Tensor) -> Tensor:
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return torch.log_softmax(z / temperature, -1)

    def mean(weights: Tensor, values: Tensor) -> Tensor:
        return (weights * values.masked_fill(weights == 0, 0.0)).sum(-1)

    log_p = log_probs(logits)
    p = log_p.exp()
    kl = torch.zeros_like(log_p[:, 0]) if ref is None else mean(p, log_p - log_probs(ref))
    return log_p.gather(1, ids[:, None]).squeeze(1), -mean(p, log_p), kl


@dataclass(frozen=True)
class Expected:
    """Float64: losses (N,), values by token (13, N), gradient (N, V), slopes (3, N); 0 on dead rows."""

    losses: Tensor
    tokens: Tensor
    grad: Tensor
    slopes: Tensor


def exact_weights(case: Case) -> Tensor:
    """Float64 aggregation weights (N,), 0 on dead rows."""
    code, weights = Code.unpack(case.loss.code), torch.zeros(case.ids.numel(), dtype=torch.float64)
    sequences = sequences_of(case.arguments.leading, case.arguments.cu_seqlens)
    scalars = case.scalars
    divisor = scalars["divisor"].item() if code.divisor else None
    rows = set(case.live.nonzero().squeeze(1).tolist())
    by_row = row_weights(AGGREGATIONS[code.aggregation], sequences, rows, divisor, scalars["max_length"].item())
    for row, weight in by_row.items():
        weights[row] = weight
    return weights


def oracle(case: Case) -> Expected:
    """log_softmax in float64, terms.py for the loss, autograd for the gradient of its slopes."""
    live, loss, code = case.live, case.loss, Code.unpack(case.loss.code)
    coef = coefficients(torch.stack(list(case.scalars.values())).double())
    z = flat(case.logits)[live].double().requires_grad_()
    reference = None if case.reference is None else flat(case.reference)[live].double()
    temperature = case.temperature.expand(live.numel())[live, None].double()
    logps, entropy, kl = exact_statistics(z, reference, case.ids[live], temperature, loss.softcap)
    values = {name: getattr(case.arguments, name).reshape(-1)[live].double() for name in VALUES}
    inputs = token_inputs({**values, "weights": exact_weights(case)[live]}, coef, code)
    chosen = entropy.detach() if loss.entropy != ENTROPY_NONE else None
    terms = token_terms(
        inputs, logps.detach(), chosen, None if reference is None else kl.detach(), coef, KL_NAMES[code.kl],
        code.kl_importance_weighted,
    )  # fmt: skip
    slopes = torch.stack((terms.g_logp, terms.g_entropy, terms.g_kl)) * coef.grad_scale
    finite = torch.where(logps.isfinite(), logps, 0.0)
    (grad,) = torch.autograd.grad((slopes[0] * finite + slopes[1] * entropy + slopes[2] * kl).sum(), z)
    lost = ~logps.isfinite()
    if lost.any():  # log_softmax at -inf has no derivative: g_logp (1[v = y] - p_v)
        p = torch.softmax(z.detach()[lost] / temperature[lost], -1)
        target = torch.nn.functional.one_hot(case.ids[live][lost], z.shape[1])
        grad[lost] = slopes[0][lost][:, None] * (target - p) / temperature[lost]
    results = RowResults(token_rows(terms, logps.detach(), chosen), token_flags(terms, inputs.unsafe))

    def spread(value: Tensor) -> Tensor:
        """(..., n) of live rows -> (..., N)."""
        out = torch.zeros(*value.shape[:-1], live.numel(), dtype=torch.float64)
        out[..., live] = value.detach()
        return out

    return Expected(spread(terms.loss), spread(token_values(results)), spread(grad.T).T, spread(slopes))
