"""Export a checkpoint of a run as a model in Hugging Face format.

python -m repo.export runs/mine                          the newest checkpoint
python -m repo.export runs/mine --checkpoint best        the best by its training batches, or step-000010
python -m repo.export runs/mine --merge                  LoRA adapters merged into the weights, as one whole model

`best` was chosen on the responses of a few training batches, which say little: compare both on held-out prompts with
`python -m repo.evaluate runs/mine --checkpoint all` before you prefer it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .common.errors import UserError, exit_with_sentence
from .common.files import write_folder
from .config.arguments import user_path
from .config.parse import load_config, require_run


def export(folder: Path, name: str, out: Path | None, trust: bool, merge: bool = False) -> Path:
    """Write the policy of a checkpoint in Hugging Face format, with a model card, and return the folder.

    folder: the run.
    name: best, latest, or a checkpoint's folder name such as step-000010.
    out: folder to create; None for RUN/export-<checkpoint>.
    trust: run Python code that comes with the model.
    merge: add LoRA adapters to the weights, so that the folder is a whole model; no change without adapters.

    Raises UserError if `out` exists or the checkpoint is missing or damaged.
    """
    require_run(folder, "RUN")
    import torch  # after the arguments are checked: these take seconds to load
    from transformers.utils import logging as transformers_logging

    from .models.policy import merged, save_policy
    from .runs.checkpoint import find_named, read_state
    from .runs.model_card import model_card
    from .setup import load_checkpoint_policy

    transformers_logging.disable_progress_bar()
    config, source = load_config(folder / "config.yaml"), find_named(folder, name)
    target = out or folder / f"export-{source.name}"
    if target.exists():
        raise UserError(f"--out: {target} exists; choose another folder")
    policy = load_checkpoint_policy(source, config, torch.device("cpu"), trust)
    policy = merged(policy) if merge else policy
    steps = read_state(source)[0].step

    def write(staging: Path) -> None:
        save_policy(policy, staging)
        (staging / "README.md").write_text(model_card(config, steps, []), encoding="utf-8")

    write_folder(target, write)
    return target


def run_command(argv: list[str] | None = None) -> None:
    """Parse the command line, export the checkpoint and print the folder."""
    parser = argparse.ArgumentParser(
        prog="repo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=user_path, help="run folder")
    parser.add_argument("--checkpoint", default="latest", metavar="NAME", help="latest (default), best or step-000010")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="new folder; default: RUN/export-<checkpoint>")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--merge", action="store_true", help="merge LoRA adapters into the weights: one whole model")
    options = parser.parse_args(argv)
    print(f"model: {export(options.run, options.checkpoint, options.out, options.trust_remote_code, options.merge)}")


def main() -> None:
    """Run repo.export as a console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
