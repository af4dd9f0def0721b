"""The arithmetic of memory beside what PyTorch's allocator counts, and beside two runs on a GPU."""

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen2Config, Starcoder2Config

from repo.memory.description import memory_of
from tests.memory.measured_memory import TYPES, make_config, make_policy, process_of, update_peak

SHAPES = {
    "Llama 64": LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=500,
    ),
    "Starcoder2 128, plain MLP": Starcoder2Config(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=800, sliding_window=None,
    ),
    "Qwen2 256, tied head": Qwen2Config(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=1000, tie_word_embeddings=True,
    ),
    "Mixtral 64, experts": MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=500,
    ),
}  # fmt: skip


@pytest.mark.pairwise
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_of_a_micro_batch_is_the_allocators(shape, types, rank, recomputes):
    config = make_config(types, rank, recomputes)
    policy = make_policy(SHAPES[shape], config.model)
    computed = memory_of(process_of(config, policy)).activations
    assert computed.peak == pytest.approx(update_peak(config, policy), rel=0.1)
