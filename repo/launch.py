"""Launch a training run, on every process of torchrun."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from .command import Switches, console_of
from .common.distributed import World, joined
from .common.malloc import keep_freed_memory
from .common.openmp import describe_load
from .config.schema import Config
from .dry_run import describe_batch, dry_run
from .evaluation.evaluator import Evaluator
from .loop import train
from .memory.budget import free_bytes, pick, with_micro_batches
from .memory.description import describe_memory
from .memory.process import Process
from .memory.scorers import scorer_bytes
from .models.actor import Actor
from .models.policy import choose_device, vocabulary
from .rollout.decoding import describe_decoding
from .rollout.engine import check_engine, open_engine
from .runs.fingerprints import fingerprints
from .runs.folder import Run, create, folder_of
from .runs.interrupts import Stopped, StopRequest
from .runs.resume import Resumed, check_inputs, check_resume, reopen
from .scoring.rehearsal import rehearse
from .session import Session
from .setup import Parts, load_parts, shards_of


def launch(switches: Switches, config: Config) -> None:
    """Dry-run, resume or start a run. Raises UserError for input that cannot be used."""
    with joined(lambda: choose_device(config.model.device)) as world:
        console = console_of(quiet=not world.first)
        transformers_logging.disable_progress_bar()
        if config.rollout.top_p < 1:
            console.print(
                "warning: rollout.top_p < 1 samples from a distribution other than the loss assumes", style="yellow"
            )
        if switches.presets:
            console.print(f"preset: {', '.join(switches.presets)}", markup=False, highlight=False)
        if switches.dry_run:
            dry_run(config, console, world, switches.trust_remote_code)
            return
        if load := describe_load():
            console.print(load, style="yellow", markup=False, highlight=False)
        keep_freed_memory()
        run_session(switches, config, console, world)


def run_session(switches: Switches, config: Config, console: Console, world: World) -> None:
    """Load everything, print what the run will do and how, and train."""
    path, resumed = choose_folder(switches, config, world)
    config = dated(config, world)
    parts = load_parts(config, console, world, switches.trust_remote_code)
    for warning in world.from_first(lambda: rehearse_parts(config, parts)):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    check_engine(config, world.size, parts.policy.model.config)
    config = with_budget(config, parts, console, world)
    with open_engine(config, parts.policy, parts.sampler, switches.trust_remote_code) as engine:
        run = open_folder(switches, config, path, resumed, parts, console, world)
        console.print(f"run: {run.path}   {describe_batch(config, world)}", markup=False, highlight=False)
        actor = make_actor(config, parts, run, console, world)
        if line := engine.describe():
            console.print(line, markup=False, highlight=False)
        evaluator = Evaluator(
            config, parts.eval_prompts, parts.scorers, parts.judge, Actor(parts.reference), console, world
        )
        try:
            with StopRequest(console.print, world.size > 1) as stop:
                train(Session(config, parts, actor, engine, evaluator, run, resumed, console, world, stop))
        except Stopped:
            console.print(f"stopped; continue with: {run.resume_command}", markup=False, highlight=False)
        finally:
            run.close()


def dated(config: Config, world: World) -> Config:
    """Return the configuration with today's date in data.date if it has none, the same on every process."""
    today = world.from_first(lambda: f"{date.today():%Y-%m-%d}")
    return replace(config, data=replace(config.data, date=config.data.date or today))


def process_of(config: Config, parts: Parts, world: World) -> Process:
    """Describe what this process holds once everything is loaded, for the arithmetic of memory."""
    prompts = [*parts.train_prompts, *parts.eval_prompts, *parts.gate_prompts]
    return Process(
        config,
        parts.policy.model,
        vocabulary(parts.policy),
        parts.critics,
        shards_of(config, world),
        world.size,
        max(len(prompt.token_ids) for prompt in prompts),
        parts.policy.attention,
        parts.policy.matmul is not None and parts.policy.matmul.half,
        parts.policy.copied,
        scorer_bytes(parts.scorers, parts.judge, parts.reference.model),
    )


def with_budget(config: Config, parts: Parts, console: Console, world: World) -> Config:
    """Return the configuration with a number for optimizer.micro_batch_tokens if that is "auto".

    It is the smallest of all processes' choices. Raises UserError if nothing fits.
    """
    if config.optimizer.micro_batch_tokens != "auto":
        return config
    choice = pick(process_of(config, parts, world), free_bytes(parts.policy.device), is_loaded=True)
    choice = min(world.gather(choice), key=lambda each: each.tokens)
    console.print(choice.describe(), markup=False, highlight=False)
    return with_micro_batches(config, choice.tokens)


def rehearse_parts(config: Config, parts: Parts) -> list[str]:
    """Try the scorers before the run folder is made; returns warnings. Raises UserError if one cannot be used."""
    prompts = {"data.train": parts.train_prompts, "data.eval": parts.eval_prompts}
    return rehearse(parts.scorers, parts.judge, prompts, config.rollout.max_response_tokens)


def choose_folder(switches: Switches, config: Config, world: World) -> tuple[Path, Resumed]:
    """Decide the run's folder and, with --resume, the checkpoint to continue from.

    Raises UserError if a new run's folder exists or the run cannot be resumed.
    """
    if not switches.resume:
        return world.from_first(lambda: folder_of(config)), Resumed(None, None, [])
    path, allowed = switches.resume, switches.allow_change
    return path, world.from_first(lambda: check_resume(path, config, allowed))


def open_folder(
    switches: Switches, config: Config, path: Path, resumed: Resumed, parts: Parts, console: Console, world: World
) -> Run:
    """Create the run folder, or reopen the folder of a resumed run and print what has changed since it began.

    path, resumed: the results of choose_folder. Raises UserError if the folder cannot be written, or if an input has
    changed that --allow-change does not name.
    """
    prompts = parts.train_prompts, parts.eval_prompts, parts.examples, parts.gate_prompts
    inputs = world.from_first(lambda: fingerprints(parts.reference.model, parts.scorers, *prompts))
    if switches.resume:
        warnings = world.from_first(lambda: check_inputs(path, inputs, switches.allow_change))
        run = reopen(path, config, resumed.state, inputs, world)
        for warning in (*resumed.warnings, *warnings):
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    else:
        run = create(config, path, inputs, world)
    run.switches = " --trust-remote-code" if switches.trust_remote_code else ""
    return run


def make_actor(config: Config, parts: Parts, run: Run, console: Console, world: World) -> Actor:
    """Make the trained module, sharded if configured.

    Prints and records how attention, layers, products and decoding are computed; prints the memory.
    """
    shards = shards_of(config, world)
    memory = describe_memory(process_of(config, parts, world))
    decoding = describe_decoding(parts.sampler)
    actor = Actor(parts.policy, parts.critics, world, shards)
    style = None if actor.attention.packs else "yellow"
    console.print(f"{actor.attention.describe()}; {decoding}", style=style, markup=False, highlight=False)
    lines = [f"layers: {parts.policy.layers}"] if parts.policy.layers else []
    if parts.policy.matmul is not None:
        lines.append(parts.policy.matmul.describe())
    for line in lines:
        console.print(line, markup=False, highlight=False)
    run.write_execution([actor.attention.describe(), decoding, *lines])
    console.print(f"memory:\n{memory}\n{parts.scorers.describe()}", markup=False, highlight=False)
    return actor
