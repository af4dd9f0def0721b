"""Session: everything that the training loop works with, and the last steps of a run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .common.distributed import World
from .config.schema import Config
from .evaluation.evaluator import Evaluator
from .evaluation.outcome import outcomes, verdict
from .evaluation.pairs import choose, markdown, print_pairs
from .evaluation.statistics import Evaluation
from .evaluation.tables import comparison_rows, print_comparison, print_compensation
from .models.actor import Actor
from .models.sharding import copy_weights, whole_weights
from .reporting import after_run
from .rollout.engine import RolloutEngine
from .runs.folder import Run
from .runs.interrupts import StopRequest
from .runs.model_card import model_card
from .runs.resume import Resumed
from .setup import Parts


@dataclass(frozen=True)
class Session:
    """Everything that one process of a training run works with.

    config: the resolved configuration.
    parts: models, scorers and prompts, as loaded.
    actor: policy and critics in their trained form, sharded if configured.
    engine: samples the responses of training.
    evaluator: measures a policy on the held-out prompts.
    run: the run folder.
    resumed: the checkpoint that a resumed run continues from; empty for a new run.
    console: where this process prints; quiet on all processes but the first.
    world: the processes of the run.
    stop: set by the first SIGINT or SIGTERM.
    """

    config: Config
    parts: Parts
    actor: Actor
    engine: RolloutEngine
    evaluator: Evaluator
    run: Run
    resumed: Resumed
    console: Console
    world: World
    stop: StopRequest


def finish(session: Session, before: Evaluation | None) -> None:
    """Evaluate the trained policy, export it with a model card, print what training changed and draw the report.

    Without held-out prompts there is no evaluation, and no report is drawn.

    before: the evaluation before training; None leaves the comparison out.
    """
    config, parts, console, run = session.config, session.parts, session.console, session.run
    copy_weights(parts.policy.model, parts.sampler.model)
    after = session.evaluator.into_run(run, "after", parts.sampler)
    whole = None if parts.sampler is parts.policy else whole_weights(parts.policy.model)
    if before and after:
        rows, sentence, pairs = comparison_rows(before, after), verdict(outcomes(before, after)), choose(before, after)
        card = model_card(config, config.steps, rows, sentence, markdown(pairs))
    else:
        card = model_card(config, config.steps, [])
    final = run.export(parts.policy, card, whole)
    if before and after:
        print_comparison(console, len(after.ids), rows)
        print_pairs(console, pairs)
        print_compensation(console, after)
        console.print(sentence, style="bold", markup=False, highlight=False)
    console.print(f"model: {final}   metrics.jsonl, samples.jsonl: {run.path}", markup=False)
    drawn = bool(after) and session.world.first and after_run.draw_report(run.path, console)
    console.print(f"next:\n{next_commands(run.path, drawn)}", markup=False, highlight=False)


def next_commands(run: Path, drawn: bool) -> str:
    """List the commands that read a finished run, one a line with what each does.

    run: the run folder. drawn: its report is there already.
    """
    path = shlex.quote(str(run))
    report = (f"python -m repo.report {path}", "figures and samples as one HTML page")
    lines = [
        *([] if drawn else [report]),
        (f"python -m repo.evaluate {path} --checkpoint all", "every checkpoint on the held-out prompts"),
        (f"python -m repo.compare {path} OTHER_RUN", "two runs prompt by prompt"),
        (f"python -m repo.export {path}", "a checkpoint as a Hugging Face model"),
    ]
    width = max(len(command) for command, _ in lines)
    return "\n".join(f"  {command.ljust(width)}  {what}" for command, what in lines)
