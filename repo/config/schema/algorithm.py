"""The objective, the multiplier lambda and the critics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt

BOUNDED = ("repo", "ppo_lagrangian", "interior_point", "cdpo", "repo_dpo")
"""Methods whose lambda moves, up to penalty.max."""
PAIRED = ("cdpo", "repo_dpo")
"""Methods that learn from pairs of responses that are not the policy's own."""
DUAL_EVERY = 5
"""With methods of PAIRED: steps from one sample of the policy, by whose costs lambda moves, to the next."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective: reward R, cost C with limit d, and KL to the reference. docs/method.md gives the formulas."""

    method: Literal["repo", "ppo_lagrangian", "interior_point", "fixed_penalty", "crpo", "ppo", "cdpo", "repo_dpo"] = (
        "repo"
    )
    """repo: bring each response's cost under the limit. ppo_lagrangian: only the mean cost. interior_point: only the
    mean cost, by a barrier that grows as the mean nears the limit. fixed_penalty: a constant lambda on the cost. crpo:
    reward steps while the batch's mean cost is within the limit, else cost steps. ppo: reward only. cdpo: constrained
    DPO, on pairs of responses that are not the policy's own. repo_dpo: the same with the cost rectified as in repo."""
    cost_mode: Literal["rectified", "split", "barrier"] = "rectified"
    """Form of the cost term of method repo. rectified: the exact gradient of E{C-d}+. split: the raw cost, penalised on
    unsafe responses only. barrier: tau softplus((C - d + margin) / tau) in place of {C-d}+, which also pushes safe
    responses that are near the limit."""
    barrier_tau: PositiveFloat = 0.1
    """Width tau of the barrier, in units of the cost; towards 0 it becomes rectified. Only for cost_mode barrier."""
    barrier_margin: NonNegativeFloat = 0.0
    """Distance below d at which the barrier has half of its slope, in units of the cost. Only for cost_mode barrier."""
    advantages: Literal["group", "gae"] = "group"
    """Baseline of the advantages. group: the mean of the prompt's other responses. gae: generalised advantage
    estimation with one critic per signal, a value per token."""
    credit: Literal["terminal", "redistributed"] = "terminal"
    """Part of the cost that a token answers for. terminal: the whole cost of its response. redistributed: what follows
    it; a small head on the reference's states learns which tokens the cost comes from. Not with cost_mode split."""
    cost_limit: float = 0.0
    """The limit d, in units of the cost: a response is safe iff its cost is <= d."""
    crpo_tolerance: NonNegativeFloat = 0.0
    """Excess of the batch's mean cost over d, in units of the cost, up to which method crpo takes a reward step."""
    beta: NonNegativeFloat = 0.02
    """Weight of KL(policy || reference). 0: no KL term."""
    kl_placement: Literal["loss", "reward", "reward-and-cost"] = "loss"
    """Place of the KL. loss: a term per token, with its exact gradient. reward: subtract beta k1 of each sampled token
    from the reward. reward-and-cost: also add beta k1 to the cost, as in Safe RLHF."""
    kl_target: float | None = None
    """Value > 0 that the metric `kl` (nats per token) is to approach: beta is adapted once per step. null: constant
    beta."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) in the loss, per token with delta = log policy - log reference. k1: delta.
    k2: delta^2 / 2. k3: exp(-delta) + delta - 1."""
    kl_importance_weighted: bool = True
    """Multiply k1 and k3 by the ratio, without which their gradient is not that of the KL. k1 requires true; k2 ignores
    it."""
    clip_range: tuple[ClosedUnitInterval, NonNegativeFloat] = (0.2, 0.2)
    """Clip the ratio of new to old probability to [1 - the first number, 1 + the second]."""
    dual_clip: float | None = None
    """Constant c > 1: where the advantage A is negative, the surrogate loss is at most -c A. null: no such limit."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy (nats per token), which is subtracted from the loss. 0: none."""
    normalize: bool = False
    """Divide the combined advantage by 1 + lambda, so that its scale does not grow with lambda."""
    scale_by_std: bool = False
    """Divide the combined advantage by its standard deviation over the responses to the prompt. Needs advantages group.
    """
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    """Average of the losses of tokens over the minibatch. token-mean: over all tokens. seq-mean-token-mean: over the
    tokens of each response, then over responses. seq-mean-token-sum: sum over tokens, mean over responses."""

    @property
    def on_pairs(self) -> bool:
        """Tell whether the method is one of PAIRED."""
        return self.method in PAIRED


@dataclass(frozen=True)
class PenaltyConfig:
    """The multiplier lambda, which weights the cost, and the limit of the step; both move once per rollout batch."""

    initial: NonNegativeFloat = 1.0
    """Value of lambda in the first step; its constant value with method fixed_penalty. interior_point: also the weight
    of the barrier, which is lambda where the mean cost is one unit below the limit. ppo and crpo have no lambda."""
    lr: NonNegativeFloat = 2.0
    """Step size eta of lambda's update, with methods repo, ppo_lagrangian, cdpo and repo_dpo; the last two move lambda
    every fifth step. The default moves lambda within a short run. interior_point: the barrier's weight is divided by
    1 + lr after each step, with lr <= 1; try 0.05."""
    max: NonNegativeFloat = 10.0
    """Upper bound of lambda, with methods repo, ppo_lagrangian, cdpo, repo_dpo and interior_point, which takes this
    value while the mean cost is above the limit."""
    limit_schedule: Literal["constant", "linear", "pi"] = "constant"
    """Course of the limit that advantages and lambda see; metrics and evaluations always use algorithm.cost_limit.
    constant: that limit. linear: from limit_start to it over limit_steps. pi: from limit_start towards it while,
    in the batch and those before it, less than 10 % of the responses are unsafe at the limit of the step, and back
    while more are. Not for methods fixed_penalty, ppo, cdpo and repo_dpo."""
    limit_start: float | None = None
    """First limit, at least algorithm.cost_limit, in units of the cost. null: the 90th percentile of the costs of the
    first batch, which the reference sampled, or algorithm.cost_limit if that is higher."""
    limit_steps: PositiveInt = 10
    """Number of steps from limit_start to algorithm.cost_limit. linear: exactly. pi: about, if no response is unsafe;
    otherwise more, without end where the policy does not become safer."""


@dataclass(frozen=True)
class CriticConfig:
    """The value functions of reward and cost. Only for algorithm.advantages gae."""

    init_from: Literal["policy", "scorers"] = "policy"
    """policy: linear heads on the policy's hidden states, which their loss does not train. They start as the scorers'
    heads if policy and scorers are embedded, else at zero. scorers: separate models, copies of the reward and the cost
    model."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the critics, constant over the run. The default suits heads that start at zero; for separate
    models try 5e-6."""
    gamma: ClosedUnitInterval = 1.0
    """Discount factor gamma per token in generalised advantage estimation. 1: no discount."""
    gae_lambda: ClosedUnitInterval = 0.95
    """Decay lambda in generalised advantage estimation. 1: returns minus values; 0: one-step differences."""
