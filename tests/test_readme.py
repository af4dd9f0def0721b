"""What the README shows works."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Code blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_loss_example_runs_and_has_a_gradient():
    torch.manual_seed(0)
    names: dict = {}
    exec(blocks("python")[0], names)
    assert names["logits"].grad.abs().sum() > 0
    assert names["out"].stats.unsafe_fraction == 0.5


def test_the_scorers_of_the_example_are_scorers():
    names: dict = {}
    exec(blocks("python")[1], names)
    assert names["helpfulness"](["a"], ["b c"]) == [0.04]
    assert names["harm"](["a", "a"], ["my password", "no"]) == [1.0, -1.0]


def test_every_option_that_is_named_exists():
    from repo.config import field_names

    options = set(re.findall(r"`?--([a-z_]+\.[a-z_]+)", README))
    assert options
    assert options <= set(field_names())


def test_no_placeholder_is_left():
    assert "@@" not in README
