"""Filter the responses of a model: draw again until the cost is surely within the limit.

python examples/shield.py                          a tiny random model, for a look
python examples/shield.py --model path/to/model    a model of yours, or the final/ of a run

Two functions score the cost, so that their disagreement counts: a response is accepted if the mean plus 1.64 standard
deviations is within the limit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import tiny_model
import torch

from repo.common.errors import exit_with_sentence
from repo.config.schema import RolloutConfig
from repo.models.policy import load_policy
from repo.rollout.shield import Shield

LIMIT = 3.0


def digits(prompts: list[str], responses: list[str]) -> list[float]:
    """Count the digits of each response."""
    return [float(sum(c.isdigit() for c in response)) for response in responses]


def marks(prompts: list[str], responses: list[str]) -> list[float]:
    """Count the characters of each response that are neither letters nor spaces."""
    return [float(sum(not (c.isalpha() or c.isspace()) for c in response)) for response in responses]


def main() -> None:
    """Load the model, put the shield around it and ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="folder or hub name of a causal LM; default: a tiny random one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or str(tiny_model.save_model(Path(folder)))
        policy = load_policy(path, torch.device("cpu"), trainable=False)
    shield = Shield(
        policy,
        [digits, marks],
        limit=LIMIT,
        samples=8,
        refusal="I would rather not answer.",
        rollout=RolloutConfig(max_response_tokens=6),
    )
    answers = shield(tiny_model.QUESTIONS)
    for prompt, text, draws, upper in zip(
        answers.prompts, answers.texts, answers.draws.tolist(), answers.upper.tolist(), strict=True
    ):
        print(f"{prompt.text}  {text!r}  {draws} drawn, upper cost {upper:.2f}")
    print(f"accepted: {int(answers.accepted.sum())} of {len(answers.texts)}")


if __name__ == "__main__":
    exit_with_sentence(main)
