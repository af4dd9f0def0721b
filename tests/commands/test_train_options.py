"""Every method and option trains, and what the command prints without training."""

import pytest

from repo import train
from repo.common.errors import UserError
from tests.support.run_folders import lines, run


def test_switches_are_not_abbreviated_and_not_read_from_yaml(tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="unknown configuration key 'resum'"):
        train.run_command([*tiny_arguments, "--resum", str(tmp_path)])
    path = tmp_path / "with_resume.yaml"
    path.write_text("resume: somewhere\n")
    with pytest.raises(UserError, match="resume"):
        run(tiny_arguments, tmp_path / "run", f"--config={path}")


def test_nothing_embedded_is_needed_when_nothing_embedded_is_used(tiny_arguments, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise train.run.UserError("a package is missing")

    monkeypatch.setattr("repo.assets.build", missing)
    options = ["--data.eval=embedded", "--evaluation.prompts=0", "--steps=1"]
    assert len(lines(run(tiny_arguments, tmp_path / "run", *options))) == 1


@pytest.mark.parametrize("method", ["ppo", "crpo", "fixed_penalty", "ppo_lagrangian"])
def test_every_method_trains(method, tiny_arguments, tmp_path):
    folder = run(
        tiny_arguments, tmp_path / method, f"--algorithm.method={method}", "--steps=2", "--evaluation.prompts=0"
    )
    lams = [r["lam"] for r in lines(folder)]
    assert lams[0] == (0.0 if method in ("ppo", "crpo") else 1.0)
    assert (lams[1] != lams[0]) == (method == "ppo_lagrangian")


@pytest.mark.parametrize(
    "options",
    [
        ["--algorithm.cost_mode=split"],
        ["--algorithm.kl_placement=reward", "--algorithm.beta=0.1"],
        ["--algorithm.kl_placement=reward-and-cost", "--algorithm.cost_mode=split"],
        ["--algorithm.advantages=gae", "--algorithm.method=crpo"],
        ["--algorithm.advantages=gae", "--algorithm.method=ppo", "--optimizer.epochs=2"],
        ["--algorithm.advantages=gae", "--algorithm.method=ppo_lagrangian", "--algorithm.entropy_coef=0.01"],
        ["--model.dtype=bfloat16", "--model.gradient_checkpointing=true"],
        ["--model.dtype=bfloat16", "--model.lora_rank=2", "--algorithm.advantages=gae"],
        ["--loggers=[tensorboard]"],
        ["--algorithm.scale_by_std=true"],
        ["--optimizer.epochs=2", "--optimizer.minibatches=2", "--algorithm.dual_clip=3"],
        ["--algorithm.kl_estimator=k2", "--algorithm.loss_agg_mode=seq-mean-token-mean", "--algorithm.normalize=true"],
    ],
)
def test_every_option_trains(options, tiny_arguments, tmp_path):
    folder = run(tiny_arguments, tmp_path / "run", "--steps=1", "--evaluation.prompts=0", *options)
    assert lines(folder)[0]["skipped"] == 0
    assert lines(folder)[0]["grad_norm"] > 0


def test_training_towards_a_reward_raises_it(tiny_arguments, tmp_path):
    options = ["--steps=25", "--evaluation.prompts=0", "--save_every=0", "--algorithm.method=ppo", "--algorithm.beta=0"]
    folder = run(tiny_arguments, tmp_path / "ppo", *options, "--optimizer.lr=3e-3", "--rollout.samples_per_prompt=8")
    rewards = [r["reward_mean"] for r in lines(folder)]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


def test_dry_run_reads_shapes_and_writes_nothing(tiny_arguments, tmp_path, capsys):
    run(tiny_arguments, tmp_path / "dry", "--dry-run")
    printed = capsys.readouterr().out
    assert "at most at once, without what scorers and libraries allocate while they run\n" in printed
    assert "activations" in printed
    assert "train prompts: 4 of" in printed
    assert "2 prompts x 3 samples = 6 responses" in printed
    assert "GiB  AdamW states" in printed
    assert not (tmp_path / "dry").exists()


def test_a_dry_run_refuses_a_stop_token_that_the_run_would(tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="rollout.stop_tokens: 'What is' must be one token of the tokenizer"):
        run(tiny_arguments, tmp_path / "dry", "--dry-run", "--rollout.stop_tokens=What is")


def test_printed_config_is_a_config(tiny_arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tiny_arguments, tmp_path / "x", "--print_config")
    assert stopped.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    train.run_command(["--config", str(path), "--dry-run"])
    assert "2 prompts x 3 samples" in capsys.readouterr().out


def test_a_kl_in_the_reward_holds_the_policy_back(tiny_arguments, tmp_path):
    """The only sign with which a large beta lowers the KL that training towards a reward leaves."""
    options = [
        "--steps=12",
        "--evaluation.prompts=0",
        "--save_every=0",
        "--algorithm.method=ppo",
        "--optimizer.lr=3e-3",
    ]
    options += [
        "--optimizer.lr=3e-3",
        "--algorithm.kl_placement=reward",
        "--rollout.samples_per_prompt=8",
        "--rollout.prompts_per_step=4",
    ]
    for advantages in ("group", "gae"):
        found = {}
        for beta in (0.0, 10.0):
            more = [f"--algorithm.beta={beta}", f"--algorithm.advantages={advantages}"]
            folder = run(tiny_arguments, tmp_path / f"{advantages}{beta}", *options, *more)
            found[beta] = sum(r["kl"] for r in lines(folder)[-4:])
        assert found[10.0] < 0.7 * found[0.0]
