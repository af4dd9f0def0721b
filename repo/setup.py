"""Setup: load the models, scorers and prompts that a configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from . import assets
from .common.distributed import ALONE, World
from .common.errors import UserError
from .config.schema import Config, PtxConfig
from .data.prompts import Example, Prompt, batch_at
from .data.sources import is_embedded, load_data
from .gate.prompts import gate_data
from .models.actor import Actor
from .models.critic import make_critics
from .models.fast_layers.choice import with_fast_layers
from .models.policy import Policy, choose_device, load_policy, load_reference, merged
from .models.scaled import patch, scale_update, trained_copies
from .rollout.sample import sample
from .rollout.stop_tokens import with_stop_tokens
from .runs.loggers import check_loggers
from .runs.state_files import restore_weights
from .scoring.judge import Judge, load_judge
from .scoring.scorers import EMBEDDED, Scorers, load_scorers, scorer_names
from .training.cost_gradient import cost_gradient
from .training.pairs import require_pairs_in_one_pass

CALIBRATION = 32
"""Training prompts whose responses give the gradient of the cost for a patch."""


@dataclass(frozen=True)
class Parts:
    """Loaded models, scorers and data of a run.

    policy: the model to train.
    sampler: the model that generates: the policy itself, or an unsharded copy if the policy will be sharded.
    reference: the frozen model that the KL is measured from.
    scorers: reward and cost.
    critics: value models by signal; empty without GAE.
    judge: scores held-out responses and takes no part in training; None leaves its verdicts out.
    train_prompts, eval_prompts: tokenised training and held-out prompts.
    gate_prompts: tokenised validation prompts; empty without a gate.
    examples: supervised examples; empty without ptx.data.
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
    gate_prompts: list[Prompt]


def find_assets(config: Config, console: Console, named: Sequence[str] = ()) -> Path | None:
    """Return the folder of the embedded assets, built first if needed; None if nothing uses any.

    named: scorers besides those of the configuration.

    Raises AssetError if something embedded is required and cannot be built. A judge that cannot be built is only
    reported, and the evaluation goes without it.
    """
    evaluates = config.evaluation.prompts > 0
    sources = [config.data.train, *([config.data.eval] if evaluates else [])]
    required = EMBEDDED in (config.model.path, *scorer_names(config.scoring), *named) or any(map(is_embedded, sources))
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
    """Return the folder or hub name that model.path means. folder: the embedded assets, or None."""
    return str(folder / "policy") if folder and config.model.path == EMBEDDED else config.model.path


def shards_of(config: Config, world: World) -> int:
    """Return how many processes share one copy of the trained weights.

    Raises UserError if that does not divide the number of processes, or if there are fewer prompts than processes.
    """
    shard = config.model.shard or world.size
    if world.size % shard:
        raise UserError(f"model.shard must divide the {world.size} processes of this run; got {shard}")
    prompts = config.rollout.prompts_per_step
    if prompts < world.size:
        raise UserError(f"rollout.prompts_per_step must be >= the {world.size} processes of this run; got {prompts}")
    return shard


def load_parts(config: Config, console: Console, world: World = ALONE, trust: bool = False) -> Parts:
    """Load the models, scorers and prompts of a run.

    trust: run Python code that comes with models. Raises UserError for whatever cannot be loaded.
    """
    check_loggers(config.loggers)
    shards = shards_of(config, world)
    folder = world.from_first(lambda: find_assets(config, console))
    device, path = choose_device(config.model.device), model_path(config, folder)
    sampler = None
    if shards > 1:
        sampler = load_policy(path, device, False, config.model, trust)
        # on the CPU: sharding moves one layer at a time to the device
        policy = load_policy(path, torch.device("cpu"), True, config.model, trust)
        policy = dataclasses.replace(policy, device=device, attention=sampler.attention)
    else:
        policy = load_policy(path, device, True, config.model, trust)
    if config.algorithm.on_pairs:
        require_pairs_in_one_pass(policy.attention, config.model.path)
    policy = with_fast_layers(policy, config.model.compile, shards > 1)
    if policy.merged:
        adapter = f"model: the adapter {path} is merged into its base {policy.merged}"
        console.print(adapter, markup=False, highlight=False)
    policy, line = with_stop_tokens(policy, config.rollout.stop_tokens)
    sampler = dataclasses.replace(sampler, eos_ids=policy.eos_ids) if sampler is not None else policy
    if line:
        console.print(line, markup=False, highlight=False)
    shape = policy.model.config.get_text_config()
    train, held_out, examples = load_data(config, folder, policy.tokenizer, policy.eos_ids, shape, console)
    train, validation = gate_data(config, folder, train, policy.tokenizer, shape, console)
    reference = load_reference(policy, path, config.model, trust)
    beside = None if reference.base_only and shards > 1 else reference
    scorers = scorers_beside(config, folder, beside, config.model.path, str(device), trust)
    signals = ("reward",) if config.algorithm.method == "ppo" else ("reward", "cost")
    uses_critics = config.algorithm.advantages == "gae"
    same_trunk = config.model.path == EMBEDDED
    critics = make_critics(config.critic, policy, scorers, signals if uses_critics else (), same_trunk)
    judge = None
    if config.evaluation.prompts > 0:
        timeout, date = config.scoring.timeout, config.data.date
        judge = load_judge(config.evaluation.judge, folder, str(device), timeout, trust, date)
    return Parts(policy, sampler, reference, scorers, critics, judge, train, held_out, examples, validation)


