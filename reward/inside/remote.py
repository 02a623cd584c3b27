"""Objects and exceptions of the other process as the tests see them (and as the program sees those of the tests).

Everything on a `Remote` is fetched or done where its object is, except what would let a program judge itself: **an
object is never equal to a plain value and in no order with one**, unless its class derives from a plain type, and then
its content is compared here. What an operator makes of an object and a plain value (which may be the expected one) is
`mixed`: no number, no truth, no container.

Runs inside the sandbox and imports nothing of the project.
"""

import builtins
import collections
import copy
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

CHANGEABLE = (list, dict, set, bytearray, collections.deque)
MIXED = "what an operator made of the program's object and a plain value is no number, truth or container to the tests"

BINARY = ["add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"]
BINARY += ["lshift", "rshift", "and", "xor", "or"]
IN_PLACE = [f"i{name}" for name in BINARY if name != "divmod"]
ORDER = ["lt", "le", "gt", "ge"]
NUMBER = ["bool", "int", "float", "complex", "index", "round", "abs", "neg", "pos", "invert"]
NUMBER += ["trunc", "floor", "ceil"]
CONTAINER = ["len", "iter", "next", "reversed", "getitem", "setitem", "delitem"]
ANY_OBJECT = ["eq", "ne", "hash", "str", "repr", "format"]
NOT_OF_TESTS = ["isinstance", "issubclass", "dir", "copy", "deepcopy"]


def _function(name: str) -> Callable[..., Any]:
    """The function of this name in the standard library: `len`, `operator.add`, `operator.and_`, `math.floor`."""
    for module in (builtins, operator, math, copy):
        for spelled in (name, f"{name}_"):
            if hasattr(module, spelled):
                return getattr(module, spelled)
    raise NameError(name)


# What can be done with objects beside fetching, setting and calling, by name; with those of the tests only OF_TESTS.
OF_TESTS: dict[str, Callable[..., Any]] = {
    **{name: _function(name) for name in [*BINARY, *IN_PLACE, *ORDER, *NUMBER, *CONTAINER, *ANY_OBJECT, "contains"]},
    "enter": lambda entered: type(entered).__enter__(entered),
    "exit": lambda left, error: type(left).__exit__(left, type(error) if error else None, error, None),
}
DEEDS = OF_TESTS | {name: _function(name) for name in NOT_OF_TESTS}


class Ended(BaseException):
    """The other end is gone or speaks nonsense; no test may catch this."""


@dataclass
class Far:
    """Where something of the other end lies: the number of an object, or one of its methods."""

    ask: Callable[..., Any]  # of the `Peer` that leads there
    number: int
    method: str | None = None
    base: Any = None  # the content of an object whose class derives from a plain type
    mixed: bool = False

    def do(self, deed: str, *operands: Any) -> Any:
        """Have one of DEEDS done there."""
        return self.ask("do", deed, *operands)


def is_remote(value: Any) -> bool:
    return issubclass(type(value), Remote)


def _refuse_mixed(*operands: Any) -> None:
    if any(is_remote(one) and FAR(one).mixed for one in operands):
        raise TypeError(MIXED)


def _content(remote: Any) -> Any:
    """The plain content now; None where the class derives from no plain type."""
    far = FAR(remote)
    if not isinstance(far.base, CHANGEABLE):
        return far.base
    content = far.ask("base", remote)
    if type(content) is not type(far.base):
        raise Ended
    return content


def _deed(name: str, mixed_too: bool = True) -> Callable[..., Any]:
    """A method that has one of DEEDS done with its object, where that lies."""

    def method(self: Any, *operands: Any) -> Any:
        if not mixed_too:
            _refuse_mixed(self)
        return FAR(self).do(name, self, *operands)

    return method


def _comparison(name: str, mixed_too: bool = True) -> Callable[[Any, Any], Any]:
    """A method that compares an object with another where they lie, and its plain content with a plain value here."""

    def method(self: Any, other: Any) -> Any:
        if not mixed_too:
            _refuse_mixed(self, other)
        if is_remote(other):
            return FAR(self).do(name, self, other)
        content = _content(self)
        return NotImplemented if content is None else DEEDS[name](content, other)

    return method


