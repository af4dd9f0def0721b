"""Configuration: small dataclasses with a docstring per field; YAML, dotted overrides and --help come from them.

python -m repo.train --config run.yaml --optimizer.lr 1e-5 --steps 40
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from math import isfinite
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..common.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Policy and reference."""

    path: str = "embedded"
    """Folder or hub name of a causal LM; "embedded" is SmolLM2-135M-Instruct from the assets folder ($REPO_ASSETS)."""
    device: str = "auto"
    """"auto" (CUDA where there is one, else CPU) or a torch device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the policy's forward passes and of frozen weights, which are rounded to it (exact for those saved in it);
    trained weights and critics of their own stay fp32."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA adapters on every linear layer but the head (needs peft), alpha = 2 x rank; 0: train all weights."""
    gradient_checkpointing: bool = False
    """Recompute the policy's activations in the backward pass: less memory, one more forward."""
    shard: NonNegativeInt = 1
    """Processes (of torchrun) that share one copy of trained weights, gradients and optimiser states by FSDP2; divides
    their number. 1: each has its own (data parallel); 0: all share one; between: several copies, as one per node."""
    compile: bool = False
    """Compile the policy's decoder layers with torch.compile (CUDA: faster update; first steps are slow)."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts: JSON lines, parquet, or a Hugging Face dataset (saved folder or hub name, `name#split`), with `prompt`
    (a text, or a conversation as a list of role and content) or `messages`, and optionally `id` and `category`."""

    train: str = "embedded"
    """Training prompts: file, folder or hub name; "embedded"."""
    eval: str = "embedded"
    """Held-out prompts, as train."""
    column: str = "prompt"
    """Column that holds the prompt."""
    system_prompt: str | None = None
    """System message before every prompt that has none; null leaves it to the chat template."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts are dropped, and counted in a message."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    prompts_per_step: PositiveInt = 4
    """Prompts in one rollout batch."""
    samples_per_prompt: PositiveInt = 4
    """Responses per prompt (the group of the leave-one-out baseline); at least 2 unless algorithm.advantages is gae."""
    max_response_tokens: PositiveInt = 40
    """Response length limit in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss uses the same."""
    top_p: ClosedUnitInterval = 1.0
    """Nucleus mass. Below 1 the sampled distribution is not the policy's, which biases the ratio."""
    batch_size: PositiveInt = 64
    """Responses decoded together at most; the samples of one prompt are never split."""


