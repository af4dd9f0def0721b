"""Train the same model by several methods and compare them prompt by prompt.

python examples/compare_methods.py --out runs/comparison                            a tiny random model, for a look
python examples/compare_methods.py --out runs/comparison --methods ppo crpo repo    other methods
python examples/compare_methods.py --out runs/comparison --steps 48 \\
    --model.path path/to/model --data.train train.jsonl --data.eval held_out.jsonl  your own; any option of repo.train

Reward and cost are those of own_scorers.py. The first method is the baseline of the comparison. A few
steps of a random model show the form of the result only: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tiny_model

from repo import compare, train
from repo.common.errors import exit_with_sentence


def main() -> None:
    """Train each method from the same seed, then compare the evaluations after training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the runs and their comparison")
    parser.add_argument("--methods", nargs="+", default=["ppo_lagrangian", "repo"], help="values of algorithm.method")
    parser.add_argument("--steps", type=int, default=3)
    options, rest = parser.parse_known_args()
    shared = [
        *tiny_model.arguments(options.out / "inputs"),
        "--scoring.reward=own_scorers:helpfulness",
        "--scoring.cost=own_scorers:harm",
        "--evaluation.judge=none",
        "--evaluation.samples_per_prompt=4",  # "mostly unsafe" says little about a single response
        "--rollout.prompts_per_step=2",
        "--optimizer.lr=1e-3",
        f"--steps={options.steps}",
        *rest,
    ]
    runs = [options.out / method for method in options.methods]
    for method, run in zip(options.methods, runs, strict=True):
        print(f"\n{method}")
        train.run_command([*shared, f"--algorithm.method={method}", f"--out={run}"])
    print()
    compare.run_command([*map(str, runs), "--out", str(options.out / "comparison")])


if __name__ == "__main__":
    exit_with_sentence(main)
