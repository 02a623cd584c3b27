"""Which config keys a job's code reads, found by following the types of the code's variables."""

import ast
import dataclasses
import importlib
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from common.jobs import JOBS

CONFIGS = [job.config for job in JOBS.values()]
ROOT = Path(__file__).resolve().parents[1]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
CHECKS = {"common/config.py", "common/jobs.py", "common/schema.py"}  # what only checks a value makes no use of it
LOADERS = ("load_config", "parse_or_help")  # of common.config: called with the job's name


class Typed(NamedTuple):
    """A value of a dataclass; `job` is the job's class where the value is known to be (a part of) such a config."""

    cls: type
    job: type | None


class Read(NamedTuple):
    job: type | None  # None: by code that takes the section of any job
    section: type
    key: str


@cache
def modules_of(script: str) -> frozenset[str]:
    """Files that a script imports, at its top or within functions, directly or through others, itself included."""
    found, todo = set(), [script]
    while todo:
        file = todo.pop()
        if file in found or not (ROOT / file).is_file():
            continue
        found.add(file)
        for node in ast.walk(tree_of(file)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                path = name.replace(".", "/")
                todo += [f"{path}.py", f"{path}/__init__.py"]
    return frozenset(found)


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def reads_of(file: str) -> frozenset[Read]:
    """Every read of a dataclass's field that the file's annotations tell of."""
    module = importlib.import_module(file.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
    reader = Reader(vars(module))
    reader.block(tree_of(file), {})
    return frozenset(reader.found)


@dataclasses.dataclass
class Reader:
    """Goes through a scope with what is known of its variables."""

    names: dict[str, Any]  # of the module
    found: set[Read] = dataclasses.field(default_factory=set)
    members: dict[str, set[Typed]] = dataclasses.field(default_factory=dict)  # self's, of the class at hand

    def block(self, scope: ast.AST, known: dict[str, set[Typed]]) -> None:
        for node in inner(scope):
            if isinstance(node, (*FUNCTION, ast.Lambda)):
                self.block(node, known | self.arguments(node))
            elif isinstance(node, ast.ClassDef):
                self.members = {}
                own = {Typed(cls, None) for cls in dataclasses_in(self.names.get(node.name))}
                for _ in range(2):  # methods may read what one below them sets
                    self.block(node, known | {"self": own})
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self.assign(target, node.value, known)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known[node.target.id] = self.annotated(node.annotation)
            elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.target, ast.Name):
                known[node.target.id] = self.types(node.iter, known)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                for value in self.types(node.value, known):
                    self.found.add(Read(value.job, value.cls, node.attr))
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                for value in self.types(node.args[0], known):
                    name = node.args[1]
                    names = [name.value] if isinstance(name, ast.Constant) else hints_of(value.cls)
                    self.found |= {Read(value.job, value.cls, one) for one in names}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                name = getattr(node.args[0], "id", "")  # that, or in another branch what it was before
                known[name] = known.get(name, set()) | self.annotated(node.args[1])

    def assign(self, target: ast.expr, value: ast.expr, known: dict[str, set[Typed]]) -> None:
        if isinstance(target, ast.Name):
            known[target.id] = self.types(value, known)
        elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
            self.members.setdefault(target.attr, set()).update(self.types(value, known))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts):
                self.assign(one, other, known)

    def arguments(self, function: ast.AST) -> dict[str, set[Typed]]:
        every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        return {one.arg: self.annotated(one.annotation) for one in every if one.annotation}

    def annotated(self, annotation: ast.expr) -> set[Typed]:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):  # in quotes
            annotation = ast.parse(annotation.value, mode="eval")
        named = (self.names.get(node.id) for node in ast.walk(annotation) if isinstance(node, ast.Name))
        return {Typed(cls, cls if cls in CONFIGS else None) for one in named for cls in dataclasses_in(one)}

    def types(self, value: ast.expr, known: dict[str, set[Typed]]) -> set[Typed]:
        if isinstance(value, ast.Name):
            return known.get(value.id, set())
        if isinstance(value, ast.Attribute):
            if getattr(value.value, "id", "") == "self" and value.attr in self.members:
                return self.members[value.attr]
            return {
                Typed(cls, one.job or (cls if cls in CONFIGS else None))
                for one in self.types(value.value, known)
                for cls in dataclasses_in(hints_of(one.cls).get(value.attr))
            }
        if isinstance(value, (ast.BoolOp, ast.IfExp)):
            parts = value.values if isinstance(value, ast.BoolOp) else (value.body, value.orelse)
            return set().union(*(self.types(part, known) for part in parts))
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            called = self.names.get(value.func.id)
            if value.func.id in LOADERS and isinstance(value.args[0], ast.Constant):
                cls = JOBS[value.args[0].value].config
                return {Typed(cls, cls)}
            if isinstance(called, types.FunctionType):
                return {Typed(cls, None) for cls in dataclasses_in(hints_of(called).get("return"))}
        return set()


def inner(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope in the order of the source; functions and classes in it, but not what is in them."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, (*FUNCTION, ast.Lambda, ast.ClassDef)):
            yield from inner(node)


@cache
def hints_of(thing: Any) -> dict[str, Any]:
    """The types of a dataclass's fields or a function's arguments; what only type checkers import is no type here."""
    absent: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(thing, localns=absent)
        except NameError as error:
            absent[error.name] = object


def dataclasses_in(hint: Any) -> Iterator[type]:
    """The dataclasses that a type names: itself, the members of a union, the entries of a list."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from dataclasses_in(part)


def sections_of(cls: type, prefix: str = "") -> dict[str, type]:
    """Every key below a job's class, dotted, and the class whose field it is."""
    found: dict[str, type] = {}
    for name, hint in ((one.name, hints_of(cls)[one.name]) for one in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hint):
            found |= sections_of(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = cls
    return found


def unread(job: type, scripts: Iterable[str]) -> list[str]:
    """Keys of the job that nothing which its scripts import reads from a config that may be the job's."""
    files = sorted({file for script in scripts for file in modules_of(script)} - CHECKS)
    reads = {read for file in files for read in reads_of(file)}

    def is_read(key: str, section: type) -> bool:
        wanted = {Read(job, section, key)} | {Read(None, cls, key) for cls in section.__mro__}
        return not reads.isdisjoint(wanted)

    return [key for key, section in sections_of(job).items() if not is_read(key.rpartition(".")[2], section)]
