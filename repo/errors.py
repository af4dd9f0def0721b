"""UserError: a mistake in what the user gave, told in one sentence and without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """The message says what is wrong, what was found and what to do."""


def exit_with_sentence(main: Callable[[], None]) -> None:
    """Run a command; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
