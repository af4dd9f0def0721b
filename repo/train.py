"""Train a policy under a cost constraint: sample -> reference -> score -> advantages -> update -> record.

python -m repo.train                                  RePO on the embedded default
python -m repo.train --preset paper                   the paper's form: critics, mode split, KL in the reward
python -m repo.train --config run.yaml --steps 100    your own model, prompts, reward and cost
python -m repo.train --resume runs/repo-...           go on from the last checkpoint
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from . import checkpoint, run
from .actor import Actor, read_reference
from .card import model_card
from .config import Config
from .data import batch_at
from .decoding import describe_decoding
from .errors import UserError, exit_with_sentence
from .evaluate import Evaluation, comparison_rows, evaluate, print_comparison
from .memory import describe_memory, keep_freed_memory
from .metrics import ConsoleTable, duration, progress_bar, show_samples
from .objective import make_batch
from .parsing import PRESETS, make_parser, parse, preset_names
from .penalty import Penalty
from .policy import Policy, vocabulary
from .record import Timer, sample_records, step_record
from .rollout import sample
from .run import Run
from .setup import Parts, describe_batch, dry_run, load_parts, require_one_process
from .signals import StopRequest
from .update import Updater

LOG_WIDTH = 140  # columns of a console that is not a terminal


def train(
    config: Config, folder: Run, parts: Parts, console: Console, state: checkpoint.State | None, saved: Path | None
) -> None:
    """The loop. Returns after the last step, or early, with a checkpoint, when a signal asked for it."""
    a, r = config.algorithm, config.rollout
    penalty = Penalty(a, config.penalty)
    actor, reference = Actor(parts.policy, parts.critics), Actor(parts.reference)
    updater, layers = Updater(actor, config, parts.examples), parts.scorers.layers_of(parts.reference.model)
    first, stop = 0, StopRequest(console.print)
    before = evaluated(config, parts, folder, "before", console, parts.reference)
    if state and saved:
        first, updater.skipped_in_a_row = state.step, state.skipped_in_a_row
        penalty.load_state_dict(state.penalty)
        checkpoint.restore(saved, actor, updater.optimizer)
    table, started = ConsoleTable(console), time.perf_counter()
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=config.steps, completed=first)
        for step in range(first, config.steps):
            if stop.requested:
                console.print(f"stopped after step {step}; continue with: {folder.resume_command}", markup=False)
                return
            timer = Timer()
            prompts = batch_at(parts.train_prompts, step, r.prompts_per_step, config.seed)
            rollout = sample(parts.policy, prompts, r.samples_per_prompt, r, config.seed, step)
            timer.mark("rollout")
            budget = config.optimizer.micro_batch_tokens
            ref_logps, reading = read_reference(reference, rollout.sequences, r.temperature, budget, layers)
            timer.mark("reference")
            scores = parts.scorers(rollout.prompts, rollout.texts, reading)
            timer.mark("score")
            said = updater.read(rollout.sequences, step)
            weights = penalty.value, penalty.beta
            batch = make_batch(config, rollout.sequences, scores.rewards, scores.costs, ref_logps, *weights, *said)
            result = updater.update(batch, step, config.steps)
            timer.mark("update")

            record = step_record(step, a.cost_limit, rollout, scores, batch, result, timer.seconds)
            penalty.update(scores.costs.tolist(), record["rectified_cost"], record["kl"])
            samples = sample_records(step, rollout, scores, batch.advantages, a.cost_limit)
            folder.write(step, record, samples)
            done = step + 1
            eta = (time.perf_counter() - started) / (done - first) * (config.steps - done)
            table.row(record, f"eta {duration(eta)}")
            if config.sample_every and done % config.sample_every == 0:
                show_samples(console, samples[:: r.samples_per_prompt][:2])
            bar.advance(task)
            if stop.requested or done == config.steps or (config.save_every and done % config.save_every == 0):
                state = checkpoint.State(done, penalty.state_dict(), updater.skipped_in_a_row, folder.offsets)
                checkpoint.save(folder.folder, state, actor, updater.optimizer)
    stop.restore()
    finish(config, parts, folder, console, before)


def evaluated(
    config: Config, parts: Parts, folder: Run, name: str, console: Console, policy: Policy
) -> Evaluation | None:
    """Evaluate on the held-out prompts into RUN/eval/<name>.json, or read that file when a resumed run has it."""
    if not parts.eval_prompts:
        return None
    a, e, started = config.algorithm, config.evaluation, time.perf_counter()
    known = folder.read_evaluation(name)
    if known and [r["id"] for r in known["responses"]][:: e.samples_per_prompt] == [p.id for p in parts.eval_prompts]:
        return Evaluation(known["responses"], a.cost_limit)
    with console.status("") as status:
        found = evaluate(
            config,
            policy,
            parts.eval_prompts,
            parts.scorers,
            parts.judge,
            lambda stage: status.update(f"evaluation {name} training: {stage}"),
        )
    seconds = time.perf_counter() - started
    console.print(f"evaluation {name} training: {len(found.records)} responses in {seconds:.0f} s", highlight=False)
    folder.write_evaluation(name, {"summary": found.summary(), "responses": found.records})
    return found


def finish(config: Config, parts: Parts, folder: Run, console: Console, before: Evaluation | None) -> None:
    """Evaluate again, print the comparison, export the model."""
    after = evaluated(config, parts, folder, "after", console, parts.policy)
    rows = comparison_rows(before, after) if before and after else []
    final = folder.export(parts.policy, model_card(config, config.steps, rows))
    if before and after:
        print_comparison(console, before, after)
    console.print(f"model: {final}   metrics: {folder.metrics.path}   samples: {folder.samples.path}", markup=False)


def read_command(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """The command's own switches and the configuration behind them: preset, then --config, then overrides."""
    command = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    command.add_argument("--preset", choices=preset_names(), help="start from one of repo/presets")
    command.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    command.add_argument("--dry-run", action="store_true", help="print shapes, memory and batch arithmetic, then exit")
    try:
        flags, rest = command.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if flags.preset:
        rest = ["--config", str(PRESETS / f"{flags.preset}.yaml"), *rest]
    if flags.resume:
        checkpoint.latest(flags.resume)
        rest = ["--config", str(flags.resume / "config.yaml"), *rest]
    return flags, parse(make_parser("repo.train", __doc__ or "", command), rest)


