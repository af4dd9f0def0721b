"""UserError: a mistake in what the user gave, told in one sentence and without a traceback."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable


class UserError(Exception):
    """The message says what is wrong, what was found and what to do."""


def first_line(error: BaseException) -> str:
    """The type and first line of a library's error, for a sentence of ours."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def require_package(name: str, what: str) -> None:
    """UserError that says how to install a package that is missing. what: what needs it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{what} needs the package {name}: pip install {name}")


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and exit code 2, an interrupt exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
