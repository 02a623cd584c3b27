"""One end of the channel between the program and its tests: what is asked of the other end, and answered to it.

An end asks (fetch an attribute, call, add, …) and waits; while it waits it answers what the other end asks, so that a
function of the tests can be called by the program. What is asked of the program is done by the program; what the
program asks of the tests is limited to what they passed to it. Objects stay where they are and are known by numbers.

Runs inside the sandbox and imports nothing of the project.
"""

import collections
import contextlib
import importlib
import operator
import os
import sys
import threading
import traceback
import types
from dataclasses import dataclass, field
from typing import Any

import values
from remote import DEEDS, FAR, OF_TESTS, Ended, Far, FarClass, FarError, far_of, remote_class, special_methods

MAX_OBJECTS = 100_000
MAX_TEXT = 1000  # of an exception
TESTS = "__main__"  # the name of the tests' own module
LIBRARIES = {*sys.stdlib_module_names, "numpy"} - {TESTS}  # both ends have them
EXIT_MEMORY = 77  # a program that ran out of memory; claiming it falsely only names a failure wrongly
BAD_REPLY = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
REFUSED = "the tests do not let a program do this with what they pass to it"


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
        """Have something done at the other end; its value, or its exception.

        What a call (of a target, with a list and a dict of arguments) did to its arguments is done to them here.
        """
        reply = self._exchange({"ask": what, "of": [self.encode(one) for one in operands]})
        changed: list[tuple[Any, Any]] = []
        try:
            if what == "call" and "arguments" in reply:
                _, arguments, named = operands
                after, after_named = self.decode(reply["arguments"])
                changed = [*zip(arguments, after), *zip(named.values(), after_named.values())]
            value = self.decode(reply["error"] if "error" in reply else reply.get("value"))
        except BAD_REPLY:
            raise self._end() from None
        for argument, one in changed:
            change(argument, one)
        if "error" not in reply:
            return value
        raise value if issubclass(type(value), Exception) else self._end()

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a question and answer the other end's until its reply comes."""
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
                reply["value"] = self._perform(what, *operands)
            except MemoryError:
                raise
            except Exception as error:
                if not isinstance(error, StopIteration) and self.names is not None:
                    traceback.print_exc()
                reply["error"] = self.refer(error)
            if operands and what == "call" and (after := self.encode(operands[1:])) != of[1:]:
                reply["arguments"] = after
        except MemoryError:
            os._exit(EXIT_MEMORY)
        except Exception as error:  # neither its text nor its type can be read
            reply = {"error": {"raised": {"kind": {"known": ["builtins", "Exception"]}, "text": type(error).__name__}}}
        self._send(reply)

    def _perform(self, what: str, *operands: Any) -> Any:
        """Do one thing; its value as JSON."""
        match what:
            case "name":
                if operands[0] not in self.names:
                    raise NameError(f"name {operands[0]!r} is not defined")
                value = self.names[operands[0]]
            case "call":
                target, arguments, named = operands
                value = target(*arguments, **named)
            case "do":
                value = DEEDS[operands[0]](*operands[1:])
            case "get":
                owner, name = operands
                value = getattr(owner, name)
                bound = isinstance(value, (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType))
                if bound and value.__self__ is owner and not isinstance(owner, types.ModuleType):
                    return {"method": [self.number(owner), name]}  # by its name, so that it needs no number
            case "set":
                value = setattr(*operands)
            case "delete":
                value = delattr(*operands)
            case "base":
                return values.encode_base(operands[0], self.refer)
            case _:
                raise ValueError(f"unknown question {what!r}")
        return self.encode(value)

    def _permit(self, what: str, of: list[Any]) -> None:
        """What the program may do to the tests: call what they passed, iterate, use instances of their classes."""
        owners = [self.objects[one["yours"][0]] for one in of if isinstance(one, dict) and "yours" in one]
        ours = bool(owners) and all(type(owner).__module__ == TESTS for owner in owners)
        if what == "call":
            allowed = isinstance(of[0], dict) and "yours" in of[0]
        elif what == "do":
            allowed = bool(owners) and (of[0] in ("iter", "next") or (ours and of[0] in OF_TESTS))
        elif what == "get":
            allowed = ours and not of[1].startswith("_")
        elif what in ("set", "delete"):  # but not in place of a method
            allowed = ours and not of[1].startswith("_") and not callable(getattr(type(owners[0]), of[1], None))
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
        if far := far_of(value):
            return {"yours": [far.number, far.method]}
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": self._kind_of(value)}
        if isinstance(value, Exception):
            return {"raised": self._describe(value)}
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
                self.remotes[number] = remote_class(name, tuple(special))(Far(self.ask, number))
            if base is not None:
                FAR(self.remotes[number]).base = self.decode(base)
            return self.remotes[number]
        if kind == "method":
            number, name = content
            return remote_class("method", ("call", "hash"))(Far(self.ask, int(number), str(name)))
        if kind == "exception":
            return self._class(content)
        if kind == "raised":
            return self._error(content)
        if kind == "library" and self.names is not None:
            module, name = content
            return operator.attrgetter(name)(importlib.import_module(module))
        raise ValueError(f"unknown kind {kind!r}")

    # Exceptions

    def _describe(self, error: Exception) -> dict[str, Any]:
        """An exception of ours as JSON: its class, text, arguments, and its number where it can be asked for more."""
        error.__traceback__ = None  # its frames would be kept with it
        description: dict[str, Any] = {"kind": self._kind_of(type(error)), "text": "", "args": None}
        with contextlib.suppress(Exception):  # the program's own `__str__`
            description["text"] = str(error)[:MAX_TEXT]
        with contextlib.suppress(Exception):  # its arguments are the program's, and so are their methods
            if len(repr(error.args)) <= MAX_TEXT:
                description["args"] = self.encode(list(error.args))
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
            module, name = description["known"]
            if (module, name) not in self.classes:
                kind = _named(module, name) if module.split(".")[0] in sys.stdlib_module_names else None
                if not isinstance(kind, type) or not issubclass(kind, Exception):
                    kind = Exception
                stands = kind if kind is StopIteration else FarClass(kind.__name__, (FarError, kind), {})
                self.classes[module, name] = stands
            return self.classes[module, name]
        number, name, bases = description["made"]
        if number not in self.classes:
            kinds = tuple(dict.fromkeys(self._class(base) for base in bases)) or (FarError,)
            self.classes[number] = FarClass(name, kinds, {"_origin": Far(self.ask, number)})
        return self.classes[number]

    def _error(self, description: dict[str, Any]) -> Exception:
        """The exception here that stands for one that `_describe` has described there."""
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
            error._error = Far(self.ask, number)
            self.remotes[number] = error
        return error


def _named(module: str, name: str) -> Any:
    """What a loaded module has under a dotted name; None where it has nothing."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _home(value: Any) -> list[str] | None:
    """Module and name of what Python itself, or numpy, defines; None for anything else."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module.split(".")[0] not in LIBRARIES:
        return None
    return [module, name] if _named(module, name) is value else None


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
