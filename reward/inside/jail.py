"""What shuts a process in: namespaces, mounts, limits, capabilities, and a filter on system calls.

Runs inside the sandbox and imports nothing of the project. Everything is a plain system call by ctypes, since a
second program started for each run (setpriv, prlimit, bwrap) would cost more than most runs do.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_NAMESPACES = {"mount": 0x20000, "user": 0x10000000, "pid": 0x20000000}
ANY_NAMESPACE = 0x7E020000
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
SIGKILL = 9
FOLDER_BYTES = 64 * 2**20  # what a program may write
FILES = 256

# System calls that no program under test needs. `socket` shuts off the loopback device too, which runs share, as
# the System V and message queue calls do for the ipc namespace: one of its own for each run would double the cost.
DENIED: dict[str, dict[str, int]] = {
    "x86_64": {
        **{"socket": 41, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "mount": 165},
        **{"umount2": 166, "unshare": 272, "setns": 308, "pivot_root": 155, "chroot": 161, "bpf": 321},
        **{"perf_event_open": 298, "keyctl": 250, "add_key": 248, "request_key": 249, "userfaultfd": 323},
        **{"io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431},
        **{"fsmount": 432, "fspick": 433, "mount_setattr": 442, "init_module": 175, "finit_module": 313},
        **{"kexec_load": 246, "open_by_handle_at": 304, "pidfd_getfd": 438},
        **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240},
    },
    "aarch64": {
        **{"socket": 198, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "mount": 40},
        **{"umount2": 39, "unshare": 97, "setns": 268, "pivot_root": 41, "chroot": 51, "bpf": 280},
        **{"perf_event_open": 241, "keyctl": 219, "add_key": 217, "request_key": 218, "userfaultfd": 282},
        **{"io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431},
        **{"fsmount": 432, "fspick": 433, "mount_setattr": 442, "init_module": 105, "finit_module": 273},
        **{"kexec_load": 104, "open_by_handle_at": 265, "pidfd_getfd": 438},
        **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180},
    },
}
# Without namespaces a program has its user's other processes in reach: no new processes, no signals to any.
DENIED_PLAIN: dict[str, dict[str, int]] = {
    "x86_64": {
        **{"fork": 57, "vfork": 58, "kill": 62, "setsid": 112, "setpgid": 109, "execve": 59, "execveat": 322},
        **{"rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "pidfd_open": 434},
        **{"prlimit64": 302, "setpriority": 141, "tkill": 200},
    },
    "aarch64": {
        **{"kill": 129, "setsid": 157, "setpgid": 154, "execve": 221, "execveat": 281, "tkill": 130},
        **{"rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "pidfd_open": 434},
        **{"prlimit64": 261, "setpriority": 140},
    },
}
CLONE = {"x86_64": 56, "aarch64": 220}
TGKILL = {"x86_64": 234, "aarch64": 131}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE3, CLONE_THREAD, EPERM, ENOSYS = 435, 0x10000, 1, 38


def check(result: int, what: str) -> None:
    """Raise OSError where a C call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def prctl(option: int, value: int = 0) -> None:
    check(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def enter_namespaces() -> None:
    """New user, mount and pid namespaces; the next fork is process 1 of the pid namespace."""
    user, group = os.getuid(), os.getgid()
    check(LIBC.unshare(sum(NEW_NAMESPACES.values())), "unshare")
    # The namespace of its own also gives every run its own count of processes for RLIMIT_NPROC.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_tmpfs(path: str, flags: int, options: str) -> None:
    check(LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", flags | MS_NOSUID | MS_NODEV, options.encode()), "mount")


def mount_folders() -> None:
    """An empty folder to write in at /tmp, and nothing in /proc."""
    mount_tmpfs("/tmp", 0, f"size={FOLDER_BYTES},nr_inodes=4096,mode=0700")
    mount_tmpfs("/proc", MS_RDONLY, "size=4k")


def set_limits(memory: int, processes: int | None, cpu: float) -> None:
    """Resource limits of one process; the keeper watches the sums."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(cpu) + 2,
        resource.RLIMIT_FSIZE: FOLDER_BYTES,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for what, value in limits.items():
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def drop_privileges() -> None:
    """Give up every capability for good."""
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            break  # past the last one, or there were none
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    check(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def filter_system_calls(plain: bool) -> None:
    """Refuse the system calls of DENIED, and of DENIED_PLAIN where there are no namespaces."""
    machine = platform.machine()
    if machine not in DENIED:
        return  # the other walls stand without it
    denied = [*DENIED[machine].values(), *(DENIED_PLAIN[machine].values() if plain else ())]
    program = _bpf(machine, denied, plain)
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filled = Program(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    check(LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(filled), 0, 0), "seccomp")


def _bpf(machine: str, denied: list[int], plain: bool) -> list[tuple[int, int, int, int]]:
    """The filter as (code, jump if true, jump if false, constant)."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, errno, allow = 0x80000000, 0x00050000, 0x7FFF0000
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the x32 interface has other numbers for the same calls
        (give, 0, 0, kill),
        (equal, 0, 1, CLONE3),  # its flags cannot be seen; the C library falls back to clone
        (give, 0, 0, errno | ENOSYS),
    ]
    for number in denied:
        lines += [(equal, 0, 1, number), (give, 0, 0, errno | EPERM)]
    first_argument = 16
    if plain:  # threads only, and signals to oneself only
        lines += [(equal, 0, 4, CLONE[machine]), (load, 0, 0, first_argument), (any_bit, 1, 0, CLONE_THREAD)]
        lines += [(give, 0, 0, errno | EPERM), (give, 0, 0, allow)]
        lines += [(equal, 0, 4, TGKILL[machine]), (load, 0, 0, first_argument), (equal, 1, 0, os.getpid())]
        lines += [(give, 0, 0, errno | EPERM), (give, 0, 0, allow)]
    else:
        lines += [(equal, 0, 3, CLONE[machine]), (load, 0, 0, first_argument), (any_bit, 0, 1, ANY_NAMESPACE)]
        lines += [(give, 0, 0, errno | EPERM)]
    return [*lines, (give, 0, 0, allow)]
