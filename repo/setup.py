"""Setup: from the configuration to the loaded parts of a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from . import assets
from .common.distributed import ALONE, World
from .common.errors import UserError
from .common.seeds import seed_from
from .config.schema import Config
from .data.prompts import Example, Prompt, load_prompts, tokenize_examples, tokenize_prompts
from .models.actor import Actor
from .models.critic import make_critics
from .models.policy import Policy, choose_device, load_policy, load_reference
from .runs.loggers import check_loggers
from .runs.state_files import restore_weights
from .scoring.judge import Judge, load_judge
from .scoring.scorers import EMBEDDED, Scorers, load_scorers, scorer_names


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a run.

    policy: is trained. sampler: the same, or a whole copy of it where the policy will be sharded. reference: frozen.
    critics: empty without GAE. judge: takes no part in training. examples: supervised ones, empty without ptx.
    """

    policy: Policy
    sampler: Policy
    reference: Policy
    scorers: Scorers
    critics: nn.ModuleDict
    judge: Judge | None
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    examples: list[Example]


def find_assets(config: Config, console: Console) -> Path | None:
    """Find the assets folder, built first when something embedded is used; None when nothing is."""
    evaluates = config.evaluation.prompts > 0
    used = [config.model.path, config.data.train, *scorer_names(config.scoring)]
    used += [config.data.eval] if evaluates else []
    required = EMBEDDED in used
    if not (required or (evaluates and config.evaluation.judge == EMBEDDED)):
        return None

    def report(stage: str, done: int, total: int) -> None:
        console.print(f"building the embedded assets, once: {stage} ({done} of {total} done)", highlight=False)

    try:
        assets.build(report=report)
    except assets.AssetError as error:
        if required:
            raise
        console.print(f"no held-out judge in the evaluation: {error}", style="yellow", markup=False)
        return None
    return assets.assets_dir()


def model_path(config: Config, folder: Path | None) -> str:
    """Give the folder or hub name behind model.path."""
    return str(folder / "policy") if folder and config.model.path == EMBEDDED else config.model.path


def shards_of(config: Config, world: World) -> int:
    """Count the processes that share one copy of the trained weights. Raises UserError when they cannot be split so."""
    shard = config.model.shard or world.size
    if world.size % shard:
        raise UserError(f"model.shard must divide the {world.size} processes of this run; got {shard}")
    prompts = config.rollout.prompts_per_step
    if prompts < world.size:
        raise UserError(f"rollout.prompts_per_step must be >= the {world.size} processes of this run; got {prompts}")
    return shard


def load_parts(config: Config, console: Console, world: World = ALONE, trust: bool = False) -> Parts:
    """Load everything. Raises UserError for what cannot be loaded. trust: run Python code that comes with models."""
    check_loggers(config.loggers)
    shards = shards_of(config, world)
    folder = world.from_first(lambda: find_assets(config, console))
    device, path = choose_device(config.model.device), model_path(config, folder)
    if shards > 1:
        sampler = load_policy(path, device, False, config.model, trust)
        policy = load_policy(path, torch.device("cpu"), True, config.model, trust)  # sharding moves a layer at a time
        policy = dataclasses.replace(policy, device=device, attention=sampler.attention)
    else:
        policy = sampler = load_policy(path, device, True, config.model, trust)
    shape = policy.model.config.get_text_config()
    prompts = load_data(config, folder, policy.tokenizer, policy.eos_ids, shape, console)
    reference = load_reference(policy, path, config.model, trust)
    scorers = scorers_beside(config, folder, reference, config.model.path, str(device), trust)
    signals = ("reward",) if config.algorithm.method == "ppo" else ("reward", "cost")
    uses_critics = config.algorithm.advantages == "gae"
    same_trunk = config.model.path == EMBEDDED
    critics = make_critics(config.critic, policy, scorers, signals if uses_critics else (), same_trunk)
    judge = None
    if config.evaluation.prompts > 0:
        judge = load_judge(config.evaluation.judge, folder, str(device), config.scoring.timeout, trust)
    return Parts(policy, sampler, reference, scorers, critics, judge, *prompts)


