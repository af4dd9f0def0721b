"""Values of fields: what is refused says what the field takes; paths, negative numbers and lists are read as meant."""

from pathlib import Path

import pytest

from repo.common.errors import UserError
from repo.config.fields import field_names, field_types
from repo.config.hints import ELSEWHERE
from repo.config.parse import make_parser, parse_config

PATHS = {
    "out": "out",
    "model.path": "model",
    "data.train": "data",
    "data.eval": "data",
    "ptx.data": "data",
    "scoring.reward": "clf#label",
    "scoring.cost": "clf",
    "evaluation.judge": "judge",
}


def parsed(*argv):
    return parse_config(make_parser("repo.train", ""), list(argv))


def from_file(folder: Path, text: str):
    path = folder / "run.yaml"
    path.write_text(text)
    return parsed("--config", str(path))


def value_of(config, name: str):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_an_empty_file_changes_nothing(tmp_path):
    assert from_file(tmp_path, "# nothing yet\n") == parsed()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- steps\n", r"must be a mapping of fields and groups of fields; got \['steps'\]"),
        ("steps: 5\n\tx", "not YAML: "),
    ],
)
def test_a_file_that_is_no_mapping_is_named(text, reason, tmp_path):
    with pytest.raises(UserError, match=rf"run\.yaml: {reason}"):
        from_file(tmp_path, text)


@pytest.mark.parametrize("name", PATHS)
def test_a_tilde_is_the_home_folder_in_every_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert value_of(parsed(f"--{name}=~/x/{PATHS[name]}"), name) == f"/home/someone/x/{PATHS[name]}"


