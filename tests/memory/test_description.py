"""The table of memory: what it lists, and what it says that it does not count."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from repo.config.schema import AlgorithmConfig, Config, CriticConfig, ModelConfig, RolloutConfig, ScoringConfig
from repo.memory.description import describe_memory, memory_of, micro_batch
from repo.memory.process import Process
from repo.memory.scorers import planned_scorer_bytes
from repo.models.layout import Attention

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 500}
SHAPE = LlamaConfig(intermediate_size=176, num_attention_heads=4, num_key_value_heads=2, **SIZES)


def on_meta(shape):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def make_process(shape=SHAPE, **settings):
    rollout = RolloutConfig(prompts_per_step=4, samples_per_prompt=4, max_response_tokens=100, batch_size=16)
    config = Config(model=ModelConfig(device="cpu", **settings), rollout=rollout)
    return Process(config, on_meta(shape), 500, prompt_tokens=60, scorers=2**30)


def gib(text, line):
    return float(re.search(rf"([\d.]+) GiB  {line}", text)[1])


def test_the_table_lists_weights_activations_and_the_cache():
    text = describe_memory(make_process())
    for line in ("activations of 3 layers for 1824 tokens", "one layer's backward pass, or .* of 1824 rows of logits"):
        assert f"update: {line}" in text or re.search(f"update: {line}", text)
    assert "of it by attention" in text
    assert "rollout: KV cache" in text
    assert gib(text, "scorers and judge") == 1.0
    assert text.splitlines()[-2].endswith("at most at once, without what scorers and libraries allocate while they run")


def test_learned_credit_is_named_with_its_bytes():
    process = make_process()
    config = replace(process.config, algorithm=AlgorithmConfig(credit="redistributed"))
    text = describe_memory(replace(process, config=config))
    bytes_ = 3 * 129**2 * 8 + 16 * 100 * 2 * 64 * 4  # covariances; two states of each token of 16 responses
    assert f"nor learned credit, in the processor's memory {bytes_ / 2**30:.2f} GiB" in text
    large = make_process(LlamaConfig(**SIZES | {"hidden_size": 4096}, intermediate_size=64, num_attention_heads=32))
    bytes_ = 3 * 8193**2 * 8 + 16 * 100 * 2 * 4096 * 4
    text = describe_memory(replace(large, config=config))
    assert f"nor learned credit, in the processor's memory {bytes_ / 2**30:.2f} GiB" in text


def test_the_cache_holds_keys_and_values_of_grouped_heads_at_the_longest():
    process = make_process()
    rows, tokens, numbers = 64, 60 + 100, 3 * 2 * 2 * 16  # the evaluation's rows; layers, k and v, heads, head size
    process = replace(process, config=replace(process.config, rollout=replace(process.config.rollout, batch_size=64)))
    assert memory_of(process).sampling["rollout: KV cache"] == rows * tokens * numbers * 4


def test_recomputation_keeps_the_inputs_of_layers_alone():
    whole, less = (memory_of(make_process(gradient_checkpointing=on)) for on in (False, True))
    assert less.activations.layers == 3 * 1824 * 64 * 4 < whole.activations.layers / 5
    assert less.peak < whole.peak
    assert "update: the inputs of 3 layers for 1824 tokens" in less.update


def test_gradients_and_activations_do_not_peak_together_in_a_single_pass():
    memory = memory_of(make_process())
    assert memory.passes == 1
    several = memory_of(make_process(), 256)
    assert several.passes == 8
    assert several.updating == sum(several.gradients.values()) + several.activations.peak
    assert memory.updating < sum(memory.gradients.values()) + memory.activations.peak


def test_shards_gather_two_layers_at_a_time():
    process = make_process()
    layers = sum(p.numel() for p in process.model.model.layers.parameters())
    rest = sum(p.numel() for p in process.model.parameters()) - layers
    assert memory_of(replace(process, shards=2)).activations.copies == 4 * (rest + 2 * layers // 3)


@pytest.mark.parametrize(("pads", "tokens", "rows"), [(True, 2048, 12), (False, 159, 1)])
def test_models_that_are_not_packed_hold_rectangles(pads, tokens, rows):
    process = replace(make_process(), attention=Attention(False, "padded", "", pads=pads))
    assert memory_of(process).activations is not None
    assert memory_of(process).tokens == tokens
    assert micro_batch(process, tokens).input_ids.shape == (rows, 159)


def test_layers_that_loop_over_tokens_are_named_as_not_counted():
    text = describe_memory(make_process(MambaConfig(**SIZES)))
    assert "without activations (RuntimeError: one layer runs more than" in text


def test_critics_with_a_model_of_their_own_add_its_activations():
    process = make_process()
    critic = nn.Module()
    critic.trunk = on_meta(SHAPE).model
    critics = nn.ModuleDict({"reward": critic})
    memory = memory_of(replace(process, critics=critics))
    assert memory.update["update: activations of the reward critic"] > 10**6
    config = replace(
        process.config, algorithm=AlgorithmConfig(advantages="gae"), critic=CriticConfig(init_from="scorers")
    )
    assert "nor the critics, 16 bytes per parameter" in describe_memory(replace(process, config=config))


def test_the_scorers_of_a_dry_run_are_counted_from_their_configs(scorer_folder):
    config = Config(
        model=ModelConfig(path="x"), scoring=ScoringConfig(reward=str(scorer_folder), cost="tests.support.scorers:cost")
    )
    config = replace(config, evaluation=replace(config.evaluation, judge="none"))
    size = planned_scorer_bytes(config, "cpu")
    assert size > 0 == size % 4
    assert planned_scorer_bytes(replace(config, scoring=ScoringConfig(reward="no/such-model")), "cpu") is None
