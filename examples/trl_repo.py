"""Train the embedded model in TRL with a reward and a cost: your own GRPO script with RePOTrainer in it.

pip install 'repo-rlhf[embedded,trl]' and, once, python -m repo.assets; then python examples/trl_repo.py --out runs/trl

RePOTrainer takes what GRPOTrainer takes and `cost_funcs`. Here reward and cost are the embedded scorers; any function
of TRL's signature will do. A response is safe iff its cost is at most 0, which is where the scorer's threshold lies.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from repo.assets import ensure
from repo.common.errors import exit_with_sentence
from repo.scoring.embedded import HeadScorer
from repo_kernels.integrations.trl import RePOConfig, RePOTrainer

COLUMNS = ("lam", "safe_rate", "rectified_cost", "compensation_gap", "reward", "kl")


def scorer_function(scorer: HeadScorer, name: str) -> Any:
    """Give a scorer of (prompts, responses) the signature of TRL's reward functions."""

    def score(prompts: list[Any], completions: list[Any], **_: object) -> list[float]:
        asked, said = [turns[-1]["content"] for turns in prompts], [turns[0]["content"] for turns in completions]
        return scorer(asked, said).tolist()

    score.__name__ = name  # TRL logs it as rewards/<name>, RePOTrainer as costs/<name>
    return score


class PrintSteps(TrainerCallback):
    """Prints a line per step."""

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "lam" in logs:
            print(f"step {state.global_step}: " + ", ".join(f"{name} {logs[name]:.3f}" for name in COLUMNS), flush=True)


def main() -> None:
    """Train and print lambda and safety after each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--max_steps", type=int, default=5, help="a generation batch each")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a generation batch, with 4 responses each")
    parser.add_argument("--lam_lr", type=float, default=0.5, help="step of lambda per unit of mean {C - d}+")
    options = parser.parse_args()

    assets = ensure()
    reward = HeadScorer.load(assets / "scorers" / "reward")
    cost = HeadScorer.load(assets / "scorers" / "cost", model=reward.trunk.model, tokenizer=reward.trunk.tokenizer)
    records = [json.loads(line) for line in (assets / "prompts" / "train.jsonl").read_text().splitlines()]
    trainer = RePOTrainer(
        str(assets / "policy"),
        reward_funcs=scorer_function(reward, "helpfulness"),
        cost_funcs=scorer_function(cost, "harm"),
        args=RePOConfig(
            output_dir=str(options.out),
            max_steps=options.max_steps,
            per_device_train_batch_size=4,  # one prompt in each of the micro-batches
            gradient_accumulation_steps=options.prompts,
            num_generations=4,
            max_completion_length=24,
            learning_rate=2e-4,
            beta=0.02,
            cost_limit=0.0,
            lam_init=1.0,
            lam_lr=options.lam_lr,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in records]),
        processing_class=AutoTokenizer.from_pretrained(assets / "policy"),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[PrintSteps()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    print(f"lambda of the next batch would be {trainer.lam:.3f}")


if __name__ == "__main__":
    exit_with_sentence(main)