class Remote:
    """An object of the other end. Subclasses (`remote_class`) have the special methods that its class has."""

    __slots__ = ("__weakref__", "_far")

    def __init__(self, far: Far) -> None:
        object.__setattr__(self, "_far", far)

    def __getattribute__(self, name: str) -> Any:
        far = FAR(self)
        if name == "__class__":  # of a class that derives from list: isinstance(…, list) holds
            return type(self) if far.base is None else type(far.base)
        if name[2:-2] in LOCAL and hasattr(type(self), name):  # `a.__eq__(b)` is `a == b`
            compared = name[2:-2] in ("eq", "ne", *ORDER)  # NotImplemented would be true
            return functools.partial(DEEDS[name[2:-2]], self) if compared else object.__getattribute__(self, name)
        if name.startswith("__array"):  # numpy would take the addresses in it as its own
            raise AttributeError(name)
        value = far.ask("get", self, name)
        if far.mixed:
            if is_remote(value):
                return _mixed(value) if callable(value) else value
            if hasattr(complex, name):
                raise TypeError(MIXED)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        FAR(self).ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        FAR(self).ask("delete", self, name)

    __eq__, __ne__ = _comparison("eq"), _comparison("ne")
    __str__, __repr__, __dir__, __copy__ = map(_deed, ("str", "repr", "dir", "copy"))

    def __hash__(self) -> int:
        base = FAR(self).base
        return FAR(self).do("hash", self) if base is None else hash(base)

    def __format__(self, form: str) -> str:
        if form:
            _refuse_mixed(self)
        return FAR(self).do("format", self, form)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return FAR(self).do("deepcopy", self)

    def __instancecheck__(self, instance: Any) -> bool:
        return FAR(self).do("isinstance", instance, self)

    def __subclasscheck__(self, other: Any) -> bool:
        return FAR(self).do("issubclass", other, self)


FAR = Remote.__dict__["_far"].__get__


class FarClass(type):
    """The class of an exception of the other end; its `_origin` says where the class lies, if it is defined there."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        origin = vars(cls).get("_origin")
        return origin.ask("call", cls, list(arguments), named) if origin else super().__call__(*arguments, **named)


class FarError(Exception, metaclass=FarClass):
    """An exception of the other end, beside the builtin type that it derives from."""

    _error: Far | None = None
    _text = ""

    def __str__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Any:
        if self._error is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._error.ask("get", self, name)


def far_of(value: Any) -> Far | None:
    """Where the other end has what this value stands for; None for a value of this end."""
    if is_remote(value):
        return FAR(value)
    if isinstance(value, FarError):
        return value._error
    return vars(value).get("_origin") if isinstance(value, FarClass) else None


def _mixed(result: Any) -> Any:
    """The same object, marked; the unmarked one, if the tests have it from elsewhere, stays as it is."""
    if not is_remote(result):
        raise TypeError(MIXED)
    return type(result)(replace(FAR(result), mixed=True))


def _binary(name: str, reflected: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Remote, other: Any) -> Any:
        far, plain = FAR(self), not is_remote(other)
        left, right = (other, self) if reflected else (self, other)
        if plain and far.base is not None:
            if isinstance(far.base, CHANGEABLE) and name in IN_PLACE and hasattr(far.base, f"__{name}__"):
                return far.do(name, left, right)
            content = _content(self)
            return DEEDS[name](*((other, content) if reflected else (content, other)))
        result = far.do(name, left, right)
        return _mixed(result) if far.mixed or plain or FAR(other).mixed else result

    return method


def _call(self: Remote, *arguments: Any, **named: Any) -> Any:
    result = FAR(self).ask("call", self, list(arguments), named)
    return _mixed(result) if FAR(self).mixed else result


def _contains(self: Remote, item: Any) -> bool:
    """Asked of the program only for an object of its own; a plain value is looked for here."""
    _refuse_mixed(self)
    if is_remote(item):
        return FAR(self).do("contains", self, item)
    content = _content(self)
    return item in content if content is not None else any(one is item or one == item for one in self)


SPECIAL: dict[str, Callable[..., Any]] = {
    "call": _call,
    "contains": _contains,
    "enter": _deed("enter"),
    "exit": lambda self, kind, error, trace: FAR(self).do("exit", self, error),
    **{name: _deed(name, mixed_too=False) for name in [*NUMBER, *CONTAINER]},
    **{name: _comparison(name, mixed_too=False) for name in ORDER},
    **{name: _binary(name) for name in [*BINARY, *IN_PLACE]},
    **{f"r{name}": _binary(name, reflected=True) for name in BINARY},
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
