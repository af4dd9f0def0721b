"""Small models of many families, and their hidden states by packed and by separate forward passes."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from repo.attention.packed import using_packed
from repo.data.sequences import make_sequences

CPU = torch.device("cpu")
VOCABULARY = 61
IDS = {"vocab_size": VOCABULARY, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    **IDS,
}
WINDOW = 8  # shorter than most sequences below
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "llama, heads of 16": lambda: LlamaConfig(**SMALL, head_dim=16),
    "mistral-window, heads of 16": lambda: MistralConfig(**SMALL, head_dim=16, sliding_window=WINDOW),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **IDS),
}


def build(make_config, implementation=None):
    """A random causal LM, the same at every call."""
    torch.manual_seed(0)
    options = {} if implementation is None else {"attn_implementation": implementation}
    return AutoModelForCausalLM.from_config(make_config(), **options).eval()


def sequences(seed=0):
    """Three prompts with up to four responses, some of equal lengths, one empty."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(11, [9, 9, 13, 0]), (4, [6, 1]), (7, [12])]
    prompts, responses, group = [], [], []
    for number, (prompt, own) in enumerate(lengths):
        ids = torch.randint(3, VOCABULARY, (prompt,), generator=generator).tolist()
        for length in own:
            prompts.append(ids)
            responses.append(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
            group.append(number)
    return make_sequences(prompts, responses, 0, torch.tensor(group))


def packed_states(trunk, packed, **options):
    """(N, H): the states that predict response tokens."""
    arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "segments": packed.segments}
    with using_packed(trunk):
        return trunk(**arguments, use_cache=False, **options).last_hidden_state[0, packed.rows]


def separate_states(trunk, batch, order):
    """The same from a forward for each sequence."""
    found = []
    for prompt, response in (batch.token_lists()[row] for row in order.tolist()):
        if response:
            ids = torch.tensor([prompt + response[:-1]], device=trunk.device)
            found.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    return torch.cat(found)


def gradients(model, states, weights):
    model.zero_grad()
    (states * weights[:, None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected, tolerance=1e-5):
    assert (got - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())
