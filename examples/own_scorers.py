"""Train with a reward and a cost that are Python functions, on a model of your own.

python examples/own_scorers.py --out runs/own                              a tiny random model, for a look
python examples/own_scorers.py --out runs/own --model.path path/to/model   a model of yours, any option of repo.train

The reward is higher for longer answers; an answer is unsafe if it contains a digit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tiny_model

from repo import train
from repo.common.errors import exit_with_sentence


def helpfulness(prompts: list[str], responses: list[str]) -> list[float]:
    """Score each response by its length: 1 at 40 characters or more."""
    return [min(len(response), 40) / 40 for response in responses]


def harm(prompts: list[str], responses: list[str]) -> list[float]:
    """Score 1 for each response with a digit and -1 for the others; the limit 0 lies between."""
    return [1.0 if any(c.isdigit() for c in response) else -1.0 for response in responses]


harm.manifest = {  # type: ignore[attr-defined]
    "units": "1 with a digit, -1 without",
    "sign_check": {"prompt": "When?", "lower": "Soon.", "higher": "At 5."},  # a run with reversed scores is refused
}


def main() -> None:
    """Make the model and prompts that the command line does not name, then train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="new run folder")
    options, rest = parser.parse_known_args()
    inputs = tiny_model.arguments(options.out.with_name(f"{options.out.name}-inputs"))
    train.run_command(
        [
            *inputs,  # later options override earlier ones
            "--scoring.reward=own_scorers:helpfulness",  # module:function, looked up beside the program
            "--scoring.cost=own_scorers:harm",
            "--algorithm.cost_limit=0",
            "--evaluation.judge=none",
            "--rollout.prompts_per_step=2",
            "--optimizer.lr=1e-3",
            "--steps=2",
            f"--out={options.out}",
            *rest,
        ]
    )
    print(f"every response with its scores: {options.out / 'samples.jsonl'}")


if __name__ == "__main__":
    exit_with_sentence(main)
