"""What RePOTrainer and RePOConfig take and refuse, and what they make of rewards and costs."""

import importlib
import statistics
import sys

import pandas as pd
import pytest
import torch

from .trainers import SETTINGS, RePOConfig, RePOTrainer, largest_costs, letters, logged, scaled_advantages, vowels


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("mode", ["rectified", "split", "lagrangian"])
def test_advantages_are_centred_in_their_group_and_scaled_together(tmp_path, mode, scale):
    rewards, costs, lam, limit = [1.0, 4.0, 2.0, 2.0, 0.5, 3.5], [-1.0, 2.0, 0.5, 0.7, 0.1, 3.0], 1.5, 0.5
    config = RePOConfig(
        str(tmp_path), **SETTINGS | {"num_generations": 2}, cost_mode=mode, scale_rewards=scale, cost_limit=limit
    )
    both = scaled_advantages(torch.tensor(rewards), torch.tensor(costs), lam, 3, config)
    combined, parts = [], []
    for start in (0, 3):
        group = range(start, start + 3)
        signal = {i: max(costs[i] - limit, 0) if mode == "rectified" else costs[i] for i in group}
        for i in group:
            of_reward = rewards[i] - statistics.mean(rewards[j] for j in group)
            of_cost = signal[i] - statistics.mean(signal.values())
            gated = of_cost if mode != "split" or costs[i] > limit else 0.0
            parts.append((of_reward, of_cost))
            combined.append(of_reward - lam * gated)
    for i in range(6):
        own = combined[:3] if i < 3 else combined[3:]
        deviation = {"group": statistics.stdev(own), "batch": statistics.stdev(combined)}.get(scale)
        by = 1.0 if deviation is None else deviation + 1e-4
        assert both["advantages"][i].item() == pytest.approx(parts[i][0] / by, abs=1e-5)
        assert both["cost_advantages"][i].item() == pytest.approx(parts[i][1] / by, abs=1e-5)


def test_of_several_costs_the_largest_counts():
    none = float("nan")
    assert largest_costs(torch.tensor([[1.0, -2.0], [-3.0, -1.0], [none, 0.5]])).tolist() == [1.0, -1.0, 0.5]
    for wrong in ([none, none], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="cost_funcs must give a finite cost.*completion 1 of the batch"):
            largest_costs(torch.tensor([[0.0, 0.0], wrong]))


def test_rewards_keep_their_weights_beside_costs(make):
    trainer = make(rewards=[letters, vowels], reward_weights=[0.5, 2.0], cost_funcs=[vowels, letters], lam_max=9.0)
    assert trainer.reward_weights.tolist() == [0.5, 2.0]
    assert trainer.args.reward_weights == [0.5, 2.0]
    trainer.train()
    for name in ("costs/vowels/mean", "costs/letters/mean", "rewards/letters/mean", "rewards/vowels/mean"):
        assert len(logged(trainer, name)) == 3
    expected = [
        0.5 * a + 2 * b
        for a, b in zip(logged(trainer, "rewards/letters/mean"), logged(trainer, "rewards/vowels/mean"), strict=True)
    ]
    assert logged(trainer, "reward") == pytest.approx(expected)


def test_a_reward_model_can_be_a_cost_and_the_table_of_completions_has_it(make, scorer_folder, tmp_path):
    trainer = make(cost_funcs=[str(scorer_folder), vowels], log_completions=True, max_steps=1)
    trainer.train()
    name = f"costs/{scorer_folder.name}/mean"
    assert len(logged(trainer, name)) == 1
    table = pd.read_parquet(tmp_path / "out" / "completions" / "completions_00001.parquet")
    assert table["cost"].mean() == pytest.approx(logged(trainer, "cost")[0], abs=1e-5)
    assert len(table["cost_advantage"]) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cost_mode": "hinge"}, "cost_mode must be one of 'rectified'.*got 'hinge'"),
        ({"cost_limit": float("nan")}, "cost_limit must be finite.*got nan"),
        ({"lam_init": 9.0}, "lam_init must be >= 0 and <= lam_max = 5.0.*got 9.0"),
        ({"lam_init": 0.0, "cost_mode": "lagrangian"}, "lam_init must be > 0 and"),
        ({"lam_lr": -1.0}, "lam_lr must be >= 0.*got -1.0"),
        ({"lam_max": 0.0}, "lam_max must be > 0"),
        ({"loss_type": "sapo"}, "loss_type must be one of 'grpo'.*got 'sapo'"),
        (
            {"importance_sampling_level": "word"},
            "importance_sampling_level must be one of 'token', 'sequence'; got 'word'",
        ),
        ({"importance_sampling_level": "sequence", "beta": 0.1}, "use_bias_correction_kl must be False.*got True"),
        ({"loss_type": "cispo"}, "epsilon_high must be >= 1 with loss_type='cispo'.*got 0.2"),
        ({"loss_type": "cispo", "epsilon_high": 2.0, "delta": 3.0}, "delta must be None.*got 3.0"),
        ({"scale_rewards": "prompt"}, "scale_rewards must be one of 'group', 'batch', 'none'; got 'prompt'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation must be"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile must be 1.0.*got 0.2"),
        ({"entropy_coef": 0.1}, "entropy_coef must be 0.0.*got 0.1"),
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold must be None.*got 0.1"),
        ({"delta": 1.1}, "delta must be >= 1 \\+ epsilon_high = 1.2 or None.*got 1.1"),
        ({"epsilon": 1.5}, "epsilon must be in \\[0, 1\\].*got 1.5"),
    ],
)
def test_a_config_that_the_loss_cannot_take_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        RePOConfig(str(tmp_path), **SETTINGS | fields)


def test_a_trainer_says_what_it_needs(make, tiny_model):
    with pytest.raises(TypeError, match="args must be a RePOConfig; got NoneType"):
        RePOTrainer(str(tiny_model), letters)
    with pytest.raises(ValueError, match="reward_funcs must hold at least one reward"):
        make(rewards=None, cost_funcs=vowels)
    with pytest.raises(ValueError, match="cost_funcs must give a finite cost.*got \\[nan\\]"):
        make(cost_funcs=lambda completions, **_: [None] * len(completions)).train()


def test_without_trl_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("repo_kernels.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ImportError, match="^repo_kernels.integrations.trl needs TRL: pip install 'repo-rlhf\\[trl\\]'$"
    ):
        importlib.import_module("repo_kernels.integrations.trl")
