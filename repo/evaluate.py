"""Evaluate a run or a model on held-out prompts, by the training scorers and by a judge that took no part in training.

python -m repo.evaluate runs/mine                             its final policy, 4 responses to each held-out prompt
python -m repo.evaluate runs/mine --checkpoint best           or latest, step-000010, reference; all: every checkpoint
python -m repo.evaluate path/to/model --reference embedded    any causal LM; the KL is measured from --reference
python -m repo.evaluate runs/mine --data.eval mine.jsonl --evaluation.judge my_module:harmfulness
python -m repo.evaluate runs/mine --shield 4                  behind a filter of responses (docs/evaluation.md)

Every field of the configuration can be overridden, as with repo.train; a run's own configuration is the default.
A judge of your own is given like scoring.cost, and a response is safe iff its score is <= 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .command import console_of
from .common.errors import UserError, exit_with_sentence
from .common.files import make_parent, write_text
from .config.arguments import join_negative_numbers, user_path
from .config.parse import make_parser, parse_config
from .config.schema import Config
from .evaluation.shield_options import SHIELDED, ShieldSettings, add_shield_switches, shield_of
from .runs.json_lines import finite

if TYPE_CHECKING:  # what follows takes seconds to load, so functions import it once the arguments are read
    import torch

    from .data.prompts import Prompt
    from .evaluation.shielded import ShieldedEvaluator
    from .evaluation.statistics import Evaluation
    from .models.policy import Policy
    from .rollout.shield import CostScorer
    from .scoring.judge import Judge
    from .scoring.scorers import Scorers

SAMPLES = 4
"""Responses to each prompt, unless evaluation.samples_per_prompt is given."""

READ = (
    "data.eval, data.column, data.system_prompt, data.max_prompt_tokens, evaluation.*, scoring.*, rollout.*, "
    "algorithm.cost_limit, model.device, model.dtype, seed"
)
"""Fields of the configuration that an evaluation reads."""


@dataclass(frozen=True)
class Command:
    """Parsed switches of the command line.

    target: a run folder, or the folder or hub name of a model.
    run: the target if it is a run folder, else None.
    checkpoint: name of a checkpoint of the run; None for its final policy.
    reference: model that the KL is measured from; None leaves the KL out.
    out: file to write; None for the default.
    trust: run Python code that comes with models.
    shield: settings of the shield; None evaluates the policy without one.
    """

    target: str
    run: Path | None
    checkpoint: str | None
    reference: str | None
    out: Path | None
    trust: bool
    shield: ShieldSettings | None = None


@dataclass(frozen=True)
class Target:
    """A policy to evaluate.

    name: name in tables and messages.
    out: file for its evaluation.
    load: function that loads it.
    """

    name: str
    out: Path
    load: Callable[[], Policy]


@dataclass(frozen=True)
class Shared:
    """What all policies of an evaluation share.

    config: with the overrides of the command line. console: where is printed. trust: run Python code of models.
    folder: the embedded assets, or None. device: torch device. reference: model that the KL is measured from, or None.
    reference_name: as the user gave it. scorers: reward and cost of training. judge: the held-out judge, or None.
    """

    config: Config
    console: Console
    trust: bool
    folder: Path | None
    device: torch.device
    reference: Policy | None
    reference_name: str | None
    scorers: Scorers
    judge: Judge | None

    def prepare(self, policy: Policy, name: str) -> tuple[Policy, list[Prompt]]:
        """Add the stop tokens to a policy and read the held-out prompts by its tokenizer; return both.

        name: of the policy, for messages. Raises UserError if its vocabulary is not the reference's.
        """
        from .data.sources import load_held_out
        from .rollout.stop_tokens import with_stop_tokens

        if policy.merged:
            adapter = f"model: the adapter {name} is merged into its base {policy.merged}"
            self.console.print(adapter, markup=False, highlight=False)
        policy, line = with_stop_tokens(policy, self.config.rollout.stop_tokens)
        if line:
            self.console.print(line, markup=False, highlight=False)
        # a token must mean the same text to both
        if self.reference is not None and policy.tokenizer.get_vocab() != self.reference.tokenizer.get_vocab():
            other = f"{self.reference_name!r} has another vocabulary than the policy"
            raise UserError(f"--reference: {other}, so there is no KL between them")
        shape = policy.model.config.get_text_config()
        prompts = load_held_out(self.config, self.folder, policy.tokenizer, shape, self.console)
        return policy, prompts[: self.config.evaluation.prompts]

    def rehearse(self, prompts: list[Prompt]) -> None:
        """Score two canned answers and print what is odd about it. Raises UserError if a scorer fails."""
        from .scoring.rehearsal import rehearse

        limit = self.config.rollout.max_response_tokens
        for warning in rehearse(self.scorers, self.judge, {"data.eval": prompts}, limit):
            self.console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)

    def load_shield(self, settings: ShieldSettings) -> ShieldedEvaluator:
        """Load the cost scorers of a shield. Raises UserError for what cannot be loaded."""
        from .evaluation.shielded import ShieldedEvaluator
        from .scoring.scorers import load_scorer

        config, device = self.config, str(self.device)
        where = (config.scoring.timeout, self.folder, None, None, device, self.trust, config.data.date)
        known = {part.name: part.scorer for part in self.scorers.parts["cost"]}
        own: list[CostScorer] = [known.get(name) or load_scorer(name, "shield", *where) for name in settings.scorers]
        return ShieldedEvaluator(config, self.scorers, self.judge, settings, own or [self.scorers], self.console)

    def evaluate(self, policy: Policy, prompts: list[Prompt], name: str) -> Evaluation:
        """Evaluate a prepared policy under a progress bar. name: label of the bar."""
        from .evaluation.evaluator import Evaluator
        from .models.actor import Actor

        beside = None if self.reference is None else Actor(self.reference)
        evaluator = Evaluator(self.config, prompts, self.scorers, self.judge, beside, self.console)
        return evaluator.with_progress(name, policy)


def load_shared(
    config: Config, reference_name: str | None, trust: bool, console: Console, named: Sequence[str] = ()
) -> Shared:
    """Load the reference, the scorers and the judge of a configuration, and print what the scores mean.

    reference_name: model that the KL is measured from; None for none. named: further scorers, which may need the
    embedded assets. Raises UserError for what cannot be loaded.
    """
    from .models.policy import choose_device
    from .scoring.judge import load_judge
    from .setup import find_assets, load_named, scorers_beside

    device, folder = choose_device(config.model.device), find_assets(config, console, named)
    reference = load_named(reference_name, config, device, trust) if reference_name else None
    scorers = scorers_beside(config, folder, reference, reference_name, str(device), trust)
    timeout, date = config.scoring.timeout, config.data.date
    judge = load_judge(config.evaluation.judge, folder, str(device), timeout, trust, date)
    console.print(scorers.describe(), markup=False, highlight=False)
    return Shared(config, console, trust, folder, device, reference, reference_name, scorers, judge)


def read_command(argv: list[str]) -> tuple[Command, Config]:
    """Parse the command line into the switches and the configuration: the run's or the default, then overrides.

    argv: the arguments after the program's name. Raises UserError for input that cannot be parsed.
    """
    switches = argparse.ArgumentParser(
        prog="repo.evaluate",
        usage="python -m repo.evaluate RUN|MODEL [options] [--GROUP.FIELD VALUE ...]",
        description=__doc__,
        epilog=f"Fields that an evaluation reads: {READ}. `python -m repo.train --help` says what each means.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    switches.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="for a run: best, latest, step-000010, all, or reference (the model that training began with)",
    )
    switches.add_argument(
        "--reference",
        type=os.path.expanduser,
        metavar="MODEL",
        help="model that the KL is measured from; default: the one a run began with",
    )
    switches.add_argument(
        "--out", type=user_path, metavar="FILE", help="JSON file to write; default: RUN/eval/NAME.json"
    )
    switches.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with models")
    add_shield_switches(switches)
    parser = make_parser("repo.evaluate", "")
    if {"-h", "--help"} & {*argv}:
        switches.parse_args(["--help"])
    if not argv or argv[0].startswith("-"):
        raise UserError("repo.evaluate takes a run folder or a model first: python -m repo.evaluate RUN|MODEL")
    try:
        options, rest = switches.parse_known_args(join_negative_numbers(argv[1:]))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    target = os.path.expanduser(argv[0])
    run = Path(target) if (Path(target) / "config.yaml").is_file() else None
    if run is None and options.checkpoint:
        raise UserError(f"--checkpoint takes a run folder; {argv[0]} is not one (it has no config.yaml)")
    base = ["--config", str(run / "config.yaml")] if run else []
    shield = shield_of(options)
    samples = SAMPLES if shield is None else 1
    config = parse_config(parser, [*base, f"--evaluation.samples_per_prompt={samples}", *rest])
    if run is None:  # a model needs no training prompts, so the embedded ones must not be built for it
        data = dataclasses.replace(config.data, train=config.data.eval)
        model = dataclasses.replace(config.model, path=target)
        config = dataclasses.replace(config, model=model, data=data)
    config = held_out_config(config)
    reference = options.reference or (config.model.path if run else None)
    command = Command(target, run, options.checkpoint, reference, options.out, options.trust_remote_code, shield)
    return command, config


def held_out_config(config: Config) -> Config:
    """Return the configuration with all held-out prompts in place of none, for a run that went without."""
    prompts = config.evaluation.prompts or sys.maxsize
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, prompts=prompts))


def targets(command: Command, config: Config, device: torch.device) -> Iterator[Target]:
    """Yield the policies to evaluate. Raises UserError for a checkpoint that does not exist or is damaged."""
    prefix = "" if command.shield is None else f"{SHIELDED}{command.shield.samples}-"
    from .runs.checkpoint import find_named, steps_of
    from .setup import load_named

    if command.run is None:
        name = Path(command.target).name or command.target
        out = Path("evaluations") / f"{prefix}{name}-{datetime.now():%Y%m%d-%H%M%S}.json"
        yield Target(name, out, lambda: load_named(command.target, config, device, command.trust))
        return
    final, there = command.run / "final", steps_of(command.run / "checkpoints")
    names = [command.checkpoint or ("final" if final.is_dir() else "latest")]
    if names == ["all"]:
        names = [there[step].name for step in sorted(there)] + ["final"] * final.is_dir()
    for name in names:
        if name == "reference":
            out = command.run / "eval" / f"{prefix}reference.json"
            yield Target(name, out, partial(load_named, config.model.path, config, device, command.trust))
            continue
        source = final if name == "final" and final.is_dir() else find_named(command.run, name)
        out = command.run / "eval" / f"{prefix}{source.name}.json"
        yield Target(source.name, out, partial(_load_from_run, source, config, device, command.trust))


def _load_from_run(source: Path, config: Config, device: torch.device, trust: bool) -> Policy:
    """Load the policy in RUN/final or in a checkpoint folder."""
    from .models.policy import load_policy
    from .setup import load_checkpoint_policy

    if source.name == "final":
        return load_policy(str(source), device, False, config.model, trust)
    return load_checkpoint_policy(source, config, device, trust)


def checked(command: Command, chosen: list[Target]) -> list[Target]:
    """Decide the output file of each target; with --checkpoint all, leave out targets that have been evaluated.

    Raises UserError if a file exists, if --out names one file for several targets, or if no target is left.
    """
    if command.checkpoint == "all":
        chosen = [target for target in chosen if not target.out.exists()]
        if not chosen:
            raise UserError(f"--checkpoint all: every checkpoint of {command.target} has been evaluated already")
    if command.out and len(chosen) > 1:
        raise UserError(f"--out: one file cannot hold the evaluations of {len(chosen)} checkpoints; leave it out")
    chosen = [dataclasses.replace(target, out=command.out or target.out) for target in chosen]
    for out in (target.out for target in chosen):
        if out.exists():
            raise UserError(f"--out: {out} exists; name another file, or remove it to evaluate again")
        make_parent(out, "--out")
    return chosen


def run_command(argv: list[str]) -> None:
    """Load what all targets share, then evaluate, print and write each target.

    argv: the arguments after the program's name.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("repo.evaluate is one process; start it with python, not with torchrun")
    command, config = read_command(argv)
    from transformers.utils import logging as transformers_logging

    from .evaluation.evaluator import content_of
    from .evaluation.shielded import print_shield, shield_report
    from .evaluation.tables import print_compensation, print_summary
    from .models.policy import choose_device

    console = console_of()
    transformers_logging.disable_progress_bar()
    chosen = checked(command, list(targets(command, config, choose_device(config.model.device))))
    named = () if command.shield is None else command.shield.scorers
    shared = load_shared(config, command.reference, command.trust, console, named)
    shield = None if command.shield is None else shared.load_shield(command.shield)
    for target in chosen:
        policy, prompts = shared.prepare(target.load(), target.name)
        if target is chosen[0]:
            shared.rehearse(prompts)
        about: dict[str, Any] = {"policy": command.target, "checkpoint": target.name, "reference": command.reference}
        if shield is None:
            evaluation = shared.evaluate(policy, prompts, target.name)
        else:
            evaluation = shield.with_progress(target.name, policy, prompts)
            about["shield"] = finite(shield.describe() | shield_report(evaluation))
        content = content_of(config, evaluation, **about)
        write_text(target.out, json.dumps(content, indent=1, ensure_ascii=False))
        print_summary(console, f"{command.target}, {target.name}", content["summary"])
        print_compensation(console, evaluation)
        if shield is not None:
            print_shield(console, f"{command.target}, {target.name}", about["shield"])
        console.print(f"evaluation: {target.out}", markup=False, highlight=False)
        del policy  # before the next one is loaded


def main() -> None:
    """Run repo.evaluate as a console script."""
    exit_with_sentence(lambda: run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
