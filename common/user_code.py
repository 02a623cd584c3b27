"""Functions and families of the user's own, named in a config as `module:name`."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from common.errors import UserError


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
