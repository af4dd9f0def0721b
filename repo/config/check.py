"""Check: fields of the configuration that do not go together."""

from __future__ import annotations

from datetime import date
from math import isfinite

from ..common.errors import UserError
from .schema import BOUNDED, AlgorithmConfig, Config, CriticConfig, PenaltyConfig

LEAST_TEMPERATURE = 0.01  # of vLLM


def _require(ok: bool, name: str, value: object, takes: str) -> None:
    """Raise UserError, "name must be takes; got value", unless `ok`."""
    if not ok:
        raise UserError(f"{name} must be {takes}; got {value!r}")


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def check(config: Config) -> Config:
    """Return the config, or raise UserError if some of its fields do not go together.

    Types, and the ranges of single fields, are checked by the parser where the annotation states them.
    """
    r, a, o = config.rollout, config.algorithm, config.optimizer
    group = a.advantages == "group"
    if a.on_pairs:
        _check_pairs(config)
    why = ">= 2, since the baseline of a response is the mean of the others of its prompt"
    _require(
        r.samples_per_prompt >= 2 or not group or a.on_pairs, "rollout.samples_per_prompt", r.samples_per_prompt, why
    )
    _require(r.top_p > 0, "rollout.top_p", r.top_p, "> 0")
    _require(
        r.engine != "vllm" or r.temperature >= LEAST_TEMPERATURE,
        "rollout.temperature",
        r.temperature,
        f">= {LEAST_TEMPERATURE} with rollout.engine vllm, which raises lower ones to it",
    )
    redistributed = a.credit == "redistributed"
    _require(a.method != "ppo" or not redistributed, "algorithm.credit", a.credit, "terminal with method ppo")
    _require(
        not (redistributed and a.cost_mode == "split"),
        "algorithm.cost_mode",
        a.cost_mode,
        "rectified or barrier with algorithm.credit redistributed: whether a response is safe shows only at its end, "
        "and what its earlier tokens have a share of would bias the gradient",
    )
    _require(
        not (redistributed and a.scale_by_std),
        "algorithm.scale_by_std",
        True,
        "false with algorithm.credit redistributed, whose advantages are of tokens",
    )
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
    _check_penalty(a, config.penalty)
    gate = config.gate
    _require(bool(gate.every) or not gate.tolerance, "gate.tolerance", gate.tolerance, "0 without gate.every")
    _require(all(b < 1 for b in o.betas), "optimizer.betas", list(o.betas), "two numbers in [0, 1)")
    sharded = config.model.shard != 1
    _require(not (sharded and config.model.lora_rank), "model.shard", config.model.shard, "1 with model.lora_rank")
    _require(
        not (sharded and o.state_dtype == "8bit"),
        "model.shard",
        config.model.shard,
        "1 with optimizer.state_dtype 8bit",
    )
    matmul, dtype = config.model.matmul_dtype, config.model.dtype
    _require(matmul != "bfloat16" or dtype == "float32", "model.matmul_dtype", matmul, f"auto with model.dtype {dtype}")
    d = config.data
    _require(d.date is None or _is_day(d.date), "data.date", d.date, "a day as YYYY-MM-DD, or null")
    batch = r.prompts_per_step * (1 if a.on_pairs else r.samples_per_prompt)
    what = "pairs" if a.on_pairs else "responses"
    _require(o.minibatches <= batch, "optimizer.minibatches", o.minibatches, f"in 1..{batch} ({what} per step)")
    return config


def _check_penalty(algorithm: AlgorithmConfig, penalty: PenaltyConfig) -> None:
    """Check the fields of lambda, of the barrier and of the limit's course."""
    method, limit = algorithm.method, algorithm.cost_limit
    positive = method in ("ppo_lagrangian", "interior_point")
    _require(penalty.initial > 0 or not positive, "penalty.initial", penalty.initial, f"> 0 with method {method}")
    bounded = method in BOUNDED
    _require(
        not bounded or penalty.max >= penalty.initial,
        "penalty.max",
        penalty.max,
        f">= penalty.initial = {penalty.initial}",
    )
    interior, greatest = method == "interior_point", penalty.max
    _require(not interior or isfinite(greatest), "penalty.max", greatest, "finite with method interior_point")
    slow = (
        "in [0, 1] with method interior_point, which divides the barrier's weight by 1 + lr after each step; try 0.05"
    )
    _require(not interior or penalty.lr <= 1, "penalty.lr", penalty.lr, slow)
    barrier = algorithm.cost_mode == "barrier"
    _require(not barrier or method == "repo", "algorithm.method", method, "repo with algorithm.cost_mode barrier")
    margin, tau, plain = algorithm.barrier_margin, algorithm.barrier_tau, Config()
    _require(barrier or not margin, "algorithm.barrier_margin", margin, "0 without algorithm.cost_mode barrier")
    width = plain.algorithm.barrier_tau
    _require(barrier or tau == width, "algorithm.barrier_tau", tau, f"{width} without algorithm.cost_mode barrier")
    schedule, start, over = penalty.limit_schedule, penalty.limit_start, penalty.limit_steps
    reads = method not in ("fixed_penalty", "ppo")
    takes = f"constant with method {method}, which has no limit"
    _require(reads or schedule == "constant", "penalty.limit_schedule", schedule, takes)
    _require(start is None or schedule != "constant", "penalty.limit_start", start, "null with limit_schedule constant")
    steps = plain.penalty.limit_steps
    unused = f"{steps} with limit_schedule constant"
    _require(over == steps or schedule != "constant", "penalty.limit_steps", over, unused)
    in_range = start is None or (isfinite(start) and start >= limit)
    _require(in_range, "penalty.limit_start", start, f"finite and >= algorithm.cost_limit = {limit}, or null")


UNUSED_ON_PAIRS = {
    "algorithm": (
        *("cost_mode", "advantages", "credit", "crpo_tolerance", "kl_placement", "kl_target", "kl_estimator"),
        *("kl_importance_weighted", "clip_range", "dual_clip", "entropy_coef", "normalize", "scale_by_std"),
        "loss_agg_mode",
    ),
    "penalty": ("limit_schedule",),
    "rollout": ("truncated", "engine", "truncation_penalty"),
    "ptx": ("data", "coef"),
    "critic": tuple(vars(CriticConfig())),
}
"""Group -> fields that cdpo and repo_dpo do not use."""


def _check_pairs(config: Config) -> None:
    """Raise UserError for a field that has no effect with methods that learn from pairs, and for a beta of 0."""
    method, plain = config.algorithm.method, Config()
    for group, names in UNUSED_ON_PAIRS.items():
        for name in names:
            value, default = (getattr(getattr(c, group), name) for c in (config, plain))
            only = "null" if default is None else default
            _require(value == default, f"{group}.{name}", value, f"{only} with method {method}, which does not use it")
    _require(config.algorithm.beta > 0, "algorithm.beta", config.algorithm.beta, f"> 0 with method {method}")
