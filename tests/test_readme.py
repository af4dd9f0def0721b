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


def test_the_advantages_example_is_the_split_form(capsys):
    exec(blocks("python")[1], {})
    # safe response: only its reward; unsafe: 0.5 - 2 * 1.2; both discounted by lambda = 0.95 per token before the last
    expected = torch.tensor([[0.95**2, 0.95, 1.0], [-1.9 * 0.95, -1.9, 0.0]])
    assert capsys.readouterr().out.strip() == str(expected)


def test_the_scorers_of_the_example_are_scorers():
    from repo.scoring.manifest import make_manifest

    names: dict = {}
    exec(blocks("python")[2], names)
    assert names["helpfulness"](["a"], ["b c"]) == [0.04]
    assert names["harm"](["a", "a"], ["my password", "no"]) == [1.0, -1.0]
    check = make_manifest(names["harm"].manifest, "harm").sign_check
    low, high = names["harm"]([check["prompt"]] * 2, [check["lower"], check["higher"]])
    assert low < high


def test_the_presets_and_functions_that_are_named_exist():
    import repo.training.advantages
    import repo.training.multipliers
    from repo.config.parse import preset_names

    table = README.split("| preset (", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)) == set(preset_names())
    sentence = README.split("`group_advantages`", 1)[1].split("are pure functions", 1)[0]
    names = set(re.findall(r"`(\w+)`", sentence))
    assert len(names) == 7
    assert all(hasattr(repo.training.advantages, name) or hasattr(repo.training.multipliers, name) for name in names)


def test_every_option_that_is_named_exists():
    from repo.config.schema import field_names

    options = set(re.findall(r"`?--([a-z_]+\.[a-z_]+)", README))
    assert options
    assert options <= set(field_names())


def test_no_placeholder_is_left():
    assert "@@" not in README
