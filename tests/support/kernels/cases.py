"""Random inputs of the losses, small and away from kinks, and the hypothesis strategy over every option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from repo_kernels.backends.interface import ARGUMENTS, RowArguments

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "none",
)
ESTIMATORS = ("k1", "k2", "k3", "full")


@dataclass
class Batch:
    """Everything a loss may read. leading: (T,) or (B, L); sequences: the number of sequences; cu_seqlens: packed only.

    Costs, limits, baselines and advantages are fp32 values; `dead` rows carry NaN and infinities in what a
    loss must not read.
    """

    leading: tuple[int, ...]
    sequences: int
    cu_seqlens: Tensor | None
    logits: Tensor
    ref_logits: Tensor
    token_ids: Tensor
    response_mask: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    importance_weights: Tensor
    sequence_of: Tensor
    generator: torch.Generator

    @property
    def dead(self) -> Tensor:
        """Leading shape, bool: rows that no result may depend on."""
        return ~self.response_mask | (self.token_ids == -100)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """fp32 standard normal times scale."""
        return torch.randn(*shape, generator=self.generator) * scale

    def advantages(self, per_sequence: bool) -> Tensor:
        """(S,) or leading shape; NaN on dead rows of the latter."""
        if per_sequence:
            return self.normal(self.sequences)
        return torch.where(self.dead, torch.nan, self.normal(*self.leading))

    def sequence_values(self, per_sequence: bool, scale: float = 1.0) -> Tensor:
        """One value per sequence, as (S,) or repeated over its rows."""
        values = self.normal(self.sequences, scale=scale)
        return values if per_sequence else values[self.sequence_of].reshape(self.leading)

    def temperatures(self, per_sequence: bool) -> Tensor:
        """(S,) or leading shape, fp32, about 1; on dead rows of the latter what divides nothing: NaN, 0, -1 and inf."""
        count = self.sequences if per_sequence else self.dead.numel()
        values = 0.5 + torch.rand(count, generator=self.generator)
        if per_sequence:
            return values
        bad = torch.tensor([torch.nan, 0.0, -1.0, torch.inf]).repeat(count // 4 + 1)[:count]
        return torch.where(self.dead.reshape(-1), bad, values).reshape(self.leading)


def make_batch(
    seed: int,
    leading: tuple[int, ...] = (2, 5),
    vocabulary: int = 7,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    dead: float = 0.25,
    scale: float = 2.0,
    spread: float = 0.3,
) -> Batch:
    """A batch whose ratios are about exp(N(0, spread)). lengths: packed rows, sum(lengths) = T."""
    g = torch.Generator().manual_seed(seed)
    cu_seqlens = None
    if lengths is not None:
        leading = (sum(lengths),)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        sequence_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    elif len(leading) == 2:
        sequence_of = torch.arange(leading[0]).repeat_interleave(leading[1])
    else:
        sequence_of = torch.arange(leading[0])
    sequences = len(lengths) if lengths is not None else leading[0]
    logits = (torch.randn(*leading, vocabulary, generator=g) * scale).to(dtype)
    ref_logits = (torch.randn(*leading, vocabulary, generator=g) * scale).to(dtype)
    ids = torch.randint(0, vocabulary, leading, generator=g)
    logps = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None]).squeeze(-1)
    old = (logps + torch.randn(leading, generator=g) * spread).float()
    ref = (logps + torch.randn(leading, generator=g)).float()
    importance_weights = torch.rand(leading, generator=g) * 2
    mask = torch.rand(leading, generator=g) >= dead / 2
    ids = torch.where(torch.rand(leading, generator=g) < dead / 2, -100, ids)
    gone = ~mask | (ids == -100)
    nan = torch.tensor(torch.nan)
    return Batch(
        leading=leading,
        sequences=sequences,
        cu_seqlens=cu_seqlens,
        logits=logits.masked_fill(gone[..., None], torch.nan),
        ref_logits=ref_logits.masked_fill(gone[..., None], torch.inf),
        token_ids=torch.where(gone & (ids != -100), 1 << 20, ids),
        response_mask=mask,
        old_logps=torch.where(gone, nan, old),
        ref_logps=torch.where(gone, -torch.inf, ref),
        importance_weights=torch.where(gone, torch.inf, importance_weights),
        sequence_of=sequence_of,
        generator=g,
    )


def loss_arguments(
    batch: Batch,
    *,
    mode: str = "rectified",
    cost_form: str = "hinge",
    per_sequence: bool = True,
    on_policy: bool = False,
    reference: str | None = None,
    importance_weights: bool = False,
    loss_agg_mode: str = "token-mean",
    **options: Any,
) -> dict[str, Any]:
    """Keyword arguments of repo_loss but the logits.

    cost_form: "hinge" (costs only), "baselines" (costs and cost_baselines), "given" (costs and cost_advantages),
    "bare" (cost_advantages only) or "none". reference: a kl_estimator or None. temperature, among the options: a
    number, or "rows" or "sequences" for one of each.
    """
    arguments: dict[str, Any] = {
        "token_ids": batch.token_ids,
        "old_logps": None if on_policy else batch.old_logps,
        "reward_advantages": batch.advantages(per_sequence),
        "cost_mode": mode,
        "response_mask": batch.response_mask,
        "cu_seqlens": batch.cu_seqlens,
        "loss_agg_mode": loss_agg_mode,
        **options,
    }
    if cost_form in ("hinge", "baselines", "given"):
        arguments["costs"] = batch.sequence_values(per_sequence, scale=2.0)
    if cost_form == "baselines":
        arguments["cost_baselines"] = batch.sequence_values(per_sequence)
    if cost_form in ("given", "bare"):
        arguments["cost_advantages"] = batch.advantages(per_sequence)
    if importance_weights:
        arguments["importance_weights"] = batch.importance_weights
    if reference is not None:
        arguments["kl_estimator"] = reference
        if reference == "full":
            arguments["ref_logits"] = batch.ref_logits
        else:
            arguments["ref_logps"] = batch.ref_logps
    if isinstance(each := options.get("temperature"), str):
        arguments["temperature"] = batch.temperatures(per_sequence=each == "sequences")
    if loss_agg_mode == "seq-mean-token-sum-norm":
        arguments.setdefault("max_length", 11)
    return arguments


def row_arguments(token_ids: Tensor, **tensors: Tensor | None) -> RowArguments:
    """The arguments of a loss as a backend takes them; absent ones are None."""
    return RowArguments(**(dict.fromkeys(ARGUMENTS) | {"token_ids": token_ids} | tensors))


@st.composite
def batches(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Batch:
    """Padded or packed batches, with empty sequences, short rows, V = 1 and anything from no to only dead rows."""
    vocabulary = draw(st.sampled_from((1, 2, 3, 8, 9, 33, 257)), label="V")
    dead = draw(st.sampled_from((0.0, 0.3, 0.9, 2.0)), label="dead")
    seed = draw(st.integers(0, 2**31), label="seed")
    if draw(st.booleans(), label="packed"):
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5), label="lengths")
        return make_batch(seed, vocabulary=vocabulary, lengths=lengths, dtype=dtype, dead=dead)
    leading = (draw(st.integers(1, 4), label="B"), draw(st.integers(1, 6), label="L"))
    return make_batch(seed, leading, vocabulary, dtype=dtype, dead=dead)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Any supported combination of options, as keywords of loss_arguments."""
    mode = draw(st.sampled_from(("rectified", "split", "lagrangian")), label="mode")
    forms = {"rectified": ("hinge", "baselines", "given", "bare"), "split": ("given",), "lagrangian": ("given", "bare")}
    reference = draw(st.sampled_from((None, *ESTIMATORS)), label="reference")
    cost_form = draw(st.sampled_from(forms[mode]), label="cost_form")
    limits = (0.0,) if cost_form == "bare" else (0.0, 0.5, -1.25)
    aggregation = draw(st.sampled_from(AGGREGATIONS), label="aggregation")
    divisible = aggregation not in ("token-sum", "none")
    return {
        "mode": mode,
        "cost_form": cost_form,
        "per_sequence": draw(st.booleans(), label="per_sequence"),
        "on_policy": draw(st.booleans(), label="on_policy"),
        "reference": reference,
        "importance_weights": draw(st.booleans(), label="importance_weights"),
        "loss_agg_mode": aggregation,
        "divisor": draw(st.sampled_from((None, 3, 7.5)), label="divisor") if divisible else None,
        "lam": draw(st.sampled_from((0.0, 0.5, 3.0)), label="lam"),
        "cost_limit": draw(st.sampled_from(limits), label="cost_limit"),
        "normalize": draw(st.booleans(), label="normalize"),
        "temperature": draw(st.sampled_from((1.0, 0.5, 1.7, "rows", "sequences")), label="temperature"),
        "softcap": draw(st.sampled_from((None, 4.0, 30.0)), label="softcap"),
        "eps_low": draw(st.sampled_from((0.2, 0.05, 1.0)), label="eps_low"),
        "eps_high": draw(st.sampled_from((0.2, 0.28, 0.0)), label="eps_high"),
        "dual_clip": draw(st.sampled_from((None, 1.1, 3.0)), label="dual_clip"),
        "beta": draw(st.sampled_from((0.0, 0.1, 2.0)), label="beta") if reference else 0.0,
        "kl_importance_weighted": True if reference == "k1" else draw(st.booleans(), label="kl_importance_weighted"),
        "entropy_coef": draw(st.sampled_from((0.0, 0.01, -0.5)), label="entropy_coef"),
    }
