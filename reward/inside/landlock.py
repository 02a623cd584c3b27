"""Landlock, by which a process without any right forbids itself all files but a few, for good. Linux 5.13 and later.

Runs inside the sandbox and imports nothing of the project. What is forbidden grows with the kernel's version of it;
what an old version cannot forbid, the filter on system calls in jail.py does. See man 7 landlock.
"""

import ctypes
import os
import struct
from collections.abc import Iterable

from jail import LIBC, check

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all machines
ASK_VERSION, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
READ = READ_FILE | READ_DIR
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # a rule on what is no folder may name only these
# Rights over files are numbered from 0; how many of them each version knows.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
NETWORK_SINCE, NETWORK = 4, 0b11  # TCP's bind and connect
SCOPE_SINCE, SCOPE = 6, 0b11  # abstract unix sockets and signals, to processes outside


def version() -> int:
    """The kernel's version of Landlock; OSError where it has none, or where a container forbids it."""
    found = LIBC.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(ASK_VERSION))
    if found < 1:
        raise OSError(ctypes.get_errno(), "this kernel has no Landlock, or it is not allowed here")
    return found


def file_rights(abi: int) -> int:
    """Every right over files that a version knows, as bits."""
    return (1 << max(count for since, count in FILE_RIGHTS.items() if since <= abi)) - 1


def ruleset_fields(abi: int) -> bytes:
    """What a ruleset forbids unless a rule allows it: all that the version can."""
    fields = [file_rights(abi)]
    if abi >= NETWORK_SINCE:
        fields.append(NETWORK)
    if abi >= SCOPE_SINCE:
        fields.append(SCOPE)
    return struct.pack(f"={len(fields)}Q", *fields)


def make_ruleset(abi: int, readable: Iterable[str], writable: Iterable[str]) -> int:
    """A ruleset's descriptor: nothing is allowed but to read and list `readable`, and everything below `writable`.

    Paths that do not exist are left out.
    """
    fields = ruleset_fields(abi)
    size, no_flags = ctypes.c_size_t(len(fields)), ctypes.c_uint32(0)
    ruleset = check(LIBC.syscall(CREATE_RULESET, fields, size, no_flags), "Landlock")
    for rights, paths in ((READ, readable), (file_rights(abi), writable)):
        for path in filter(os.path.exists, paths):
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & OF_FILES, beneath)
            check(LIBC.syscall(ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(PATH_BENEATH), rule, no_flags), "Landlock")
            os.close(beneath)
    return ruleset


def restrict(ruleset: int) -> None:
    """Put this process under a ruleset for good, and close its descriptor; needs PR_SET_NO_NEW_PRIVS."""
    check(LIBC.syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)), "Landlock")
    os.close(ruleset)
