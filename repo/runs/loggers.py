"""Loggers: send metrics to TensorBoard, Weights & Biases or Trackio. Each package is imported only if configured."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ..common.errors import UserError, first_line
from ..common.files import write_text

Send = Callable[[dict[str, float], int], Any]
Finish = Callable[[], Any]


class Logger:
    """One logging package. Its first error is passed to `warn` and ends the logging, not the run.

    name: the package.
    send: logs numbers by name at a step.
    finish: sends what is left and closes.
    warn: prints a sentence.
    """

    def __init__(self, name: str, send: Send, finish: Finish, warn: Callable[[str], None]) -> None:
        self.name, self.send, self.finish, self.warn, self.failed = name, send, finish, warn, False

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send the finite numbers of a line of metrics.jsonl."""
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, Real) and math.isfinite(v) and k != "step"}
        if not self.failed:
            self._call(self.send, numbers, step)

    def close(self) -> None:
        """Send what is left and close the logger."""
        self._call(self.finish)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # each package has its own exceptions
            if not self.failed:
                self.warn(f"warning: no more metrics go to {self.name}: {first_line(error)}")
            self.failed = True


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError unless the package of every named logger is installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: only a folder of that name, such as wandb leaves behind
            raise UserError(f"loggers: {name} needs its package: pip install {name}")


def make_loggers(
    names: Sequence[str],
    folder: Path,
    config: Mapping[str, Any],
    first_step: int = 0,
    warn: Callable[[str], None] = print,
) -> list[Logger]:
    """Start the named loggers of a run.

    names: tensorboard, wandb or trackio.
    folder: the run.
    config: the run's configuration, which the loggers show.
    first_step: the next step of the run, > 0 if it is resumed.
    warn: prints a sentence when a logger fails later.

    Raises UserError if a logger cannot start; those already started are closed.
    """
    check_loggers(names)
    starters = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    loggers: list[Logger] = []
    for name in names:
        try:
            loggers.append(Logger(name, *starters[name](folder, dict(config), first_step), warn))
        except Exception as error:
            for started in loggers:
                started.close()
            raise UserError(f"loggers: {name} cannot start: {first_line(error)}") from error
    return loggers


def _tensorboard(folder: Path, config: dict[str, Any], first_step: int) -> tuple[Send, Finish]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
    writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```", first_step)

    def send(numbers: dict[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    return send, writer.close


def _identity(folder: Path, name: str) -> tuple[str, bool]:
    """Return (the run's id at a logging service, whether it was started before).

    A file in the run folder keeps the id, so that a run keeps it when its folder is moved.
    """
    path = folder / f"{name}.id"
    known = path.is_file()
    if not known:
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8"), known


def _wandb(folder: Path, config: dict[str, Any], first_step: int) -> tuple[Send, Finish]:
    import wandb

    project, identity = os.environ.get("WANDB_PROJECT", "repo"), _identity(folder, "wandb")[0]
    # a resumed run logs the steps after its checkpoint again, with the same numbers: wandb keeps the first of them
    run = wandb.init(project=project, dir=folder, name=folder.name, id=identity, resume="allow", config=config)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _trackio(folder: Path, config: dict[str, Any], first_step: int) -> tuple[Send, Finish]:
    import trackio

    project, known = os.environ.get("TRACKIO_PROJECT", "repo"), _identity(folder, "trackio")[1]
    # a resumed run logs the steps after its checkpoint again, with the same numbers: trackio shows both
    # the name is the folder's, so "allow" would continue a run in another folder of the same name
    run = trackio.init(project, folder.name, config=config, resume="allow" if known else "never")
    return lambda numbers, step: run.log(numbers, step=step), trackio.finish
