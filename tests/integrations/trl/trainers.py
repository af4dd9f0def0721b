"""Trainers of a tiny model, what they score, and lambda in plain Python."""

import pytest

pytest.importorskip("trl", reason="the extra `trl` is not installed")
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from repo_kernels.integrations.trl import RePOConfig, RePOTrainer
from repo_kernels.integrations.trl.costs import largest_costs, scaled_advantages
from tests.support.tiny import QUESTIONS, make_tokenizer

__all__ = ["GRPOTrainer", "RePOConfig", "RePOTrainer", "largest_costs", "scaled_advantages"]  # and what is defined here
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
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def letters(completions, **_):
    return [float(len(set(text))) for text in completions]


def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) - 1.0 for text in completions]


def questions(texts=QUESTIONS):
    return Dataset.from_list([{"prompt": text} for text in texts])


def config_of(trainer):
    return RePOConfig if issubclass(trainer, RePOTrainer) else GRPOConfig


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recording(RePOTrainer):
    """Notes the lambda of each loss, and the costs of each generation batch."""

    def __init__(self, *arguments, **keywords):
        self.used, self.batches = [], []
        super().__init__(*arguments, **keywords)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and "costs" in output:
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
