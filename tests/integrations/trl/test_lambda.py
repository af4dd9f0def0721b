"""Lambda: its recursion, when it moves, and that it outlives a checkpoint."""

import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from .trainers import LORA, RULE, GRPOTrainer, Recording, logged, questions, recursion, weights


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
    record = trainer.evaluate(questions(["Is bread green?"]))
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
    make(GRPOTrainer, **fields).train()
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint needs .*repo_state.json"):
        make(**RULE, **fields).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_checkpoint_is_named_after_the_method(make, tmp_path):
    make(**RULE, save_strategy="steps", save_steps=1, max_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"
    assert json.loads((folder / "repo_state.json").read_text()).keys() == {"lam", "batch"}
    assert "2410.19933" in (tmp_path / "out" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.long
def test_two_processes_train_as_grpo_trainer_does_and_share_lambda(tiny_model, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    program = ["-m", "tests.support.programs.trl_processes", str(tmp_path), str(tiny_model)]
    done = subprocess.run(
        launch + program, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / rank) for rank in "01")
    assert first["ours"]["loss"] == pytest.approx(first["theirs"]["loss"], abs=1e-5)
    for rank in (first, second):
        for name, value in rank["theirs"]["weights"].items():
            torch.testing.assert_close(rank["ours"]["weights"][name], value, rtol=0, atol=1e-5)
    batches = [a + b for a, b in zip(first["with a cost"]["batches"], second["with a cost"]["batches"], strict=True)]
    lams = recursion(batches)
    for rank in (first["with a cost"], second["with a cost"]):
        assert rank["used"] == pytest.approx(lams[:-1])
        assert rank["lam"] == pytest.approx(lams[-1])
        assert all(torch.equal(x, first["with a cost"]["weights"][name]) for name, x in rank["weights"].items())
