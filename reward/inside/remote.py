"""Objects of the other process as the tests see them (and as the program sees those of the tests).

Everything on a `Remote` is fetched or done where its object is, except what would let a program judge itself: **an
object is never equal to a plain value and in no order with one**, unless its class derives from a plain type, and then
its content is compared here. What an operator makes of an object and a plain value (which may be the expected one) is
`mixed`: no number, no truth, no container.

Runs inside the sandbox and imports nothing of the project.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peer import Peer


CHANGEABLE = (list, dict, set, bytearray, collections.deque)

BINARY = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"]
BINARY += ["lshift", "rshift", "and", "xor", "or"]
IN_PLACE = [name for name in BINARY if name != "divmod"]
ORDER = ["lt", "le", "gt", "ge"]
NUMBER = ["bool", "int", "float", "complex", "index", "round", "abs", "neg", "pos", "invert"]
NUMBER += ["trunc", "floor", "ceil"]
CONTAINER = ["len", "iter", "next", "reversed", "getitem", "setitem", "delitem"]


def _operator(name: str) -> Callable[..., Any]:
    return divmod if name == "divmod" else getattr(operator, f"{name}_", None) or getattr(operator, name)


# What can be done with objects beside fetching, setting and calling, by name.
DEEDS: dict[str, Callable[..., Any]] = {
    **{
        one.__name__: one
        for one in (len, bool, str, repr, hash, format, dir, iter, next, reversed, int, float, complex)
    },
    **{one.__name__: one for one in (round, abs, isinstance, issubclass, copy.copy, copy.deepcopy)},
    **{one.__name__: one for one in (math.trunc, math.floor, math.ceil)},
    **{name: _operator(name) for name in [*BINARY, *ORDER, "eq", "ne", "neg", "pos", "invert", "index", "contains"]},
    **{f"i{name}": _operator(f"i{name}") for name in IN_PLACE},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem")},
    "enter": lambda entered: type(entered).__enter__(entered),
    "exit": lambda left, error: type(left).__exit__(left, type(error) if error else None, error, None),
}
OF_TESTS = DEEDS.keys() - {"isinstance", "issubclass", "dir", "copy", "deepcopy"}  # with objects of the tests' classes


class Ended(BaseException):
    """The other end is gone or speaks nonsense; no test may catch this."""


@dataclass
class Far:
    """Where a `Remote` lies: the number of an object, or one of its methods; its content where that is plain."""

    peer: Peer
    number: int
    method: str | None = None
    base: Any = None
    mixed: bool = False

    def content(self, remote: Remote) -> Any:
        """The plain content now; None where the class derives from no plain type."""
        if isinstance(self.base, CHANGEABLE):
            content = self.peer.ask("base", remote)
            if type(content) is not type(self.base):
                raise Ended
            return content
        return self.base


class Remote:
    """An object of the other end. Subclasses (`remote_class`) have the special methods that its class has."""

    __slots__ = ("__weakref__", "_far")

    def __getattribute__(self, name: str) -> Any:
        far = FAR(self)
        if name == "__class__":  # of a class that derives from list: isinstance(…, list) holds
            return type(self) if far.base is None else type(far.base)
        if name[2:-2] in LOCAL and hasattr(type(self), name):  # `a.__eq__(b)` is `a == b`
            compared = name[2:-2] in ("eq", "ne", *ORDER)  # NotImplemented would be true
            return functools.partial(DEEDS[name[2:-2]], self) if compared else object.__getattribute__(self, name)
        if name.startswith("__array"):  # numpy would take the addresses in it as its own
            raise AttributeError(name)
        value = far.peer.ask("get", self, name)
        if far.mixed:
            if is_remote(value):
                return _mixed(value) if callable(value) else value
            if hasattr(complex, name):
                raise TypeError(MIXED)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        FAR(self).peer.ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        FAR(self).peer.ask("delete", self, name)

    def __eq__(self, other: Any) -> Any:
        return _compare("eq", self, other)

    def __ne__(self, other: Any) -> Any:
        return _compare("ne", self, other)

    def __hash__(self) -> int:
        base = FAR(self).base
        return _do("hash", self) if base is None else hash(base)

    def __str__(self) -> str:
        return _do("str", self)

    def __repr__(self) -> str:
        return _do("repr", self)

    def __format__(self, form: str) -> str:
        if form and FAR(self).mixed:
            raise TypeError(MIXED)
        return _do("format", self, form)

    def __dir__(self) -> list[str]:
        return _do("dir", self)

    def __copy__(self) -> Any:
        return _do("copy", self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _do("deepcopy", self)

    def __instancecheck__(self, instance: Any) -> bool:
        return _do("isinstance", instance, self, peer=FAR(self).peer)

    def __subclasscheck__(self, other: Any) -> bool:
        return _do("issubclass", other, self, peer=FAR(self).peer)


FAR = Remote.__dict__["_far"].__get__
MIXED = "what an operator made of the program's object and a plain value is no number, truth or container to the tests"


def is_remote(value: Any) -> bool:
    return issubclass(type(value), Remote)


def _do(name: str, *operands: Any, peer: Peer | None = None) -> Any:
    return (peer or FAR(operands[0]).peer).ask("do", name, *operands)


def _compare(name: str, self: Remote, other: Any) -> Any:
    if is_remote(other):
        return _do(name, self, other)
    content = FAR(self).content(self)
    return NotImplemented if content is None else DEEDS[name](content, other)


def _mixed(result: Any) -> Any:
    """The same object, marked; the unmarked one, if the tests have it from elsewhere, stays as it is."""
    if not is_remote(result):
        raise TypeError(MIXED)
    return new_remote(type(result), dataclasses.replace(FAR(result), mixed=True))


def _binary(name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Remote, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        far = FAR(self)
        mixed = far.mixed or not is_remote(other) or FAR(other).mixed
        if not is_remote(other) and far.base is not None:
            if isinstance(far.base, CHANGEABLE) and name[0] == "i" and hasattr(far.base, f"__{name}__"):
                return far.peer.ask("do", name, left, right)
            content = far.content(self)
            return DEEDS[name](*((other, content) if reflected else (content, other)))
        result = far.peer.ask("do", name, left, right)
        return _mixed(result) if mixed else result

    return method


def _order(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Remote, other: Any) -> Any:
        if FAR(self).mixed or (is_remote(other) and FAR(other).mixed):
            raise TypeError(MIXED)
        return _compare(name, self, other)

    return method


def _plainly(name: str) -> Callable[..., Any]:
    def method(self: Remote, *operands: Any) -> Any:
        if FAR(self).mixed:
            raise TypeError(MIXED)
        return _do(name, self, *operands)

    return method


def _call(self: Remote, *arguments: Any, **named: Any) -> Any:
    result = FAR(self).peer.call(self, arguments, named)
    return _mixed(result) if FAR(self).mixed else result


def _contains(self: Remote, item: Any) -> bool:
    """Asked of the program only for an object of its own; a plain value is looked for here."""
    if FAR(self).mixed:
        raise TypeError(MIXED)
    if is_remote(item):
        return _do("contains", self, item)
    content = FAR(self).content(self)
    return item in content if content is not None else any(one is item or one == item for one in self)


SPECIAL: dict[str, Callable[..., Any]] = {
    "call": _call,
    "contains": _contains,
    "enter": lambda self: _do("enter", self),
    "exit": lambda self, kind, error, trace: _do("exit", self, error),
    **{name: _plainly(name) for name in [*NUMBER, *CONTAINER]},
    **{name: _order(name) for name in ORDER},
    **{name: _binary(name, False) for name in BINARY},
    **{f"r{name}": _binary(name, True) for name in BINARY},
    **{f"i{name}": _binary(f"i{name}", False) for name in IN_PLACE},
}
LOCAL = {*SPECIAL, "eq", "ne", "copy", "deepcopy"} - {"call"}


@functools.lru_cache(maxsize=1000)
def special_methods(kind: type) -> tuple[str, ...]:
    """Which of SPECIAL a class has, `hash` too."""
    methods = {name: method for owner in reversed(kind.__mro__[:-1]) for name, method in vars(owner).items()}
    found = [name for name in SPECIAL if methods.get(f"__{name}__") is not None]
    return (*found, "hash") if kind.__hash__ is not None else tuple(found)


@functools.lru_cache(maxsize=1000)
def remote_class(name: str, special: tuple[str, ...]) -> type:
    """The class of the remote objects of one of the other end's classes."""
    methods: dict[str, Any] = {f"__{one}__": SPECIAL[one] for one in special if one in SPECIAL}
    if "hash" not in special:
        methods["__hash__"] = None
    return type(name[:100], (Remote,), {"__slots__": (), **methods})


def new_remote(kind: type, far: Far) -> Any:
    """An object of one of `remote_class`'s classes."""
    remote = object.__new__(kind)
    Remote.__dict__["_far"].__set__(remote, far)
    return remote
