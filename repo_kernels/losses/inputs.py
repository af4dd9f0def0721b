"""The arguments of a loss: each keyword stands once, as a field of one of these dataclasses.

`LossOptions` are constant in a run, the classes here are made at every call. A function takes both, so its call is a
subclass of both; a module has its options already and takes the inputs alone::

    LossOptions --------------------------------+--> RepoLossCall        repo_loss(logits, ...)
    Logits ---------+                           |
    LossInputs -----+--> RepoLossInputs --------+                        RepoLoss(options)(logits, ...)
                    +--> LinearRepoLossInputs --+--> LinearRepoLossCall  linear_repo_loss(hidden, weight, ...)
    HiddenStates ---+                                                    LinearRepoLoss(options)(hidden, weight, ...)

The temperature is an option that a call may know better: functions take one value per row in its place
(`CallOptions`), modules take the argument `ModuleTemperature` besides their options.

`LossOptions` are `TokenOptions`, which also serve `repo_loss_from_logps`, and what concerns the vocabulary;
`LossInputs` are its `TokenValues` and the token ids.

Their `__init__` gives functions and modules their signature, at run time and to type checkers, and their docstrings the
list of arguments (keywords.py).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from ..checks import Scalar, check_scalar, number
from .heads.lora import LoraHead
from .options import LossOptions, TokenOptions
from .temperature import is_by_row


@dataclass(frozen=True, eq=False, repr=False)
class Logits:
    """The logits of `repo_loss`.

    Args:
        logits: (T, V) of packed tokens or (B, L, V); fp32, bf16, fp16 or fp64; any row strides, unit column stride. Row
            t scores token_ids[t]: nothing is shifted.
        ref_logits: the reference policy's logits for kl_estimator="full"; shape, dtype and device of the logits.
    """

    logits: Tensor
    _: KW_ONLY
    ref_logits: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class HiddenStates:
    """The hidden states and the head of `linear_repo_loss`: logits = hidden @ weight^T + bias.

    Args:
        hidden: (T, H) of packed tokens or (B, L, H); fp32, bf16, fp16 or fp64; unit column stride. Row t scores
            token_ids[t].
        weight: (V, H), dtype of hidden, or fp32 for bf16 and fp16 hidden states, or a `LoraHead`, which is a frozen
            weight with a low-rank adapter.
        bias: (V,), same choice of dtypes, or None.
        ref_hidden, ref_weight, ref_bias: the same of the reference policy for kl_estimator="full"; leading shape of
            hidden and the same V; H and dtype may differ.
    """

    hidden: Tensor
    weight: Tensor | LoraHead
    _: KW_ONLY
    bias: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class TokenValues:
    """The arguments of one call that every loss takes, on the device of the logits, hidden states or log-probabilities.

    "Leading shape" is (T,) or (B, L). A scalar is a float or a 0-d tensor, whose value is not checked. A token is live
    if `response_mask` is True there and its id, where there are ids, is not -100. Values of other tokens are never
    read; their loss and gradient are 0.

    Args:
        old_logps: leading shape, fp32 or fp64: log-probabilities in nats under the policy that sampled, at the
            temperature of log pi. None: that policy is the current one, rho is 1 and has the gradient of log pi.
        reward_advantages: A_R; leading shape, or (B,) or (B, 1) with one value per sequence; fp32 or fp64. With
            cu_seqlens of as many sequences as rows (B,) is the leading shape; (B, 1) never is.
        cost_advantages: A_C; like reward_advantages, or None.
        costs: C of each sequence, (B,), (B, 1) or leading shape, fp32 or fp64; a sequence is unsafe if C > d. They
            always enter the statistics.
        cost_baselines: like costs; subtracted from the hinge {C - d}^+ with cost_mode="rectified" and without
            cost_advantages.
        lam: the multiplier lambda of the cost, >= 0.
        cost_limit: d, in units of the costs: a finite scalar, (B,), (B, 1) or leading shape.
        ref_logps: leading shape, fp32 or fp64: log-probabilities in nats under the reference policy, at the temperature
            of log pi, for k1, k2, k3.
        beta: weight of the KL to the reference, >= 0.
        response_mask: leading shape, bool, or 0 and 1 in any integer or floating dtype: which tokens count. None: all.
            Other values are an error on the CPU; on a GPU, which would have to be waited for, they count as 1.
        cu_seqlens: (B + 1,) int32: the bounds of packed sequences, which rise within 0 and T. Tokens before the first
            bound or from the last one on do not count. Without it each packed token is a sequence of its own.
        importance_weights: leading shape, fp32 or fp64: they multiply the surrogate and nothing else (truncated
            importance sampling, say). Not differentiated.
        divisor: a scalar > 0 that replaces the outer count of loss_agg_mode: live tokens for "token-mean", sequences
            for the "seq-mean" modes. Pass the count of the whole batch when it is split into micro-batches.
    """

    old_logps: Tensor | None
    reward_advantages: Tensor
    cost_advantages: Tensor | None = None
    _: KW_ONLY
    costs: Tensor | None = None
    cost_baselines: Tensor | None = None
    lam: Scalar = 0.0
    cost_limit: Scalar = 0.0
    ref_logps: Tensor | None = None
    beta: Scalar = 0.0
    response_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    importance_weights: Tensor | None = None
    divisor: Scalar | None = None


@dataclass(frozen=True, eq=False, repr=False)
class TokenIds:
    """The tokens that rows score.

    Args:
        token_ids: leading shape, int64 or int32; live ids are in [0, V).
    """

    token_ids: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LossInputs(TokenValues, TokenIds):
    """The arguments of one call that both losses over the vocabulary take.

    Args:
        grad_scale: a scalar > 0 that multiplies the gradient before it is rounded to the dtype of the logits, against
            underflow; the caller divides it out. `linear_repo_loss` divides it out itself.
        kept: leading shape + (K,), int64 or int32: the ids that the rollout's top-k or top-p left to sample from, each
            once, and -1 in the rest. The policy, its entropy and its full KL are then those of the softmax over these
            ids. A set holds its row's token; on a GPU, which would have to be waited for, a row without it is NaN.
            Takes no group and no inplace. None: the whole vocabulary.
    """

    _: KW_ONLY
    grad_scale: Scalar = 1.0
    kept: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Logps:
    """The log-probabilities of `repo_loss_from_logps`.

    Args:
        logps: (T,) of packed tokens or (B, L), fp32 or fp64: log-probabilities in nats of the sampled tokens under the
            current policy, with their graph.
    """

    logps: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class LogpsLossInputs(TokenValues, Logps):
    """The inputs of one call of `repo_loss_from_logps`."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LogpsLossCall(TokenOptions, LogpsLossInputs):
    """One call of `repo_loss_from_logps`: its options and its inputs."""