def test_a_tilde_is_the_home_folder_in_sums_of_scorers(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert from_file(tmp_path, "scoring: {cost: {~/a: 1, b: 2}}").scoring.cost == {"/home/someone/a": 1, "b": 2}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("algorithm: {beta: 1}\nalgorithm: {method: ppo}\n", "'algorithm'"),
        ("steps: 1\nseed: 2\nsteps: 3\n", "'steps'"),
        ("scoring:\n  cost: {a: 1, a: 2}\n", "'a'"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(text, key, tmp_path):
    with pytest.raises(UserError, match=rf"run\.yaml: {key} is given twice, in lines \d and \d"):
        from_file(tmp_path, text)


@pytest.mark.parametrize("name", field_names())
def test_null_is_refused_by_every_field_whose_type_has_none(name, tmp_path):
    group, _, field = name.rpartition(".")
    text = f"{group}: {{{field}: null}}" if group else f"{field}: null"
    if type(None) in getattr(field_types()[name], "__args__", ()):
        assert value_of(from_file(tmp_path, text), name) is None
    else:
        with pytest.raises(UserError, match=rf"{name} must be .*; got null"):
            from_file(tmp_path, text)


def test_a_group_takes_fields(tmp_path):
    for text in ("penalty: null", "penalty: 3"):
        with pytest.raises(UserError, match="penalty must be a group of fields; got"):
            from_file(tmp_path, text)
    with pytest.raises(UserError, match="model must be a group of fields"):
        parsed("--model", "5")


@pytest.mark.parametrize(("text", "value"), [("-1e-1", -0.1), ("-.5", -0.5), ("-2", -2.0), ("-1E+2", -100.0)])
def test_negative_numbers_need_no_equals_sign(text, value):
    assert parsed("--algorithm.cost_limit", text).algorithm.cost_limit == value


def test_an_integer_beyond_the_floats_is_refused():
    with pytest.raises(UserError, match="more than 308 digits"):
        parsed("--algorithm.cost_limit", str(10**400))


def test_an_option_with_hyphens_is_told_the_underscores():
    with pytest.raises(UserError, match="unknown option '--optimizer.micro-batch-tokens'; did you mean '--optimizer.m"):
        parsed("--optimizer.micro-batch-tokens", "4")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--optimizer.lr 0", "optimizer.lr must be a number > 0; got 0"),
        ("--optimizer.lr x", "optimizer.lr must be a number > 0; got 'x'"),
        ("--steps 1.5", "steps must be an integer > 0; got '1.5'"),
        ("--rollout.top_p 2", r"rollout.top_p must be a number in \[0, 1\]; got 2"),
        ("--model.compile maybe", "model.compile must be true or false or auto; got maybe"),
        ("--algorithm.method foo", "algorithm.method must be one of repo, .*, repo_dpo; got foo"),
        ("--algorithm.kl_target x", "algorithm.kl_target must be a number or null; got x"),
        (
            "--algorithm.clip_range 0.2",
            r"clip_range must be a list of two: a number in .*, a number >= 0; got 0.2",
        ),
        ("--loggers [foo]", "loggers must be a list, each element one of tensorboard, wandb, trackio; got foo"),
        ("--algorithm.beta", "--algorithm.beta needs a value: a number >= 0"),
    ],
)
def test_a_wrong_value_is_told_what_the_field_takes(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        parsed(*argv.split())


def test_a_single_value_is_a_list_of_one(tmp_path):
    assert parsed("--loggers", "wandb").loggers == parsed("--loggers=wandb").loggers == ["wandb"]
    assert from_file(tmp_path, "loggers: wandb\nrollout: {stop_tokens: 5}").loggers == ["wandb"]
    assert parsed("--rollout.stop_tokens", "<|end|>").rollout.stop_tokens == ["<|end|>"]
    assert parsed("--rollout.stop_tokens", "7").rollout.stop_tokens == [7]
    assert parsed("--rollout.stop_tokens", '["</s>", 7]').rollout.stop_tokens == ["</s>", 7]


def test_names_of_other_libraries_lead_to_fields():
    assert set(ELSEWHERE.values()) <= set(field_names())
    for key, field in (
        ("algorithm.kl_coef", "algorithm.beta"),
        ("num_generations", "rollout.samples_per_prompt"),
        ("penalty_max", "penalty.max"),
    ):
        with pytest.raises(UserError, match=f"unknown configuration key {key!r}; did you mean {field!r}"):
            parsed(f"--{key}", "1")


BARRIER = "--algorithm.cost_mode barrier "
INTERIOR = "--algorithm.method interior_point "
LINEAR = "--penalty.limit_schedule linear "


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (BARRIER + "--algorithm.barrier_tau 0", "algorithm.barrier_tau must be a number > 0; got 0"),
        (BARRIER + "--algorithm.barrier_tau inf", "algorithm.barrier_tau must be finite; got inf"),
        (BARRIER + "--algorithm.barrier_margin -1", "algorithm.barrier_margin must be a number >= 0; got -1"),
        (
            BARRIER + "--algorithm.method ppo",
            "algorithm.method must be repo with algorithm.cost_mode barrier; got 'ppo'",
        ),
        (
            "--algorithm.barrier_margin 0.5",
            "algorithm.barrier_margin must be 0 without algorithm.cost_mode barrier; got 0.5",
        ),
        (
            "--algorithm.barrier_tau 0.5",
            "algorithm.barrier_tau must be 0.1 without algorithm.cost_mode barrier; got 0.5",
        ),
        ("--penalty.limit_steps 20", "penalty.limit_steps must be 10 with limit_schedule constant; got 20"),
        ("--gate.tolerance 0.05", "gate.tolerance must be 0 without gate.every; got 0.05"),
        (INTERIOR, r"penalty.lr must be in \[0, 1\] with method interior_point, .*; got 2.0"),
        (INTERIOR + "--penalty.lr 0.1 --penalty.max inf", "penalty.max must be finite with method interior_point"),
        (INTERIOR + "--penalty.lr 0.1 --penalty.initial 0", "penalty.initial must be > 0 with method interior_point"),
        (INTERIOR + "--penalty.lr 0.1 --penalty.initial 11", "penalty.max must be >= penalty.initial = 11.0; got 10.0"),
        (
            LINEAR + "--algorithm.method fixed_penalty",
            "limit_schedule must be constant with method fixed_penalty, which has no limit; got 'linear'",
        ),
        (LINEAR + "--algorithm.method ppo", "limit_schedule must be constant with method ppo"),
        ("--penalty.limit_start 1", "penalty.limit_start must be null with limit_schedule constant; got 1.0"),
        (
            LINEAR + "--penalty.limit_start 0.5 --algorithm.cost_limit 1",
            r"penalty.limit_start must be finite and >= algorithm.cost_limit = 1.0, or null; got 0.5",
        ),
        (LINEAR + "--penalty.limit_steps 0", "penalty.limit_steps must be an integer > 0; got 0"),
        ("--penalty.limit_schedule pid", "penalty.limit_schedule must be one of constant, linear, pi; got pid"),
    ],
)
def test_fields_of_the_limit_and_the_barrier_that_do_not_go_together_are_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        parsed(*argv.split())


@pytest.mark.parametrize(
    "argv",
    [
        BARRIER + "--algorithm.barrier_margin 0.5",
        INTERIOR + "--penalty.lr 0.1 " + LINEAR,
        BARRIER + "--algorithm.barrier_tau 0.5",
        LINEAR + "--penalty.limit_start 0",
        "--penalty.limit_schedule pi --penalty.limit_steps 20",
        "--gate.every 5 --gate.tolerance 0.05",
        LINEAR + "--algorithm.method crpo",
        "--penalty.limit_schedule pi --algorithm.method ppo_lagrangian",
    ],
)
def test_fields_of_the_limit_and_the_barrier_that_go_together_are_accepted(argv):
    parsed(*argv.split())


@pytest.mark.parametrize("number", [".inf", ".nan"])
def test_a_first_limit_that_is_not_finite_is_refused(number, tmp_path):
    with pytest.raises(UserError, match="penalty.limit_start must be finite and >= algorithm.cost_limit = 0.0"):
        from_file(tmp_path, f"penalty: {{limit_schedule: pi, limit_start: {number}}}")
