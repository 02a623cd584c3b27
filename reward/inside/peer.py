"""One end of the channel between the program and its tests: what is asked of the other end, and answered to it.

An end asks (fetch an attribute, call, add, …) and waits; while it waits it answers what the other end asks, so that a
function of the tests can be called by the program. What is asked of the program is done by the program; what the
program asks of the tests is limited to what they passed to it. Objects stay where they are and are known by numbers.

Runs inside the sandbox and imports nothing of the project.
"""

from __future__ import annotations

import collections
import functools
import importlib
import os
import sys
import threading
import traceback
import types
from dataclasses import dataclass, field
from typing import Any

import values
from remote import DEEDS, FAR, OF_TESTS, Ended, Far, is_remote, new_remote, remote_class, special_methods

MAX_OBJECTS = 100_000
MAX_TEXT = 1000  # of an exception
TESTS = "__main__"  # the name of the tests' own module
EXIT_MEMORY = 77  # a program that ran out of memory; claiming it falsely only names a failure wrongly
BAD_REPLY = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
REFUSED = "the tests do not let a program do this with what they pass to it"


class FarClass(type):
    """The class of an exception that was raised, or is defined, at the other end."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        origin = cls.__dict__.get("_origin")
        return origin[0].call(cls, arguments, named) if origin else super().__call__(*arguments, **named)


class FarError(Exception, metaclass=FarClass):
    """An exception of the other end, beside the builtin type that it derives from."""

    _error: tuple[Peer, int] | None = None
    _text = ""

    def __str__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Any:
        if self._error is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._error[0].ask("get", self, name)


@dataclass
class Peer:
    """One end of the channel. `names` are the program's globals; the tests' end has none."""

    channel: int
    names: dict[str, Any] | None = None
    objects: list[Any] = field(default_factory=list)
    numbers: dict[Any, int] = field(default_factory=dict)  # of our objects, by identity
    remotes: dict[int, Any] = field(default_factory=dict)  # the other end's objects, by their number
    classes: dict[Any, type] = field(default_factory=dict)  # of its exceptions
    asked: int = 0
    ended: bool = False
    lock: Any = field(default_factory=threading.RLock)

    # Asking

    def ask(self, what: str, *operands: Any) -> Any:
        """Have something done at the other end; its value, or its exception."""
        return self._value(self._ask(what, operands))

    def call(self, target: Any, arguments: tuple, named: dict[str, Any]) -> Any:
        """Call a function there; what it did to the arguments is done to them here."""
        reply = self._ask("call", (target, list(arguments), named))
        if "arguments" in reply:
            try:
                after = self.decode(reply["arguments"])
                [*after_arguments], after_named = after
            except BAD_REPLY:
                raise self._end() from None
            for argument, one in zip([*arguments, *named.values()], [*after_arguments, *after_named.values()]):
                change(argument, one)
        return self._value(reply)

    def _ask(self, what: str, operands: tuple[Any, ...]) -> dict[str, Any]:
        message = {"ask": what, "of": [self.encode(one) for one in operands]}
        with self.lock:
            self.asked += 1
            self._send(message)
            while True:
                reply = self.receive()
                if not isinstance(reply, dict):
                    raise self._end()
                if "ask" not in reply:
                    return reply
                self.answer(reply)

    def receive(self) -> Any:
        """The next message; Ended where there is none."""
        try:
            if self.ended:
                raise Ended
            return values.receive(self.channel)
        except (EOFError, OSError, ValueError, RecursionError):
            raise self._end() from None

    def _send(self, message: dict[str, Any]) -> None:
        try:
            values.send(self.channel, message)
        except OSError:
            raise self._end() from None

    def _end(self) -> Ended:
        self.ended = True
        return Ended()

    def _value(self, reply: dict[str, Any]) -> Any:
        try:
            value = self._error(reply["error"]) if "error" in reply else self.decode(reply.get("value"))
        except BAD_REPLY:
            raise self._end() from None
        if "error" in reply:
            raise value
        return value

    # Answering

    def answer(self, message: dict[str, Any]) -> None:
        """Do what the other end asks and reply."""
        reply: dict[str, Any] = {}
        operands: list[Any] = []
        try:
            try:
                what, of = message["ask"], message["of"]
                if self.names is None:
                    self._permit(what, of)
                operands = [self.decode(one) for one in of]
                if what == "base":
                    reply["value"] = values.encode_base(operands[0], self.refer)
                elif what == "get":
                    reply["value"] = self._attribute(*operands)
                else:
                    reply["value"] = self.encode(self._perform(what, *operands))
            except Exception as error:
                if isinstance(error, MemoryError):
                    raise
                if not isinstance(error, StopIteration) and self.names is not None:
                    traceback.print_exc()
                reply["error"] = self._encode_error(error)
            if operands and what == "call" and (after := self.encode(operands[1:])) != of[1:]:
                reply["arguments"] = after
        except MemoryError:
            os._exit(EXIT_MEMORY)
        except Exception as error:  # neither its text nor its type can be read
            reply = {"error": {"kind": {"known": ["builtins", "Exception"]}, "text": type(error).__name__}}
        self._send(reply)

    def _perform(self, what: str, *operands: Any) -> Any:
        match what:
            case "name":
                if operands[0] not in self.names:
                    raise NameError(f"name {operands[0]!r} is not defined")
                return self.names[operands[0]]
            case "call":
                target, arguments, named = operands
                return target(*arguments, **named)
            case "do":
                return DEEDS[operands[0]](*operands[1:])
            case "set":
                return setattr(*operands)
            case "delete":
                return delattr(*operands)
        raise ValueError(f"unknown question {what!r}")

    def _attribute(self, owner: Any, name: str) -> Any:
        """An attribute as JSON; a method of the object itself by its name, so that it needs no number."""
        value = getattr(owner, name)
        bound = isinstance(value, (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType))
        if bound and value.__self__ is owner and not isinstance(owner, types.ModuleType):
            return {"method": [self.number(owner), name]}
        return self.encode(value)

    def _permit(self, what: str, of: list[Any]) -> None:
        """What the program may do to the tests: call what they passed, iterate, use instances of their classes."""
        mine = [one["yours"] for one in of if isinstance(one, dict) and "yours" in one]
        owners = [self.objects[number] for number, _ in mine]
        ours = bool(owners) and all(type(owner).__module__ == TESTS for owner in owners)
        if what == "call":
            allowed = isinstance(of[0], dict) and "yours" in of[0]
        elif what == "do":
            allowed = bool(owners) and (of[0] in ("iter", "next") or (ours and of[0] in OF_TESTS))
        elif what == "get":
            allowed = ours and not of[1].startswith("_")
        elif what in ("set", "delete"):  # but not in place of a method
            method = callable(getattr(type(owners[0]), of[1], None)) if owners else True
            allowed = ours and not of[1].startswith("_") and not method
        else:
            allowed = ours and what == "base"
        if not allowed:
            raise TypeError(REFUSED)

    # Naming objects

    def number(self, value: Any) -> int:
        """The number by which the other end knows an object of ours."""
        if id(value) not in self.numbers:
            if len(self.objects) >= MAX_OBJECTS:
                raise TypeError("too many objects")
            self.objects.append(value)
            self.numbers[id(value)] = len(self.objects) - 1
        return self.numbers[id(value)]

    def encode(self, value: Any) -> Any:
        return values.encode(value, self.refer)

    def decode(self, data: Any) -> Any:
        return values.decode(data, self._find)

    def refer(self, value: Any) -> dict[str, Any]:
        """How a value that does not travel is referred to."""
        if is_remote(value):
            return {"yours": [FAR(value).number, FAR(value).method]}
        if isinstance(value, FarError) and value._error:
            return {"yours": [value._error[1], None]}
        if isinstance(value, type) and issubclass(value, Exception):
            origin = value.__dict__.get("_origin")
            return {"yours": [origin[1], None]} if origin else {"exception": self._kind_of(value)}
        if isinstance(value, Exception):
            return {"raised": self._encode_error(value)}
        if self.names is None:
            if home := _home(value):
                return {"library": home}
            if not (callable(value) or hasattr(value, "__next__") or type(value).__module__ == TESTS):
                raise TypeError(f"a {type(value).__name__} cannot be passed to the program under test")
        base = values.encode_base(value, self.refer)
        return {"object": [self.number(value), type(value).__name__, special_methods(type(value)), base]}

    def _find(self, kind: str, content: Any) -> Any:
        """What a reference stands for here; ValueError for an unknown kind."""
        if kind == "yours":
            owner, name = self.objects[content[0]], content[1]
            if name is None:
                return owner
            if self.names is None and (name.startswith("_") or type(owner).__module__ != TESTS):
                raise TypeError(REFUSED)
            return getattr(owner, name)
        if kind == "object":
            number, name, special, base = content
            if number not in self.remotes:
                self.remotes[number] = new_remote(remote_class(name, tuple(special)), Far(self, number))
            if base is not None:
                FAR(self.remotes[number]).base = self.decode(base)
            return self.remotes[number]
        if kind == "method":
            number, name = content
            return new_remote(remote_class("method", ("call", "hash")), Far(self, int(number), str(name)))
        if kind == "exception":
            return self._class(content)
        if kind == "raised":
            return self._error(content)
        if kind == "library" and self.names is not None:
            module, name = content
            return functools.reduce(getattr, name.split("."), importlib.import_module(module))
        raise ValueError(f"unknown kind {kind!r}")

    # Exceptions

    def _encode_error(self, error: Exception) -> dict[str, Any]:
        if isinstance(error, FarError) and error._error:
            return {"yours": error._error[1]}
        error.__traceback__ = None  # its frames would be kept with it
        description: dict[str, Any] = {"kind": self._kind_of(type(error)), "text": _text_of(error)}
        try:
            description["args"] = self.encode(list(error.args)) if len(repr(error.args)) <= MAX_TEXT else None
        except Exception:  # its arguments are the program's, and so are their methods
            description["args"] = None
        if not _home(type(error)) or vars(error):
            description["number"] = self.number(error)
        return description

    def _kind_of(self, kind: type) -> dict[str, Any]:
        if home := _home(kind):
            return {"known": home}
        bases = [self._kind_of(base) for base in kind.__bases__ if issubclass(base, Exception)]
        return {"made": [self.number(kind), kind.__name__, bases]}

    def _class(self, description: dict[str, Any]) -> type:
        """The class here that stands for an exception class there, below the same builtin classes."""
        if "known" in description:
            key: Any = tuple(description["known"])
            if key not in self.classes:
                kind = _exception_named(*key)
                self.classes[key] = kind if kind is StopIteration else FarClass(kind.__name__, (FarError, kind), {})
            return self.classes[key]
        number, name, bases = description["made"]
        if number not in self.classes:
            kinds = tuple(dict.fromkeys(self._class(base) for base in bases)) or (FarError,)
            self.classes[number] = FarClass(name, kinds, {"_origin": (self, number)})
        return self.classes[number]

    def _error(self, description: dict[str, Any]) -> Exception:
        if "yours" in description:
            error = self.objects[description["yours"]]
            if not isinstance(error, Exception):
                raise ValueError("not an exception")
            return error
        number = description.get("number")
        if number is not None and number in self.remotes:
            return self.remotes[number]
        kind = self._class(description["kind"])
        if kind is StopIteration:
            return StopIteration()
        arguments = self.decode(description.get("args"))
        error = kind.__new__(kind, *(arguments if isinstance(arguments, list) else [str(description.get("text"))]))
        error._text = str(description.get("text"))
        if type(number) is int:
            error._error = (self, number)
            self.remotes[number] = error
        return error


def _home(value: Any) -> list[str] | None:
    """Module and name of what Python itself, or numpy, defines; both ends have it."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module not in sys.modules:
        return None
    if module.split(".")[0] not in {*sys.stdlib_module_names, "numpy"} - {TESTS}:
        return None
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return [module, name] if found is value else None


def _exception_named(module: str, name: str) -> type:
    found: Any = sys.modules.get(module) if module.split(".")[0] in sys.stdlib_module_names else None
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else Exception


def _text_of(error: Exception) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except Exception:  # the program's own `__str__`
        return ""


def change(before: Any, after: Any) -> Any:
    """Do to a value what was done to its copy, in place where it can be changed; the value."""
    if type(before) is not type(after):
        return after
    if isinstance(before, (list, collections.deque)):
        items = [change(one, other) for one, other in zip(before, after)] + list(after)[len(before) :]
        before.clear()
        before.extend(items)
    elif isinstance(before, dict):
        pairs = {key: change(before[key], one) if key in before else one for key, one in after.items()}
        before.clear()
        before.update(pairs)
    elif isinstance(before, set):
        before.clear()
        before.update(after)
    elif isinstance(before, bytearray):
        before[:] = after
    else:
        return after
    return before
