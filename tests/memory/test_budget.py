"""optimizer.micro_batch_tokens auto: the largest micro-batch that fits, kept when the run is resumed."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from repo import launch, train
from repo.common.errors import UserError
from repo.config.schema import Config, ModelConfig, RolloutConfig
from repo.memory import budget
from repo.memory.batch import filled, padded
from repo.memory.budget import MARGIN, free_bytes, pick, sizes
from repo.memory.description import memory_of
from repo.memory.process import Process

SHAPE = LlamaConfig(
    hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=500,
)  # fmt: skip
AUTO = "--optimizer.micro_batch_tokens=auto"


@pytest.fixture
def process():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPE)
    rollout = RolloutConfig(prompts_per_step=8, samples_per_prompt=4, max_response_tokens=200)
    return Process(Config(model=ModelConfig(device="cpu"), rollout=rollout), model, 500, prompt_tokens=50)


def test_the_sizes_are_powers_of_two_and_then_multiples_of_1024():
    assert sizes(5000) == [128, 256, 512, 1024, 2048, 3072, 4096, 5120]
    assert sizes(300) == [128, 256, 512]
    assert sizes(128) == [128]


def test_a_pass_is_filled_with_the_longest_prompts_and_responses():
    packed = filled(2048, 30, 40, 4)
    assert packed.tokens == 2048
    assert packed.lengths[:4] == (40,) * 4
    assert filled(10, 30, 40, 4).tokens == 72  # one response has its own pass, 30 + 39 and filler
    assert padded(2048, 30, 40).input_ids.shape == (29, 69)


def test_the_largest_size_that_fits_is_picked(process):
    needs = {tokens: memory_of(process, tokens).peak for tokens in sizes(process.batch_tokens)}
    assert sorted(needs.values()) == list(needs.values())
    everything = pick(process, 10**12, is_loaded=False)
    assert (everything.tokens, everything.next) == (max(needs), None)
    middle = pick(process, int((needs[2048] + 1) / (1 - MARGIN)) + 1, is_loaded=False)
    assert (middle.tokens, middle.next) == (2048, 3072)
    assert "3072 would need" in middle.describe()
    assert "holds the whole batch" in everything.describe()


def test_loaded_weights_need_no_free_memory(process):
    unloaded, loaded = (pick(process, 10**12, is_loaded=is_loaded) for is_loaded in (False, True))
    assert unloaded.needs - loaded.needs == sum(memory_of(process).loaded.values())


def test_memory_too_small_for_any_size_is_an_error_that_says_what_helps(process):
    with pytest.raises(UserError, match=r"auto finds no size that fits: 128 tokens need .* GiB .*lora_rank"):
        pick(process, 10**6, is_loaded=False)


def test_a_model_whose_activations_cannot_be_counted_needs_a_number(process):
    with pytest.raises(UserError, match="auto cannot count activations .*; give a number"):
        pick(replace(process, model=torch.nn.Linear(4, 4)), 10**12, is_loaded=False)


def test_free_memory_is_what_system_and_container_leave(tmp_path, monkeypatch):
    free = free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50
    for name, text in (("max", "3000000\n"), ("current", "1000000\n"), ("stat", "anon 5\ninactive_file 400\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(budget, "CGROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 2_000_400
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 2**20
    with pytest.raises(UserError, match="auto cannot see the free memory of meta; give a number"):
        free_bytes(torch.device("meta"))


def test_a_run_keeps_the_number_that_auto_picked_and_resumes_bit_for_bit(options, tmp_path, monkeypatch, capsys):
    train.run_command([*options, "--optimizer.micro_batch_tokens=128", f"--out={tmp_path / 'number'}"])
    capsys.readouterr()
    train.run_command([*options, AUTO, "--steps=2", f"--out={tmp_path / 'auto'}"])
    assert "micro-batches: auto = 128 tokens, which need" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert config["optimizer"]["micro_batch_tokens"] == 128
    monkeypatch.setattr(launch, "free_bytes", lambda device: 1)  # another day, with no memory to spare
    train.run_command(["--resume", str(tmp_path / "auto"), "--steps=4"])
    whole, resumed = (
        [
            {name: value for name, value in json.loads(line).items() if "seconds" not in name and "per_s" not in name}
            for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("number", "auto")
    )
    assert whole == resumed


def test_a_dry_run_says_what_auto_would_pick(options, capsys):
    train.run_command([*options, AUTO, "--dry-run"])
    printed = capsys.readouterr().out
    assert "micro-batches: auto = 128 tokens" in printed
    assert "micro-batches of <= 128 tokens" in printed


def test_another_word_than_auto_is_an_error(options):
    with pytest.raises(UserError, match="micro_batch_tokens must be an integer > 0 or auto; got most"):
        train.run_command([*options, "--optimizer.micro_batch_tokens=most", "--dry-run"])
    with pytest.raises(UserError, match="micro_batch_tokens must be an integer > 0 or auto; got 0"):
        train.run_command([*options, "--optimizer.micro_batch_tokens=0", "--dry-run"])
