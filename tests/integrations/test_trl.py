"""RePOTrainer in TRL: GRPOTrainer where nothing is penalised, and RePO's lambda where something is."""

# ruff: noqa: E402  (the imports below the skip need TRL)
import importlib
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
from datasets import Dataset
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, TrainerCallback, set_seed

from repo_kernels.integrations.trl import RePOConfig, RePOTrainer
from repo_kernels.integrations.trl.costs import largest_costs, scaled_advantages
from tests.support.tiny import QUESTIONS, make_tokenizer

TOKENIZER = make_tokenizer()
SETTINGS = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "optim": "sgd",  # Adam would blow up what rounding leaves of a gradient that is 0
    "learning_rate": 0.03,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def letters(completions, **_):
    return [float(len(set(text))) for text in completions]


def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) - 1.0 for text in completions]


@pytest.fixture
def make(tiny_model, tmp_path):
    """Make a trainer of a class on a fresh copy of the tiny model."""

    def build(trainer=RePOTrainer, model=None, rewards=letters, **fields):
        others = {name: fields.pop(name) for name in ("cost_funcs", "peft_config") if name in fields}
        config = RePOConfig if issubclass(trainer, RePOTrainer) else trl.GRPOConfig
        return trainer(
            str(tiny_model) if model is None else model,
            rewards,
            config(output_dir=str(tmp_path / "out"), **SETTINGS | fields),
            Dataset.from_list([{"prompt": question} for question in QUESTIONS]),
            processing_class=TOKENIZER,
            **others,
        )

    return build


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_training(ours, theirs):
    """Train both; they must sample the same and agree in every step's loss and in the parameters after each step."""
    ends = []
    for trainer in (ours, theirs):
        seen, after_step = [], []
        score = trainer._calculate_rewards

        def note(*arguments, seen=seen, score=score):
            seen.extend(map(tuple, arguments[3]))
            return score(*arguments)

        class AfterStep(TrainerCallback):
            def on_step_end(self, *_, after_step=after_step, trainer=trainer, **__):
                after_step.append(weights(trainer))

        trainer._calculate_rewards = note
        trainer.add_callback(AfterStep())
        set_seed(0)
        trainer.train()
        ends.append((seen, after_step))
    assert ends[0][0] == ends[1][0]
    assert len(ends[0][1]) == 3
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)
    for mine, other in zip(ends[0][1], ends[1][1], strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5)


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 0.1},
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
        {"loss_type": "dr_grpo", "scale_rewards": "batch", "temperature": 0.8, "mask_truncated_completions": True},
        {"loss_type": "bnpo", "beta": 0.1, "lora": True},
    ],
    ids=["default", "accumulation", "truncation", "lora"],
)
def test_without_a_cost_three_steps_are_those_of_grpo_trainer(make, fields):
    if fields.pop("lora", False):
        fields["peft_config"] = pytest.importorskip("peft").LoraConfig(**LORA)
    assert_same_training(make(**fields), make(trl.GRPOTrainer, **fields))


def test_with_lambda_0_a_cost_changes_nothing_but_the_log(make):
    ours = make(lam_init=0.0, lam_lr=0.0, cost_funcs=vowels, beta=0.1)
    assert_same_training(ours, make(trl.GRPOTrainer, beta=0.1))
    assert logged(ours, "lam") == [0.0] * 3
    assert len(logged(ours, "costs/vowels/mean")) == 3