def scorers_beside(
    config: Config, folder: Path | None, reference: Policy | None, name: str | None, device: str, trust: bool
) -> Scorers:
    """Load the scorers of reward and cost.

    Embedded scorers share the reference's forward pass if the reference is the model that they were fitted on, in fp32.

    folder: the embedded assets, or None.
    reference: None, as where its layers are sharded, if nothing may be shared.
    name: the path that the reference was loaded from.
    """
    date = config.data.date
    if reference is None or name != EMBEDDED or reference.model.dtype != torch.float32:
        return load_scorers(config.scoring, folder, None, None, device, trust, date)
    model, tokenizer = reference.model, reference.tokenizer
    return load_scorers(config.scoring, folder, model, tokenizer, device, trust, date, reference.adapters)


def load_named(path: str, config: Config, device: torch.device, trust: bool) -> Policy:
    """Load a frozen model by folder, hub name or "embedded"."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
    folder = find_assets(config, Console(quiet=True))
    return load_policy(model_path(config, folder), device, False, config.model, trust)


def load_checkpoint_policy(
    source: Path, config: Config, device: torch.device, trust: bool, scale: float = 1.0
) -> Policy:
    """Load the policy of a checkpoint folder.

    config: the configuration of its run. scale: of the update, see models.scaled; 1 takes the weights as they are.
    """
    path = model_path(config, assets.ensure() if config.model.path == EMBEDDED else None)
    policy = load_policy(path, device, True, config.model, trust)
    begun = {} if scale == 1 else trained_copies(policy.model)
    restore_weights(source, Actor(policy))
    if begun:
        scale_update(policy.model, begun, scale)
    return policy


def load_patched_policy(
    source: Path, config: Config, device: torch.device, trust: bool, scale: float, keep: float, console: Console
) -> Policy:
    """Load the reference of a run with the entries of a checkpoint's update that matter most to the cost.

    The gradient of the cost is that of one batch of training prompts which the reference answers: CALIBRATION prompts,
    rollout.samples_per_prompt >= 2 responses to each. Weights are whole and fp32, adapters merged.

    scale, keep: see models.scaled.patch. Raises UserError if the gradient is 0.
    """
    folder = find_assets(config, console)
    model = dataclasses.replace(config.model, dtype="float32")
    trained = load_checkpoint_policy(source, dataclasses.replace(config, model=model), device, trust)
    update = dict(merged(trained, "--keep").model.named_parameters())
    whole = dataclasses.replace(config, model=dataclasses.replace(model, lora_rank=0))
    policy = load_policy(model_path(config, folder), device, True, whole.model, trust)
    policy, _ = with_stop_tokens(policy, config.rollout.stop_tokens)
    shape = policy.model.config.get_text_config()
    plain = dataclasses.replace(config, ptx=PtxConfig())  # without supervised examples
    prompts, _, _ = load_data(plain, folder, policy.tokenizer, policy.eos_ids, shape, console)
    prompts, _ = gate_data(config, folder, prompts, policy.tokenizer, shape, console)
    asked = batch_at(prompts, 0, min(CALIBRATION, len(prompts)), config.seed, "patch")
    rollout = sample(policy, asked, max(2, config.rollout.samples_per_prompt), config.rollout, config.seed, "patch")
    costs = scorers_beside(config, folder, None, None, str(device), trust).costs(rollout.prompts, rollout.texts)
    gradient = cost_gradient(Actor(policy), whole, rollout, costs)
    added = patch(policy.model, update, gradient, scale, keep)
    if not added:
        raise UserError(
            f"--keep: the cost has no gradient, since the {len(costs)} responses to {len(asked)} training prompts cost "
            "the same within each prompt, or training has changed nothing"
        )
    line = f"patch: {added:.1%} of the entries, by the cost of {len(costs)} responses to {len(asked)} training prompts"
    console.print(line, markup=False, highlight=False)
    return policy
