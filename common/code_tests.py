"""What the tests of a code task use and check, read from their source; nothing is run."""

import ast
import builtins
import functools
import json
import symtable
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import UserError
from common.records import Record

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
CONSTANT = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.JoinedStr, ast.Lambda)
DROPPED = (*CONSTANT, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Name)  # without effect as a statement
NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Usage:
    """What a list of tests takes from where, and whether it can fail."""

    program: tuple[str, ...]  # names that the program defines
    shadowing: tuple[str, ...]  # those among them that Python or the setup defines too
    modules: tuple[str, ...]  # of the standard library, used without an import
    problem: str  # why the tests test nothing, empty where they do


def checked_usage(record: Record, where: str) -> Usage:
    """What the tests of a task's functions use; UserError where they are no Python or test nothing."""
    tests = record["test_list"]
    if isinstance(tests, str) and _is_json_list(tests):
        raise UserError(f"{where}: `test_list` is a list written as one text; give the list itself")
    entries = (tests,) if isinstance(tests, str) else tuple(tests)
    try:
        usage = _usage(entries, record.get("setup") or "", record.get("entry_point") or "")
    except NO_PYTHON as error:
        told = " ".join(str(error).split())
        raise UserError(f"{where}: `test_list` or `setup` is not valid Python: {told:.160}") from None
    if usage.problem:
        raise UserError(f"{where}: `test_list` {usage.problem}; every program would pass")
    return usage


def check_input_output(record: Record, where: str) -> None:
    """UserError for inputs and outputs of whole programs that test nothing."""
    given, wanted = record["test_input"], record["test_output"]
    if isinstance(given, str) and isinstance(wanted, str) and _is_json_list(given) and _is_json_list(wanted):
        raise UserError(
            f"{where}: `test_input` and `test_output` are lists written as one text; give the lists themselves "
            "(a single text that looks like a list: as a list of one)"
        )
    if not "".join([wanted] if isinstance(wanted, str) else wanted).strip():
        raise UserError(f"{where}: `test_output` is empty everywhere; a program that prints nothing would pass")


def _is_json_list(text: str) -> bool:
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(one, str) for one in found)


@functools.lru_cache(maxsize=1024)
def _usage(tests: tuple[str, ...], setup: str, entry_point: str) -> Usage:
    """What these tests use, a problem among it; one of NO_PYTHON where they cannot be read."""
    with warnings.catch_warnings(action="ignore"):
        trees = [ast.parse(test) for test in tests]
        before = ast.parse(setup)
        scopes = [symtable.symtable(source, "tests", "exec") for source in (*tests, setup)]
    defined = {name for scope in scopes for name in _global_names(scope, defined=True)}
    used = dict.fromkeys(name for scope in scopes[:-1] for name in _global_names(scope, defined=False))
    free = [name for name in used if name not in defined and not hasattr(builtins, name)]
    # A module of the standard library is only looked into (`math.pi`), never called.
    nodes = [node for tree in trees for node in ast.walk(tree)]
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    bare = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in owners}
    modules = tuple(name for name in free if name in sys.stdlib_module_names - bare - {entry_point})
    program = [name for name in free if name not in modules]
    live = list(_live(trees, before))
    shadowing = [entry_point] if entry_point else []
    if not program and not entry_point:
        called = [node.func for node in live if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        called.sort(key=lambda name: (name.lineno, name.col_offset))
        shadowing = [name.id for name in called if name.id not in defined][:1]  # as `assert sum(10, 15) == 6`
    program += [name for name in shadowing if name not in program]
    problem = _problem(trees, live, set(program))
    return Usage(tuple(program), tuple(shadowing), modules, problem)


def _problem(trees: list[ast.Module], live: list[ast.AST], program: set[str]) -> str:
    for number, tree in enumerate(trees, 1):
        values = [node.value for node in tree.body if isinstance(node, ast.Expr)]
        texts = all(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in values)
        if values and len(values) == len(tree.body) and not texts and all(isinstance(one, DROPPED) for one in values):
            return f"entry {number} is a value at which nobody looks (write `assert …`)"
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert) and isinstance(node.test, ast.Tuple) and node.test.elts:
                return f"entry {number} asserts a tuple, which is always true (take away the brackets)"
    if not any(map(_can_fail, live)):
        return "has no assertion that is run (a function that only defines checks has to be called)"
    if not program & {node.id for node in live if isinstance(node, ast.Name)}:
        return "uses nothing of the program's"
    return ""


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, CONSTANT) or getattr(node.test, "value", None) is False
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name.lower().startswith(("assert", "fail", "exit", "_exit"))
    return isinstance(node, ast.Raise)


def _live(trees: list[ast.Module], before: ast.Module) -> Iterator[ast.AST]:
    """The nodes that are run: the statements of the tests, and the bodies of the functions and classes they name."""
    bodies: defaultdict[str, list[ast.AST]] = defaultdict(list)
    for tree in [*trees, before]:
        for node in ast.walk(tree):
            if isinstance(node, FUNCTION):
                bodies[node.name] += node.body
            elif isinstance(node, ast.ClassDef):
                methods = [one for child in node.body if isinstance(child, FUNCTION) for one in child.body]
                bodies[node.name] += methods
                bases = [getattr(base, "attr", None) or getattr(base, "id", "") for base in node.bases]
                if "TestCase" in bases:
                    bodies["main"] += methods  # unittest.main() finds it
    todo: list[ast.AST] = list(trees)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.Name, ast.Attribute)):
            todo += bodies.pop(node.id if isinstance(node, ast.Name) else node.attr, [])
        # The body of a function waits until it is named.
        todo += [*node.decorator_list, node.args] if isinstance(node, FUNCTION) else ast.iter_child_nodes(node)


def _global_names(scope: symtable.SymbolTable, defined: bool) -> Iterator[str]:
    """The global names that a source defines, or those that it uses, in any of its scopes."""
    top = scope.get_type() == "module"
    for symbol in scope.get_symbols():
        found = symbol.is_assigned() or symbol.is_imported() if defined else symbol.is_referenced()
        if found and (top or symbol.is_global()):
            yield symbol.get_name()
    for inner in scope.get_children():
        yield from _global_names(inner, defined)
