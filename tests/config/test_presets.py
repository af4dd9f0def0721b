"""The configurations that come with the package."""

import json
from itertools import pairwise

import pytest
import yaml

from repo import train
from repo.assets.build import FITTED
from repo.assets.prompts import SYSTEM_PROMPT
from repo.assets.rows import TEMPERATURE
from repo.command import read_command
from repo.common.errors import UserError
from repo.config.fields import field_names
from repo.config.parse import PRESETS, load_config, preset_names
from repo.config.schema import Config


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_there_are_at_most_85_fields_and_each_is_documented(capsys):
    assert len(field_names()) <= 85
    with pytest.raises(SystemExit):
        train.run_command(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in field_names():
        entry = shown.split(f"--{name} ", 1)[1].split(" --", 1)[0]
        words = entry.split("(type:")[0].split()
        assert len(words) >= 4, f"{name} has no docstring: {entry}"


def test_the_default_preset_is_the_defaults_field_by_field():
    assert load_config(PRESETS / "default.yaml") == Config()
    nested = yaml.safe_load((PRESETS / "default.yaml").read_text())
    groups = {group: value for group, value in nested.items() if isinstance(value, dict)}
    named = {f"{group}.{name}" for group, value in groups.items() for name in value}
    assert named | (nested.keys() - groups.keys()) == set(field_names())


def test_the_paper_preset_is_the_papers_form():
    algorithm = load_config(PRESETS / "paper.yaml").algorithm
    assert (algorithm.advantages, algorithm.cost_mode, algorithm.kl_placement) == ("gae", "split", "reward")
    assert algorithm.method == "repo"
    assert not algorithm.normalize


@pytest.mark.parametrize("start", ["policy", "scorers"])
def test_the_paper_preset_trains_and_lambda_follows_its_rule(start, tiny_arguments, tmp_path, scorer_folder):
    options = ["--preset=paper", *tiny_arguments, "--evaluation.prompts=0", f"--critic.init_from={start}"]
    if start == "scorers":
        options += [f"--scoring.reward={scorer_folder}", f"--scoring.cost={scorer_folder}", "--critic.lr=1e-4"]
    train.run_command([*options, f"--out={tmp_path / 'run'}"])
    records = lines(tmp_path / "run")
    for this, following in pairwise(records):
        assert following["lam"] == min(this["lam"] + 2.0 * this["rectified_cost"], 10.0)
    assert all(r["reward_value_loss"] >= 0 and r["cost_value_loss"] >= 0 and r["skipped"] == 0 for r in records)
    assert "cost_explained_variance" in records[0]


def test_a_run_with_critics_and_ptx_resumes_bit_for_bit(tiny_arguments, tmp_path):
    answers = tmp_path / "answers.jsonl"
    pairs = [{"prompt": f"Question {i}?", "response": f"It is {i}."} for i in range(5)]
    answers.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = ["--preset=paper", *tiny_arguments, "--evaluation.prompts=0", f"--ptx.data={answers}"]
    options += ["--optimizer.minibatches=2", "--algorithm.kl_target=0.05"]
    train.run_command([*options, f"--out={tmp_path / 'whole'}"])
    train.run_command([*options, f"--out={tmp_path / 'part'}", "--steps=2"])
    train.run_command(["--resume", str(tmp_path / "part"), "--steps=4"])
    whole, part = (
        [{k: v for k, v in r.items() if "seconds" not in k and "tokens_per" not in k} for r in lines(tmp_path / name)]
        for name in ("whole", "part")
    )
    assert whole == part
    assert whole[0]["ptx_loss"] > 0
    assert whole[1]["beta"] != whole[0]["beta"]


def test_a_dry_run_says_that_critics_of_their_own_are_not_counted(tiny_arguments, capsys):
    train.run_command(["--preset=paper", *tiny_arguments, "--critic.init_from=scorers", "--dry-run"])
    assert "nor the critics, 16 bytes per parameter" in capsys.readouterr().out


def test_one_sample_per_prompt_needs_critics(tiny_arguments, tmp_path):
    single = [*tiny_arguments, "--rollout.samples_per_prompt=1", "--evaluation.prompts=0", "--steps=1"]
    with pytest.raises(UserError, match="samples_per_prompt must be >= 2"):
        train.run_command([*single, f"--out={tmp_path / 'group'}"])
    train.run_command(["--preset=paper", *single, f"--out={tmp_path / 'gae'}"])
    assert len(lines(tmp_path / "gae")) == 1


@pytest.mark.parametrize("name", ["7b-lora-one-gpu", "7b-full-fsdp"])
def test_large_presets_resolve_and_print_their_arithmetic(name, tiny_model, tiny_prompts, tmp_path, capsys):
    assert name in preset_names()
    data = [f"--data.train={tiny_prompts[0]}", f"--data.eval={tiny_prompts[1]}", "--rollout.max_response_tokens=8"]
    train.run_command([f"--preset={name}", f"--model.path={tiny_model}", *data, "--dry-run"])
    printed = capsys.readouterr().out
    assert ("policy without its adapter" in printed) == ("lora" in name)
    assert f"preset: {name}\n" in printed
    assert "x 4 samples" in printed


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(UserError, match="7b-full-fsdp.*default.*paper"):
        train.run_command(["--preset=papers"])


def test_several_processes_without_torchrun_are_a_sentence(monkeypatch, tiny_arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"WORLD_SIZE is 2 but \$RANK is not set; start several processes with torchrun"
    ):
        train.run_command(tiny_arguments)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"WORLD_SIZE must be a number"):
        train.run_command(tiny_arguments)


