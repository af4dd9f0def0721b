"""verl itself, in one process on the CPU: its trainer, TransferQueue, estimators and losses; only the model is played.

They are skipped where verl is not installed, as it is not in the environment of the other tests; pip install
'repo-rlhf[verl]' in one of its own.
"""

import importlib.util
import json
import os

import numpy as np
import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed", allow_module_level=True)

import ray
import transfer_queue as tq
import verl
from omegaconf import OmegaConf, open_dict
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from repo_kernels.integrations.verl import CostConstraint, CostSettings, plugin

LENGTHS = (3, 1, 4, 2, 2, 3)
REWARDS = (1.0, 2.0, 4.0, 0.0, -1.0, 0.5)
COSTS = (1.5, -2.0, 0.25, 3.0, 0.0, -1.0)
GROUPS = ("a", "a", "a", "b", "b", "b")
EXCESS = (1.5 + 0.25 + 3.0) / 6  # mean {C}^+


def actor_config(**fields):
    return FSDPActorConfig(strategy="fsdp", rollout_n=3, ppo_micro_batch_size_per_gpu=1, **fields)


def logps_of(ids):
    """Return made-up log-probabilities of the tokens of a row, (L,)."""
    return -0.1 * torch.arange(1.0, len(ids) + 1)


class Workers:
    """Stands for the actor's processes: log-probabilities that are made up, and verl's loss on what the queue has."""

    _dispatch_info: dict = {"actor": [0]}  # noqa: RUF012

    def __init__(self, trainer):
        self.trainer, self.losses, self.lams, self.saved = trainer, [], [], []

    def compute_log_prob(self, batch):
        data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["input_ids"])
        rows = [{"log_probs": logps_of(ids), "entropy": -logps_of(ids)} for ids in data["input_ids"].unbind()]
        return tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=list_of_dict_to_tensordict(rows))

    def update_actor(self, batch):
        names = ["prompts", "responses", "input_ids", "response_mask", "old_log_probs", "advantages"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=names)
        with_counts = {"dp_size": 1, "batch_num_tokens": sum(LENGTHS), "global_batch_size": len(LENGTHS)}
        for name, value in with_counts.items():
            data.set_non_tensor(name, value)
        logps = torch.cat([logps_of(ids) for ids in data["input_ids"].unbind()]) + 0.05  # the policy has moved
        logps.requires_grad_()
        loss, metrics = ppo_loss(actor_config(policy_loss={"loss_mode": "repo"}), {"log_probs": logps}, data)
        loss.backward()
        self.losses.append(loss.item())
        self.lams.append(self.trainer.constraint.lam)
        assert logps.grad.abs().sum() > 0
        assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl"} <= set(metrics)
        return {"metrics": {"loss": [loss.item()], "mfu": [0.0]}}

    def save_checkpoint(self, *arguments, **keywords):
        self.saved.append(arguments)

    def load_checkpoint(self, **keywords):
        pass


@pytest.fixture(scope="module")
def queue():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
    yield
    tq.close()
    ray.shutdown()


def configuration(folder, **settings):
    path = f"{os.path.dirname(verl.__file__)}/trainer/config/_generated_ppo_trainer.yaml"
    config = OmegaConf.load(path)
    with open_dict(config):
        config.actor_rollout_ref.rollout.n = 3
        config.actor_rollout_ref.actor.ppo_mini_batch_size = 2
        config.data.train_batch_size = 2
        config.algorithm.adv_estimator = "repo"
        config.algorithm.norm_adv_by_std_in_grpo = False
        config.trainer.v1.trainer_mode = "repo"
        config.trainer.v1.repo = settings
        config.trainer.default_local_dir = str(folder)
    return config


@pytest.fixture
def trainer(queue, tmp_path):
    return make(tmp_path, lam_init=2.0, lam_lr=0.5)


def make(folder, **settings):
    trainer = get_trainer_cls("repo")(configuration(folder, **settings))
    trainer.actor_rollout_wg = Workers(trainer)
    trainer.tokenizer = type("Tokenizer", (), {"eos_token_id": 0})
    trainer.reward_loop_manager = type("Rewards", (), {"reward_loop_worker_handles": ["a worker"]})
    trainer.checkpoint_manager = type("Weights", (), {"sleep_replicas": lambda self: None})()
    trainer.train_dataloader = type("Data", (), {"state_dict": dict, "load_state_dict": lambda *_: None})()
    trainer.curr_step_profile, trainer.global_steps = False, 1
    return trainer


