"""Functions: a Python function as a scorer, called with a time limit."""

from __future__ import annotations

import importlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError, first_line
from ..data.prompts import Prompt
from .manifest import Manifest, make_manifest
from .signals import field_of


class FunctionScorer:
    """A scorer that calls a Python function as f(prompts, responses) with two lists of B strings.

    The function returns B numbers in a list, an array or a tensor. The scores are (number - offset) / scale with the
    values of its attribute `manifest`, a dict, if it has one.
    """

    def __init__(self, name: str, signal: str, timeout: float) -> None:
        """Import the function. Raises UserError if that fails or its manifest is wrong.

        name: `module:function`; the module may lie in the working directory. signal: "reward", "cost" or "judge", for
        messages. timeout: seconds that a call may take.
        """
        self.where, self.timeout = f"{field_of(signal)} {name!r}", timeout
        self.function = load_function(name, signal)
        self.source = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
        content = getattr(self.function, "manifest", None)
        self.manifest = Manifest() if content is None else make_manifest(content, f"{self.where}: its manifest")

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score B pairs; returns (B,) fp32 on the CPU.

        Raises UserError if the function takes too long, raises, or returns something else than B numbers.
        """
        values = self._call([p.text for p in prompts], list(responses))
        takes = f"{self.where} must return {len(prompts)} numbers"
        try:
            scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{takes}; got {type(values).__name__} ({first_line(error)})") from None
        if scores.layout != torch.strided:
            raise UserError(f"{takes} in a dense tensor; got one of layout {scores.layout}")
        if scores.shape != (len(prompts),):
            raise UserError(f"{takes}; got shape {tuple(scores.shape)}")
        return self.manifest.apply(scores)

    def _call(self, prompts: list[str], responses: list[str]) -> Any:
        """Call the function in a new thread and return its result. Raises UserError on a timeout or an exception."""
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.extend((self.function(prompts, responses), None))
            except BaseException as error:  # SystemExit would end the thread silently
                outcome.extend((None, error))

        # a daemon thread, so that a function that hangs does not keep the process alive
        thread = threading.Thread(target=work, name=self.where, daemon=True)
        thread.start()
        thread.join(min(self.timeout, threading.TIMEOUT_MAX))
        if not outcome:
            raise UserError(f"{self.where} did not return within scoring.timeout={self.timeout:g} seconds")
        values, error = outcome
        if error is not None:
            raise UserError(f"{self.where} raised {first_line(error)} ({_place(error)})") from error
        return values


def load_function(name: str, signal: str) -> Callable[..., Any]:
    """Import the function named `module:function`. Raises UserError that says which of the two is missing."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        raise UserError(f"{field_of(signal)}: cannot import module {module_name!r}: {first_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{field_of(signal)}: module {module_name!r} has no function {attribute!r}")
    return function


def _place(error: BaseException) -> str:
    """Return "file:line" where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"
