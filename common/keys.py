"""How a key of a config is declared: its type, its default, one line of explanation and its limits."""

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, NewType, Union, get_args, get_origin, get_type_hints

Function = NewType("Function", str)  # module:function, of the user's own
Schedule = dict[int, int]  # a number by the RL steps done: {0: 4, 40: 8} is 8 from step 41 on


@dataclass(frozen=True)
class Key:
    """What a value under a config key may be; for a list, what its entries may be."""

    kind: type  # int, float, bool or str
    is_list: bool
    optional: bool  # null is allowed too
    choices: tuple[str, ...]  # the words allowed; none: any text
    function: bool  # module:function is allowed too
    setting: bool  # one of its section's `settings`
    lists: bool  # a list of such is allowed too, an entry for each setting of an evaluation
    schedule: bool  # a Schedule is allowed too
    default: Any
    help: str
    low: float | None
    high: float | None


def key(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A schema field with its explanation and limits, as in `Key`; lists are copied per instance."""
    limits = {"help": help, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=limits)
    return field(default=default, metadata=limits)


def section(cls: type) -> Any:
    """A nested section with the defaults of its class."""
    return field(default_factory=cls)


@cache
def keys_of(cls: type, prefix: str = "") -> dict[str, Key]:
    """Every key of a section or job, those of sections below it too: by dotted name, in order."""
    found: dict[str, Key] = {}
    hints = get_type_hints(cls)
    for entry in fields(cls):
        name, hint = prefix + entry.name, hints[entry.name]
        if is_dataclass(hint):
            found |= keys_of(hint, f"{name}.")
            continue
        kind, *others = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        is_list = get_origin(kind) is list
        kind = get_args(kind)[0] if is_list else kind
        setting = entry.name in getattr(cls, "settings", ())
        found[name] = Key(
            kind=kind if kind in (int, float, bool) else str,
            is_list=is_list,
            optional=NoneType in others,
            choices=get_args(kind),
            function=Function in (kind, *others),
            setting=setting,
            lists=setting and cls.takes_lists,
            schedule=Schedule in others,
            default=entry.default if entry.default is not MISSING else entry.default_factory(),
            **entry.metadata,
        )
    return found
