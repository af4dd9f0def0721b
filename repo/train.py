"""Train a policy under a cost constraint: sample -> reference -> score -> advantages -> update -> record.

python -m repo.train                                  RePO on the embedded default
python -m repo.train --preset paper                   the paper's form: critics, mode split, KL in the reward
python -m repo.train --config run.yaml --steps 100    your own model, prompts, reward and cost
python -m repo.train --resume runs/repo-...           go on from the last checkpoint
"""

from __future__ import annotations

import sys
import time

from rich.console import Console
from transformers.utils import logging as transformers_logging

from .command import Switches, console_of, read_command
from .common.distributed import World, joined
from .common.errors import exit_with_sentence
from .config.schema import Config
from .data.prompts import batch_at
from .evaluation.run import evaluated
from .evaluation.statistics import Evaluation
from .evaluation.tables import comparison_rows, print_comparison, print_compensation
from .models.actor import Actor, read_reference
from .models.memory import describe_memory, keep_freed_memory
from .models.policy import choose_device, vocabulary
from .models.sharding import copy_weights, whole_weights
from .rollout.kv_cache import describe_decoding
from .rollout.sample import sample
from .runs import checkpoint
from .runs import folder as run
from .runs.checkpoint import Saver
from .runs.console import ConsoleTable, duration, progress_bar, show_samples
from .runs.fingerprints import fingerprints
from .runs.folder import Resumed, Run
from .runs.interrupts import Stopped, StopRequest
from .runs.model_card import model_card
from .runs.panel import SafetyPanel
from .runs.records import Timer, sample_records, step_record
from .scoring.scorers import gathered
from .setup import Parts, describe_batch, dry_run, load_parts, shards_of
from .training.loss import make_batch
from .training.mismatch import agreement, require_finite_weights, warning_of
from .training.multipliers import Penalty
from .training.update import Updater


def train(
    config: Config,
    folder: Run,
    parts: Parts,
    actor: Actor,
    console: Console,
    resumed: Resumed,
    world: World,
    stop: StopRequest,
) -> None:
    """The loop. Returns after the last step; raises Stopped, with a checkpoint, when a signal asked for it."""
    a, r, budget = config.algorithm, config.rollout, config.optimizer.micro_batch_tokens
    penalty, reference, first = Penalty(a, config.penalty), Actor(parts.reference), 0
    updater, layers = Updater(actor, config, parts.examples), parts.scorers.layers_of(parts.reference.model)
    with stop.at_once():
        before = evaluated(config, parts, folder, "before", console, parts.reference, world)
    if resumed.state and resumed.checkpoint:
        first, updater.skipped_in_a_row = resumed.state.step, resumed.state.skipped_in_a_row
        penalty.load_state_dict(resumed.state.penalty)
        checkpoint.restore(resumed.checkpoint, actor, updater.optimizer, world)
    table, panel, watched, records = ConsoleTable(console), SafetyPanel(console, a.cost_limit), False, []
    started = time.perf_counter()
    with (
        Saver(folder.folder, config.keep, config.safety_target, world, actor.sharded) as saver,
        progress_bar(console, panel) as bar,
    ):
        task = bar.add_task("training", total=config.steps, completed=first)
        for step in range(first, config.steps):
            timer = Timer()
            copy_weights(parts.policy.model, parts.sampler.model)
            prompts = batch_at(parts.train_prompts, step, r.prompts_per_step, config.seed)
            part = world.slice(len(prompts))
            rollout = sample(parts.sampler, prompts, r.samples_per_prompt, r, config.seed, step, part)
            timer.mark("rollout")
            ref_logps, reading = read_reference(reference, rollout.sequences, r.temperature, budget, layers)
            timer.mark("reference")
            scores = parts.scorers(rollout.prompts, rollout.texts, reading)
            rollout, scores, ref_logps = gathered(world, rollout, scores, ref_logps, parts.policy.pad_id)
            timer.mark("score")
            saver.wait()  # the weights have rested until here
            said = updater.read(rollout.sequences, step)
            weights = penalty.value, penalty.beta
            batch = make_batch(config, rollout.sequences, scores.rewards, scores.costs, ref_logps, *weights, *said)
            result = updater.update(batch, step, config.steps)
            require_finite_weights(actor, world, f"after step {step}")
            timer.mark("update")

            found = agreement(rollout.logps, result.logps, rollout.sequences.response_mask)
            record = step_record(step, a, rollout, scores, batch, result, found, timer.seconds)
            penalty.update(scores.costs.tolist(), record["rectified_cost"], record["kl"])
            samples = sample_records(step, rollout, scores, batch.advantages, a.cost_limit)
            folder.write(step, record, samples)
            records.append(record)
            done = step + 1
            eta = (time.perf_counter() - started) / (done - first) * (config.steps - done)
            table.row(record, f"eta {duration(eta)}")
            panel.add(samples)
            if not watched and (warning := warning_of(found, config)):
                console.print(warning, style="yellow", markup=False, highlight=False)
                watched = True
            if config.sample_every and done % config.sample_every == 0:
                show_samples(console, samples[:: r.samples_per_prompt][:2])
            bar.advance(task)
            stopping = world.any(stop.requested)
            if stopping or done == config.steps or (config.save_every and done % config.save_every == 0):
                state = checkpoint.make_state(
                    done, penalty.state_dict(), updater.skipped_in_a_row, folder.offsets, records, world
                )
                saver.start(state, actor, updater.optimizer)
                records = []
            if stopping and done < config.steps:
                saver.wait()
                raise Stopped
        saver.wait()
    if not console.is_terminal:
        console.print(panel)
    with stop.at_once():
        finish(config, parts, folder, console, before, world)


