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
import json
import os
import struct
import uuid
from collections.abc import Callable, Iterable
from typing import Any

MAX_FRAME = 64 * 2**20
SAFE_INT = 2**53  # from which on an integer travels as hexadecimal digits
VIEWS = tuple(type(view) for one in ({}, collections.OrderedDict()) for view in (one.keys(), one.values(), one.items()))
# Builtin types and constants that mean the same on both sides.
BUILTIN_NAMES = """bool bytearray bytes complex dict float frozenset int list object range set str tuple type Ellipsis
NotImplemented"""
BUILTINS = {name: getattr(builtins, name) for name in BUILTIN_NAMES.split()} | {"NoneType": type(None)}


def _pairs(mapping: dict[Any, Any]) -> Iterable[list[Any]]:
    return map(list, dict.items(mapping))


def _bounds(value: Any) -> list[Any]:
    return [value.start, value.stop, value.step]


Plain = dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]]
# Types whose items are values themselves: name → (type, a value's items, the value of a list of items).
CONTAINERS: Plain = {
    "tuple": (tuple, tuple.__iter__, tuple),
    "set": (set, set.__iter__, set),
    "frozenset": (frozenset, frozenset.__iter__, frozenset),
    "deque": (collections.deque, collections.deque.__iter__, collections.deque),
    "dict": (dict, _pairs, dict),
    "Counter": (collections.Counter, _pairs, lambda pairs: collections.Counter(dict(pairs))),
    "OrderedDict": (collections.OrderedDict, _pairs, collections.OrderedDict),
    "range": (range, _bounds, lambda bounds: range(*bounds)),
    "slice": (slice, _bounds, lambda bounds: slice(*bounds)),
}
# Types of which JSON can hold a value: name → (type, what it holds, the value of that). A derived type goes first.
SCALARS: Plain = {
    "int": (int, lambda number: hex(int.__index__(number)), lambda text: int(text, 16)),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "bytearray": (bytearray, bytearray.hex, bytearray.fromhex),
    "complex": (complex, lambda number: [number.real, number.imag], lambda parts: complex(*parts)),
    "Decimal": (decimal.Decimal, decimal.Decimal.__str__, decimal.Decimal),
    "Fraction": (fractions.Fraction, fractions.Fraction.__str__, fractions.Fraction),
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (
        datetime.timedelta,
        lambda span: [span.days, span.seconds, span.microseconds],
        lambda parts: datetime.timedelta(*parts),
    ),
    "UUID": (uuid.UUID, uuid.UUID.__str__, uuid.UUID),
}
NAMES = {kind: name for name, (kind, _, _) in [*CONTAINERS.items(), *SCALARS.items()]}
# A class of the program's that derives from one of these is compared with plain values, by its content.
BASES = (str, float, list, *NAMES)


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """A value as JSON; what is not plain becomes what `refer` says of it, which may raise TypeError."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is list or kind in NAMES:
        return _encode_as(kind, value, refer)
    if kind in VIEWS:
        return [encode(item, refer) for item in value]
    if kind.__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    if kind is collections.defaultdict:
        return _encode_as(dict, value, refer)
    for name, known in BUILTINS.items():
        if value is known:
            return {"builtin": name}
    return refer(value)


def encode_base(value: Any, refer: Callable[[Any], Any]) -> Any:
    """The content of a value whose type derives from one of BASES, as that type; None for any other."""
    for base in BASES:
        if isinstance(value, base):
            return _encode_as(base, value, refer)
    return None


def _encode_as(kind: type, value: Any, refer: Callable[[Any], Any]) -> Any:
    """The content as one of BASES; methods of the value's own class are not called."""
    if kind is int and -SAFE_INT < (number := int.__index__(value)) < SAFE_INT:
        return number
    if kind is str:
        return str.__str__(value)
    if kind is float:
        return float.__float__(value)
    if kind is list:
        return [encode(item, refer) for item in list.__iter__(value)]
    name = NAMES[kind]
    if name in SCALARS:
        return {name: SCALARS[name][1](value)}
    return {name: [encode(item, refer) for item in CONTAINERS[name][1](value)]}


def decode(data: Any, find: Callable[[str, Any], Any]) -> Any:
    """The value again; `find(kind, content)` for what is referred to; ValueError for what `encode` would not write."""
    if data is None or isinstance(data, (bool, str, int, float)):
        return data
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("not a value")
    kind, content = next(iter(data.items()))
    if kind in CONTAINERS:
        return CONTAINERS[kind][2]([decode(item, find) for item in content])
    if kind in SCALARS:
        return SCALARS[kind][2](content)
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


def _read(descriptor: int, length: int) -> bytearray:
    data = bytearray()
    while len(data) < length:
        part = os.read(descriptor, min(length - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return data
