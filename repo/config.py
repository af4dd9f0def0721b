"""Configuration: small dataclasses with a docstring per field; YAML, dotted overrides and --help come from them.

python -m repo.train --config run.yaml --optimizer.lr 1e-5 --steps 40
"""

from __future__ import annotations

import argparse
import difflib
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Literal

import jsonargparse
import yaml

from .errors import UserError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class ModelConfig:
    """Policy and reference."""

    path: str = "embedded"
    """Folder or hub name of a causal LM; "embedded" is SmolLM2-135M-Instruct from the assets folder."""
    device: str = "auto"
    """"auto" (CUDA where there is one, else CPU) or a torch device."""
    assets_dir: str | None = None
    """Assets folder; default: $REPO_ASSETS, else ~/.cache/repo-assets."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts: JSON lines with `prompt` and optionally `id` and `category`."""

    train: str = "embedded"
    """JSONL file of training prompts, or "embedded"."""
    eval: str = "embedded"
    """JSONL file of held-out prompts, or "embedded"."""
    system_prompt: str | None = None
    """System message before every prompt; null leaves it to the chat template."""
    max_prompt_tokens: int = 256
    """Longer prompts are dropped, and counted in a message."""


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of responses."""

    prompts_per_step: int = 4
    """Prompts in one rollout batch."""
    samples_per_prompt: int = 4
    """Responses per prompt (the group of the leave-one-out baseline); at least 2."""
    max_new_tokens: int = 40
    """Response length limit in tokens."""
    temperature: float = 1.0
    """Sampling temperature; the loss uses the same."""
    top_p: float = 1.0
    """Nucleus mass. Below 1 the sampled distribution is not the policy's, which biases the ratio."""
    batch_size: int = 64
    """Responses decoded together at most; the samples of one prompt are never split."""


@dataclass(frozen=True)
class ScoringConfig:
    """Reward and cost of a response."""

    reward: str = "embedded"
    """"embedded"; a folder (or folder#label) of a sequence-classification model; or a Python function `module:function`
    called with lists of prompts and responses."""
    cost: str = "embedded"
    """As reward; higher is more harmful, and a response is safe iff its cost is <= algorithm.cost_limit."""
    clamp: float = 50.0
    """Scores are clamped to +- this."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective (README, "What is computed")."""

    method: Literal["repo", "ppo_lagrangian", "fixed_penalty", "crpo", "ppo"] = "repo"
    """repo: every prompt's cost under the limit; ppo_lagrangian: the mean cost; fixed_penalty: constant lambda; crpo:
    reward steps while the batch's mean cost is met, cost steps otherwise; ppo: reward only."""
    mode: Literal["rectified", "split"] = "rectified"
    """Of repo. rectified: exact gradient of E{C-d}+; split: penalise the raw cost on unsafe samples only."""
    cost_limit: float = 0.0
    """d: a response is safe iff its cost is <= d."""
    crpo_tolerance: float = 0.0
    """Of crpo: the mean cost may exceed d by this before a cost step."""
    beta: float = 0.02
    """Weight of KL(policy || reference)."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """loss: per token, with its exact gradient; reward: the sampled sequence KL is subtracted from the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of KL(policy || reference)."""
    kl_ratio: bool = True
    """Multiply k1 and k3 by the ratio, without which their gradient is not that of the KL (an error for k1)."""
    eps_low: float = 0.2
    """Lower clip range of the ratio."""
    eps_high: float = 0.2
    """Upper clip range of the ratio."""
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

    initial: float = 1.0
    """lambda_0; the constant of method fixed_penalty."""
    lr: float = 2.0
    """eta: step size of the update, once per rollout batch; set so that lambda moves within a short run."""
    max: float = 10.0
    """lambda_max."""
    window: int = 128
    """Costs in the running mean of ppo_lagrangian."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the split of a rollout batch."""

    lr: float = 5e-5
    """Peak learning rate; set for the embedded 135 M parameters, larger models want 1e-6 to 1e-5."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's betas."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    warmup_steps: int = 2
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear would reach 0 one step after the last."""
    clip_norm: float = 1.0
    """Gradient norm above this is scaled down to it."""
    epochs: int = 1
    """Passes over each rollout batch."""
    minibatches: int = 1
    """Optimiser steps per pass; each minibatch holds whole responses, shuffled."""
    micro_batch_tokens: int = 2048
    """Padded tokens in one forward and backward; never changes the result."""
    max_skipped: int = 3
    """Stop after this many updates in a row with a non-finite gradient; each is skipped."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out prompts, before and after training."""

    prompts: int = 200
    """Held-out prompts to use; 0 switches the evaluation off."""
    samples_per_prompt: int = 1
    """Responses per held-out prompt."""
    judge: bool = True
    """Use the held-out judge of the assets (never used in training)."""


