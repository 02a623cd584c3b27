"""What runs in a cell: the program under test (alone, or answering calls), or the tests that call it.

The tests run in a cell of their own. They hold the only descriptor on which a pass can be reported, and reach the
program through messages of plain values (`values`): the program never shares a process, a file or a descriptor with
them, so that all it can influence is which values its functions return.

Runs inside the sandbox and imports nothing of the project.
"""

from __future__ import annotations

import atexit
import builtins
import importlib
import os
import sys
import threading
import traceback
import types
from typing import Any

import values

CHANNEL, RESULT = 3, 4  # descriptors
EXIT_MEMORY = 77  # a program that ran out of memory; claiming it falsely only names a failure wrongly
MAX_OBJECTS = 100_000


def run_program(order: dict[str, Any]) -> None:
    """A whole program as `python program.py` would run it; ends the process."""
    _leave(_run(order["source"], "__main__"))


def serve_functions(order: dict[str, Any]) -> None:
    """Run the program's definitions, then answer calls of its functions until the tests end."""
    module = types.ModuleType("program")
    code = _run(order["prefix"], "program", module) or _run(order["source"], "program", module)
    if code:
        _leave(code)
    objects: list[Any] = []
    values.send(CHANNEL, "ready")
    while True:
        try:
            call = values.receive(CHANNEL)
        except EOFError:
            _leave(0)
        values.send(CHANNEL, _answer(call, vars(module), objects))


def run_tests(order: dict[str, Any]) -> None:
    """Run the tests against the program behind the channel and report on the result descriptor; ends the process."""
    program = Program()
    try:
        verdict = _test(order, program)
    except ProgramEnded:
        verdict = "ended"
    except MemoryError:
        verdict = "failed"
    os.write(RESULT, verdict.encode())
    os._exit(0)


MODES = {"program": run_program, "functions": serve_functions, "tests": run_tests}


def _run(source: str, name: str, module: types.ModuleType | None = None) -> int:
    """Execute a source as a module; its exit code, as Python would give it."""
    module = module or types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), vars(module))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            # Exiting is no crash for a whole program, but it leaves no functions to call.
            return (end.code or 0) & 0xFF if name == "__main__" else 1
        print(end.code, file=sys.stderr)
        return 1
    except MemoryError:
        return EXIT_MEMORY
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> None:
    """End the process as the interpreter would, but without unwinding into the server's frames."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 1
    os._exit(code)


def _answer(call: dict[str, Any], names: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    """Call what the tests name: a function, or an attribute of an object that an earlier call returned."""

    def refer(value: Any) -> int:
        if len(objects) >= MAX_OBJECTS:
            raise TypeError("too many objects")
        objects.append(value)
        return len(objects) - 1

    try:
        target = names[call["name"]] if call["object"] is None else objects[call["object"]]
        for attribute in call["attributes"]:
            target = getattr(target, attribute)
        arguments = values.decode(call["arguments"], objects.__getitem__)
        named = values.decode(call["named"], objects.__getitem__)
        result = target(*arguments, **named)
        reply = {"value": values.encode(result, refer)}
        if result is None:  # by convention it changed its arguments in place
            reply["arguments"] = values.encode(arguments, refer)
        return reply
    except MemoryError:
        os._exit(EXIT_MEMORY)
    except Exception as error:
        known = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
        if not isinstance(error, StopIteration):
            traceback.print_exc()
        return {"error": known[0] if known else "Exception", "message": str(error)[:1000]}
    except BaseException:
        traceback.print_exc()
        _leave(1)


class ProgramEnded(BaseException):
    """The program is gone or speaks nonsense; no test may catch this."""


class FromProgram(Exception):
    """Marks an exception as raised by the program, beside its builtin type."""


class Program:
    """The far side of the channel."""

    def __init__(self) -> None:
        if self._receive() != "ready":
            raise ProgramEnded

    def _receive(self) -> Any:
        try:
            return values.receive(CHANNEL)
        except (EOFError, OSError, ValueError, RecursionError):
            raise ProgramEnded from None

    def call(self, place: tuple[Any, ...], arguments: tuple, named: dict) -> Any:
        """Call a function there; its value here, or its exception."""
        name, number, attributes = place
        message = {"name": name, "object": number, "attributes": attributes}
        message["arguments"] = values.encode(list(arguments), _number)
        message["named"] = values.encode(named, _number)
        try:
            values.send(CHANNEL, message)
        except OSError:
            raise ProgramEnded from None
        reply = self._receive()
        if not isinstance(reply, dict):
            raise ProgramEnded
        if "error" in reply:
            raise _exception(reply)
        try:
            value = values.decode(reply.get("value"), lambda number: Remote(self, None, number, ()))
            changed = values.decode(reply.get("arguments"), lambda number: Remote(self, None, number, ()))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError):
            raise ProgramEnded from None
        if value is None and isinstance(changed, list):
            for argument, after in zip(arguments, changed):
                _change(argument, after)
        return value


class Remote:
    """A function or an object of the program's. Equal to nothing but itself, whatever the program says."""

    def __init__(self, program: Program, name: str | None, number: int | None, attributes: tuple) -> None:
        self.__dict__["_place"] = (program, name, number, attributes)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        program, *place = self._place
        return program.call(tuple(place), arguments, named)

    def __getattr__(self, name: str) -> Remote:
        if name.startswith("__"):  # copying and printing look for these here
            raise AttributeError(name)
        return _attribute(self, name)

    def __iter__(self) -> Any:
        return _attribute(self, "__iter__")()

    def __next__(self) -> Any:
        return _attribute(self, "__next__")()


