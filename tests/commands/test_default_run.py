"""A slice of the main job: one step on the embedded model, scorers, prompts and judge."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo import train
from repo.assets import ensure
from repo.assets.prompts import SYSTEM_PROMPT
from repo.config.parse import PRESETS, load_config
from repo.config.schema import Config, CriticConfig, EvaluationConfig, ModelConfig, ScoringConfig
from repo.data.packing import unflat
from repo.data.prompts import load_prompts, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.actor import Actor
from repo.models.critic import make_critics
from repo.models.policy import load_policy
from repo.scoring.scorers import load_scorers
from repo.setup import load_parts

pytestmark = [pytest.mark.assets, pytest.mark.slow]


def test_one_step_of_the_default_run_ends_with_held_out_figures(tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([f"--out={out}", "--steps=1", "--evaluation.prompts=10", "--rollout.max_response_tokens=8"])
    printed = capsys.readouterr().out
    for line in ("reward", "safe rate (training cost)", "E{C-d}+", "safe rate (held-out judge)"):
        assert line in printed
    assert "10 held-out prompts" in printed
    assert "[" in printed.split("safe rate (held-out judge)")[1].splitlines()[0]
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["lam"] == load_config(PRESETS / "embedded.yaml").penalty.initial
    assert record["grad_norm"] > 0
    assert 0 < record["entropy"] < 11
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert any(bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_papers_form_takes_two_steps_and_lambda_follows_its_rule(tmp_path):
    out = tmp_path / "run"
    options = [
        "--steps=2",
        "--evaluation.prompts=0",
        "--rollout.max_response_tokens=8",
        "--rollout.samples_per_prompt=1",
    ]
    train.run_command(["--preset=paper", f"--out={out}", *options])
    first, second = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert second["lam"] == min(first["lam"] + 2.0 * first["rectified_cost"], 10.0)
    assert first["cost_value_loss"] > 0
    assert first["skipped"] == second["skipped"] == 0


@pytest.mark.parametrize("start", ["policy", "scorers"])
def test_critics_of_the_embedded_scorers_begin_as_the_score_of_what_has_been_said(start):
    folder = ensure()
    policy = load_policy(str(folder / "policy"), torch.device("cpu"), trainable=True).exact()
    scorers = load_scorers(ScoringConfig(), folder, policy.model, policy.tokenizer)
    critics = make_critics(CriticConfig(init_from=start), policy, scorers, ("reward", "cost"), same_trunk=True)
    asked = load_prompts(folder / "prompts" / "train.jsonl")[:2]
    prompts = tokenize_prompts(asked, policy.tokenizer, SYSTEM_PROMPT, 256).kept
    answer = policy.tokenizer("I am sorry, but I cannot help you with that. Bread is made of flour.").input_ids
    sequences = make_sequences([p.token_ids for p in prompts], [answer, answer[:9]], policy.pad_id)
    actor, values = Actor(policy, critics), torch.zeros(2, len(answer))
    for signal in critics:
        scorer = scorers.only(signal)
        scorer.manifest = dataclasses.replace(scorer.manifest, fluency_weight=0.0)
        with torch.no_grad():
            (packed,) = actor.parts(sequences, torch.arange(2), 10**6)
            unflat(packed, actor(packed, lambda states, critics, signal=signal: critics[signal](states)), values)
        for row, prompt in enumerate(prompts):
            for t in (0, 1, 4, 8):
                score = scorer([prompt.text], [policy.tokenizer.decode(answer[:t])])
                assert values[row, t].item() == pytest.approx(score.item(), abs=1e-3)


def test_the_embedded_scorers_do_not_see_the_adapter():
    config = Config(model=ModelConfig(lora_rank=2), evaluation=EvaluationConfig(prompts=0))
    parts = load_parts(config, Console(quiet=True))
    prompts, answers = parts.train_prompts[:2], ["I cannot help with that.", "Mix flour and water."]
    before = parts.scorers(prompts, answers)
    with torch.no_grad():
        for parameter in parts.policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    after = parts.scorers(prompts, answers)
    assert torch.equal(before.rewards, after.rewards)
    assert torch.equal(before.costs, after.costs)


def test_held_out_prompts_are_many_and_never_trained_on():
    folder = ensure() / "prompts"
    training, held_out = load_prompts(folder / "train.jsonl"), load_prompts(folder / "eval.jsonl")
    assert len(held_out) >= 200
    assert not {p.id for p in training} & {p.id for p in held_out}
    assert not {p.text for p in training} & {p.text for p in held_out}
    half = [p.id.startswith("advbench") for p in held_out[:200]]
    assert 0.35 <= sum(half) / len(half) <= 0.65