@pytest.mark.parametrize("arguments", [[], ["--steps=3"], ["--scoring.timeout=9"]])
def test_the_default_run_starts_from_the_embedded_preset(arguments):
    switches, config = read_command([*arguments, "--seed=4"], "")
    assert switches.presets == ["embedded"]
    assert config.data.system_prompt == SYSTEM_PROMPT
    assert (config.rollout.temperature, config.seed) == (TEMPERATURE, 4)


@pytest.mark.parametrize(
    "own", ["--model.path=mine", "--data.train=mine.jsonl", f"--config={PRESETS / 'default.yaml'}"]
)
def test_with_a_model_prompts_or_configuration_of_ones_own_it_does_not(own):
    switches, config = read_command([own], "")
    assert switches.presets == []
    assert config.data.system_prompt is None


def test_presets_apply_in_turn():
    _, config = read_command(["--preset=embedded", "--preset=paper", "--steps=2"], "")
    assert (config.steps, config.algorithm.advantages, config.data.system_prompt) == (2, "gae", SYSTEM_PROMPT)


def test_the_embedded_scorers_were_fitted_with_the_presets_system_message():
    for signal in ("reward", "cost"):
        assert json.loads((FITTED / signal / "scorer.json").read_text())["system_prompt"] == SYSTEM_PROMPT


def test_the_presets_of_neighbouring_methods_change_what_they_are_named_for():
    _, simmer = read_command(["--preset=embedded", "--preset=simmer"], "")
    assert (simmer.penalty.limit_schedule, simmer.penalty.limit_start) == ("pi", None)
    assert simmer.penalty.limit_steps < simmer.steps
    _, barrier = read_command(["--preset=barrier"], "")
    assert (barrier.algorithm.method, barrier.algorithm.cost_mode) == ("repo", "barrier")
    for config, group, names in (
        (read_command(["--preset=simmer"], "")[1], "penalty", {"limit_schedule", "limit_steps"}),
        (barrier, "algorithm", {"cost_mode", "barrier_tau"}),
    ):
        plain = Config()
        changed = {k for k, v in vars(getattr(config, group)).items() if v != getattr(getattr(plain, group), k)}
        assert changed == names
