"""Functions: a Python function as a scorer, called with a time limit and the columns of the data that it asks for."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError, first_line
from ..data.prompts import Prompt
from .manifest import Manifest, make_manifest
from .signals import field_of
from .user_code import Settings, TimeUp, call_within, torch_settings, torch_settings_restored

SETTINGS: dict[str, Settings] = {}
"""By module the torch settings that its import has left, which its functions are called with."""


class FunctionScorer:
    """A scorer that calls a Python function as f(prompts, responses) with two lists of B strings.

    A further parameter of the function with the name of a column of the data gets the list of its B values, and
    **kwargs gets all columns. The function returns B numbers in a list, an array or a tensor. The scores are
    (number - offset) / scale with the values of its attribute `manifest`, a dict, if it has one.
    """

    def __init__(self, name: str, signal: str, timeout: float) -> None:
        """Import the function. Raises UserError if that fails or its manifest is wrong.

        name: `module:function`; the module may lie in the working directory. signal: "reward", "cost", "judge" or
        "shield", for messages. timeout: seconds that a call may take.
        """
        self.where, self.timeout = f"{field_of(signal)} {name!r}", timeout
        self.function = load_function(name, signal)
        self.module = name.partition(":")[0]
        self.source = getattr(sys.modules[self.module], "__file__", None)
        self.parameters, self.takes_all = _parameters(self.function)
        content = getattr(self.function, "manifest", None)
        self.manifest = Manifest() if content is None else make_manifest(content, f"{self.where}: its manifest")

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        """Score B pairs; returns (B,) fp32 on the CPU.

        Raises UserError if the function takes too long, raises, or returns something else than B numbers, or if the
        prompts lack a column that it needs.
        """
        names = self.columns_for(prompts)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        values = self._call([p.text for p in prompts], list(responses), columns)
        takes = f"{self.where} must return {len(prompts)} numbers"
        if _is_complex(values):
            raise UserError(f"{takes}; got complex ones")
        try:
            scores = torch.as_tensor(values, dtype=torch.float32, device="cpu").detach().to_dense()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise UserError(f"{takes}; got {type(values).__name__} ({first_line(error)})") from None
        if scores.shape != (len(prompts),):
            raise UserError(f"{takes}; got shape {tuple(scores.shape)}")
        return self.manifest.apply(scores)

    def columns_for(self, prompts: Iterable[Prompt], source: str = "the data") -> list[str]:
        """List the columns of the prompts' records that the function gets. source: of the prompts, for messages.

        Raises UserError, which lists the columns present, if it has a parameter without a default that is none of them.
        """
        present = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
        named = [name for name in self.parameters if name in present]
        missing = [name for name, required in self.parameters.items() if required and name not in present]
        if missing:
            there = ", ".join(present) or "no columns"
            raise UserError(
                f"{self.where} has the parameter {missing[0]!r}, which is no column of {source}; it has {there}"
            )
        return [n for n in present if n not in _first_two(self.function)] if self.takes_all else named

    def _call(self, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Any:
        """Call the function and return its result. Raises UserError on a timeout or an exception."""
        try:
            with torch_settings_restored(SETTINGS.get(self.module)):
                return call_within(self.timeout, self.function, prompts, responses, **columns)
        except TimeUp:
            raise UserError(f"{self.where} did not return within scoring.timeout={self.timeout:g} seconds") from None
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.where} raised {first_line(error)} ({_place(error)})") from error


def load_function(name: str, signal: str) -> Callable[..., Any]:
    """Import the function named `module:function`. Raises UserError that says which of the two is missing."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        is_new = module_name not in sys.modules
        with torch_settings_restored():
            module = importlib.import_module(module_name)
            if is_new:
                SETTINGS[module_name] = torch_settings()
    except Exception as error:  # the module's own code runs here
        raise UserError(f"{field_of(signal)}: cannot import module {module_name!r}: {first_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{field_of(signal)}: module {module_name!r} has no function {attribute!r}")
    return function


def _signature(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """List the parameters of a function; [] for a builtin that does not tell them."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _first_two(function: Callable[..., Any]) -> list[str]:
    """List the names of the parameters that get prompts and responses."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in _signature(function) if p.kind in by_place][:2]


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """Return ({name: it has no default} of the parameters besides prompts and responses, the function has **kwargs)."""
    signature, first = _signature(function), _first_two(function)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p.default is p.empty for p in signature if p.kind in by_name and p.name not in first}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature)


def _is_complex(values: Any) -> bool:
    """Tell whether an array or a tensor holds complex numbers, whose imaginary parts torch would drop."""
    if isinstance(values, torch.Tensor):
        return values.is_complex()
    return getattr(getattr(values, "dtype", None), "kind", "") == "c"


def _place(error: BaseException) -> str:
    """Return "file:line" where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}:{frame.lineno}"
