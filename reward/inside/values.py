"""Plain values over a pipe: what may pass between the program under test and the tests, and nothing else.

The receiving side builds values of exact builtin types only, so that no method of the program's own (`__eq__`,
`__bool__`, `__del__`) ever runs where the tests are. What is not plain stays where it is and is referred to (`peer`).
Runs inside the sandbox and imports nothing of the project.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import os
import struct
from collections.abc import Callable
from typing import Any

MAX_FRAME = 64 * 2**20
SAFE_INT = 2**53
SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
MAPPINGS = {"dict": dict, "Counter": collections.Counter, "OrderedDict": collections.OrderedDict}
BYTES = {"bytes": bytes, "bytearray": bytearray}
VIEWS = tuple(type(view) for one in ({}, collections.OrderedDict()) for view in (one.keys(), one.values(), one.items()))
# Types of the standard library whose values are rebuilt from a text.
FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "decimal.Decimal": decimal.Decimal,
    "fractions.Fraction": fractions.Fraction,
    "datetime.date": datetime.date.fromisoformat,
    "datetime.time": datetime.time.fromisoformat,
    "datetime.datetime": datetime.datetime.fromisoformat,
    "uuid.UUID": lambda text: importlib.import_module("uuid").UUID(text),
}
# Builtin types and constants that mean the same on both sides.
BUILTIN_NAMES = """bool bytearray bytes complex dict float frozenset int list object range set str tuple type Ellipsis
NotImplemented"""
BUILTINS = {name: getattr(builtins, name) for name in BUILTIN_NAMES.split()} | {"NoneType": type(None)}
# What a class of the program's may derive from and still be compared with plain values, by its content.
BASES = (int, str, float, list, *SEQUENCES.values(), dict, *BYTES.values(), complex, decimal.Decimal)
BASES += (fractions.Fraction, datetime.datetime, datetime.date, datetime.time, datetime.timedelta)


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON; what is not plain becomes what `refer` says of it, which may raise TypeError."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is list:
        return [encode(item, refer) for item in value]
    if kind in _ENCODERS:
        return _ENCODERS[kind](value, refer)
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    if kind is collections.defaultdict:
        return _mapping("dict")(value, refer)
    if kind.__module__ == "uuid" and kind.__qualname__ == "UUID":
        return {"text": ["uuid.UUID", str(value)]}
    for name, known in BUILTINS.items():
        if value is known:
            return {"builtin": name}
    return refer(value)


def encode_base(value: Any, refer: Callable[[Any], Any]) -> Any:
    """The content of a value whose type derives from one of BASES, as that type; None for any other."""
    for base in BASES:
        if isinstance(value, base):
            if base in (str, float):
                return base.__str__(value) if base is str else base.__float__(value)
            if base is list:
                return [encode(item, refer) for item in list.__iter__(value)]
            return _ENCODERS[base](value, refer)
    return None


def _integer(value: int, refer: Callable[[Any], Any]) -> Any:
    number = int.__index__(value)
    return number if -SAFE_INT < number < SAFE_INT else {"int": hex(number)}


def _sequence(name: str) -> Callable[[Any, Callable[[Any], Any]], Any]:
    items = SEQUENCES[name].__iter__
    return lambda value, refer: {name: [encode(item, refer) for item in items(value)]}


def _mapping(name: str) -> Callable[[Any, Callable[[Any], Any]], Any]:
    return lambda value, refer: {name: [[encode(key, refer), encode(one, refer)] for key, one in dict.items(value)]}


_ENCODERS: dict[type, Callable[[Any, Callable[[Any], Any]], Any]] = {
    int: _integer,
    **{kind: _sequence(name) for name, kind in SEQUENCES.items()},
    **{kind: _mapping(name) for name, kind in MAPPINGS.items()},
    bytes: lambda value, refer: {"bytes": bytes.hex(value)},
    bytearray: lambda value, refer: {"bytearray": bytearray.hex(value)},
    complex: lambda value, refer: {"complex": [value.real, value.imag]},
    range: lambda value, refer: {"range": [encode(n, refer) for n in (value.start, value.stop, value.step)]},
    slice: lambda value, refer: {"slice": [encode(n, refer) for n in (value.start, value.stop, value.step)]},
    **dict.fromkeys(VIEWS, lambda value, refer: [encode(item, refer) for item in value]),
    decimal.Decimal: lambda value, refer: {"text": ["decimal.Decimal", decimal.Decimal.__str__(value)]},
    fractions.Fraction: lambda value, refer: {"text": ["fractions.Fraction", fractions.Fraction.__str__(value)]},
    datetime.date: lambda value, refer: {"text": ["datetime.date", datetime.date.isoformat(value)]},
    datetime.time: lambda value, refer: {"text": ["datetime.time", datetime.time.isoformat(value)]},
    datetime.datetime: lambda value, refer: {"text": ["datetime.datetime", datetime.datetime.isoformat(value)]},
    datetime.timedelta: lambda value, refer: {"timedelta": [value.days, value.seconds, value.microseconds]},
}


def decode(data: Any, find: Callable[[str, Any], Any]) -> Any:
    """The value again; `find(kind, content)` for what is referred to; ValueError for what `encode` would not write."""
    if data is None or isinstance(data, (bool, str, int, float)):
        return data
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("not a value")
    kind, content = next(iter(data.items()))
    if kind in SEQUENCES:
        return SEQUENCES[kind]([decode(item, find) for item in content])
    if kind in MAPPINGS:
        return MAPPINGS[kind]({decode(key, find): decode(item, find) for key, item in content})
    if kind == "int":
        return int(content, 16)
    if kind in BYTES:
        return BYTES[kind].fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind in ("range", "slice"):
        return {"range": range, "slice": slice}[kind](*(decode(number, find) for number in content))
    if kind == "timedelta":
        return datetime.timedelta(*content)
    if kind == "text":
        return FROM_TEXT[content[0]](content[1])
    if kind == "builtin":
        return BUILTINS[content]
    return find(kind, content)


def send(descriptor: int, message: Any) -> None:
    """Write one message, whole."""
    data = json.dumps(message).encode()
    data = memoryview(struct.pack(">I", len(data)) + data)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int) -> Any:
    """Read one message; EOFError where the other side has ended, ValueError for what is none."""
    (length,) = struct.unpack(">I", _read(descriptor, 4))
    if length > MAX_FRAME:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(descriptor, length))


def _read(descriptor: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(descriptor, min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
