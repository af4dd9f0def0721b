"""Loggers: TensorBoard, Weights & Biases and Trackio beside metrics.jsonl. Each is imported when it is asked for."""

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
    """A package's functions behind one interface. After its first error, which goes to `warn`, it is silent."""

    def __init__(self, name: str, send: Send, finish: Finish, warn: Callable[[str], None]) -> None:
        self.name, self.send, self.finish, self.warn, self.failed = name, send, finish, warn, False

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Pass on the finite numbers of a record."""
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, Real) and math.isfinite(v) and k != "step"}
        if not self.failed:
            self._call(self.send, numbers, step)

    def close(self) -> None:
        """Send what is left."""
        self._call(self.finish)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:  # each package raises its own kind
            if not self.failed:
                self.warn(f"warning: no more metrics go to {self.name}: {first_line(error)}")
            self.failed = True


def check_loggers(names: Sequence[str]) -> None:
    """UserError when the package of a logger is missing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a mere folder of that name, as wandb leaves behind
            raise UserError(f"loggers: {name} needs its package: pip install {name}")


def make_loggers(
    names: Sequence[str],
    folder: Path,
    config: Mapping[str, Any],
    first_step: int = 0,
    warn: Callable[[str], None] = print,
) -> list[Logger]:
    """The named loggers of the run in `folder`, whose next step is first_step. UserError when one cannot start."""
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
    """(id of the run there, whether it has been started before). A file keeps it, so that a moved run stays itself."""
    path = folder / f"{name}.id"
    known = path.is_file()
    if not known:
        write_text(path, secrets.token_hex(8))
    return path.read_text(encoding="utf-8"), known


def _wandb(folder: Path, config: dict[str, Any], first_step: int) -> tuple[Send, Finish]:
    import wandb

    project, identity = os.environ.get("WANDB_PROJECT", "repo"), _identity(folder, "wandb")[0]
    # steps after the checkpoint come twice on resuming: wandb keeps the first, of which the second is a repetition
    run = wandb.init(project=project, dir=folder, name=folder.name, id=identity, resume="allow", config=config)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _trackio(folder: Path, config: dict[str, Any], first_step: int) -> tuple[Send, Finish]:
    import trackio

    project, known = os.environ.get("TRACKIO_PROJECT", "repo"), _identity(folder, "trackio")[1]
    # steps after the checkpoint come twice on resuming, with the same numbers: trackio shows both
    # a run's name is that of its folder, so "allow" would go on with the run of another folder of the same name
    run = trackio.init(project, folder.name, config=config, resume="allow" if known else "never")
    return lambda numbers, step: run.log(numbers, step=step), trackio.finish
