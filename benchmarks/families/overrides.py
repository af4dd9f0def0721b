"""Overrides: what the rules of tiny_config do not say of single families."""

from __future__ import annotations

from typing import Any

_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_HEADS = {"head_dim": 8, "num_key_value_heads": 2}
_LAST_ATTENDS = {"num_hidden_layers": 2, "attn_layer_indices": [1]}
_ZAMBA = {
    "attention_hidden_size": 64,  # its attention reads the states and the embeddings side by side
    "attention_head_dim": 16,
    "num_hidden_layers": 2,
    "layers_block_type": ["linear_attention", "hybrid"],
    "hybrid_layer_ids": [1],
    "n_mamba_heads": 8,
    "mamba_headdim": 8,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _LAST_ATTENDS,
    "deepseek_v2": _EXPERTS,
    "doge": {"keep_window_size": 512},  # a mask that chooses among fewer keys would let them depend on later tokens
    "dots1": {**_EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "dots3_note": {"adapter_in_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "longcat_flash": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "head_dim": 8, "v_head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": {"dim_model_base": 32, "scale_emb": 1},  # else the logits are so large that each token is certain
    "ministral": _HEADS,
    "nemotron": _HEADS,
    "nemotron_h": {"initializer_range": 0.1},  # its step and its scan differ by 1e-5 of the logits, in fp64 too
    "reformer": {"axial_pos_embds": False},
    # its step and its scan differ, in fp64 too: by 3e-4 of a logit with weights of 0.2, by 1e-7 with these
    "zamba2": {**_ZAMBA, "initializer_range": 0.05},
    "zaya": {"num_experts_per_tok": 1},
}
