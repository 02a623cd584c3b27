"""The sandbox without bubblewrap: which fallback is taken and why, what it says, what programs can do in it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.sandbox_attacks import SOLUTIONS, TASKS
from common import doctor
from common.errors import UserError
from reward import sandbox as sandbox_module
from reward.code_reward import run_tests
from reward.sandbox import Cell, Limits, Outcome, Sandbox
from reward.sandbox_kinds import INSIDE, KINDS

ROOT = Path(__file__).resolve().parents[1]
SYSTEM_PYTHON = "/usr/bin/python3"  # unlike one in a home folder, every user can read it
USER = ("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups")
NO_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")  # as a container without any
FILES = """
import argparse, os, shutil, tempfile
open("a", "w").write("xyz")
shutil.copy("a", "b")
os.mkdir("d")
shutil.move("b", "d/c")
with tempfile.TemporaryDirectory() as folder:
    open(folder + "/x", "w").write("x")
open("a", "r+").truncate(1)
print(os.listdir("d"), open("a").read(), open("/dev/null", "w").write("x"))
"""


def inside(source: str, *arguments: str) -> str:
    """What a script prints that imports the sandbox's own modules, in a process of its own."""
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, cwd=INSIDE, capture_output=True, text=True, check=True).stdout


def versions() -> range:
    """The versions of Landlock that this kernel can stand for."""
    source = "import landlock\ntry: print(landlock.version())\nexcept OSError: print(0)"
    return range(1, int(inside(source)) + 1)


