"""The shape of the code: imports go one way, tests assert something and do not lean on private names."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from shipped import shipped

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "train", "rollout", "serving", "sample", "reward", "data", "models", "common")
# Whom a package may import besides itself. The entry scripts may import all of them.
ALLOWED = {
    "common": set(),
    "models": {"common"},
    "sample": {"models", "common"},
    "serving": {"sample", "models", "common"},
    "reward": {"common"},
    "data": {"common"},
    "rollout": {"sample", "reward", "data", "models", "common"},
    "train": {"rollout", "sample", "reward", "data", "models", "common"},
    "launch": {"train", "rollout", "sample", "reward", "data", "models", "common"},
    "benchmarks": set(PACKAGES),
}
# by name: docs ask users to put modules of their own beside them
ENTRY_SCRIPTS = [ROOT / f"{name}.py" for name in ("eval", "generate", "multinode_eval", "multinode_rl", "rl", "serve")]
PRODUCT = [*ENTRY_SCRIPTS, *(path for name in ALLOWED for path in shipped(name, "**/*.py"))]
TESTS = shipped("tests", "*.py")
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of imported modules, wherever in the file they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            yield node.module or ""


def wrong_imports(package: str, tree: ast.AST) -> set[str]:
    """The project's packages and scripts that a file of `package` imports and must not."""
    scripts = {path.stem for path in ENTRY_SCRIPTS}
    ours = {name.split(".")[0] for name in imported(tree)} & {*ALLOWED, *scripts, "tests"}
    return ours - ALLOWED[package] - {package}


