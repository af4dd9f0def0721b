"""A slice of the main job: one step on the embedded model, scorers, prompts and judge."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo import train
from repo.assets import ensure
from repo.data import load_prompts

pytestmark = [pytest.mark.assets, pytest.mark.slow]


def test_one_step_of_the_default_run_ends_with_held_out_figures(tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([f"--out={out}", "--steps=1", "--evaluation.prompts=12", "--rollout.max_new_tokens=16"])
    printed = capsys.readouterr().out
    for line in ("reward", "safe rate (training cost)", "E{C-d}+", "safe rate (held-out judge)"):
        assert line in printed
    assert "12 held-out prompts" in printed
    assert "[" in printed.split("safe rate (held-out judge)")[1].splitlines()[0]
    record = json.loads((out / "metrics.jsonl").read_text())
    assert record["lam"] == 1.0
    assert record["grad_norm"] > 0
    assert 0 < record["entropy"] < 11
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    start = AutoModelForCausalLM.from_pretrained(ensure() / "policy")
    assert not torch.equal(model.model.norm.weight, start.model.norm.weight)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_held_out_prompts_are_many_and_never_trained_on():
    folder = ensure() / "prompts"
    training, held_out = load_prompts(folder / "train.jsonl"), load_prompts(folder / "eval.jsonl")
    assert len(held_out) >= 200
    assert not {p.id for p in training} & {p.id for p in held_out}
    assert not {p.text for p in training} & {p.text for p in held_out}
    half = [p.id.startswith("advbench") for p in held_out[:200]]
    assert 0.35 <= sum(half) / len(half) <= 0.65