def run_command(argv: list[str]) -> None:
    """Parse, then dry-run, resume or start."""
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    transformers_logging.disable_progress_bar()
    flags, config = read_command(argv)
    require_one_process()
    if config.rollout.top_p < 1:
        console.print(
            "warning: rollout.top_p < 1 samples from another distribution than the loss assumes", style="yellow"
        )
    if flags.dry_run:
        dry_run(config, console)
        return
    keep_freed_memory()
    state = saved = None
    if flags.resume:
        state, saved = run.check_resume(flags.resume, config)
        parts = load_parts(config, console)
        folder = run.reopen(flags.resume, config, state)
    else:
        path = run.folder_of(config)
        parts = load_parts(config, console)
        folder = run.create(config, path)
    console.print(f"run: {folder.folder}   {describe_batch(config)}", markup=False, highlight=False)
    attention = Actor(parts.policy, parts.critics).attention
    kernels = f"{attention.describe()}; {describe_decoding(parts.policy)}"
    console.print(kernels, style=None if attention.packs else "yellow", markup=False, highlight=False)
    memory = describe_memory(config, parts.policy.model, vocabulary(parts.policy), parts.critics)
    console.print(f"memory:\n{memory}\n{parts.scorers.describe()}", markup=False, highlight=False)
    try:
        train(config, folder, parts, console, state, saved)
    finally:
        folder.close()


def main() -> None:
    """Console script."""
    exit_with_sentence(lambda: run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
