"""Evaluator: sample responses to held-out prompts, and score them as in training and by a judge kept out of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ..common.distributed import ALONE, World
from ..config.schema import Config
from ..data.prompts import Prompt
from ..models.actor import Actor, read_reference
from ..models.policy import Policy
from ..rollout.sample import sample
from ..runs.console import progress_bar
from ..runs.folder import Run, versions
from ..runs.json_lines import finite
from ..scoring.judge import Judge
from ..scoring.scorers import Scorers
from .kinds import measured_by_kind
from .responses import columns_of, records_of
from .statistics import RENAMED, Evaluation


@dataclass(frozen=True)
class Evaluator:
    """Measures policies on the same held-out prompts.

    config: sampling, seed, cost limit and samples per prompt are read from it.
    prompts: held-out prompts.
    scorers: the reward and cost of training.
    judge: scorer that took no part in training; None leaves its verdicts out.
    reference: model that KL and perplexity are measured by; None leaves them out.
    console: where progress is printed.
    world: processes that share the prompts; each gets the whole result.
    """

    config: Config
    prompts: list[Prompt]
    scorers: Scorers
    judge: Judge | None
    reference: Actor | None
    console: Console
    world: World = ALONE

    def __call__(self, policy: Policy, advance: Callable[[int], None] = lambda _: None) -> Evaluation:
        """Sample responses of a policy and score them.

        Every policy is sampled with the same random numbers, which makes evaluations paired.

        advance: called with the number of prompts done since its last call.
        """
        part = self.world.slice(len(self.prompts))
        mine, k = self.prompts[part.start : part.stop], self.config.evaluation.samples_per_prompt
        order = sorted(range(len(mine)), key=lambda i: len(mine[i].token_ids))
        per_batch = max(1, self.config.rollout.batch_size // k)
        by_prompt: dict[int, list[dict[str, Any]]] = {}
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            records = self._records(policy, [mine[i] for i in chosen])
            by_prompt |= {i: records[n * k : (n + 1) * k] for n, i in enumerate(chosen)}
            advance(len(chosen) * self.world.size)
        whole = self.world.gather([record for i in range(len(mine)) for record in by_prompt[i]])
        return Evaluation([record for records in whole for record in records], self.config.algorithm.cost_limit)

    def _records(self, policy: Policy, prompts: list[Prompt]) -> list[dict[str, Any]]:
        """Sample samples_per_prompt responses to each of a few prompts; return their records, prompt by prompt."""
        config, r = self.config, self.config.rollout
        rollout = sample(policy, prompts, config.evaluation.samples_per_prompt, r, config.seed, "evaluation")
        texts, reading = list(rollout.texts), None
        columns: dict[str, Sequence[Any]] = {
            "tokens": rollout.sequences.response_lengths.tolist(),
            "surprise": (-rollout.logps.double().sum(1)).tolist(),
            "truncated": rollout.truncated.tolist(),
        }
        if self.reference is not None:
            layers, budget = self.scorers.layers_of(self.reference.lm.model), config.optimizer.budget
            ref_logps, reading = read_reference(self.reference, rollout.sequences, r.temperature, budget, layers, True)
            assert reading is not None
            columns["ref_logp"] = torch.stack(list(reading.logps)).double().sum(1).tolist()
            columns["kl"] = (rollout.logps.double() - ref_logps.double()).sum(1).tolist()
        scores = self.scorers(rollout.prompts, texts, reading)
        columns |= columns_of(rollout.prompts, texts, scores, self.judge)
        return records_of(rollout.prompts, texts, columns)

    def with_progress(self, title: str, policy: Policy) -> Evaluation:
        """Evaluate a policy under a progress bar, and print how long it took. title: label of the bar."""
        started = time.perf_counter()
        with progress_bar(self.console) as bar:
            task = bar.add_task(escape(title), total=len(self.prompts))
            evaluation = self(policy, lambda n: bar.advance(task, n))
        line = f"{title}: {len(evaluation.records)} responses in {time.perf_counter() - started:.0f} s"
        self.console.print(line, highlight=False, markup=False)
        return evaluation

    def into_run(self, run: Run, name: str, policy: Policy) -> Evaluation | None:
        """Evaluate a policy into RUN/eval/<name>.json, or read that file if a resumed run already has it.

        A file made with other settings, which --allow-change permits, is replaced. Returns None if there are no
        held-out prompts.
        """
        if not self.prompts:
            return None
        known, ids = run.read_evaluation(name), [p.id for p in self.prompts]
        if isinstance(known, dict):
            known = {"stop_tokens": []} | {RENAMED.get(key, key): value for key, value in known.items()}
            same = all(known.get(key) == value for key, value in settings_of(self.config).items())
            every = self.config.evaluation.samples_per_prompt
            if same and [r["id"] for r in known["responses"]][::every] == ids:
                return Evaluation(known["responses"], self.config.algorithm.cost_limit)
        evaluation = self.with_progress(f"evaluation {name} training", policy)
        run.write_evaluation(name, content_of(self.config, evaluation, policy=name))
        return evaluation


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that an evaluation depends on besides policy and prompts, in the types that JSON has."""
    settings = {
        "cost_limit": config.algorithm.cost_limit,
        "seed": config.seed,
        "max_response_tokens": config.rollout.max_response_tokens,
        "temperature": config.rollout.temperature,
        "stop_tokens": config.rollout.stop_tokens,
        "top_p": config.rollout.top_p,
        "reward_scorer": config.scoring.reward,
        "cost_scorer": config.scoring.cost,
        "judge": config.evaluation.judge,
    }
    return dict(json.loads(json.dumps(settings)))


def content_of(config: Config, evaluation: Evaluation, **about: Any) -> dict[str, Any]:
    """Build the content of an evaluation file: settings, versions, the summary and every response.

    about: further keys, such as the policy's name.
    """
    settings = {**settings_of(config), "data": config.data.eval, "versions": versions()}
    summary = evaluation.summary() | {"kinds": measured_by_kind(evaluation)}
    return {**about, **settings, **finite({"summary": summary, "responses": evaluation.records})}
