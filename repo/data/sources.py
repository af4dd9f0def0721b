"""Sources: the prompts and supervised examples that a configuration names, embedded or of files and data sets."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common import config_fields
from ..common.errors import UserError
from ..common.seeds import seed_from
from ..config.schema import Config
from .chat_format import ChatFormat
from .pairs import have_pairs, tokenize_pairs, with_ids_of_pairs
from .prompts import COLUMN, Example, Prompt, load_prompts, tokenize_examples, tokenize_prompts
from .token_ids import require_embedded

EMBEDDED = "embedded"
"""Name of the prompts that come with the assets."""


def is_embedded(source: str) -> bool:
    """Tell whether a source of prompts is in the embedded assets: "embedded" or "embedded#split"."""
    return source.partition("#")[0] == EMBEDDED


def embedded_file(folder: Path, source: str, split: str) -> str:
    """Return the file of embedded prompts that a source means. split: the one that "embedded" alone means.

    folder: the embedded assets. Raises UserError for a split that they do not have.
    """
    name = source.partition("#")[2] or split
    there = sorted(path.stem for path in (folder / "prompts").glob("*.jsonl"))
    if name not in there:
        raise UserError(f"the embedded prompts have no split {name!r}; they have {', '.join(there)}")
    return str(folder / "prompts" / f"{name}.jsonl")


def context_of(shape: Any) -> int:
    """Return the most tokens that prompt and response may have together. shape: the model's text config."""
    return config_fields.context_of(shape) or sys.maxsize


def read_prompts(
    config: Config, source: str, split: str, folder: Path | None, tokenizer: Any, shape: Any, console: Console
) -> list[Prompt]:
    """Read and tokenise the prompts of a source, and print how many were kept and dropped.

    source: "embedded" or "embedded#split", a file or a data set, as data.train takes it.
    split: the one to read if the source names none: train, eval or test.
    folder: the embedded assets, or None.
    shape: the model's text config, whose context bounds prompt and response together.

    Raises UserError if rollout.max_response_tokens leaves no room for a prompt.
    """
    data, context, limit = config.data, context_of(shape), config.rollout.max_response_tokens
    room = min(data.max_prompt_tokens, context - limit)
    if room < 1:
        raise UserError(f"rollout.max_response_tokens={limit} leaves no room for a prompt in a context of {context}")
    read, column = source, data.column
    if is_embedded(source) and folder is not None:
        read, column = embedded_file(folder, source, split), COLUMN
    chat = ChatFormat(tokenizer, data.template_arguments, data.date)
    loaded = load_prompts(read, column, split)
    if split == "train" and config.algorithm.on_pairs and have_pairs(loaded):
        loaded = with_ids_of_pairs(loaded)
    prompts = tokenize_prompts(loaded, tokenizer, data.system_prompt, room, chat)
    require_embedded((i for p in prompts.kept for i in p.token_ids), shape.vocab_size, f"{read}: a prompt")
    tokens = sum(len(p.token_ids) for p in prompts.kept) / len(prompts.kept)
    line = f"{split} prompts: {len(prompts.kept)} of {read}, mean {tokens:.0f} tokens, {prompts.report()}"
    console.print(line, markup=False, highlight=False)
    return prompts.kept


def load_held_out(config: Config, folder: Path | None, tokenizer: Any, shape: Any, console: Console) -> list[Prompt]:
    """Read all held-out prompts in a fixed random order; return [] if evaluation.prompts is 0."""
    if not config.evaluation.prompts:
        return []
    split = "eval" if is_embedded(config.data.eval) else "test"
    held_out = read_prompts(config, config.data.eval, split, folder, tokenizer, shape, console)
    # files are often sorted by category, so the first n would all be of one category
    return sorted(held_out, key=lambda prompt: seed_from("held out", prompt.id))


def load_data(
    config: Config, folder: Path | None, tokenizer: Any, eos_ids: Sequence[int], shape: Any, console: Console
) -> tuple[list[Prompt], list[Prompt], list[Example]]:
    """Read training prompts, held-out prompts and supervised examples, and print how many were kept and dropped.

    Training prompts whose text is also held out are dropped.

    folder: the embedded assets, or None.
    eos_ids: token ids that end a response.
    shape: the model's text config, whose context bounds prompt and response together.

    Raises UserError if no training prompt is left.
    """
    data, context = config.data, context_of(shape)
    train = read_prompts(config, data.train, "train", folder, tokenizer, shape, console)
    held_out = load_held_out(config, folder, tokenizer, shape, console)
    held_texts = {p.text for p in held_out}
    kept = [p for p in train if p.text not in held_texts]
    if len(kept) < len(train):
        console.print(f"train prompts: {len(train) - len(kept)} more dropped: they are held out", style="yellow")
    if not kept:
        raise UserError("data.train: every prompt is also in data.eval; training needs prompts that are not held out")
    chat = ChatFormat(tokenizer, data.template_arguments, data.date)
    if config.algorithm.on_pairs and not have_pairs(kept):
        console.print("pairs: sampled from the reference in each step", highlight=False)
    elif config.algorithm.on_pairs:
        limit = config.rollout.max_response_tokens
        pairs = tokenize_pairs(kept, tokenizer, data.system_prompt, limit, eos_ids, chat)
        kept = pairs.kept
        ids = (i for p in kept for e in p.pair for i in (*e.prompt_ids, *e.response_ids))
        require_embedded(ids, shape.vocab_size, f"{data.train}: a pair")
        console.print(f"pairs: {len(kept)} of {data.train}, {pairs.report()}", markup=False, highlight=False)
    examples: list[Example] = []
    if config.ptx.data is not None:
        answers = load_prompts(config.ptx.data, data.column)
        auto = config.optimizer.micro_batch_tokens == "auto"
        limit = context if auto else min(context, config.optimizer.budget)
        supervised = tokenize_examples(answers, tokenizer, data.system_prompt, limit, eos_ids, chat)
        examples = supervised.kept
        ids = (i for e in examples for i in (*e.prompt_ids, *e.response_ids))
        require_embedded(ids, shape.vocab_size, f"{config.ptx.data}: an example")
        console.print(f"ptx examples: {len(examples)}, {supervised.report()}", markup=False, highlight=False)
    return kept, held_out[: config.evaluation.prompts], examples
