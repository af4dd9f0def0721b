"""Train a policy under a cost constraint: sample -> reference -> score -> advantages -> update -> record.

python -m repo.train                                  RePO on the embedded default, preset embedded
python -m repo.train --preset embedded --preset paper the paper's form: critics, cost mode split, KL in the reward
python -m repo.train --config run.yaml --steps 100    your own model, prompts, reward and cost
python -m repo.train --resume runs/repo-...           continue from the last checkpoint
"""

from __future__ import annotations

import sys

from .command import read_command
from .common.errors import exit_with_sentence


def run_command(argv: list[str]) -> None:
    """Run repo.train on this process. argv: the arguments after the program's name."""
    switches, config = read_command(argv, __doc__ or "")
    from .launch import launch  # after the arguments are read: torch takes seconds to load

    launch(switches, config)


def main() -> None:
    """Run repo.train as a console script."""
    exit_with_sentence(lambda: run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
