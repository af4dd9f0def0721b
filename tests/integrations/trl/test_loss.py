"""The loss of RePOTrainer is GRPOTrainer's where nothing is penalised, with the options that both have."""

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, TrainerCallback, set_seed

from .trainers import LORA, TOKENIZER, GRPOTrainer, RePOTrainer, logged, vowels, weights


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


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 0.1, "gradient_checkpointing": True},
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
        {"loss_type": "dr_grpo", "scale_rewards": "batch", "temperature": 0.8, "mask_truncated_completions": True},
        {"loss_type": "bnpo", "beta": 0.1, "lora": True},
    ],
    ids=["default", "accumulation", "truncation", "lora"],
)
def test_without_a_cost_three_steps_are_those_of_grpo_trainer(make, fields):
    if "lora" in fields:
        fields = {name: value for name, value in fields.items() if name != "lora"}
        fields["peft_config"] = pytest.importorskip("peft").LoraConfig(**LORA)
    assert_same_training(make(**fields), make(GRPOTrainer, **fields))


def test_with_lambda_0_a_cost_changes_nothing_but_the_log(make):
    ours = make(lam_init=0.0, lam_lr=0.0, cost_funcs=vowels, beta=0.1)
    assert_same_training(ours, make(GRPOTrainer, beta=0.1))
    assert logged(ours, "lam") == [0.0] * 3
    assert len(logged(ours, "costs/vowels/mean")) == 3


def test_a_softcap_and_a_head_in_fp32_are_those_of_grpo_trainer(make):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    config = Gemma2Config(vocab_size=len(TOKENIZER), final_logit_softcapping=2.0, head_dim=8, **sizes, **ids)
    model = Gemma2ForCausalLM(config)
    fields = {"cast_lm_head_to_fp32": True, "temperature": 0.7}
    theirs = make(GRPOTrainer, model=copy.deepcopy(model), **fields)
    assert_same_training(make(model=model, **fields), theirs)


def test_under_autocast_the_loss_is_that_of_grpo_trainer_but_for_rounding(make):
    ours, theirs = (make(trainer, bf16=True, beta=0.1) for trainer in (RePOTrainer, GRPOTrainer))
    inputs = micro_batch(ours)
    loss, gradient = loss_and_gradient(ours, inputs)
    expected = loss_and_gradient(theirs, inputs)
    torch.testing.assert_close(loss, expected[0], rtol=2e-2, atol=1e-3)
    assert (gradient - expected[1]).norm() <= 0.02 * expected[1].norm()


def test_the_ratio_of_a_policy_to_itself_is_1_in_bf16(make):
    trainer = make(bf16=True, beta=0.1, steps_per_generation=2, max_steps=1)  # with log-probs of the old policy
    trainer.train()
    assert logged(trainer, "kl")[0] < 1e-9


def test_a_head_that_scales_its_logits_trains_from_log_probs_and_says_so(make, caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None}
    config = GraniteConfig(vocab_size=len(TOKENIZER), logits_scaling=4.0, num_key_value_heads=4, **sizes, **ids)
    model = GraniteForCausalLM(config)
    theirs = make(GRPOTrainer, model=copy.deepcopy(model))
    ours = make(model=model)
    assert [r.getMessage() for r in caplog.records if "repo_loss_from_logps" in r.getMessage()] == [
        "RePOTrainer: the loss is repo_loss_from_logps, of TRL's log-probs: "
        "GraniteForCausalLM scales its logits (logits_scaling = 4.0)"
    ]
    assert_same_training(ours, theirs)


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
        {"loss_type": "cispo", "epsilon_high": 1.5, "beta": 0.1},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.4},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": False},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values() if isinstance(value, str)),
)
def test_the_loss_takes_the_options_of_grpo(make, fields):
    ours, theirs = make(**fields), make(GRPOTrainer, **fields)
    inputs = micro_batch(ours)
    assert_same_loss(ours, theirs, inputs, inputs)
    for name in ("kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        # TRL's kl has the factor rho, and it counts sequences where the ratio is a sequence's, we their tokens
        if name in theirs._metrics["train"] and name != "kl" and ours.importance_sampling_level == "token":
            assert ours._metrics["train"][name][0] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1)])
def test_vllm_weights_and_tools_multiply_as_in_grpo(make, shape):
    ours, theirs = make(beta=0.1), make(GRPOTrainer, beta=0.1)
    ours.use_vllm = theirs.use_vllm = True
    tool_mask = torch.ones(4, 6, dtype=torch.long)
    tool_mask[0, 2:4] = 0
    inputs = micro_batch(ours) | {"importance_sampling_ratio": torch.rand(shape), "tool_mask": tool_mask}
    assert_same_loss(ours, theirs, inputs, inputs)


@pytest.mark.parametrize("mode", ["rectified", "split", "lagrangian"])
def test_the_loss_weighs_the_cost_with_lambda(make, mode):
    ours, theirs = make(cost_mode=mode, lam_init=2.5, cost_funcs=vowels, cost_limit=0.5), make(GRPOTrainer)
    inputs = micro_batch(ours)
    costs, of_cost = torch.tensor([-1.0, 0.5, 0.6, 3.0]), torch.tensor([-1.0, 0.3, -0.2, 0.9])
    gate = (costs > 0.5).float() if mode == "split" else 1.0
    combined = inputs["advantages"] - 2.5 * gate * of_cost
    assert_same_loss(
        ours, theirs, inputs | {"costs": costs, "cost_advantages": of_cost}, inputs | {"advantages": combined}
    )