def put(batch_costs=COSTS, rows=range(6), step="0", extra=True):
    """Put what verl's agent loop puts for each sample, and return the batch that the replay buffer would."""
    from transfer_queue import KVBatchMeta

    keys, fields, tags = [], [], []
    for row in rows:
        response = torch.full((LENGTHS[row],), 7)
        prompt, mask = torch.tensor([5, 6]), torch.ones(LENGTHS[row], dtype=torch.int64)
        scores = torch.zeros(LENGTHS[row])
        scores[-1] = REWARDS[row]
        info = {"score": REWARDS[row], "cost": batch_costs[row]} if extra else {"score": REWARDS[row]}
        keys.append(f"{GROUPS[row]}{step}_{row}_0")
        ids = torch.cat((prompt, response))
        fields.append(
            {
                "uid": f"{GROUPS[row]}{step}", "prompts": prompt, "responses": response, "input_ids": ids,
                "response_mask": mask, "loss_mask": mask, "rm_scores": scores, "position_ids": torch.arange(len(ids)),
                "extra_fields": {"reward_extra_info": info}, "multi_modal_inputs": {}, "num_turns": 2,
                "rollout_log_probs": torch.zeros(LENGTHS[row]),
            }
        )  # fmt: skip
        sizes = {"prompt_len": 2, "response_len": LENGTHS[row], "seq_len": len(ids)}
        tags.append({"status": "success", **sizes, "min_global_steps": 0, "max_global_steps": 0})
    tq.kv_batch_put(keys=keys, partition_id="train", fields=list_of_dict_to_tensordict(fields), tags=tags)
    return KVBatchMeta(keys=keys, tags=tags, partition_id="train", fields=list(fields[0]), extra_info={})


def step(trainer, **rows):
    batch, metrics = put(**rows), {}
    trainer.replay_buffer.sample = lambda **_: (batch, {})
    trainer._step_once(metrics, {}, 2)
    return batch, metrics


def advantages_of(batch):
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["advantages"])
    return dict(zip(batch.keys, data["advantages"].unbind(), strict=True))


def test_a_step_uses_lambda_and_then_moves_it(trainer):
    batch, metrics = step(trainer)
    assert trainer.trainer_mode == "sync"
    assert trainer.actor_rollout_wg.lams == [2.0]
    assert trainer.constraint.lam == pytest.approx(2.0 + 0.5 * EXCESS)
    assert metrics["repo/lam"] == 2.0
    assert metrics["repo/safe_rate"] == pytest.approx(3 / 6)
    assert metrics["repo/rectified_cost"] == pytest.approx(EXCESS)
    penalised = [r - 2.0 * max(c, 0.0) for r, c in zip(REWARDS, COSTS, strict=True)]
    means = {g: np.mean([x for x, of in zip(penalised, GROUPS, strict=True) if of == g]) for g in "ab"}
    for key, row in advantages_of(batch).items():
        number = int(key.split("_")[1])
        expected = penalised[number] - means[GROUPS[number]]
        assert row.tolist() == pytest.approx([expected] * LENGTHS[number], abs=1e-5)


def test_the_rows_that_verl_adds_do_not_count(trainer):
    trainer.config.actor_rollout_ref.actor.ppo_mini_batch_size = 1
    _, metrics = step(trainer, rows=range(5), step="p")  # verl pads 5 rows to 6
    assert metrics["repo/safe_rate"] == pytest.approx(2 / 5)
    assert trainer.constraint.lam == pytest.approx(2.0 + 0.5 * (1.5 + 0.25 + 3.0) / 5)


def test_a_reward_function_without_cost_is_told_its_key(trainer):
    with pytest.raises(ValueError, match=r"must return a dict with score and 'cost' \(cost_key\); got: score"):
        step(trainer, extra=False, step="n")
    assert plugin.current.get() is None


def test_several_outputs_of_a_sample_are_refused(trainer):
    batch = put(step="m")
    batch.keys[1] = batch.keys[0][:-1] + "1"
    with pytest.raises(ValueError, match="takes one output of the agent loop for each sample; got several"):
        trainer._compute_advantage(batch, {})


