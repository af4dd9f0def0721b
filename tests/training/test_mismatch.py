"""The sampler and the training forward pass compared: what differs is told, with its likely cause."""

import pytest
import torch

from repo import train
from repo.config.schema import Config, ModelConfig, RolloutConfig
from repo.training.mismatch import Agreement, agreement, describe_mismatch, likely_cause
from tests.support.run_folders import lines


def test_agreement_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rollout = torch.tensor([[-1.0, -2.0, torch.nan], [-3.0, 0.0, 0.0]])
    same = agreement(rollout, rollout, mask)
    assert (same.gap, same.ess) == (0.0, 1.0)
    trainer = rollout + torch.tensor([[0.0, torch.log(torch.tensor(2.0)), 0.0], [-0.3, 9.0, 9.0]])
    found = agreement(rollout, trainer, mask)
    w = [1.0, 2.0, 2.718281828**-0.3]
    assert found.gap == pytest.approx((0 + 0.693147 + 0.3) / 3, rel=1e-5)
    assert found.ess == pytest.approx(sum(w) ** 2 / 3 / sum(x * x for x in w), rel=1e-5)
    assert agreement(rollout, trainer + 300.0, mask).ess == pytest.approx(found.ess, rel=1e-4)  # no overflow
    assert str(agreement(rollout, rollout, mask & False)) == "Agreement(gap=nan, ess=nan)"


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (Config(rollout=RolloutConfig(top_p=0.8)), "rollout.top_p=0.8"),
        (Config(model=ModelConfig(dtype="bfloat16")), "model.dtype bfloat16"),
        (Config(model=ModelConfig(compile=True)), "compiled layers"),
        (Config(), "its cache, positions or attention"),
    ],
)
def test_the_likely_cause_is_what_is_configured(config, cause):
    assert cause in likely_cause(config)
    assert cause in describe_mismatch(Agreement(0.2, 0.99), config)
    assert "effective sample size 50%" in describe_mismatch(Agreement(0.01, 0.5), config)
    assert describe_mismatch(Agreement(0.01, 0.99), config) is None
    assert describe_mismatch(Agreement(float("nan"), float("nan")), config) is None


def test_a_truncated_rollout_is_warned_of_once_and_a_plain_one_never(options, tmp_path, capsys):
    train.run_command([*options, f"--out={tmp_path / 'plain'}"])
    assert "log-probabilities differ from those of the rollout" not in capsys.readouterr().out
    assert all(r["rollout_gap"] < 1e-5 and r["rollout_ess"] > 1 - 1e-6 for r in lines(tmp_path / "plain"))
    train.run_command([*options, "--rollout.top_p=0.5", f"--out={tmp_path / 'cut'}"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("the trained policy's log-probabilities differ from those of the rollout") == 1
    assert "rollout.top_p=0.5 samples from a truncated distribution" in printed
    assert all(r["rollout_gap"] > 0.1 for r in lines(tmp_path / "cut"))


def test_with_several_optimiser_steps_the_sampling_policy_is_compared(options, tmp_path):
    more = ["--optimizer.epochs=2", "--optimizer.minibatches=2", "--optimizer.lr=0.01"]
    train.run_command([*options, *more, f"--out={tmp_path / 'run'}"])
    assert all(r["rollout_gap"] < 1e-5 for r in lines(tmp_path / "run"))
