"""Config fields: read what a model's config says, also where a field varies by layer or has several names."""

from __future__ import annotations

from typing import Any

LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types whose factors change with the longest position of a batch


def config_field(config: Any, name: str, default: Any = None) -> Any:
    """Return a field of a config, `default` where it is missing or None.

    A field that varies by layer, which transformers refuses to read, gives the largest value of all layers.
    """
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' error for a field that varies by layer
        values = [getattr(layer, name, None) for layer in layer_configs(config)]
        value = max((v for v in values if v is not None), default=None)
    return default if value is None else value


def layer_configs(config: Any) -> list[Any]:
    """List the configs of the layers of a model whose layers differ."""
    layers = config.per_layer_config
    return list(layers.values()) if isinstance(layers, dict) else list(layers)


def head_size(config: Any) -> int:
    """Return the size of the largest query head of a text config."""
    nope, rope = config_field(config, "qk_nope_head_dim"), config_field(config, "qk_rope_head_dim")
    if nope and rope:  # latent attention, as in DeepSeek-V3
        return int(nope + rope)
    return int(
        config_field(config, "head_dim")
        or config_field(config, "hidden_size") // max(1, config_field(config, "num_attention_heads", 1))
    )


def equal_head_sizes(config: Any) -> bool:
    """Tell whether queries and values have heads of the same size, which latent attention has not."""
    return int(config_field(config, "v_head_dim", head_size(config))) == head_size(config)


def is_length_dependent(model: Any) -> bool:
    """Tell whether a rotary embedding of the model changes with the length of what it reads."""
    return any(_rope_types(module) & {*LENGTH_DEPENDENT} for module in model.modules())


def _rope_types(module: Any) -> set[str]:
    """List the rope types of a rotary embedding, one or one per kind of layer; empty for other modules."""
    kinds = vars(module).get("rope_type", ())
    return {kinds} if isinstance(kinds, str) else {*kinds.values()} if isinstance(kinds, dict) else set()


def longest_input(config: Any) -> int | None:
    """Return the number of positions that a text config names, None if it names none."""
    # MPT has no position embeddings, but its ALiBi biases are made for this many
    return config_field(config, "max_position_embeddings") or config_field(config, "max_seq_len")


def context_of(config: Any) -> int | None:
    """Return the most tokens that a sequence may have, None if the config names no limit.

    config: a text config. Where the factors of the rotary embedding change beyond
    original_max_position_embeddings, that is the limit: a sequence beyond it changes what the shorter rows of its
    batch read, and the keys that are cached before the limit do not fit those after it.
    """
    context = longest_input(config)
    rope = config_field(config, "rope_parameters", {})
    several = [value for value in rope.values() if isinstance(value, dict)]
    keys = config_field(config, "keep_window_size")  # Doge's dynamic mask chooses among more keys by later tokens too
    limits = [limit for limit in (context, keys) if limit]
    for parameters in several or [rope]:
        if parameters.get("rope_type") in LENGTH_DEPENDENT:
            original = parameters.get("original_max_position_embeddings")
            original = original or config_field(config, "original_max_position_embeddings")
            limits += [original] if original else []
    return int(min(limits)) if limits else None