def context_of(shape: Any) -> int:
    """Give the longest prompt and response together, in tokens, that a model's text config allows."""
    return getattr(shape, "max_position_embeddings", None) or sys.maxsize


def read_prompts(
    config: Config, source: str, split: str, folder: Path | None, tokenizer: Any, shape: Any, console: Console
) -> list[Prompt]:
    """Read and tokenise the prompts of a source, and say what was kept and what was dropped."""
    data, context, limit = config.data, context_of(shape), config.rollout.max_response_tokens
    room = min(data.max_prompt_tokens, context - limit)
    if room < 1:
        raise UserError(f"rollout.max_response_tokens={limit} leaves no room for a prompt in a context of {context}")
    if source == EMBEDDED and folder is not None:
        source = str(folder / "prompts" / f"{split}.jsonl")
    found = tokenize_prompts(load_prompts(source, data.column, split), tokenizer, data.system_prompt, room)
    tokens = sum(len(p.token_ids) for p in found.kept) / len(found.kept)
    line = f"{split} prompts: {len(found.kept)} of {source}, mean {tokens:.0f} tokens, {found.report()}"
    console.print(line, markup=False, highlight=False)
    return found.kept


def load_held_out(config: Config, folder: Path | None, tokenizer: Any, shape: Any, console: Console) -> list[Prompt]:
    """Read all held-out prompts in a fixed random order; none where evaluation.prompts is 0."""
    if not config.evaluation.prompts:
        return []
    split = "eval" if config.data.eval == EMBEDDED else "test"
    held_out = read_prompts(config, config.data.eval, split, folder, tokenizer, shape, console)
    # files are often sorted by category, and the first n would be one category
    return sorted(held_out, key=lambda prompt: seed_from("held out", prompt.id))


def scorers_beside(
    config: Config, folder: Path | None, reference: Policy | None, name: str | None, device: str, trust: bool
) -> Scorers:
    """Load the scorers of both signals.

    Embedded ones share the reference's forward where the reference is the model they were fitted on, in fp32 and
    without an adapter. name: what the reference was loaded as.
    """
    shares = reference is not None and name == EMBEDDED and not reference.base_only
    if reference is None or not shares or reference.model.dtype != torch.float32:
        return load_scorers(config.scoring, folder, None, None, device, trust)
    return load_scorers(config.scoring, folder, reference.model, reference.tokenizer, device, trust)


def load_data(
    config: Config, folder: Path | None, tokenizer: Any, eos_ids: Sequence[int], shape: Any, console: Console
) -> tuple[list[Prompt], list[Prompt], list[Example]]:
    """Read training prompts, held-out prompts and supervised examples, and say what was kept and what was dropped.

    shape: the model's text config, whose context bounds prompt and response together.
    """
    data, context = config.data, context_of(shape)
    train = read_prompts(config, data.train, "train", folder, tokenizer, shape, console)
    held_out = load_held_out(config, folder, tokenizer, shape, console)
    held_texts = {p.text for p in held_out}
    kept = [p for p in train if p.text not in held_texts]
    if len(kept) < len(train):
        console.print(f"train prompts: {len(train) - len(kept)} more dropped, since they are held out", style="yellow")
    if not kept:
        raise UserError("every prompt of data.train is in data.eval too")
    examples: list[Example] = []
    if config.ptx.data is not None:
        answers = load_prompts(config.ptx.data, data.column)
        limit = min(context, config.optimizer.micro_batch_tokens)
        supervised = tokenize_examples(answers, tokenizer, data.system_prompt, limit, eos_ids)
        examples = supervised.kept
        console.print(f"ptx examples: {len(examples)}, {supervised.report()}", markup=False, highlight=False)
    return kept, held_out[: config.evaluation.prompts], examples


def load_checkpoint_policy(source: Path, config: Config, device: torch.device, trust: bool) -> Policy:
    """Load the policy of a checkpoint folder. config: of its run."""
    path = model_path(config, assets.ensure() if config.model.path == EMBEDDED else None)
    policy = load_policy(path, device, True, config.model, trust)
    restore_weights(source, Actor(policy))
    return policy
