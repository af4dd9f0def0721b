"""Errors: mistakes in the user's input, reported in one sentence without a traceback."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the user's input. The message names the field or file, the value it has and the values it takes."""


def first_line(error: BaseException) -> str:
    """Return "Type: first line of the message" of a library's exception, to quote it in a sentence."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def warn_user(sentence: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {sentence}", file=sys.stderr)


def require_package(name: str, what: str) -> None:
    """Raise UserError with the install command if the package `name` is missing. what: the feature that needs it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs the package {name}: pip install {name}")


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Run a command. Turn UserError into one line on stderr and exit code 2, and an interrupt into exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
