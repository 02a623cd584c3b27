"""How a config's schema is written and read: fields with an explanation, and all keys below a section."""

from dataclasses import Field, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints


def key(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    function: bool = False,
) -> Any:
    """A schema field with its one-line explanation; lists and dicts are copied per instance.

    `choices` names the words allowed, `function` allows module:function (too), `low` and `high` bound numbers;
    `common.config` holds each value, or each entry of a list, to them.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "function": function}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A nested section with the defaults of its class."""
    return field(default_factory=cls)


@cache
def keys_of(cls: type, prefix: str = "") -> dict[str, tuple[Any, Field]]:
    """Every key below a section, dotted, in order: its type and its field."""
    found: dict[str, tuple[Any, Field]] = {}
    hints = get_type_hints(cls)
    for one in fields(cls):
        if is_dataclass(hints[one.name]):
            found |= keys_of(hints[one.name], f"{prefix}{one.name}.")
        else:
            found[prefix + one.name] = (hints[one.name], one)
    return found


def default_of(one: Field) -> Any:
    """The default value of a field made by `key`."""
    return one.default_factory() if callable(one.default_factory) else one.default
