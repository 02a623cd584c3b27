"""How a user's mistake is told: one line, exit code 2, no traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that its user can mend: the message names the key, the value and the way out, in one line."""


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap an entry point so that a UserError prints as one line and ends the program with code 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
