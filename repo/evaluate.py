"""Evaluate a run or a model on held-out prompts, by the training scorers and by a judge that took no part in training.

python -m repo.evaluate runs/mine                             its final policy, 4 responses to each held-out prompt
python -m repo.evaluate runs/mine --checkpoint best           or latest, step-000010, reference; all: every checkpoint
python -m repo.evaluate path/to/model --reference embedded    any causal LM; the KL is measured from --reference
python -m repo.evaluate runs/mine --data.eval mine.jsonl --evaluation.judge my_module:harmfulness

Every field of the configuration can be overridden, as with repo.train; a run's own configuration is the default.
A judge of your own is given like scoring.cost, and a response is safe iff its score is <= 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
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

if TYPE_CHECKING:  # what follows takes seconds to load, so functions import it once the arguments are read
    import torch

    from .models.policy import Policy

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
    """

    target: str
    run: Path | None
    checkpoint: str | None
    reference: str | None
    out: Path | None
    trust: bool


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
    config = parse_config(parser, [*base, f"--evaluation.samples_per_prompt={SAMPLES}", *rest])
    if run is None:  # a model needs no training prompts, so the embedded ones must not be built for it
        data = dataclasses.replace(config.data, train=config.data.eval)
        config = dataclasses.replace(named(config, target), data=data)
    if config.evaluation.prompts == 0:
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, prompts=sys.maxsize))
    reference = options.reference or (config.model.path if run else None)
    return Command(target, run, options.checkpoint, reference, options.out, options.trust_remote_code), config


def named(config: Config, path: str) -> Config:
    """Return the configuration with model.path set to `path`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))


def load_named(path: str, config: Config, device: torch.device, trust: bool) -> Policy:
    """Load a frozen model by folder, hub name or "embedded"."""
    config = named(config, path)
    from .models.policy import load_policy
    from .setup import find_assets, model_path

    folder = find_assets(config, Console(quiet=True))
    return load_policy(model_path(config, folder), device, False, config.model, trust)


def targets(command: Command, config: Config, device: torch.device) -> Iterator[Target]:
    """Yield the policies to evaluate. Raises UserError for a checkpoint that does not exist or is damaged."""
    from .runs.checkpoint import find_named, steps_of

    if command.run is None:
        name = Path(command.target).name or command.target
        out = Path("evaluations") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}.json"
        yield Target(name, out, lambda: load_named(command.target, config, device, command.trust))
        return
    final, there = command.run / "final", steps_of(command.run / "checkpoints")
    names = [command.checkpoint or ("final" if final.is_dir() else "latest")]
    if names == ["all"]:
        names = [there[step].name for step in sorted(there)] + ["final"] * final.is_dir()
    for name in names:
        if name == "reference":
            out = command.run / "eval" / "reference.json"
            yield Target(name, out, partial(load_named, config.model.path, config, device, command.trust))
            continue
        source = final if name == "final" and final.is_dir() else find_named(command.run, name)
        out = command.run / "eval" / f"{source.name}.json"
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


def require_same_vocabulary(policy: Policy, reference: Policy, name: str) -> None:
    """Raise UserError unless both models have the same vocabulary, so that a token means the same text to both.

    name: the reference, as the user gave it.
    """
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise UserError(f"--reference: {name!r} has another vocabulary than the policy, so there is no KL between them")


def run_command(argv: list[str]) -> None:
    """Load what all targets share, then evaluate, print and write each target.

    argv: the arguments after the program's name.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("repo.evaluate is one process; start it with python, not with torchrun")
    command, config = read_command(argv)
    from transformers.utils import logging as transformers_logging

    from .evaluation.evaluator import Evaluator, content_of
    from .evaluation.tables import print_compensation, print_summary
    from .models.actor import Actor
    from .models.policy import choose_device
    from .rollout.stop_tokens import with_stop_tokens
    from .scoring.judge import load_judge
    from .scoring.rehearsal import rehearse
    from .setup import find_assets, load_held_out, scorers_beside

    console = console_of()
    transformers_logging.disable_progress_bar()
    device, trust = choose_device(config.model.device), command.trust
    chosen = checked(command, list(targets(command, config, device)))
    folder = find_assets(config, console)
    reference = load_named(command.reference, config, device, trust) if command.reference else None
    scorers = scorers_beside(config, folder, reference, command.reference, str(device), trust)
    timeout, date = config.scoring.timeout, config.data.date
    judge = load_judge(config.evaluation.judge, folder, str(device), timeout, trust, date)
    console.print(scorers.describe(), markup=False, highlight=False)
    for target in chosen:
        policy = target.load()
        if policy.merged:
            adapter = f"model: the adapter {target.name} is merged into its base {policy.merged}"
            console.print(adapter, markup=False, highlight=False)
        policy, line = with_stop_tokens(policy, config.rollout.stop_tokens)
        if line:
            console.print(line, markup=False, highlight=False)
        if reference is not None:
            require_same_vocabulary(policy, reference, command.reference or "")
        shape = policy.model.config.get_text_config()
        prompts = load_held_out(config, folder, policy.tokenizer, shape, console)[: config.evaluation.prompts]
        if target is chosen[0]:
            for warning in rehearse(scorers, judge, {"data.eval": prompts}, config.rollout.max_response_tokens):
                console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        beside = None if reference is None else Actor(reference)
        evaluation = Evaluator(config, prompts, scorers, judge, beside, console).with_progress(target.name, policy)
        about: dict[str, Any] = {"policy": command.target, "checkpoint": target.name, "reference": command.reference}
        content = content_of(config, evaluation, **about)
        write_text(target.out, json.dumps(content, indent=1, ensure_ascii=False))
        print_summary(console, f"{command.target}, {target.name}", content["summary"])
        print_compensation(console, evaluation)
        console.print(f"evaluation: {target.out}", markup=False, highlight=False)
        del policy  # before the next one is loaded


def main() -> None:
    """Run repo.evaluate as a console script."""
    exit_with_sentence(lambda: run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
