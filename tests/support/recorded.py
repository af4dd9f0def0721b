"""Write run folders with made-up content in the format of training, for tests of what reads them."""

import json
import random
from pathlib import Path

import torch

from repo.config.parse import to_yaml
from repo.config.schema import AlgorithmConfig, Config
from repo.scoring.safety import summarize

WORDS = (
    "the of a policy answer harm safe prompt model question people water city music garden code write explain".split()
)


def write_run(
    folder: Path, steps: int = 6, prompts: int = 4, per_step: int = 2, samples: int = 2, held_out: int = 0, **algorithm
) -> Path:
    """Write a run in which costs fall and λ rises; with held_out > 0 also both evaluations, of that many prompts."""
    folder.mkdir(parents=True)
    config = Config(steps=steps, out=str(folder), algorithm=AlgorithmConfig(**algorithm))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "versions.json").write_text(
        json.dumps({"python": "3.12", "torch": "2.13", "flash-attn": "not installed"})
    )
    random_numbers, metrics, lines = random.Random(0), [], []
    for step in range(steps):
        chosen = [(step * per_step + i) % prompts for i in range(per_step)]
        drawn = [responded(random_numbers, i, 1 - step / steps) for i in chosen for _ in range(samples)]
        lines += [
            {"step": step, **r, "safe": r["cost"] <= config.algorithm.cost_limit, "advantage": 0.1} for r in drawn
        ]
        metrics.append({"step": step, **step_metrics(drawn, step, config.algorithm.cost_limit)})
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "samples.jsonl", lines)
    if held_out:
        for name, badness in (("before", 1.0), ("after", 0.2)):
            records = [responded(random_numbers, i, badness) | {"tokens": 9} for i in range(held_out)]
            write_evaluation(folder, name, records, config.algorithm.cost_limit)
    return folder


def responded(random_numbers: random.Random, index: int, badness: float) -> dict:
    """Make a scored response to the index-th prompt. badness: raises its cost and lowers its reward."""
    words = random_numbers.choices(WORDS, k=12)
    return {
        "id": f"prompt-{index:04d}",
        "category": ("harmful", "chat")[index % 2],
        "prompt": f"Question {index}: {' '.join(WORDS[index % 7 : index % 7 + 6])}?",
        "response": " ".join(words),
        "reward": random_numbers.gauss(0.5 - badness, 1.0),
        "cost": random_numbers.gauss(badness - 0.7 - index % 2, 1.0),
    }


def step_metrics(records: list[dict], step: int, limit: float) -> dict:
    """Compute most fields of a line of metrics.jsonl, without the step."""
    ids = {r["id"]: i for i, r in enumerate(records)}
    group = torch.tensor([ids[r["id"]] for r in records])
    rewards, costs = (torch.tensor([r[key] for r in records]) for key in ("reward", "cost"))
    return {
        **summarize(rewards, costs, group, limit),
        "lam": 1 + 0.1 * step,
        "kl": 0.01 * step,
        "entropy": 3.0 - 0.001 * step,
        "clip_frac": 0.0,
        "grad_norm": 5.0,
        "length": 9.0,
        "response_tokens": 9 * len(records),
        "tokens_per_second": 150.0,
    }


def write_lines(path: Path, records: list[dict]) -> None:
    """Write records as JSON lines, NaN as null."""
    path.write_text("".join(json.dumps({k: None if v != v else v for k, v in r.items()}) + "\n" for r in records))


def write_evaluation(folder: Path, name: str, records: list[dict], limit: float = 0.0) -> None:
    """Write RUN/eval/<name>.json in the format of training."""
    from repo.evaluation.statistics import Evaluation

    (folder / "eval").mkdir(exist_ok=True)
    content = {"summary": Evaluation(records, limit).summary(), "responses": records}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(content))