def _attribute(remote: Remote, name: str) -> Remote:
    program, known, number, attributes = remote._place
    return Remote(program, known, number, (*attributes, name))


def _number(value: Any) -> int:
    """The far side's number of an object of its own; our own objects do not travel."""
    if isinstance(value, Remote) and value._place[2] is not None and not value._place[3]:
        return value._place[2]
    raise TypeError(f"a {type(value).__name__} cannot be passed to the program under test")


def _exception(reply: dict[str, Any]) -> Exception:
    kind = getattr(builtins, str(reply["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = Exception
    if kind is StopIteration:
        return StopIteration()
    try:
        return type(kind.__name__, (FromProgram, kind), {})(str(reply.get("message")))
    except TypeError:  # the Unicode errors take more arguments
        return FromProgram(str(reply.get("message")))


def _change(argument: Any, after: Any) -> None:
    """What the program did to an argument, done here."""
    if type(argument) is not type(after) or argument == after:
        return
    if isinstance(argument, (list, bytearray)):
        argument[:] = after
    elif isinstance(argument, (dict, set)):
        argument.clear()
        argument.update(after)


def _test(order: dict[str, Any], program: Program) -> str:
    """passed, failed (a test does not hold) or crashed (the program raised)."""
    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(order["prefix"], "prefix", "exec", dont_inherit=True), names)
        tests = [compile(test, f"test {n}", "exec", dont_inherit=True) for n, test in enumerate(order["tests"], 1)]
        for name in _names_of_program(order, tests, names):
            if name in sys.stdlib_module_names and name != order.get("entry_point"):
                names[name] = importlib.import_module(name)  # never the program's idea of `math`
            else:
                names[name] = Remote(program, name, None, ())
        for test in tests:
            exec(test, names)
    except FromProgram:
        return "crashed"
    except ProgramEnded:
        raise
    except BaseException:  # a failed assertion, or tests that cannot digest what they were given
        traceback.print_exc()
        return "failed"
    return "passed"


def _names_of_program(order: dict[str, Any], tests: list[types.CodeType], names: dict[str, Any]) -> set[str]:
    """The names that tests use and that neither the prefix nor Python defines: those are the program's."""
    used = set().union(*(_names_in(test) for test in tests))
    found = {name for name in used if name not in names and not hasattr(builtins, name)}
    if order.get("entry_point"):
        found.add(order["entry_point"])
    elif not found and tests and tests[0].co_names:
        found.add(tests[0].co_names[0])  # as `assert sum(10, 15) == 6`, where the program's bears a builtin's name
    return found


def _names_in(code: types.CodeType) -> set[str]:
    inner = [_names_in(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)
