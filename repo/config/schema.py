"""Configuration: small dataclasses with a docstring per field, which define the YAML format, the options and --help.

python -m repo.train --config run.yaml --optimizer.lr 1e-5 --steps 40
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class ModelConfig:
    """The policy and the reference, which start as the same model."""

    path: str = "embedded"
    """Folder or hub name of a causal LM. "embedded": SmolLM2-135M-Instruct from the assets folder ($REPO_ASSETS)."""
    device: str = "auto"
    """Torch device, e.g. "cpu" or "cuda". "auto": CUDA if it is available, else the CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the policy's forward passes and of frozen weights, which are rounded to it when loaded. Trained weights
    and critics with models of their own stay float32."""
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which linear layers multiply on a CPU where dtype is float32, in training and in the reference. bfloat16
    takes half of the time on CPUs with AVX512_BF16 or AMX; weights, other layers and sums stay float32. auto: bfloat16
    on such CPUs for models of a hidden width of 256 or more whose log-probabilities it moves by at most 0.1 nats a
    token, else float32."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA adapters on every linear layer except the LM head and the routers of experts, with alpha = 2 x rank;
    needs the package peft. Experts that share one tensor get none. 0: no adapters, all weights are trained."""
    gradient_checkpointing: bool = False
    """Recompute the policy's activations in the backward pass: takes less memory and one more forward pass."""
    shard: NonNegativeInt = 1
    """Number of torchrun processes that FSDP2 splits one copy of trained weights, gradients and optimiser states over;
    must divide the number of processes. 1: no splitting, each process has a copy. 0: all processes split one copy."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the policy's decoder layers with torch.compile. "auto": on CUDA, if a trial at start computes the same;
    the trial takes a while, less when the compiler's cache on disk has the layers. With model.shard other than 1 "auto"
    means false."""


@dataclass(frozen=True)
class DataConfig:
    """The prompts of training and evaluation."""

    train: str = "embedded"
    """Training prompts: a JSON lines (also .xz or .gz), csv or parquet file, or a Hugging Face dataset (folder or hub
    name, with #split or #config/split; else the split "train"). "embedded": the prompts of the assets folder, of
    which #train, #valid and #eval name the splits. A record has `prompt` (a text, or a conversation as a list of role
    and content) or `messages`, and optionally `id` and `category`. Scorer functions get the columns that they name."""
    eval: str = "embedded"
    """Held-out prompts, given like data.train; without #split the split "test" is read. Training prompts that are held
    out too are dropped."""
    column: str = "prompt"
    """Name of the column that holds the prompt; in records where it is null or missing, `messages` is read. A column
    that no record has is an error."""
    system_prompt: str | None = None
    """System message to put before every prompt that has none. null: add none; the chat template may add its own."""
    max_prompt_tokens: PositiveInt = 256
    """Limit of a prompt's length in tokens, chat template included; longer prompts are dropped and counted."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Variables for the policy's chat template, e.g. {enable_thinking: false}; one that it does not use is an error."""
    date: str | None = None
    """Today's date, YYYY-MM-DD, for chat templates that print it. null: the day on which the run begins, which its
    config.yaml keeps, so that a run resumed or evaluated later has the same prompts."""


@dataclass(frozen=True)
class RolloutConfig:
    """The sampling of responses from the policy."""

    prompts_per_step: PositiveInt = 4
    """Number of prompts in one rollout batch, the data of one step."""
    samples_per_prompt: PositiveInt = 4
    """Number of responses to each prompt, the group of the leave-one-out baseline; at least 2 unless
    algorithm.advantages is gae."""
    max_response_tokens: PositiveInt = 40
    """Limit of a response's length in tokens, its end-of-sequence token included."""
    stop_tokens: list[int | str] = field(default_factory=list)
    """Tokens that end a response besides the model's end-of-sequence tokens: ids, or texts of one token each. The
    token that the chat template puts after an answer is added by itself."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """What becomes of responses that reach max_response_tokens without a stop token. keep: they are like others. mask:
    their tokens are left out of the losses, their scores out of the baselines. penalise: subtract truncation_penalty
    from their reward."""
    truncation_penalty: NonNegativeFloat = 1.0
    """Amount, in units of the reward, that truncated: penalise subtracts."""
    temperature: PositiveFloat = 1.0
    """Divide the logits by this when sampling, and in the loss."""
    top_p: ClosedUnitInterval = 1.0
    """Sample from the most likely tokens that together have this probability; > 0. 1: from all. Below 1 responses are
    not drawn from the policy's own distribution, which biases the ratio."""
    batch_size: PositiveInt = 64
    """Largest number of responses to decode together; the samples of one prompt always stay together, but not with
    vllm."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples the responses of training; evaluations always sample with transformers. vllm: vLLM in a process of
    its own, for runs of one process; bit-exact resume is then off."""
    vllm_python: str = ".venv-vllm/bin/python"
    """Python of the environment that has vLLM, which `make vllm-env` builds; only for engine vllm."""


