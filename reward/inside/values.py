"""Plain values over a pipe: what may pass between the program under test and the tests, and nothing else.

The receiving side builds values of exact builtin types only, so that no method of the program's own (`__eq__`,
`__bool__`, `__del__`) ever runs where the tests are. Runs inside the sandbox and imports nothing of the project.
"""

from __future__ import annotations

import collections
import decimal
import fractions
import json
import os
import struct
from collections.abc import Callable
from typing import Any

MAX_FRAME = 64 * 2**20
SAFE_INT = 2**53
TEXT_TYPES = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """A value as JSON; what is not plain becomes {"object": number} by `refer`, which may raise TypeError."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -SAFE_INT < number < SAFE_INT else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in list.__iter__(value)]
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item, refer) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in dict.items(value)]}
    return _encode_rare(value, refer)


def _encode_rare(value: Any, refer: Callable[[Any], int]) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__mro__[-2].__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, (type({}.keys()), type({}.values()), type({}.items()))):
        return [encode(item, refer) for item in value]
    for name, kind in TEXT_TYPES.items():
        if isinstance(value, kind):
            return {"text": [name, str(value)]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    return {"object": refer(value)}


def decode(data: Any, find: Callable[[int], Any]) -> Any:
    """The value again; ValueError for anything that `encode` would not write."""
    if data is None or isinstance(data, (bool, str, int, float)):
        return data
    if isinstance(data, list):
        return [decode(item, find) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError("not a value")
    kind, content = next(iter(data.items()))
    if kind in SEQUENCES:
        return SEQUENCES[kind]([decode(item, find) for item in content])
    if kind == "dict":
        return {decode(key, find): decode(item, find) for key, item in content}
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "range":
        return range(*content)
    if kind == "text":
        return TEXT_TYPES[content[0]](content[1])
    if kind == "object" and type(content) is int:
        return find(content)
    raise ValueError(f"unknown kind {kind!r}")


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