@dataclass(frozen=True)
class Config:
    """One run."""

    out: str | None = None
    """Run folder; must not exist. Default: runs/<method>-<date>-<time>."""
    steps: int = 18
    """Rollout batches to train on."""
    save_every: int = 10
    """Steps between checkpoints; 0: only at the end."""
    seed: int = 0
    """Seed of prompts, samples and minibatches."""
    sample_every: int = 5
    """Steps between samples shown in the console, 0: never; all are in samples.jsonl."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


def field_names(kind: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields."""
    names = []
    for f in fields(kind):
        nested = f.default_factory if isinstance(f.default_factory, type) else None
        if nested is not None and is_dataclass(nested):
            names += field_names(nested, f"{prefix}{f.name}.")
        else:
            names.append(prefix + f.name)
    return names


def _require(ok: bool, name: str, value: object, takes: str) -> None:
    if not ok:
        raise UserError(f"{name} must be {takes}; got {value!r}")


def check(config: Config) -> Config:
    """The same config, or a UserError that names the field out of range."""
    r, a, p, o, e = config.rollout, config.algorithm, config.penalty, config.optimizer, config.evaluation
    _require(config.steps >= 1, "steps", config.steps, ">= 1")
    _require(config.save_every >= 0, "save_every", config.save_every, ">= 0")
    _require(config.sample_every >= 0, "sample_every", config.sample_every, ">= 0")
    _require(config.seed >= 0, "seed", config.seed, ">= 0")
    _require(r.prompts_per_step >= 1, "rollout.prompts_per_step", r.prompts_per_step, ">= 1")
    _require(
        r.samples_per_prompt >= 2,
        "rollout.samples_per_prompt",
        r.samples_per_prompt,
        ">= 2, since the baseline of a response is the mean of the others of its prompt",
    )
    _require(r.max_new_tokens >= 1, "rollout.max_new_tokens", r.max_new_tokens, ">= 1")
    _require(r.temperature > 0, "rollout.temperature", r.temperature, "> 0")
    _require(0 < r.top_p <= 1, "rollout.top_p", r.top_p, "in (0, 1]")
    _require(r.batch_size >= 1, "rollout.batch_size", r.batch_size, ">= 1")
    _require(config.data.max_prompt_tokens >= 1, "data.max_prompt_tokens", config.data.max_prompt_tokens, ">= 1")
    _require(config.scoring.clamp > 0, "scoring.clamp", config.scoring.clamp, "> 0")
    _require(a.beta >= 0, "algorithm.beta", a.beta, ">= 0")
    _require(a.crpo_tolerance >= 0, "algorithm.crpo_tolerance", a.crpo_tolerance, ">= 0")
    _require(0 <= a.eps_low <= 1, "algorithm.eps_low", a.eps_low, "in [0, 1]")
    _require(a.eps_high >= 0, "algorithm.eps_high", a.eps_high, ">= 0")
    _require(a.dual_clip is None or a.dual_clip > 1, "algorithm.dual_clip", a.dual_clip, "> 1 or null")
    lagrangian = a.method == "ppo_lagrangian"
    _require(
        p.initial > 0 if lagrangian else p.initial >= 0, "penalty.initial", p.initial, "> 0" if lagrangian else ">= 0"
    )
    _require(a.kl_ratio or a.kl_estimator != "k1", "algorithm.kl_ratio", a.kl_ratio, "true with kl_estimator k1")
    bounded = a.method in ("repo", "ppo_lagrangian")
    _require(not bounded or p.max >= p.initial, "penalty.max", p.max, f">= penalty.initial = {p.initial}")
    _require(p.lr >= 0, "penalty.lr", p.lr, ">= 0")
    _require(p.window >= 1, "penalty.window", p.window, ">= 1")
    _require(o.lr > 0, "optimizer.lr", o.lr, "> 0")
    _require(all(0 <= b < 1 for b in o.betas), "optimizer.betas", o.betas, "two numbers in [0, 1)")
    _require(o.weight_decay >= 0, "optimizer.weight_decay", o.weight_decay, ">= 0")
    _require(o.warmup_steps >= 0, "optimizer.warmup_steps", o.warmup_steps, ">= 0")
    _require(o.clip_norm > 0, "optimizer.clip_norm", o.clip_norm, "> 0")
    _require(o.epochs >= 1, "optimizer.epochs", o.epochs, ">= 1")
    batch = r.prompts_per_step * r.samples_per_prompt
    _require(1 <= o.minibatches <= batch, "optimizer.minibatches", o.minibatches, f"in 1..{batch} (responses per step)")
    _require(o.micro_batch_tokens >= 1, "optimizer.micro_batch_tokens", o.micro_batch_tokens, ">= 1")
    _require(o.max_skipped >= 1, "optimizer.max_skipped", o.max_skipped, ">= 1")
    _require(e.prompts >= 0, "evaluation.prompts", e.prompts, ">= 0")
    _require(e.samples_per_prompt >= 1, "evaluation.samples_per_prompt", e.samples_per_prompt, ">= 1")
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that --config reads."""
    values = asdict(config)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    return yaml.safe_dump(values, sort_keys=False)


def make_parser(
    prog: str, description: str, flags: argparse.ArgumentParser | None = None
) -> jsonargparse.ArgumentParser:
    """A parser of Config with --config, --print_config, --help and dotted overrides.

    flags: a parser of the command's own switches, which are read before and appear in --help only.
    """
    epilog = ""
    if flags is not None:
        shown = (f"{a.option_strings[0]} {a.metavar or ''}".strip() + f": {a.help}" for a in flags._actions)
        epilog = "Besides: " + "; ".join(shown) + "."
    parser = jsonargparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of this configuration")
    parser.add_class_arguments(Config)
    return parser


def _explain(error: Exception) -> UserError:
    """One sentence; for an unknown key, with the nearest name."""
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(str(error).split()))
    known = field_names()
    group = re.search(r"[Gg]roup '([\w.]+)' does not accept option '(\w+)'", text)
    flag = re.search(r"unrecognized arguments: --([\w.\-]+)", text)
    bare = re.search(r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '(\w+)'", text)
    name = None
    if group:
        name = f"{group[1]}.{group[2]}"
    elif flag:
        name = flag[1].replace("-", "_")
    elif bare:
        name = bare[1] or bare[2]
    if name is None:
        return UserError(text)
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    near = near or [by_last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_last), 1, 0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else "; --help lists all"
    return UserError(f"unknown configuration key {name!r}{hint}")


def parse(parser: jsonargparse.ArgumentParser, argv: list[str]) -> Config:
    """The checked Config. UserError on bad input."""
    try:
        init = parser.instantiate(parser.parse_args(argv))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise _explain(error) from None
    return check(Config(**{f.name: init[f.name] for f in fields(Config)}))


def load(path: Path) -> Config:
    """The config saved in a run folder."""
    return parse(make_parser("repo", ""), ["--config", str(path)])