def finish(
    config: Config, parts: Parts, folder: Run, console: Console, before: Evaluation | None, world: World
) -> None:
    """Evaluate again, print the comparison, export the model."""
    copy_weights(parts.policy.model, parts.sampler.model)
    after = evaluated(config, parts, folder, "after", console, parts.sampler, world)
    rows = comparison_rows(before, after) if before and after else []
    whole = None if parts.sampler is parts.policy else whole_weights(parts.policy.model)
    final = folder.export(parts.policy, model_card(config, config.steps, rows), whole)
    if before and after:
        print_comparison(console, before, after)
        print_compensation(console, after)
    console.print(f"model: {final}   metrics.jsonl, samples.jsonl: {folder.folder}", markup=False)


def run_command(argv: list[str]) -> None:
    """Parse, then dry-run, resume or start; on every process of torchrun."""
    flags, config = read_command(argv, __doc__ or "")
    with joined(lambda: choose_device(config.model.device)) as world:
        console = console_of(quiet=not world.first)
        transformers_logging.disable_progress_bar()
        if config.rollout.top_p < 1:
            console.print(
                "warning: rollout.top_p < 1 samples from another distribution than the loss assumes", style="yellow"
            )
        if flags.dry_run:
            dry_run(config, console, world, flags.trust_remote_code)
            return
        keep_freed_memory()
        start(flags, config, console, world)


def start(flags: Switches, config: Config, console: Console, world: World) -> None:
    """Load, say what will be done and how, and train."""
    path = flags.resume or world.from_first(lambda: run.folder_of(config))
    resumed = run.Resumed(None, None, [])
    if flags.resume:
        resumed = world.from_first(lambda: run.check_resume(path, config, flags.allow_change))
    parts = load_parts(config, console, world, flags.trust_remote_code)
    inputs = world.from_first(lambda: fingerprints(parts))
    if flags.resume:
        warnings = world.from_first(lambda: run.check_inputs(path, inputs, flags.allow_change))
        folder = run.reopen(path, config, resumed.state, inputs, world)
        for warning in (*resumed.warnings, *warnings):
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    else:
        folder = run.create(config, path, inputs, world)
    folder.switches = " --trust-remote-code" if flags.trust_remote_code else ""
    console.print(f"run: {folder.folder}   {describe_batch(config, world)}", markup=False, highlight=False)
    shards = shards_of(config, world)
    memory = describe_memory(config, parts.policy.model, vocabulary(parts.policy), parts.critics, shards)
    decoding = describe_decoding(parts.sampler)
    actor = Actor(parts.policy, parts.critics, world, shards)
    style = None if actor.attention.packs else "yellow"
    console.print(f"{actor.attention.describe()}; {decoding}", style=style, markup=False, highlight=False)
    console.print(f"memory:\n{memory}\n{parts.scorers.describe()}", markup=False, highlight=False)
    try:
        with StopRequest(console.print, world.size > 1) as stop:
            train(config, folder, parts, actor, console, resumed, world, stop)
    except Stopped:
        console.print(f"stopped; continue with: {folder.resume_command}", markup=False, highlight=False)
    finally:
        folder.close()


def main() -> None:
    """Console script."""
    exit_with_sentence(lambda: run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