needs_landlock = pytest.mark.skipif(not versions(), reason="this kernel has no Landlock")


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """One that finds no bubblewrap."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    made = Sandbox()
    yield made
    made.close()


@pytest.fixture(params=["landlock", "plain"])
def kind(request: pytest.FixtureRequest, sandbox: Sandbox) -> str:
    """One fallback after the other."""
    if request.param == "landlock" and not versions():
        pytest.skip("this kernel has no Landlock")
    sandbox.kinds = [request.param]
    return request.param


def run(sandbox: Sandbox, source: str) -> Outcome:
    return sandbox.run(Cell("program", {"source": source}, Limits(seconds=5)))[0]


@needs_landlock
def test_it_says_once_what_holds_and_why(sandbox, capfd):
    assert sandbox.kind() == "landlock"
    sandbox.close()
    assert sandbox.kind() == "landlock"
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "bubblewrap is not installed (apt-get install bubblewrap)" in told
    assert "Shut off: reading files outside, writing files outside, network, other processes." in told
    assert "Limited: memory, time, output" in told and "Not shut off" not in told


def test_what_does_not_hold_is_said(kind, sandbox, capfd):
    sandbox.kind()
    told = capfd.readouterr().err
    assert ("Not shut off: reading files outside" in told) == (kind == "plain")
    assert ("can write no file" in told) == (kind == "plain")


def refuse(monkeypatch: pytest.MonkeyPatch, reason: str, *kinds: str) -> None:
    """Have the servers of some kinds end with a reason instead of starting."""
    start = sandbox_module.start_commands

    def commands(kind: str) -> list[list[str]]:
        return [["sh", "-c", f"echo {reason} >&2; exit 1"]] if kind in kinds else start(kind)

    monkeypatch.setattr(sandbox_module, "start_commands", commands)


def test_without_landlock_the_next_kind_is_taken_and_the_reason_given(sandbox, monkeypatch):
    refuse(monkeypatch, "this kernel has no Landlock", "landlock")
    kind, told = sandbox.report()
    assert kind == "plain" and "bubblewrap is not installed" in told and "this kernel has no Landlock" in told


def test_where_none_can_start_the_first_run_says_so_and_later_ones_are_no_wrong_answers(sandbox, monkeypatch):
    used = Sandbox(["plain"])
    assert run_tests(SOLUTIONS["stdio"], TASKS["stdio"], sandbox=used) == "passed"
    used.close()
    refuse(monkeypatch, "no room", "landlock", "plain")
    with pytest.raises(UserError, match=r"no sandbox can start here: bubblewrap is not installed.*landlock: no room"):
        run_tests(SOLUTIONS["stdio"], TASKS["stdio"], sandbox=sandbox)
    assert run_tests(SOLUTIONS["stdio"], TASKS["stdio"], sandbox=used) == "infrastructure"


def test_the_doctor_says_the_same(kind, sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_module, "SANDBOX", sandbox)
    (row,) = [row for row in doctor.main_report() if row["what"] == "sandbox"]
    assert (row["found"], row["note"]) == sandbox.report()


def test_right_programs_pass(kind, sandbox):
    for method, program in SOLUTIONS.items():
        assert run_tests(program, TASKS[method], sandbox=sandbox) == "passed"
    assert (
        run(sandbox, "import numpy, sympy, xml.etree.ElementTree\nprint(sympy.sqrt(4) + numpy.ones(1)[0])").stdout[:1]
        == b"3"
    )
    assert b"ModuleNotFoundError" in run(sandbox, "import torch").stderr, "other packages are not there"


def test_programs_use_files_of_their_own_and_leave_none(kind, sandbox):
    said = run(sandbox, FILES + "print(os.getcwd())")
    if kind == "plain":
        assert b"PermissionError" in said.stderr
        return
    told, folder = said.stdout.decode().splitlines()
    assert told == "['c'] x 1" and Path(folder).name.startswith("cell-") and not Path(folder).exists()


BIG = "for n in range(5):\n    os.mkdir(str(n))\n    open(f'{n}/big', 'wb').write(bytes(20 << 20))\n"
MANY = "for n in range(4200): open(str(n), 'w').close()\n"


@needs_landlock
@pytest.mark.parametrize("fill", [BIG, MANY], ids=["big files", "many files"])
def test_a_folder_that_grows_too_large_is_the_end(fill, sandbox):
    stopped = run(sandbox, f"import os, time\n{fill}time.sleep(60)")
    assert stopped.reason == "output_limit" and stopped.wall < 10


def test_programs_start_no_other(kind, sandbox):
    source = "import os\nfor start in (os.fork, lambda: os.execv('/bin/true', ['true'])):\n"
    assert run(sandbox, source + "    try: start()\n    except PermissionError: print('no')").stdout == b"no\nno\n"


REPORT = """
import shutil, sys
from reward.sandbox import Cell, Limits, Sandbox
sandbox = Sandbox(["landlock", "plain"])
print(sandbox.report()[0])
source = "import os, argparse, decimal\\nprint(os.getuid())\\nopen('a', 'w').write('x')\\nprint(open('a').read())\\n"
source += f"for name in {sys.argv[1:]}:\\n    try: open(name)\\n    except PermissionError: print('no')"
print(sandbox.run(Cell("program", {"source": source}, Limits(5)))[0].stdout.decode())
"""


@needs_landlock
@pytest.mark.parametrize(
    ("python", "prefix", "user"),
    [(SYSTEM_PYTHON, USER, "12345"), (SYSTEM_PYTHON, (), "65534"), (sys.executable, NO_CAPABILITIES, "0")],
    ids=["a user", "root", "root without capabilities"],
)
def test_a_user_and_root_are_shut_in_alike(python, prefix, user, tmp_path):
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("only root can become another user, by setpriv")
    if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip(f"{python} is not Python 3.11")
    if prefix == USER and subprocess.run([*USER, "test", "-r", __file__]).returncode:
        pytest.skip("other users cannot read this checkout")
    (tmp_path / "mine").write_text("x")
    command = [*prefix, python, "-c", REPORT, "/etc/passwd", str(tmp_path / "mine"), "/proc/version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["landlock", user, "x", "no", "no", "no"], done.stderr


def test_a_container_with_a_covered_proc_still_gets_namespaces():
    if os.getuid() != 0 or not all(map(shutil.which, ("bwrap", "unshare", "setpriv"))):
        pytest.skip("needs root, bubblewrap, unshare and setpriv")
    script = 'mount -t tmpfs none /proc/fs && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", *USER, SYSTEM_PYTHON, "-m", "reward.sandbox"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "mount:" in done.stderr or "unshare:" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.stdout.startswith("namespaces: ") and done.returncode == 0, done.stderr


def test_python_m_says_which_kind_this_machine_gets():
    command = [sys.executable, "-m", "reward.sandbox"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    kind, _, told = done.stdout.partition(": ")
    assert done.returncode == 0 and kind in KINDS and told.startswith(f"programs run in {KINDS[kind]}")
    assert not done.stderr


RULES = {  # version: (bytes that the kernel reads, rights over files, over the network, over other processes)
    1: (8, 13, 0, 0),
    2: (8, 14, 0, 0),
    3: (8, 15, 0, 0),
    4: (16, 15, 2, 0),
    5: (16, 16, 2, 0),
    6: (24, 16, 2, 2),
    9: (24, 16, 2, 2),
}


@pytest.mark.parametrize("abi", RULES)
def test_a_ruleset_forbids_all_that_the_kernel_knows(abi):
    source = "import landlock, struct, json, sys\nfields = landlock.ruleset_fields(int(sys.argv[1]))\n"
    source += "print(json.dumps([len(fields), *struct.unpack(f'={len(fields) // 8}Q', fields)]))"
    size, *fields = json.loads(inside(source, str(abi)))
    counts = [field.bit_count() for field in fields] + [0] * (3 - len(fields))
    assert (size, *counts) == RULES[abi]
    assert fields[0] == (1 << counts[0]) - 1


OLD = """
import fallback, jail, os, sys
import landlock
abi, library, secret, folder = int(sys.argv[1]), *sys.argv[2:]
os.chdir(folder)
rules = landlock.make_ruleset(abi, [library], [folder])
jail.drop_privileges()
landlock.restrict(rules)
jail.filter_system_calls("folder")
tries = {
    "read secret": lambda: open(secret).read(),
    "write secret": lambda: open(secret, "a"),
    "remove secret": lambda: os.unlink(secret),
    "take secret": lambda: os.rename(secret, "taken"),
    "link secret": lambda: os.link(secret, "linked"),
    "truncate secret": lambda: os.truncate(secret, 0),
    "list": lambda: os.listdir(os.path.dirname(secret)),
    "make": lambda: os.mkdir(secret + "new"),
    "read library": lambda: open(library).read(),
    "write library": lambda: open(library, "a"),
    "truncate library": lambda: os.truncate(library, 0),
    "empty library": lambda: os.open(library, os.O_RDONLY | os.O_TRUNC),
    "replace library": lambda: (open("mine", "w"), os.rename("mine", library)),
    "own": lambda: (open("own", "w").write("x"), os.rename("own", "renamed"), os.unlink("renamed")),
}
for name, attempt in tries.items():
    try:
        attempt()
    except OSError:
        continue
    print(name)
"""


@needs_landlock
@pytest.mark.parametrize("abi", versions())
def test_every_version_of_landlock_holds_the_same(abi, tmp_path):
    library, secret, folder = tmp_path / "libraries" / "library", tmp_path / "secrets" / "secret", tmp_path / "folder"
    for file in (library, secret):
        file.parent.mkdir()
        file.write_text("text")
    folder.mkdir()
    done = inside(OLD, str(abi), str(library), str(secret), str(folder)).splitlines()
    assert done == ["read library", "own"]
    assert library.read_text() == secret.read_text() == "text"
