"""Export a checkpoint of a run as a model in Hugging Face format.

python -m repo.export runs/mine                          the newest checkpoint
python -m repo.export runs/mine --checkpoint best        the best by its training batches, or step-000010
python -m repo.export runs/mine --merge                  LoRA adapters merged into the weights, as one whole model
python -m repo.export runs/mine --scale 0.5              half of what training changed: between reference and policy
python -m repo.export runs/mine --keep 0.1               only the tenth of it that matters most to the cost

`best` was chosen on the responses of a few training batches, which say little: compare both on held-out prompts with
`python -m repo.evaluate runs/mine --checkpoint all` before you prefer it. What each scale gives says
`python -m repo.compare --scales 0.25,0.5,0.75,1,1.25 runs/mine`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .command import console_of
from .common.errors import UserError, exit_with_sentence
from .common.files import write_folder
from .config.arguments import join_negative_numbers, user_path
from .config.parse import load_config, require_run

SCALED = """
The weights are θ_ref + {scale:g} (θ − θ_ref), the base model and {scale:g} times what training changed: no checkpoint.
"""
"""What the model card of a scaled policy says besides."""
KEPT = """Of what training changed only the share {keep:g} of the entries is in it, those that matter most to the cost.
"""
"""What the model card of a patched policy says besides."""


def export(
    folder: Path,
    name: str,
    out: Path | None,
    trust: bool,
    merge: bool = False,
    scale: float = 1.0,
    keep: float | None = None,
) -> Path:
    """Write the policy of a checkpoint in Hugging Face format, with a model card, and return the folder.

    folder: the run.
    name: best, latest, or a checkpoint's folder name such as step-000010.
    out: folder to create; None for RUN/export-<checkpoint>, with -scale-<scale> behind it unless the scale is 1, and
        -keep-<keep> with `keep`.
    trust: run Python code that comes with the model.
    merge: add LoRA adapters to the weights, so that the folder is a whole model; no change without adapters.
    scale: alpha in (0, 1.5] of theta_ref + alpha (theta - theta_ref), where theta_ref is the model that training began
        with. Whole weights are fp32; a merged adapter is rounded to the dtype of its base.

    keep: share in (0, 1] of the update's entries to write, those with the largest |entry * gradient of the cost|; the
        others stay the reference's, and the result is a whole model in fp32. None writes the update as it is.

    Raises UserError if `out` exists, the checkpoint is missing or damaged, or scale or keep is out of range.
    """
    require_run(folder, "RUN")
    import torch  # after the arguments are checked: these take seconds to load
    from transformers.utils import logging as transformers_logging

    from .models.policy import merged, save_policy
    from .models.scaled import require_scale, require_share
    from .runs.checkpoint import find_named, read_state
    from .runs.model_card import model_card
    from .setup import load_checkpoint_policy, load_patched_policy

    require_scale(scale, "--scale")
    if keep is not None:
        require_share(keep, "--keep")
    transformers_logging.disable_progress_bar()
    config, source = load_config(folder / "config.yaml"), find_named(folder, name)
    scaled = f"-scale-{scale:g}" * (scale != 1) + ("" if keep is None else f"-keep-{keep:g}")
    target = out or folder / f"export-{source.name}{scaled}"
    if target.exists():
        raise UserError(f"--out: {target} exists; choose another folder")
    cpu = torch.device("cpu")
    if keep is None:
        policy = load_checkpoint_policy(source, config, cpu, trust, scale)
    else:
        policy = load_patched_policy(source, config, cpu, trust, scale, keep, console_of())
    policy = merged(policy, "--merge") if merge else policy
    steps = read_state(source)[0].step

    def write(staging: Path) -> None:
        save_policy(policy, staging)
        card = model_card(config, steps, []) + (SCALED.format(scale=scale) if scaled else "")
        card += "" if keep is None else KEPT.format(keep=keep)
        (staging / "README.md").write_text(card, encoding="utf-8")

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
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="A",
        help="factor of what training changed, > 0 and <= 1.5; default: 1, the trained policy itself",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="P",
        help="write only the share P of the changed entries, > 0 and <= 1, with the largest |entry x gradient of the "
        "cost|; samples and scores a batch of training prompts, and writes a whole model in fp32",
    )
    options = parser.parse_args(join_negative_numbers(sys.argv[1:] if argv is None else argv))
    how = options.trust_remote_code, options.merge, options.scale, options.keep
    print(f"model: {export(options.run, options.checkpoint, options.out, *how)}")


def main() -> None:
    """Run repo.export as a console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
