"""How a user's mistake is told: one line, exit code 2, no traceback."""

import errno
import functools
import sys
from collections.abc import Callable

FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake that its user can mend: the message names the key, the value and the way out, in one line."""


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap an entry point so that a UserError prints as one line and ends the program with code 2.

    So do a full disk and a full device, which are nobody's mistake but are mended by the user too.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            told = str(error)
        except OSError as error:
            if error.errno not in FULL:
                raise
            told = f"{error.filename or 'a file'} could not be written: {error.strerror}; free some space and resume"
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
                raise
            told = "the device's memory is full; python -m common.doctor config=… says what needs it and what helps"
        else:
            return
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)

    return wrapped
