"""What stands in for namespaces where there are none: an account of no one's, Landlock, and modules by name.

Runs inside the sandbox and imports nothing of the project.
"""

import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any

import jail
import landlock

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")  # as bubblewrap's /dev
MAX_FILES = 4096  # that one run may have at a time, as in the folder that a namespace has


@dataclass(frozen=True)
class Fallback:
    """How cells are shut in where they have no namespaces of their own."""

    readable: list[str]  # files and folders that programs need: Python, its packages, shared libraries
    landlock: int  # the kernel's version; 0 where programs are to run without
    nobody: bool  # whether cells give up their user


@dataclass(frozen=True)
class Packages:
    """Finds packages by name for `import`, so that the folder that holds them and all others need not be readable."""

    folders: dict[str, str]

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The package's own __init__.py; None for all that was not named."""
        if fullname not in self.folders:
            return None
        folder = self.folders[fullname]
        start = os.path.join(folder, "__init__.py")
        return importlib.util.spec_from_file_location(fullname, start, submodule_search_locations=[folder])


def prepare(kind: str, paths_json: str) -> Fallback:
    """Make the server itself ready. `paths_json` has the `readable` paths, and the folders of `packages`.

    Raises OSError where the kind is landlock and the kernel is not able.
    """
    paths = json.loads(paths_json)
    version = landlock.version() if kind == "landlock" else 0
    jail.prctl(jail.PR_SET_DUMPABLE, 0)  # no cell looks into the memory of another, or of this process
    sys.meta_path.append(Packages(paths["packages"]))
    needed = [os.__file__, *(os.path.join(folder, "__init__.py") for folder in paths["packages"].values())]
    return Fallback(paths["readable"], version, os.getuid() == 0 and _nobody_can_read(needed))


def become_nobody() -> None:
    """Give up the user; only root can."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def make_folder(fallback: Fallback) -> str:
    """A folder on the disk for one cell."""
    folder = tempfile.mkdtemp(prefix="cell-")
    if fallback.nobody:
        os.chown(folder, NOBODY, NOBODY)
    return folder


def is_overfull(folder: str) -> bool:
    """Whether a cell keeps more in its folder than it may."""
    files = total = 0
    for here, folders, names in os.walk(folder):
        files += len(folders) + len(names)
        for name in names[:MAX_FILES]:
            try:
                total += os.lstat(os.path.join(here, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # removed while we looked
        if files > MAX_FILES or total > jail.FOLDER_BYTES:
            return True
    return False


def shut_in(fallback: Fallback, folder: str, limits: dict[str, Any]) -> None:
    """Give up what the cell's process could do outside its folder, for good."""
    ruleset = None
    if fallback.landlock:
        ruleset = landlock.make_ruleset(fallback.landlock, fallback.readable, (folder, *DEVICES))
    if fallback.nobody:
        become_nobody()
    jail.set_limits(limits["memory"], None, limits["seconds"])
    jail.drop_privileges()
    if ruleset is not None:
        landlock.restrict(ruleset)
    jail.filter_system_calls("read-only" if ruleset is None else "folder")


def _nobody_can_read(paths: list[str]) -> bool:
    """Whether a process that gives up root can still read Python: one in /root is out of its reach."""
    folder = tempfile.mkdtemp(prefix="cell-")
    child = os.fork()
    if child == 0:
        try:
            os.chown(folder, NOBODY, NOBODY)
            become_nobody()
            able = all(os.access(path, os.R_OK) for path in paths)
        except OSError:  # a container without the right to change the user
            able = False
        os._exit(0 if able else 1)
    _, status = os.waitpid(child, 0)
    os.rmdir(folder)
    return status == 0
