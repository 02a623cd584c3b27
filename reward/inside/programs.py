"""What runs in a cell: the program under test (alone, or answering calls), or the tests that call it.

The tests run in a cell of their own. They hold the only descriptor on which a pass can be reported, and reach the
program through messages of plain values (`values`): the program never shares a process, a file or a descriptor with
them, so that all it can influence is which values its functions return (`remote`).

Runs inside the sandbox and imports nothing of the project.
"""

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
from peer import EXIT_MEMORY, FarError, Peer
from remote import Ended

CHANNEL, RESULT = 3, 4  # descriptors


def run_program(order: dict[str, Any]) -> None:
    """A whole program as `python program.py` would run it; ends the process."""
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    _leave(_run(order["source"], module))


def serve_functions(order: dict[str, Any]) -> None:
    """Run the program's definitions, then answer what the tests ask until they end."""
    sys.modules["__main__"] = sys.modules["program"] = module = types.ModuleType("program")
    if code := _run(order["setup"], module) or _run(order["source"], module):
        _leave(code)
    peer = Peer(CHANNEL, vars(module))
    values.send(CHANNEL, "ready")
    try:
        while True:
            peer.answer(peer.receive())
    except Ended:
        _leave(0)
    except BaseException:
        traceback.print_exc()
        _leave(1)


def run_tests(order: dict[str, Any]) -> None:
    """Run the tests against the program behind the channel; ends the process.

    Reports on the result descriptor: passed, failed (a test does not hold), crashed (the program raised) or ended.
    """
    peer = Peer(CHANNEL)
    try:
        verdict = _test(order, peer) if peer.receive() == "ready" else "ended"
    except FarError:
        verdict = "crashed"
    except BaseException:  # a failed assertion, or tests that cannot digest what they were given
        verdict = "failed"
        if not peer.ended:
            traceback.print_exc()
    if peer.ended:  # though a test may have caught that
        verdict = "ended"
    os.write(RESULT, verdict.encode())
    os._exit(0)


MODES = {"program": run_program, "functions": serve_functions, "tests": run_tests}


def _run(source: str, module: types.ModuleType) -> int:
    """Execute a source as a module; its exit code, as Python would give it."""
    module.__file__ = "program.py"
    sys.argv, sys.orig_argv = ["program.py"], ["python", "program.py"]
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), vars(module))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF  # what was defined before can still be called
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


def _test(order: dict[str, Any], peer: Peer) -> str:
    """Run the tests, which raise where they do not hold; passed, or failed where they asked the program nothing."""
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    sys.argv = ["program.py"]
    names = vars(module)
    names["__builtins__"] = Names(peer, order["modules"])
    if any("unittest" in source for source in (order["setup"], *order["tests"])):
        _look_at_results()
    exec(compile(order["setup"], "setup", "exec", dont_inherit=True), names)
    names |= {name: peer.ask("name", name) for name in order["shadowing"]}
    peer.asked = 0
    for number, test in enumerate(order["tests"], 1):
        try:
            exec(compile(test, f"test {number}", "exec", dont_inherit=True), names)
        except SystemExit as end:  # how `unittest.main()` ends
            if end.code:
                raise
    return "passed" if peer.asked else "failed"


def _look_at_results() -> None:
    """A failed run of unittest's ends the tests, also where they do not look: `unittest.main(exit=False)`."""
    from unittest import TextTestRunner

    run = TextTestRunner.run

    def checked(self: Any, test: Any) -> Any:
        result = run(self, test)
        if not result.wasSuccessful():
            raise AssertionError("a test of unittest's does not hold")
        return result

    TextTestRunner.run = checked


class Names(dict):
    """Python's builtins to the tests; a name that is none, and that they do not define, is the program's."""

    def __init__(self, peer: Peer, modules: list[str]) -> None:
        super().__init__(vars(builtins))
        self.peer, self.modules = peer, modules

    def __missing__(self, name: str) -> Any:
        if name in self.modules:  # never the program's idea of `math`
            return importlib.import_module(name)
        return self.peer.ask("name", name)
