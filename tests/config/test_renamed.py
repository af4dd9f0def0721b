"""Old names of fields and arguments keep working for one release, and say what the new ones are."""

import warnings

import pytest
import torch
import yaml

from repo.common.errors import UserError
from repo.config.fields import field_names
from repo.config.parse import make_parser, parse_config
from repo.config.renamed import RENAMED, new_name
from repo.training.advantages import gae, rectified_advantages

VALUES = {
    "algorithm.mode": "split",
    "algorithm.kl_ratio": False,
    "rollout.max_new_tokens": 7,
    "critic.start": "scorers",
    "critic.discount": 0.5,
    "critic.trace": 0.25,
    "optimizer.states": "bfloat16",
}


def value_of(config, name: str):
    group, field = name.split(".")
    return getattr(getattr(config, group), field)


def test_every_old_name_is_gone_and_every_new_one_is_there():
    assert VALUES.keys() == RENAMED.keys()
    assert not RENAMED.keys() & set(field_names())
    assert set(RENAMED.values()) <= set(field_names())
    assert new_name("algorithm.mode") == new_name("algorithm.cost_mode") == "algorithm.cost_mode"


@pytest.mark.parametrize("old", VALUES)
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_an_old_option_sets_the_new_field_and_says_so(old, form, capsys):
    config = parse_config(make_parser("repo", ""), form.format(old, str(VALUES[old]).lower()).split())
    assert value_of(config, RENAMED[old]) == VALUES[old]
    assert f"--{old} is now --{RENAMED[old]}" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_a_file_of_old_names_is_read_and_each_is_named(form, tmp_path, capsys):
    path, content = tmp_path / "run.yaml", {}
    for name, value in VALUES.items():
        content.setdefault(name.split(".")[0], {})[name.split(".")[1]] = value
    path.write_text(yaml.safe_dump(content))
    config = parse_config(make_parser("repo", ""), form.format(path).split())
    told = capsys.readouterr().err
    for old, new in RENAMED.items():
        assert value_of(config, new) == VALUES[old]
        assert f"{path}: {old} is now {new}" in told


def test_an_override_under_either_name_wins_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("critic: {discount: 0.5}\n")
    for option in ("--critic.gamma=0.75", "--critic.discount=0.75"):
        config = parse_config(make_parser("repo", ""), ["--config", str(path), option], warn=lambda _: None)
        assert config.critic.gamma == 0.75


def test_a_file_that_gives_a_field_both_names_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("critic: {discount: 0.5, gamma: 0.5}\n")
    with pytest.raises(UserError, match=r"gives both critic\.discount and critic\.gamma"):
        parse_config(make_parser("repo", ""), ["--config", str(path)])


@pytest.mark.parametrize("text", ["critic: [discount", "- a\n- b\n", "critic: {discuont: 1.0}\n", "critic: 3\n"])
def test_files_with_other_faults_are_refused_as_ever(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        parse_config(make_parser("repo", ""), ["--config", str(path)])


def test_new_names_are_not_commented_on(capsys):
    parse_config(make_parser("repo", ""), ["--critic.gamma=0.5", "--algorithm.cost_mode=split"])
    assert capsys.readouterr().err == ""


def test_functions_take_old_keywords_with_a_warning():
    mask, values = torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 3)
    with pytest.warns(DeprecationWarning, match="discount is now gamma"):
        old = gae(values, values, mask, discount=0.5, trace=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = gae(values, values, mask, gamma=0.5, gae_lambda=0.25)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    signals = torch.tensor([1.0, 0.5]), torch.tensor([0.2, 0.4]), torch.tensor([-1.0, 1.0])
    with pytest.warns(DeprecationWarning, match="mode is now cost_mode"):
        combined = rectified_advantages(*signals, lam=2.0, mode="split")
    assert torch.equal(combined, rectified_advantages(*signals, 2.0, "split"))
    with pytest.raises(TypeError, match="both discount and gamma"):
        gae(values, values, mask, discount=0.5, gamma=0.5)


@pytest.mark.parametrize(
    ("old", "new"), [("repo.advantages", "training.advantages"), ("repo.penalty", "training.multipliers")]
)
def test_documented_modules_are_found_under_their_old_names(old, new):
    import importlib
    import sys

    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now repo.{new}"):
        module = importlib.import_module(old)
    current = importlib.import_module(f"repo.{new}")
    public = [n for n, v in vars(current).items() if getattr(v, "__module__", "") == current.__name__ and n[0] != "_"]
    assert public
    assert all(getattr(module, name) is getattr(current, name) for name in public)
