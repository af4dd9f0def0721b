"""Token ids: which of them a model can embed, the one that fills padding, and plain ones to try a model with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.seeds import generator


def embedding_rows(model: Any) -> int:
    """Return the number of token ids that a model can read: the rows of its input embedding."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):  # transformers raises either for models without one table
        return int(model.config.get_text_config().vocab_size)
    # DeepSpeed and FSDP leave empty weights behind; the config then says how many rows there are
    return int(weight.shape[0]) or int(model.config.get_text_config().vocab_size)


def padding_id(model: Any, candidates: Sequence[int | None]) -> int:
    """Return the first of `candidates` that the model can embed, else 0. Any id serves, as masks come from lengths."""
    rows = embedding_rows(model)
    return next((i for i in candidates if i is not None and 0 <= i < rows), 0)


def plain_ids(model: Any, count: int, length: int, name: str) -> Tensor:
    """Draw ids (count, length) int64 to try a model with, none of them special to it, e.g. a place for an image.

    name: of the trial, which seeds the draw.
    """
    rows = embedding_rows(model)
    special = {value for config in _configs(model.config) for value in _special(config)}
    ids = torch.randint(0, rows, (count, length), generator=generator(name))
    if special:
        plain = torch.tensor([i for i in range(rows) if i not in special])
        ids = plain[ids % len(plain)]
    return ids


def _configs(config: Any) -> Iterable[Any]:
    """List a config and its text config, which are often the same object."""
    text = config.get_text_config()
    return (config,) if text is config else (config, text)


def _special(config: Any) -> Iterable[int]:
    """List the token ids that a config names, e.g. image_token_id or pad_token_id."""
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_ids", "_token_index", "_token_indices")):
            values = value if isinstance(value, (list, tuple)) else (value,)
            yield from (v for v in values if isinstance(v, int))


def require_embedded(ids: Iterable[int], rows: int, where: str) -> None:
    """Raise UserError if a token id is beyond the embedding of the model that reads it.

    rows: of the embedding. where: begins the message and names the tokenizer or the text.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        raise UserError(
            f"{where} has token id {largest}, but the model embeds {rows} tokens, ids 0 to {rows - 1}: tokens were "
            "added to the tokenizer without resizing the model (model.resize_token_embeddings)"
        )