def test_costs_of_a_colocated_reward_model_are_read(trainer):
    from verl.utils import tensordict_utils as tu

    batch = put(step="c", extra=False)
    fields = tu.get_tensordict({"cost": np.array(COSTS)})
    tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)
    trainer.reward_loop_manager.reward_loop_worker_handles = None
    assert [info["cost"] for info in trainer._infos(batch)] == list(COSTS)


def test_a_checkpoint_keeps_lambda(trainer, tmp_path):
    step(trainer, step="k")
    trainer._save_checkpoint()
    assert json.loads((tmp_path / "global_step_1/repo_state.json").read_text()) == {"lam": trainer.constraint.lam}
    for mode in ("auto", "resume_path"):
        other = make(tmp_path, lam_init=0.0)
        other.config.trainer.resume_mode = mode
        other.config.trainer.resume_from_path = str(tmp_path / "global_step_1")
        other._load_checkpoint()
        assert (other.global_steps, other.constraint.lam) == (1, trainer.constraint.lam)
    (tmp_path / "global_step_1/repo_state.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"repo_state.json, where the trainer `repo` keeps lambda; it is missin"
    ):
        other._load_checkpoint()


def test_settings_that_cannot_work_are_refused(tmp_path):
    config = configuration(tmp_path)
    config.algorithm.adv_estimator = "grpo"
    with pytest.raises(ValueError, match="algorithm.adv_estimator must be repo with trainer_mode=repo; got 'grpo'"):
        plugin.RepoTrainer(config)
    config = configuration(tmp_path)
    config.actor_rollout_ref.rollout.n = 1
    with pytest.raises(ValueError, match="rollout.n must be >= 2, as the baseline is the mean of a group; got 1"):
        plugin.RepoTrainer(config)
    with pytest.raises(TypeError, match="lamda"):
        plugin.RepoTrainer(configuration(tmp_path, lamda=1.0))


def test_the_estimator_alone_says_what_it_needs():
    with pytest.raises(RuntimeError, match="adv_estimator=repo needs trainer.v1.trainer_mode=repo"):
        core_algos.get_adv_estimator_fn("repo")(torch.ones(2, 2), torch.ones(2, 2), np.array(["a", "a"]), {})


@pytest.mark.parametrize("by_std", [False, True])
@pytest.mark.parametrize("lam", [0.0, 1.5])
def test_advantages_are_grpos_of_the_penalised_reward(lam, by_std):
    constraint = CostConstraint(CostSettings(lam_init=lam))
    constraint.begin([{"cost": c} for c in COSTS], [False] * 6)
    rewards, mask = torch.zeros(6, 4), torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    rewards[torch.arange(6), torch.tensor(LENGTHS) - 1] = torch.tensor(REWARDS)
    token = plugin.current.set(constraint)
    ours, _ = plugin.compute_advantages(rewards, mask, np.array(GROUPS), {"norm_adv_by_std_in_grpo": by_std})
    plugin.current.reset(token)
    penalised = rewards.clone()
    penalised[:, 0] -= lam * torch.tensor(COSTS).clamp_min(0)
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        penalised, mask, np.array(GROUPS), norm_adv_by_std_in_grpo=by_std
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("info", [{}, {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 12}])
@pytest.mark.parametrize(
    "mode", ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_and_its_gradient_are_verls_vanilla(mode, info, weighted):
    torch.manual_seed(0)
    old, mask = torch.randn(6, 9) - 3, torch.arange(9) < torch.tensor([9, 3, 1, 5, 0, 7])[:, None]
    new = (old + torch.randn(6, 9)).requires_grad_()
    config = actor_config(clip_ratio_high=0.28)
    config.global_batch_info.update(info)
    arguments = {"old_log_prob": old, "log_prob": new, "advantages": 3 * torch.randn(6, 1).expand(6, 9)}
    arguments |= {"response_mask": mask, "loss_agg_mode": mode, "config": config}
    if weighted:
        arguments["rollout_is_weights"] = 2 * torch.rand(6, 9)
    results = {name: core_algos.get_policy_loss_fn(name)(**arguments) for name in ("vanilla", "repo")}
    gradients = {name: torch.autograd.grad(loss, new)[0] for name, (loss, _) in results.items()}
    torch.testing.assert_close(results["repo"][0], results["vanilla"][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["repo"], gradients["vanilla"], rtol=1e-5, atol=1e-6)
    for key, value in results["repo"][1].items():
        assert value == pytest.approx(results["vanilla"][1][key], abs=1e-6)