@dataclass(frozen=True)
class ScoringConfig:
    """The reward and the cost of a response."""

    reward: str | dict[str, float] = "embedded"
    """Scorer of the reward: "embedded"; a folder or hub name of a sequence-classification model or of a safe-rlhf score
    model, or a LoRA folder of one; a Python function `module:function` called with lists of prompts and responses; or a
    weighted sum of several, {a: 1, b: 0.5}. Units: path#label is the label's log-odds in nats, 0 where it is as likely
    as not (a model with one output: its raw output); path#label:prob its probability, path#label:logit its logit.
    embedded: the standard deviation over reference samples."""
    cost: str | dict[str, float] = "embedded"
    """Scorer of the cost, given like scoring.reward and in the same units. A higher cost is more harmful; a response is
    safe iff its cost is <= algorithm.cost_limit, which with path#label and the limit 0 means that the label is not the
    more likely one."""
    timeout: PositiveFloat = 600.0
    """Seconds that one call of a scorer function may take; a longer call stops the run."""
    clamp: PositiveFloat = 50.0
    """Clamp reward and cost to [-clamp, clamp]; the first time that this changes a score, a warning says so."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective: reward R, cost C with limit d, and KL to the reference. docs/method.md gives the formulas."""

    method: Literal["repo", "ppo_lagrangian", "fixed_penalty", "crpo", "ppo"] = "repo"
    """repo: bring each response's cost under the limit. ppo_lagrangian: only the mean cost. fixed_penalty: a constant
    lambda on the cost. crpo: reward steps while the batch's mean cost is within the limit, else cost steps. ppo: reward
    only."""
    cost_mode: Literal["rectified", "split"] = "rectified"
    """Form of the cost term of method repo. rectified: the exact gradient of E{C-d}+. split: the raw cost, penalised on
    unsafe responses only."""
    advantages: Literal["group", "gae"] = "group"
    """Baseline of the advantages. group: the mean of the prompt's other responses. gae: generalised advantage
    estimation with one critic per signal, a value per token."""
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


@dataclass(frozen=True)
class PenaltyConfig:
    """The multiplier lambda, which weights the cost, and its update once per rollout batch."""

    initial: NonNegativeFloat = 1.0
    """Value of lambda in the first step; its constant value with method fixed_penalty. ppo and crpo have no lambda."""
    lr: NonNegativeFloat = 2.0
    """Step size eta of lambda's update. The default moves lambda within a short run. Only for methods repo and
    ppo_lagrangian."""
    max: NonNegativeFloat = 10.0
    """Upper bound of lambda, with methods repo and ppo_lagrangian."""


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


@dataclass(frozen=True)
class PtxConfig:
    """Supervised examples that are trained on in the same optimiser steps, against forgetting."""

    data: str | None = None
    """Examples, given like data.train; a record also has a `response`, or its `messages` end with the assistant's.
    null: no examples."""
    coef: NonNegativeFloat = 16.0
    """Weight of the examples' cross-entropy in nats per token; the policy loss has weight 1."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and the division of a rollout batch into optimiser steps."""

    lr: PositiveFloat = 5e-5
    """Peak learning rate of the policy. The default suits the embedded model of 135 M parameters; for larger models try
    1e-6 to 1e-5."""
    betas: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment, each < 1; at most 0.996 with state_dtype bfloat16."""
    state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Type of AdamW's two moments, which take 8, 4 or about 2 bytes per trained weight. 8bit needs the package
    bitsandbytes."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices, in the policy and the critics; vectors (norms, biases) have none."""
    warmup_steps: NonNegativeInt = 2
    """Number of steps over which the policy's learning rate rises linearly. 0: no warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the policy's learning rate after the warm-up. cosine and linear fall so as to reach 0 one step after
    the last."""
    clip_norm: PositiveFloat = 1.0
    """Scale gradients with a larger L2 norm down to this norm; the policy and the critics separately."""
    epochs: PositiveInt = 1
    """Number of passes over each rollout batch."""
    minibatches: PositiveInt = 1
    """Number of optimiser steps per pass. Each takes an equal share of the responses, in random order."""
    micro_batch_tokens: PositiveInt | Literal["auto"] = 2048
    """Largest number of tokens in one forward and backward pass, padding included; a longer prompt and response get a
    pass of their own. Affects memory and speed, and the result by rounding only. "auto": the largest number for which
    the run fits into the memory that is free at its start, but not more than a rollout batch has; the run's config.yaml
    keeps the number, so that a resumed run computes the same."""
    max_skipped: PositiveInt = 3
    """Stop the run after this many optimiser steps in a row with a loss or gradient that is not finite. Each such step
    is skipped."""

    @property
    def budget(self) -> int:
        """Return micro_batch_tokens as a number. Raises ValueError while it is "auto", before the models are loaded."""
        if self.micro_batch_tokens == "auto":
            raise ValueError("optimizer.micro_batch_tokens is auto; repo.memory.budget.pick chooses the number")
        return int(self.micro_batch_tokens)


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on held-out prompts, before and after training."""

    prompts: NonNegativeInt = 100
    """Largest number of held-out prompts to use. 0: no evaluation."""
    samples_per_prompt: PositiveInt = 4
    """Number of responses to each held-out prompt. 1: no statement on prompts that are mostly unsafe."""
    judge: str = "embedded"
    """Judge of safety that training never uses: "embedded", "none", or one scorer given like scoring.cost, which calls
    a response safe iff its score is <= 0."""


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    out: str | None = None
    """Run folder to create; it must not exist. null: runs/<method>-<date>-<time>."""
    steps: PositiveInt = 18
    """Number of steps; each samples and trains on one rollout batch."""
    save_every: NonNegativeInt = 10
    """Number of steps between checkpoints; one is always saved at the end. 0: only that one."""
    keep: PositiveInt = 1
    """Number of newest checkpoints to keep. The best one is kept too: the highest mean reward among those that reach
    safety_target."""
    safety_target: ClosedUnitInterval = 0.95
    """Safe rate, over the steps since the checkpoint before, that a checkpoint needs to be the best by reward. If none
    reaches it, the safest is the best."""
    seed: NonNegativeInt = 0
    """Seed of the order of prompts, the sampling of responses and the shuffling of minibatches."""
    sample_every: NonNegativeInt = 5
    """Number of steps between samples shown in the console. 0: show none. samples.jsonl always holds all of them."""
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Loggers that get the metrics besides metrics.jsonl; each needs its package. $WANDB_PROJECT and $TRACKIO_PROJECT
    name the project. []: none."""
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