def micro_batch(trainer, seed=0):
    """Make a padded micro-batch of 4 sequences whose ratios reach past the clip."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (4, 11), generator=draw)
    prompt_mask, completion_mask = torch.ones(4, 5, dtype=torch.long), torch.ones(4, 6, dtype=torch.long)
    prompt_mask[1, :2] = completion_mask[2, 3:] = completion_mask[3] = 0
    inputs = {"prompt_ids": ids[:, :5], "prompt_mask": prompt_mask, "completion_ids": ids[:, 5:]}
    inputs |= {"completion_mask": completion_mask, "num_items_in_batch": torch.tensor(37)}
    with torch.no_grad():
        whole = ids, torch.cat((prompt_mask, completion_mask), 1), 6
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, *whole)[0]
    noise = torch.randn(2, 4, 6, generator=draw)
    inputs |= {"old_per_token_logps": logps + 0.6 * noise[0], "ref_per_token_logps": logps + 0.3 * noise[1]}
    return inputs | {"advantages": torch.randn(4, generator=draw)}


def loss_and_gradient(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradient = torch.cat([value.grad.flatten() for value in trainer.model.parameters() if value.grad is not None])
    return loss.detach(), gradient


def assert_same_loss(ours, theirs, our_inputs, their_inputs):
    expected = loss_and_gradient(theirs, their_inputs)
    for why in (None, "the test wants it"):  # from hidden states, then from log-probabilities
        ours._why_logps = why
        loss, gradient = loss_and_gradient(ours, our_inputs)
        torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "bnpo", "beta": 0.1, "delta": 1.5, "epsilon_high": 0.4},
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False, "steps_per_generation": 4},
        {"loss_type": "dr_grpo", "epsilon": 0.1, "temperature": 0.7},
        {"loss_type": "luspo", "epsilon_high": 0.3},
    ],
    ids=lambda fields: fields["loss_type"],
)
def test_the_loss_takes_the_options_of_grpo(make, fields):
    ours, theirs = make(**fields), make(trl.GRPOTrainer, **fields)
    inputs = micro_batch(ours)
    assert_same_loss(ours, theirs, inputs, inputs)
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        if name in theirs._metrics["train"] and name != "kl":  # TRL's kl has the factor rho
            assert ours._metrics["train"][name][0] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1)])
def test_vllm_weights_and_tools_multiply_as_in_grpo(make, shape):
    ours, theirs = make(beta=0.1), make(trl.GRPOTrainer, beta=0.1)
    ours.use_vllm = theirs.use_vllm = True
    tool_mask = torch.ones(4, 6, dtype=torch.long)
    tool_mask[0, 2:4] = 0
    inputs = micro_batch(ours) | {"importance_sampling_ratio": torch.rand(shape), "tool_mask": tool_mask}
    assert_same_loss(ours, theirs, inputs, inputs)


@pytest.mark.parametrize("mode", ["rectified", "split", "lagrangian"])
def test_the_loss_weighs_the_cost_with_lambda(make, mode):
    ours, theirs = make(cost_mode=mode, lam_init=2.5, cost_funcs=vowels, cost_limit=0.5), make(trl.GRPOTrainer)
    inputs = micro_batch(ours)
    costs, of_cost = torch.tensor([-1.0, 0.5, 0.6, 3.0]), torch.tensor([-1.0, 0.3, -0.2, 0.9])
    gate = (costs > 0.5).float() if mode == "split" else 1.0
    combined = inputs["advantages"] - 2.5 * gate * of_cost
    assert_same_loss(
        ours, theirs, inputs | {"costs": costs, "cost_advantages": of_cost}, inputs | {"advantages": combined}
    )


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


class Recording(RePOTrainer):
    """Notes the lambda of each loss, and the costs of each generation batch."""

    def __init__(self, *arguments, **keywords):
        self.used, self.batches = [], []
        super().__init__(*arguments, **keywords)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.batches.append(output["costs"].tolist())
        return output

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            self.used.append(self.lam)
        return loss


def recursion(batches, lam=1.0, lr=0.1, limit=0.5, most=1.9):
    """Compute in plain Python the lambda of each batch, and the last that no loss has used."""
    lams = [lam]
    for costs in batches:
        excess = sum(max(cost - limit, 0.0) for cost in costs) / len(costs)
        lams.append(min(lams[-1] + lr * excess, most))
    return lams


RULE = {"cost_limit": 0.5, "lam_init": 1.0, "lam_lr": 0.1, "lam_max": 1.9, "cost_funcs": vowels}


def test_lambda_follows_its_recursion_line_by_line(make):
    trainer = make(Recording, **RULE, max_steps=5)
    trainer.train()
    lams = recursion(trainer.batches)
    assert len(set(lams)) > 3
    assert lams[-1] == 1.9  # the bound was reached
    assert logged(trainer, "lam") == pytest.approx(lams[:-1])
    assert trainer.lam == pytest.approx(lams[-1])
    for i, costs in enumerate(trainer.batches):
        excess = statistics.mean(max(cost - 0.5, 0) for cost in costs)
        mean = statistics.mean(costs)
        assert logged(trainer, "rectified_cost")[i] == pytest.approx(excess)
        assert logged(trainer, "safe_rate")[i] == pytest.approx(statistics.mean(cost <= 0.5 for cost in costs))
        assert logged(trainer, "compensation_gap")[i] == pytest.approx(excess - max(mean - 0.5, 0), abs=1e-6)


def test_lambda_moves_once_per_generation_batch_after_all_of_its_losses(make):
    trainer = make(
        Recording, **RULE, gradient_accumulation_steps=2, steps_per_generation=4, num_iterations=2, max_steps=8
    )
    trainer.train()
    lams = recursion(trainer.batches)
    assert len(trainer.batches) == 2  # of 16 rows, each with 4 micro-batches in 2 iterations
    assert lams[0] < lams[1]
    assert trainer.used == pytest.approx([lam for lam in lams[:-1] for _ in range(8)])


def test_lagrangian_lambda_falls_while_the_mean_cost_is_below_the_limit(make):
    trainer = make(Recording, **RULE | {"cost_mode": "lagrangian", "cost_limit": 100.0}, max_steps=2)
    trainer.train()
    assert 0 < trainer.lam < trainer.used[1] < trainer.used[0] == 1.0


def test_evaluation_reports_costs_and_leaves_lambda(make):
    trainer = make(Recording, **RULE, per_device_eval_batch_size=4)
    record = trainer.evaluate(Dataset.from_list([{"prompt": "Is bread green?"}]))
    assert record["eval_lam"] == 1.0
    assert "eval_safe_rate" in trainer.state.log_history[-1]
    assert trainer.lam == 1.0
    assert trainer._batch is None


def test_lora_trains_its_adapters_alone_with_a_cost(make):
    trainer = make(peft_config=pytest.importorskip("peft").LoraConfig(**LORA), beta=0.1, **RULE)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert trainer._why_logps is None


def test_a_resumed_run_goes_on_with_its_lambda(make, tmp_path):
    fields = RULE | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make(Recording, **fields)
    whole.train()
    resumed = make(Recording, **fields | {"lam_init": 0.0})
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.used == whole.used[2:]
    assert resumed.batches == whole.batches[2:]
    assert resumed.lam == whole.lam
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(resumed)[name], rtol=0, atol=1e-6)


def test_a_batch_that_a_checkpoint_cuts_still_moves_lambda_once(make, tmp_path):
    fields = RULE | {"steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = make(Recording, **fields)
    whole.train()
    cut = make(Recording, **fields)
    cut.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert cut.used == [whole.lam]


def test_a_checkpoint_without_lambda_is_refused(make, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(trl.GRPOTrainer, **fields).train()
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint needs .*repo_state.json"):
        make(**RULE, **fields).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_checkpoint_is_named_after_the_method(make, tmp_path):
    make(**RULE, save_strategy="steps", save_steps=1, max_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"
    assert json.loads((folder / "repo_state.json").read_text()).keys() == {"lam", "batch"}
    assert "2410.19933" in (tmp_path / "out" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_that_scales_its_logits_trains_from_log_probs_and_says_so(make, caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    config = GraniteConfig(vocab_size=len(TOKENIZER), logits_scaling=4.0, num_key_value_heads=4, **sizes, **ids)
    model = GraniteForCausalLM(config)
    copy = GraniteForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    ours = make(model=model)
    assert [r.getMessage() for r in caplog.records if "repo_loss_from_logps" in r.getMessage()] == [
        "RePOTrainer: the loss is repo_loss_from_logps, of TRL's log-probs: "
        "GraniteForCausalLM scales its logits (logits_scaling = 4.0)"
    ]
    assert_same_training(ours, make(trl.GRPOTrainer, model=copy))


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
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token'.*got 'sequence'"),
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


def test_without_trl_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("repo_kernels.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ImportError, match="^repo_kernels.integrations.trl needs TRL: pip install 'repo-rlhf\\[trl\\]'$"
    ):
        importlib.import_module("repo_kernels.integrations.trl")


def test_the_losses_import_no_adapter():
    import repo_kernels

    text = Path(repo_kernels.__file__).read_text()
    assert "integrations" not in text