def asserts_something(test: ast.AST, helpers: set[str]) -> bool:
    """Whether a test has an assert, a pytest.raises, a call named assert_…, or calls a helper that has."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called.startswith("assert_") or called in ("raises", "fail") or called in helpers:
                return True
    return False


# `python -m package` and the doctor are entry scripts that happen to lie in a package
@pytest.mark.parametrize(
    "path",
    [path for path in PRODUCT if path.parent != ROOT and path.name not in ("__main__.py", "doctor.py")],
    ids=name_of,
)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert not wrong_imports(package, parse(path))


def test_the_rule_of_imports_can_fail() -> None:
    assert wrong_imports("sample", ast.parse("def f():\n    from reward.score import make_scorer")) == {"reward"}
    assert wrong_imports("common", ast.parse("import models, torch, common.errors, eval")) == {"models", "eval"}
    assert wrong_imports("reward", ast.parse("import models.sdar")) == {"models"}
    assert not wrong_imports("train", ast.parse("from sample.draw import token_logp"))


def test_the_page_on_architecture_has_the_rule_of_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| folder | may import |")[2].partition("\n\n")[0]
    written = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", table, re.MULTILINE))
    expected = {room: rooms for room, rooms in ALLOWED.items() if room != "benchmarks"}
    assert {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in written.items()} == expected


def test_all_packages_and_scripts_are_looked_at() -> None:
    names = {name_of(path) for path in PRODUCT}
    assert {"rl.py", "eval.py", "generate.py", "train/views.py", "common/config.py", "sample/engine.py"} <= names
    roots = {name.split(".")[0] for path in PRODUCT for name in imported(parse(path))}
    assert {name for name in roots if (ROOT / name).is_dir()} <= set(ALLOWED)
    assert {name for name in roots if (ROOT / f"{name}.py").is_file()} <= {path.stem for path in ENTRY_SCRIPTS}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> dict[int, str]:
    """Line → what a test takes of the project's insides there: an imported `_name`, `module._name`, or its patch."""
    tree, found = ast.parse(source), {}
    ours = {*ALLOWED, *(path.stem for path in ENTRY_SCRIPTS)}
    modules = set()  # names in this file that may stand for modules of the project
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(one.asname or one.name).split(".")[0] for one in node.names if one.name.split(".")[0] in ours}
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ours:
            modules |= {one.asname or one.name for one in node.names}
            found |= {one.lineno: one.name for one in node.names if private(one.name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            path = ast.unparse(node.value)
            if path.split(".")[0] in modules and re.fullmatch(r"[a-z_.]+", path):
                found[node.lineno] = f"{path}.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            for argument in node.args[:2]:  # monkeypatch.setattr(module, "_name", …) or ("module._name", …)
                if isinstance(argument, ast.Constant) and private(str(argument.value).rpartition(".")[2]):
                    found[node.lineno] = str(argument.value)
    return found


def comments(source: str) -> set[int]:
    """The lines that end in a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_a_private_name_in_a_test_has_its_reason_beside_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    explained = comments(source)
    assert not {line: name for line, name in private_names(source).items() if line not in explained}


def test_the_rule_of_private_names_can_fail() -> None:
    imports = "import eval, models.original\nfrom data import tasks as t\nfrom sample.draw import _hash\n"
    uses = 'models.original._f()\nt._g = 1\nm.setattr(eval, "_a", 1)\nm.setattr("data.tasks._b", 1)'
    found = {3: "_hash", 4: "models.original._f", 5: "t._g", 6: "_a", 7: "data.tasks._b"}
    assert private_names(imports + uses) == found
    assert not private_names("import os, models\nos._exit(3)\nmodel.config._attn = 1\nmodels.__name__")
    assert comments('x = "# no"\ny = 1  # yes\n') == {2}


@pytest.mark.parametrize("path", [*PRODUCT, *TESTS], ids=name_of)
def test_no_bare_except(path: Path) -> None:
    handlers = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)


@pytest.mark.parametrize("path", [path for path in TESTS if path.name.startswith("test_")], ids=name_of)
def test_every_test_asserts(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, FUNCTION)]
    helpers: set[str] = set()
    for _ in range(3):  # helpers that call helpers
        helpers |= {node.name for node in functions if asserts_something(node, helpers)}
    tests = [node.name for node in functions if node.name.startswith("test_")]
    assert tests and set(tests) <= helpers, set(tests) - helpers
    empty = ast.parse("def test_nothing():\n    f()").body[0]
    assert not asserts_something(empty, helpers={"g"})


def test_every_test_has_its_own_name() -> None:
    """A second function of the same name would silently replace the first."""
    for path in TESTS:
        names = [node.name for node in parse(path).body if isinstance(node, FUNCTION)]
        assert len(names) == len(set(names)), path


# what those outside sample/ may call: docs/engine.md lists it
ENGINES_DOOR = {"generate", "set_up", "add", "take_from", "cancel", "step", "progress", "finished", "busy"}
ENGINES_DOOR |= {"allow", "paused", "suspend", "go_on"}
ENGINES_DOOR |= {"longest_prompt", "load_weights", "sleep", "wake", "tensor_group"}
BEHIND_THE_DOOR = {"Slots", "Sequence", "Watch", "Room", "Step", "Network", "KeyValueCache", "Graphs"}


def behind_the_door(tree: ast.AST) -> set[str]:
    """What a file takes of an `engine`, or of the sampler's files, that is not for those outside."""
    found = set()
    for node in ast.walk(tree):
        holder = getattr(node, "value", None)
        if isinstance(node, ast.Attribute) and "engine" in (getattr(holder, "attr", ""), getattr(holder, "id", "")):
            found |= {node.attr} - ENGINES_DOOR
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sample"):
            found |= {alias.name for alias in node.names} & BEHIND_THE_DOOR
    return found


OUTSIDE = [path for path in PRODUCT if path.relative_to(ROOT).parts[0] not in ("sample", "benchmarks")]


@pytest.mark.parametrize("path", OUTSIDE, ids=name_of)
def test_the_engine_is_used_through_its_door(path: Path) -> None:
    """Benchmarks may measure what is inside."""
    assert not behind_the_door(parse(path))


def test_the_rule_of_the_engines_door_can_fail() -> None:
    assert behind_the_door(ast.parse("self.engine.slots.finished[0] = True")) == {"slots"}
    assert behind_the_door(ast.parse("def f(run):\n    run.loop.engine.queue = engine.active")) == {"queue", "active"}
    assert behind_the_door(ast.parse("from sample.slots import Sequence, Progress")) == {"Sequence"}
    assert not behind_the_door(ast.parse("for done in self.engine.finished():\n    engine.cancel(done.id)"))
    assert ROOT / "serving" / "loop.py" in OUTSIDE and ROOT / "launch" / "evaluation.py" in OUTSIDE
