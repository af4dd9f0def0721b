"""Held-out prompts: a policy's responses, scored as in training and by a judge that took no part in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..common.distributed import ALONE, World
from ..config.schema import Config
from ..data.prompts import Prompt
from ..models.actor import Actor, read_reference
from ..models.policy import Policy
from ..rollout.sample import sample
from ..runs.console import finite, progress_bar
from ..runs.folder import Run, versions
from ..scoring.judge import Judging
from ..scoring.scorers import Scorers
from ..setup import Parts
from .reward_hacking import is_refusal, repetition
from .statistics import Evaluation


def evaluate_policy(
    config: Config,
    policy: Policy,
    reference: Actor | None,
    prompts: list[Prompt],
    scorers: Scorers,
    judge: Judging | None,
    advance: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
) -> Evaluation:
    """Sample, score and judge. The same seed gives the same random numbers to every policy, which pairs evaluations.

    reference: for the KL; None leaves it out. advance is called with numbers of prompts as they are done. Processes
    share the prompts, and all get the whole.
    """
    part = world.slice(len(prompts))
    mine = prompts[part.start : part.stop]
    order = sorted(range(len(mine)), key=lambda i: len(mine[i].token_ids))
    per_batch = max(1, config.rollout.batch_size // config.evaluation.samples_per_prompt)
    found: dict[int, list[dict[str, Any]]] = {}
    for start in range(0, len(order), per_batch):
        chosen = order[start : start + per_batch]
        records = _records(config, policy, reference, [mine[i] for i in chosen], scorers, judge)
        k = config.evaluation.samples_per_prompt
        found |= {i: records[n * k : (n + 1) * k] for n, i in enumerate(chosen)}
        advance(len(chosen) * world.size)
    whole = world.gather([record for i in range(len(mine)) for record in found[i]])
    return Evaluation([record for records in whole for record in records], config.algorithm.cost_limit)


def _records(
    config: Config,
    policy: Policy,
    reference: Actor | None,
    prompts: list[Prompt],
    scorers: Scorers,
    judge: Judging | None,
) -> list[dict[str, Any]]:
    """Of samples_per_prompt responses to each prompt, in their order."""
    r, budget = config.rollout, config.optimizer.micro_batch_tokens
    rollout = sample(policy, prompts, config.evaluation.samples_per_prompt, r, config.seed, "evaluation")
    texts, reading = list(rollout.texts), None
    columns: dict[str, list[Any]] = {
        "tokens": rollout.sequences.response_lengths.tolist(),
        "surprise": (-rollout.logps.double().sum(1)).tolist(),
    }
    if reference is not None:
        layers = scorers.layers_of(reference.settings.model)
        ref_logps, reading = read_reference(reference, rollout.sequences, r.temperature, budget, layers)
        columns["kl"] = (rollout.logps.double() - ref_logps.double()).sum(1).tolist()
    scores = scorers(rollout.prompts, texts, reading)
    columns |= {"reward": scores.rewards.tolist(), "cost": scores.costs.tolist()}
    columns |= {"refusal": [is_refusal(t) for t in texts], "repetition": [repetition(t) for t in texts]}
    if judge is not None:
        columns["judge_safe"] = judge(rollout.prompts, texts).tolist()
    return [
        {"id": p.id, "category": p.category, "prompt": p.text, "response": text}
        | {key: values[row] for key, values in columns.items()}
        for row, (p, text) in enumerate(zip(rollout.prompts, texts, strict=True))
    ]


def evaluated(
    config: Config, parts: Parts, folder: Run, name: str, console: Console, policy: Policy, world: World
) -> Evaluation | None:
    """`evaluate_policy` into RUN/eval/<name>.json, or what a resumed run has there; None without held-out prompts."""
    if not parts.eval_prompts:
        return None
    a, e = config.algorithm, config.evaluation
    known, ids = folder.read_evaluation(name), [p.id for p in parts.eval_prompts]
    # as it would be made now: what --allow-change changed is evaluated anew
    same = isinstance(known, dict) and all(known.get(key) == value for key, value in how_made(config).items())
    if same and [r["id"] for r in known["responses"]][:: e.samples_per_prompt] == ids:
        return Evaluation(known["responses"], a.cost_limit)
    reference = Actor(parts.reference)
    prompts, scorers, judge = parts.eval_prompts, parts.scorers, parts.judge
    found = with_progress(
        console, f"evaluation {name} training", config, policy, reference, prompts, scorers, judge, world
    )
    folder.write_evaluation(name, content_of(config, found, policy=name))
    return found


def with_progress(
    console: Console,
    title: str,
    config: Config,
    policy: Policy,
    reference: Actor | None,
    prompts: list[Prompt],
    scorers: Scorers,
    judge: Judging | None,
    world: World = ALONE,
) -> Evaluation:
    """evaluate_policy() under a progress bar, and a line that says how long it took."""
    started = time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task(escape(title), total=len(prompts))
        found = evaluate_policy(
            config, policy, reference, prompts, scorers, judge, lambda n: bar.advance(task, n), world
        )
    seconds = time.perf_counter() - started
    console.print(f"{title}: {len(found.records)} responses in {seconds:.0f} s", highlight=False, markup=False)
    return found


def how_made(config: Config) -> dict[str, Any]:
    """What an evaluation's numbers depend on besides policy and prompts, as JSON."""
    how = {
        "cost_limit": config.algorithm.cost_limit,
        "seed": config.seed,
        "max_new_tokens": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "reward_scorer": config.scoring.reward,
        "cost_scorer": config.scoring.cost,
        "judge": config.evaluation.judge,
    }
    return dict(json.loads(json.dumps(how)))


def content_of(config: Config, evaluation: Evaluation, **about: Any) -> dict[str, Any]:
    """What an evaluation's file holds: how it was made, its summary and every response."""
    how = {**how_made(config), "data": config.data.eval, "versions": versions()}
    return {**about, **how, **finite({"summary": evaluation.summary(), "responses": evaluation.records})}
