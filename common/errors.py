"""A user's mistake: one line, exit code 2, no traceback; and the user's own functions, found by `module:name`."""

import difflib
import errno
import functools
import importlib
import os
import select
import sys
from collections.abc import Callable, Iterable
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """A mistake that its user can mend: the message names the key, the value and the way out, in one line."""


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap an entry point so that a UserError prints as one line and ends the program with code 2.

    So do a full disk and a full device, which are nobody's mistake but are mended by the user too. Where whoever reads
    what is printed has gone, as `| head` does, the program ends without a word, by 141 as a shell would say.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            result = main(*args, **kwargs)
            sys.stdout.flush()
            return result
        except UserError as error:
            message = str(error)
        except BrokenPipeError:
            if not nobody_reads():
                raise
            sys.exit(141)
        except OSError as error:
            if error.errno not in FULL:
                raise
            message = f"{error.filename or 'a file'} could not be written: {error.strerror}; free some space and resume"
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
                raise
            message = "the device's memory is full; python -m common.doctor config=… says what needs it and what helps"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return wrapped


def show(value: Any) -> str:
    """A value as a user would type it, in one short line."""
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else one_line(value)


def one_line(thing: Any) -> str:
    """The first line of a text, shortened."""
    text = (str(thing).strip().splitlines() or [""])[0]
    return text if len(text) <= 100 else text[:97] + "…"


def nobody_reads() -> bool:
    """Whether the pipe that is stdout is closed at its other end; what would be written there is dropped then."""
    look = select.poll()
    look.register(sys.stdout, select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in look.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
    return closed


def names_of(names: Iterable[str]) -> str:
    """A list in words, at most a dozen."""
    names = list(names)
    return ", ".join(names[:12]) + (" …" if len(names) > 12 else "") if names else "none"


def load_function(key: str, spec: str) -> Callable[..., Any]:
    """The function that `module:function` names, the current folder searched too; UserError names the config key."""
    return load_object(key, spec, "function", callable)


def load_object(key: str, spec: str, what: str, fits: Callable[[Any], bool]) -> Any:
    """What `module:name` names, if it is what is wanted there; else UserError, `what` being the word for it."""
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise UserError(f"{key}: '{spec}' is not of the form module:{what}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise UserError(
            f"{key}: there is no module '{error.name}' ('{spec}'); put {error.name}.py into {here} or install it"
        ) from None
    found = getattr(module, name, None)
    if not fits(found):
        close = difflib.get_close_matches(name, [word for word, value in vars(module).items() if fits(value)], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"{key}: '{spec}': {module.__file__} has no {what} '{name}'{hint}")
    return found
