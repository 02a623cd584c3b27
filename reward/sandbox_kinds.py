"""The kinds of sandbox: the command that starts each, and what is tried from inside before one is used."""

import functools
import json
import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

INSIDE = Path(__file__).with_name("inside")
PACKAGES = ("numpy", "numpy.libs", "sympy", "mpmath")  # what programs may import beside the standard library
# Tried in this order; the first whose probe runs is taken.
KINDS = {
    "namespaces": "bubblewrap: namespaces of their own",
    "landlock": "the fallback: Landlock and a filter on system calls",
    "plain": "the weakest fallback: a filter on system calls",
}
# What programs may read beside Python and its packages where they see the host's files.
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
OTHERS = ("/etc/ld.so.cache", "/usr/share/zoneinfo", "/usr/share/locale")
# What is tried from inside before a sandbox is used; a line is printed for each that was possible.
PROBE = """
import os, socket
def attempt(promise, action):
    try:
        action()
    except OSError:
        return
    print(promise)
attempt("reading files outside", lambda: open({file!r}).read())
attempt("writing files outside", lambda: open({file!r}, "a").write("x"))
attempt("network", lambda: socket.socket())
attempt("other processes", lambda: os.kill({process}, 0))
print(6 * 7)
"""
PROBED = ("reading files outside", "writing files outside", "network", "other processes")
PYTHON_OPTIONS = ("-P", "-s", "-S", "-B", "-X", "utf8")


def start_commands(kind: str) -> list[list[str]]:
    """The commands that start a server of a kind, the better first; none where bubblewrap is not installed."""
    if kind == "namespaces":
        # A container whose /proc is covered in part may make no new one, but may have the rest.
        return [_bubblewrap(own_proc) for own_proc in (True, False)] if shutil.which("bwrap") else []
    readable = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *LIBRARIES, *OTHERS}
    prefix = os.path.realpath(sys.base_prefix)
    if prefix not in ("/", "/usr", "/usr/local"):
        readable.add(os.path.join(prefix, "lib"))
    packages = {name: str(folder) for name, folder in _packages().items()}
    paths = {"readable": sorted(readable.union(packages.values())), "packages": packages}
    return [[sys.executable, *PYTHON_OPTIONS, str(INSIDE / "server.py"), kind, json.dumps(paths)]]


def _bubblewrap(own_proc: bool) -> list[str]:
    """The command around the server: Python and its libraries to read, an empty /tmp, no network, nothing else.

    Without a /proc of its own the server stays in the host's space of processes; cells have their own in any case.
    """
    command = ["bwrap", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--unshare-pid"] if own_proc else []
    if os.getuid() == 0:  # the server gives up root by itself; bwrap alone cannot and still read a Python in /root
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    command += ["--new-session", "--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = os.path.realpath(sys.base_prefix)
    if not prefix.startswith("/usr"):
        for parent in reversed(Path(prefix).parents[:-1]):  # else only root could pass through them
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", prefix, prefix]
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--tmpfs", "/tmp"]
    command += ["--proc", "/proc"] if own_proc else ["--bind", "/proc", "/proc"]
    command += ["--ro-bind", str(INSIDE), "/inside", "--perms", "0755", "--dir", "/packages"]
    for name, folder in _packages().items():
        command += ["--ro-bind", str(folder), f"/packages/{name}"]
    command += ["--remount-ro", "/", "--chdir", "/tmp", os.path.realpath(sys.executable), *PYTHON_OPTIONS]
    return [*command, "/inside/server.py", "namespaces"]


@functools.cache
def _packages() -> dict[str, Path]:
    folders = [Path(folder) for folder in site.getsitepackages()]
    return {name: folder / name for name in PACKAGES for folder in folders if (folder / name).is_dir()}
