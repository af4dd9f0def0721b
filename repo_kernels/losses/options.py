"""LossOptions: what stays the same over a training run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..backends.codes import AGGREGATIONS
from ..checks import (
    COST_MODES,
    KL_ESTIMATORS,
    RATIO_LEVELS,
    SURROGATES,
    Scalar,
    check_bool,
    check_choice,
    check_scalar,
    check_softcap,
    describe,
    number,
)
from .temperature import is_by_row

SEQUENCE_MODES = AGGREGATIONS[2:5]
MODES_WITHOUT_COUNT = ("token-sum", "none")


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """The options of every loss that are constant in a run, checked when they are made.

    A scalar is a float or a 0-d tensor on any device. The value of a tensor is not checked, since reading it would make
    the host wait for the device.

    Args:
        cost_mode: what the multiplier lam penalises. "rectified" (default): `cost_advantages`, or without them the
            hinge {C - d}^+ - `cost_baselines`. "split": `cost_advantages` where C > d, 0 elsewhere; needs `costs`.
            "lagrangian": `cost_advantages` everywhere, as in Safe RLHF. Source: RePO, arXiv:2410.19933; Safe RLHF,
            arXiv:2310.12773.
        surrogate: what is made of the ratio rho and the advantage A. "clip" (default): -min(rho A, clip(rho) A), PPO,
            arXiv:1707.06347. "cispo": -clip(rho) A log pi, in which clip(rho) is a constant, so that every token has a
            gradient; eps_low=1 leaves rho without a lower bound. Source: CISPO, arXiv:2506.13585.
        ratio_level: "token" (default), or "sequence": all live tokens of a sequence have the ratio exp(mean over them
            of log pi - old_logps), clipped as one, whose gradient goes through the mean; the rho of a KL stays that of
            the token. Source: GSPO, arXiv:2507.18071. "cispo" and "sequence" need the log-probabilities first, and read
            the logits twice.
        normalize: divide the combined advantage A_R - lam * A_C by 1 + lam, so that its scale does not grow with the
            multiplier. Default False. Source: Safe RLHF, arXiv:2310.12773.
        eps_low: the ratio rho is clipped from below at 1 - eps_low, in [0, 1]. Default 0.2. Source: PPO,
            arXiv:1707.06347.
        eps_high: the ratio rho is clipped from above at 1 + eps_high, >= 0. Default 0.2. Source: PPO, arXiv:1707.06347;
            as a value of its own: DAPO, arXiv:2503.14476.
        dual_clip: a scalar c > 1: where the advantage A is negative, the surrogate loss is at most -c * A. None
            (default): no bound. Source: Dual-clip PPO, arXiv:1912.09729.
        kl_estimator: estimator of KL(pi || pi_ref) in nats per token, with delta = log pi - log pi_ref. "k1": delta.
            "k2": delta^2 / 2. "k3" (default): exp(-delta) + delta - 1. "full": the sum over the vocabulary, which takes
            the reference's logits instead of `ref_logps`. Source: joschu.net/blog/kl-approx.html.
        kl_importance_weighted: multiply k1 and k3 by rho and differentiate the product, which makes the gradient that
            of the KL; k2 and "full" need no factor and ignore it. Default True; k1 without it has a gradient of mean 0
            and is refused.
        loss_agg_mode: how the losses of live tokens become one number. "token-mean" (default): divided by the number of
            live tokens. "token-sum": not divided. "seq-mean-token-mean": mean over the tokens of a sequence, then over
            the sequences with a live token. "seq-mean-token-sum": sum over tokens, mean over sequences.
            "seq-mean-token-sum-norm": the same, divided by max_length (Dr. GRPO, arXiv:2503.20783). "none": one loss
            per token.
        max_length: tokens, a float > 0, for "seq-mean-token-sum-norm", which needs it; None (default) for the others.

    Raises:
        TypeError, ValueError: a field has a wrong type, value or companion. The message names the field, what it got
            and what it takes.
    """

    cost_mode: str = "rectified"
    surrogate: str = "clip"
    ratio_level: str = "token"
    normalize: bool = False
    eps_low: Scalar = 0.2
    eps_high: Scalar = 0.2
    dual_clip: Scalar | None = None
    kl_estimator: str = "k3"
    kl_importance_weighted: bool = True
    loss_agg_mode: str = "token-mean"
    max_length: float | None = None

    def __post_init__(self) -> None:
        for name in ("eps_low", "eps_high", "dual_clip", "max_length", "temperature", "softcap", "entropy_coef"):
            if isinstance(value := getattr(self, name, None), np.number):
                object.__setattr__(self, name, number(value))
        for name in ("normalize", "kl_importance_weighted"):
            check_bool(name, getattr(self, name))
        check_choice("cost_mode", self.cost_mode, COST_MODES)
        check_choice("surrogate", self.surrogate, SURROGATES)
        check_choice("ratio_level", self.ratio_level, RATIO_LEVELS)
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("loss_agg_mode", self.loss_agg_mode, AGGREGATIONS)
        self._check_clip()
        self._check_max_length()
        if self.surrogate == "cispo" and self.dual_clip is not None:
            raise ValueError(f"dual_clip is for surrogate='clip'; got {describe(self.dual_clip)} with 'cispo'")
        if self.logps_first and self.kl_estimator == "full":
            raise ValueError(
                "kl_estimator='full' is for surrogate='clip' and ratio_level='token'; got "
                f"surrogate={self.surrogate!r}, ratio_level={self.ratio_level!r}"
            )
        if self.kl_estimator == "k1" and not self.kl_importance_weighted:
            raise ValueError(
                "kl_estimator='k1' needs kl_importance_weighted=True, without which the mean of its gradient is zero; "
                "got False"
            )

    @property
    def logps_first(self) -> bool:
        """Whether the loss of a token needs log-probabilities before it, so that no single pass can compute it."""
        return self.surrogate != "clip" or self.ratio_level != "token"

    def _check_clip(self) -> None:
        check_scalar("eps_low", self.eps_low, lambda x: x >= 0, ">= 0")
        if not isinstance(self.eps_low, Tensor) and self.eps_low > 1:
            raise ValueError(f"eps_low must be in [0, 1]; got {self.eps_low!r}")
        check_scalar("eps_high", self.eps_high, lambda x: x >= 0, ">= 0")
        if self.dual_clip is not None:
            check_scalar("dual_clip", self.dual_clip, lambda x: x > 1, "> 1 or None")

    def _check_max_length(self) -> None:
        mode = self.loss_agg_mode
        if mode != "seq-mean-token-sum-norm":
            if self.max_length is not None:
                raise ValueError(f"max_length is for loss_agg_mode='seq-mean-token-sum-norm' only; got mode {mode!r}")
            return
        if self.max_length is None or isinstance(self.max_length, Tensor):
            raise ValueError(f"max_length must be a number > 0 for {mode!r}; got {describe(self.max_length)}")
        check_scalar("max_length", self.max_length, lambda x: x > 0, "> 0")


@dataclass(frozen=True, kw_only=True)
class LossOptions(TokenOptions):
    """The options of `repo_loss` and `linear_repo_loss` that are constant in a run, checked when they are made.

    Args:
        temperature: the logits are divided by it, > 0. Default 1.0. Use the temperature of sampling, so that the policy
            that is trained is the one that sampled. A call, of a function or a module, also takes a tensor for rollouts
            that were sampled at several temperatures: leading shape, or (B,) or (B, 1) with one value per sequence, of
            any floating dtype. It gets no gradient, and one that requires grad is a ValueError where gradients are
            recorded. On a GPU, which would have to be waited for, a row whose value is not > 0 and finite is NaN; on
            the CPU it is a ValueError.
        softcap: a float > 0 in units of the logits: they become softcap * tanh(logits / softcap) before the division by
            the temperature. None (default): no cap. Source: Gemma 2, arXiv:2408.00118.
        entropy_coef: a finite scalar; entropy_coef * H (H in nats per token) is subtracted from the loss. Default 0.0.
        return_entropy: return the entropy, detached, also when entropy_coef is 0. Default False.
    """

    temperature: Scalar = 1.0
    softcap: float | None = None
    entropy_coef: Scalar = 0.0
    return_entropy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("return_entropy", self.return_entropy)
        self._check_temperature()
        check_softcap(self.softcap)
        check_scalar("entropy_coef", self.entropy_coef, lambda x: True, "finite")

    def _check_temperature(self) -> None:
        if is_by_row(self.temperature):
            raise ValueError(
                "temperature of LossOptions must be a float or a 0-d tensor; got "
                f"{describe(self.temperature)}: pass one value per row or sequence to the call"
            )
        check_scalar("temperature", self.temperature, lambda x: x > 0, "> 0")