@dataclass(frozen=True)
class ScoringConfig:
    """Reward and cost of a response."""

    reward: str | dict[str, float] = "embedded"
    """"embedded"; a folder or hub name of a sequence-classification model (folder#label) or of a safe-rlhf score model;
    a Python function `module:function` called with lists of prompts and responses; or several with weights, {a: 1, b:
    0.5}, whose weighted scores are added."""
    cost: str | dict[str, float] = "embedded"
    """As reward; higher is more harmful, and a response is safe iff its cost is <= algorithm.cost_limit."""
    timeout: PositiveFloat = 600.0
    """Seconds after which a Python function counts as hung, which stops the run."""
    clamp: PositiveFloat = 50.0
    """Scores are clamped to +- this."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective (README, "What is computed")."""

    method: Literal["repo", "ppo_lagrangian", "fixed_penalty", "crpo", "ppo"] = "repo"
    """repo: every prompt's cost under the limit; ppo_lagrangian: the mean cost; fixed_penalty: constant lambda; crpo:
    reward steps while the batch's mean cost is met, cost steps otherwise; ppo: reward only."""
    cost_mode: Literal["rectified", "split"] = "rectified"
    """Of repo. rectified: exact gradient of E{C-d}+; split: penalise the raw cost on unsafe samples only."""
    advantages: Literal["group", "gae"] = "group"
    """group: leave-one-out over the responses of a prompt; gae: one critic per signal, a value per token."""
    cost_limit: float = 0.0
    """d: a response is safe iff its cost is <= d."""
    crpo_tolerance: NonNegativeFloat = 0.0
    """Of crpo: the mean cost may exceed d by this before a cost step."""
    beta: NonNegativeFloat = 0.02
    """Weight of KL(policy || reference)."""
    kl_placement: Literal["loss", "reward", "reward-and-cost"] = "loss"
    """loss: per token, with its exact gradient; reward: -beta k1 of each sampled token is part of the reward;
    reward-and-cost: and +beta k1 of the cost, as in Safe RLHF."""
    kl_target: float | None = None
    """Adapt beta so that `kl` of the metrics (nats per token) approaches this; null: beta is constant."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) in the loss."""
    kl_importance_weighted: bool = True
    """Multiply k1 and k3 by the ratio, without which their gradient is not that of the KL (an error for k1)."""
    clip_range: tuple[ClosedUnitInterval, NonNegativeFloat] = (0.2, 0.2)
    """The ratio is clipped to [1 - the first, 1 + the second]."""
    dual_clip: float | None = None
    """Bound c > 1 of the surrogate for negative advantages; null: none."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalize: bool = False
    """Divide the combined advantage by 1 + lambda."""
    scale_by_std: bool = False
    """Divide the combined advantage by its standard deviation in the group."""
    loss_agg_mode: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    """How per-token losses are averaged (global counts)."""


@dataclass(frozen=True)
class PenaltyConfig:
    """The multiplier lambda and its rule."""

    initial: NonNegativeFloat = 1.0
    """lambda_0; the constant of method fixed_penalty."""
    lr: NonNegativeFloat = 2.0
    """eta: step size of the update, once per rollout batch; set so that lambda moves within a short run."""
    max: NonNegativeFloat = 10.0
    """lambda_max."""


@dataclass(frozen=True)
class CriticConfig:
    """Value functions of reward and cost, with algorithm.advantages gae."""

    init_from: Literal["policy", "scorers"] = "policy"
    """policy: linear heads on the policy's states, which they do not move; they begin as the embedded scorers' heads if
    policy and scorers are embedded, else as zero. scorers: models of their own, copies of the reward and cost model."""
    lr: PositiveFloat = 1e-4
    """Learning rate, constant; set for heads that begin as zero, models of their own want 5e-6."""
    gamma: ClosedUnitInterval = 1.0
    """gamma of generalised advantage estimation."""
    gae_lambda: ClosedUnitInterval = 0.95
    """lambda of generalised advantage estimation."""


@dataclass(frozen=True)
class PtxConfig:
    """Supervised examples in the same optimiser step, against forgetting."""

    data: str | None = None
    """Examples, as data.train, with `response` or `messages` that end with the assistant's; null: none."""
    coef: NonNegativeFloat = 16.0
    """Weight of their cross-entropy per token, beside a policy loss of weight 1."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the split of a rollout batch."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate; set for the embedded 135 M parameters, larger models want 1e-6 to 1e-5."""
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.95)
    """Adam's betas."""
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Of AdamW's two moments, 8, 4 or about 2 bytes per trained weight."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    warmup_steps: NonNegativeInt = 2
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear would reach 0 one step after the last."""
    clip_norm: PositiveFloat = 1.0
    """Gradient norm above this is scaled down to it."""
    epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    minibatches: PositiveInt = 1
    """Optimiser steps per pass; each minibatch holds whole responses, shuffled."""
    micro_batch_tokens: PositiveInt = 2048
    """Tokens in one forward and backward, padding-free where the model allows it; never changes the result."""
    max_skipped: PositiveInt = 3
    """Stop after this many updates in a row with a non-finite gradient; each is skipped."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts, before and after training."""

    prompts: NonNegativeInt = 200
    """Held-out prompts to use; 0 switches the evaluation off."""
    samples_per_prompt: PositiveInt = 1
    """Responses per held-out prompt."""
    judge: str = "embedded"
    """Never used in training: "embedded", "none", or a scorer of your own as in scoring.cost, safe iff its score is
    <= 0."""


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str | None = None
    """Run folder; must not exist. Default: runs/<method>-<date>-<time>."""
    steps: PositiveInt = 18
    """Rollout batches to train on."""
    save_every: NonNegativeInt = 10
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 1
    """Newest checkpoints to keep, besides the best one: the highest reward among those that reach safety_target."""
    safety_target: ClosedUnitInterval = 0.95
    """Safe rate of the best checkpoint over the steps since the one before; where none reaches it, the safest stays."""
    seed: NonNegativeInt = 0
    """Seed of prompts, samples and minibatches."""
    sample_every: NonNegativeInt = 5
    """Steps between samples shown in the console, 0: never; all are in samples.jsonl."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl; each needs its package. Project: $WANDB_PROJECT, $TRACKIO_PROJECT."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def field_names(kind: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields."""
    names = []
    for f in fields(kind):
        if isinstance(f.default_factory, type) and is_dataclass(f.default_factory):
            names += field_names(f.default_factory, f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def _require(ok: bool, name: str, value: object, takes: str) -> None:
    if not ok:
        raise UserError(f"{name} must be {takes}; got {value!r}")


def check(config: Config) -> Config:
    """The same config, or a UserError for fields that do not go together; types and ranges are the parser's."""
    r, a, p, o = config.rollout, config.algorithm, config.penalty, config.optimizer
    group, lagrangian = a.advantages == "group", a.method == "ppo_lagrangian"
    why = ">= 2, since the baseline of a response is the mean of the others of its prompt"
    _require(r.samples_per_prompt >= 2 or not group, "rollout.samples_per_prompt", r.samples_per_prompt, why)
    _require(r.top_p > 0, "rollout.top_p", r.top_p, "> 0")
    _require(group or not a.scale_by_std, "algorithm.scale_by_std", True, "false with advantages gae")
    in_cost = a.kl_placement == "reward-and-cost"
    _require(
        a.method != "ppo" or not in_cost, "algorithm.kl_placement", a.kl_placement, "loss or reward with method ppo"
    )
    for name, value in vars(a).items():
        _require(not isinstance(value, float) or isfinite(value), f"algorithm.{name}", value, "finite")
    _require(a.kl_target is None or a.kl_target > 0, "algorithm.kl_target", a.kl_target, "> 0 or null")
    _require(a.dual_clip is None or a.dual_clip > 1, "algorithm.dual_clip", a.dual_clip, "> 1 or null")
    _require(a.kl_target is None or a.beta > 0, "algorithm.beta", a.beta, "> 0 with algorithm.kl_target")
    weighted = a.kl_importance_weighted
    _require(
        weighted or a.kl_estimator != "k1", "algorithm.kl_importance_weighted", weighted, "true with kl_estimator k1"
    )
    _require(p.initial > 0 or not lagrangian, "penalty.initial", p.initial, "> 0 with method ppo_lagrangian")
    bounded = a.method in ("repo", "ppo_lagrangian")
    _require(not bounded or p.max >= p.initial, "penalty.max", p.max, f">= penalty.initial = {p.initial}")
    _require(all(b < 1 for b in o.betas), "optimizer.betas", list(o.betas), "two numbers in [0, 1)")
    sharded = config.model.shard != 1
    _require(not (sharded and config.model.lora_rank), "model.shard", config.model.shard, "1 with model.lora_rank")
    _require(
        not (sharded and o.state_dtype == "8bit"),
        "model.shard",
        config.model.shard,
        "1 with optimizer.state_dtype 8bit",
    )
    batch = r.prompts_per_step * r.samples_per_prompt
    _require(o.minibatches <= batch, "optimizer.minibatches", o.minibatches, f"in 1..{batch} (responses per step)")
    return config
