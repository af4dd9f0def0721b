"""Tiny configs: shrink the default config of any family by rules on the names of its fields."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .overrides import OVERRIDES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = 2
WINDOW = 8  # shorter than most prompts, so that a window that is ignored shows
TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 2}
COUNTS = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(en|de)coder_layers|num_blocks)")

_RULES: list[tuple[str, Any]] = [
    (r"hidden_size|d_model|n_embd|n_embed|embed_dim|dim|model_dim|embedding_size|emb_dim|word_embed_proj_dim", 32),
    (r"dim_model|(input|output)_embedding_size|attention_hidden_size|lru_width|hidden_size_per_layer_input|width", 32),
    (
        r".*intermediate_size.*|.*ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim|dim_ff|feed_forward_size|dim_feedforward",
        48,
    ),
    (r"(num_|n_)?(hidden_|decoder_|encoder_|index_|.*attention_)?n?_?heads?", 4),
    (r".*num_(global_)?(key_value|kv)_heads|multi_query_group_num|.*kv_n_heads", 2),
    (r"(.*_)?head_dim|kv_channels|d_kv|d_head|head_size|attention_head_size", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r".*(state_size|d_state)|.*_dt_rank|time_step_rank", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"q_lora_rank|kv_lora_rank|.*_lora_rank|.*_latent_dim", 16),
    (r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|.*_num_experts", 4),
    (r"num_experts_per_tok(en)?|top_k|moe_top_?k|moe_k|num_selected_experts|.*_topk_experts", 2),
    (r"rotary_dim", 8),
    (r"n_group|topk_group|n_groups|mamba_n_groups|num_expert_groups?", 1),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|original_max_position_embeddings",
        512,
    ),
    (r".*window(_size)?|attention_chunk_size", WINDOW),
    (r"initializer_range|init_std|initializer_factor|embedding_initializer_range", 0.2),
    (r"is_decoder", True),
    (r"is_encoder_decoder|add_cross_attention|scale_embedding", False),
    (r".*drop(out|_rate|path)?(_p|_prob)?|.*_dropout|.*_pdrop|.*layerdrop|(router|input)_jitter_noise", 0.0),
    (r"index_topk", 512),
]


def tiny_config(family: str, vocabulary: int) -> Any:
    """Build a config of `family`, a model_type of transformers, with some 10 000 weights and `vocabulary` tokens."""
    cls = CONFIG_MAPPING[family]
    overrides = {"vocab_size": vocabulary, **OVERRIDES.get(family, {})}
    return cls(**_shrunk(cls(), vocabulary, overrides))


def _shrunk(default: Any, vocabulary: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a small config like `default`; overrides replace what the rules say."""
    fields = {name: _value(default, name) for name in vars(default) if not name.startswith("_")}
    keep = _kept_layers(fields)
    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        if hasattr(value, "to_diff_dict"):
            arguments[name] = _shrunk(value, vocabulary, dict(overrides.get(name, {}), vocab_size=vocabulary))
        elif isinstance(value, (list, tuple)) and len(value) == keep[1] and keep[1] > 1:
            arguments[name] = [value[i] for i in keep[0]]
        elif name == "vocab_size" and isinstance(value, int):
            arguments[name] = vocabulary
        elif COUNTS.fullmatch(name) and isinstance(value, int):
            arguments[name] = len(keep[0])
        elif name in TOKENS:
            arguments[name] = TOKENS[name]
        elif value is not None and not isinstance(value, (str, dict, list)):
            rule = next((small for pattern, small in _RULES if re.fullmatch(pattern, name)), None)
            if rule is not None and isinstance(value, bool) == isinstance(rule, bool):
                arguments[name] = rule if isinstance(rule, bool) or rule != int(rule) else type(value)(rule)
    if "kv_lora_rank" in arguments and "num_key_value_heads" in arguments:  # latent attention has no grouped heads
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    # the names that a config class maps to others would be given twice
    aliases = set(getattr(type(default), "attribute_map", {}))
    arguments = {name: value for name, value in arguments.items() if name not in aliases}
    own = {name: value for name, value in overrides.items() if not isinstance(value, dict) or name not in arguments}
    if "vocab_size" not in fields:
        own.pop("vocab_size", None)
    return arguments | own


def _value(config: Any, name: str) -> Any:
    """Read a field, also one whose property refuses because it varies by layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


def _kept_layers(fields: dict[str, Any]) -> tuple[list[int], int]:
    """Return the layers to keep, one of each kind and at least LAYERS, and the number that the default has."""
    count = next(
        (v for n, v in fields.items() if COUNTS.fullmatch(n) and isinstance(v, int) and not isinstance(v, bool)), 0
    )
    kinds = [fields.get(n) for n in ("layer_types", "layers_block_type", "mlp_layer_types") if fields.get(n)]
    kinds = [k for k in kinds if isinstance(k, (list, tuple)) and len(k) == count]
    if not kinds:
        return list(range(min(LAYERS, count) or LAYERS)), count
    signature = list(zip(*kinds, strict=True))
    kept = sorted({signature.index(s) for s in signature})
    for extra in range(count):
        if len(kept) >= LAYERS:
            break
        if extra not in kept:
            kept.append(extra)
    return sorted(kept), count
