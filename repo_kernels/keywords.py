"""Functions whose arguments are the fields of a dataclass.

    @takes(Point)
    def norm(point: Point) -> float: ...

is called as `norm(1.0, y=2.0)`. `inspect.signature`, `help` and type checkers see the fields of `Point` with their
defaults; a keyword that does not exist is refused with the nearest one that does.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Call = TypeVar("Call")
Owner = TypeVar("Owner")
Result = TypeVar("Result")

# Old name -> new name, accepted for one release.
RENAMED = {"mode": "cost_mode", "is_weights": "importance_weights", "kl_ratio": "kl_importance_weighted"}


def takes(call: Callable[P, Call]) -> Callable[[Callable[[Call], Result]], Callable[P, Result]]:
    """Make a function of one dataclass into a function of its fields, which also takes the names in RENAMED."""

    def decorate(run: Callable[[Call], Result]) -> Callable[P, Result]:
        names = _describe(run, call)

        @functools.wraps(run)
        def function(*args: P.args, **keywords: P.kwargs) -> Result:
            known = _known(run.__name__, names, keywords, RENAMED)
            return run(call(*args, **known))  # type: ignore[arg-type]

        _sign(function, call, run)
        return function

    return decorate


def method_takes(
    call: Callable[P, Call], options: type | None = None
) -> Callable[[Callable[[Owner, Call], Result]], Callable[Concatenate[Owner, P], Result]]:
    """Make a method of one dataclass into a method of its fields.

    options: dataclass of what the object was made with, whose fields a call may mistake for its own; None: nothing.
    """
    given_before = {} if options is None else dict.fromkeys(inspect.signature(options).parameters, options.__name__)

    def decorate(run: Callable[[Owner, Call], Result]) -> Callable[Concatenate[Owner, P], Result]:
        names = _describe(run, call)

        @functools.wraps(run)
        def method(self: Owner, *args: P.args, **keywords: P.kwargs) -> Result:
            known = _known(run.__qualname__, names, keywords, {}, given_before)
            return run(self, call(*args, **known))  # type: ignore[arg-type]

        _sign(method, call, run, inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD))
        return method

    return decorate


def _known(
    function: str,
    names: frozenset[str],
    keywords: Mapping[str, Any],
    renamed: Mapping[str, str],
    given_before: Mapping[str, str] = MappingProxyType({}),
) -> Mapping[str, Any]:
    """Return the keywords under their present names, or raise TypeError for one that does not exist.

    given_before: options that are no arguments, with the class that takes them.
    """
    for name in keywords:
        if name not in names:
            return _renamed(function, names, keywords, renamed, given_before)
    return keywords


def _renamed(
    function: str,
    names: frozenset[str],
    keywords: Mapping[str, Any],
    renamed: Mapping[str, str],
    given_before: Mapping[str, str],
) -> Mapping[str, Any]:
    present = {}
    for name, value in keywords.items():
        new = renamed.get(name, name)
        if new not in names:
            hint = _hint(name, names, given_before)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
        if new != name:
            if new in keywords:
                raise TypeError(f"{function}() got both {new!r} and its old name {name!r}: pass {new!r} alone")
            _warn_renamed(function, name, new)
        present[new] = value
    return present


def _hint(name: str, names: frozenset[str], given_before: Mapping[str, str]) -> str:
    """Return what the caller of a name that does not exist may have meant."""
    near = difflib.get_close_matches(name, sorted(names | given_before.keys()), n=1, cutoff=0.5)
    if not near:
        return ""
    if near[0] in names:
        return f": did you mean {near[0]!r}?"
    return f": {near[0]!r} is an option, which is given once, in {given_before[near[0]]}({near[0]}=...)"


def _warn_renamed(function: str, old: str, new: str) -> None:
    """Warn at the line that called the function; torch.compile cannot trace a warning and gets none."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"{function}: {old!r} is now {new!r}; the old name will be removed in the next release",
            DeprecationWarning,
            stacklevel=5,
        )


def _describe(run: Callable[..., Any], call: Any) -> frozenset[str]:
    """Add the arguments to the docstring of `run` and name it in Python's own errors; return their names."""
    call.__init__.__qualname__ = run.__qualname__
    if run.__doc__ is not None:  # None under python -OO
        head, returns, tail = inspect.cleandoc(run.__doc__).partition("\nReturns:\n")
        run.__doc__ = f"{head}\nArgs:\n{_arguments(call)}\n{returns}{tail}"
    return frozenset(inspect.signature(call).parameters)


def _arguments(call: type) -> str:
    """Join what the docstrings of a dataclass and its bases say under "Args:"."""
    parts = [inspect.cleandoc(base.__dict__.get("__doc__") or "") for base in reversed(call.__mro__)]
    sections = [part.partition("\nArgs:\n")[2].partition("\n\n")[0] for part in parts]
    return "\n".join(section.rstrip() for section in sections if section)


def _sign(function: Any, call: Any, run: Callable[..., Any], *leading: inspect.Parameter) -> None:
    """Give the function the signature and the annotations of the dataclass and the result of `run`."""
    signature, result = inspect.signature(call), run.__annotations__["return"]
    function.__signature__ = signature.replace(
        parameters=[*leading, *signature.parameters.values()], return_annotation=result
    )
    function.__annotations__ = {**call.__init__.__annotations__, "return": result}