@dataclass(frozen=True, eq=False, repr=False)
class RepoLossInputs(LossInputs, Logits):
    """The inputs of one call of `repo_loss`."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearRepoLossInputs(LossInputs, HiddenStates):
    """The inputs of one call of `linear_repo_loss`."""


@dataclass(frozen=True, eq=False, repr=False)
class ModuleTemperature:
    """The temperature that a call of a module gives in place of its options'.

    Args:
        temperature: of this call, in place of that of the options: a scalar > 0, or one value per row or sequence, see
            `LossOptions`. None: that of the options.
    """

    _: KW_ONLY
    temperature: Scalar | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not is_by_row(self.temperature):
            object.__setattr__(self, "temperature", number(self.temperature))
            check_scalar("temperature", self.temperature, lambda x: x > 0, "> 0")

    def temperature_or(self, options: LossOptions) -> Scalar:
        """Return the temperature of this call; without one, that of the options."""
        return options.temperature if self.temperature is None else self.temperature


@dataclass(frozen=True, eq=False, repr=False)
class RepoLossModuleCall(ModuleTemperature, RepoLossInputs):
    """One call of `RepoLoss`."""


@dataclass(frozen=True, eq=False, repr=False)
class LinearRepoLossModuleCall(ModuleTemperature, LinearRepoLossInputs):
    """One call of `LinearRepoLoss`."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CallOptions(LossOptions):
    """The options of one call of a function, which knows its rows: the temperature may have a value for each."""

    def _check_temperature(self) -> None:
        if not is_by_row(self.temperature):  # else checked with the rows
            super()._check_temperature()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RepoLossCall(CallOptions, RepoLossInputs):
    """One call of `repo_loss`: its options, its inputs and how it runs.

    Args:
        inplace: write the gradient over the logits: one buffer instead of two, one backward; not under torch.compile.
        backend: "triton", "cpu", "eager", or None to choose by device and dtype: Triton on a GPU, C++ on the CPU,
            PyTorch for fp64.
        group: the processes among which the vocabulary is divided: logits are (T, V / P) or (B, L, V / P), the columns
            of this process in the order of ranks; token_ids are those of the whole vocabulary. Loss and statistics are
            the same in every process. Takes no full KL, kept, inplace or torch.func. None: logits are whole.
    """

    inplace: bool = False
    backend: str | None = None
    group: ProcessGroup | None = None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LinearRepoLossCall(CallOptions, LinearRepoLossInputs):
    """One call of `linear_repo_loss`: its options, its inputs and how it runs.

    Args:
        chunk_tokens: live tokens per chunk, >= 1. None: by chunk_bytes.
        chunk_bytes: bytes that the logits of a chunk may take, with those of the reference and their gradient; chunks
            are equally long. None: 64 MB on the CPU; on a GPU 1 GB or twice the gradient of the weight in fp32,
            whichever is more, and at least 1024 tokens; with a divided vocabulary the processes share these bytes.
        backend: "triton", "cpu", "eager", or None to choose by device and dtype: Triton on a GPU, C++ on the CPU,
            PyTorch for fp64.
        group: the processes among which the vocabulary is divided: weight is (V / P, H) and bias (V / P,), the rows of
            this process in the order of ranks, as are base and lora_B of a `LoraHead`, whose lora_A is whole; token_ids
            are those of the whole vocabulary. Takes no full KL, kept or torch.func. None: weight is whole, or a DTensor
            sharded on dim 0, which may be cut unevenly.
    """

    chunk_tokens: int | None = None
    chunk_bytes: int | None = None
    backend: str | None = None
    group: ProcessGroup | None = None
