"""What shuts a process in: namespaces, mounts, limits, capabilities, and a filter on system calls.

Runs inside the sandbox and imports nothing of the project. Everything is a plain system call by ctypes, since a
second program started for each run (setpriv, prlimit, bwrap) would cost more than most runs do.
"""

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Iterable

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_NAMESPACES = 0x20000 | 0x10000000 | 0x20000000  # mount, user, pid
ANY_NAMESPACE = 0x7E020000
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
FOLDER_BYTES = 64 * 2**20  # what a program may write
FILES = 256


def _calls(table: str) -> dict[str, dict[str, int]]:
    """Machine → name → number of system calls; of each the name, x86-64's number and aarch64's, - for none."""
    rows = [row.split() for row in table.split(",")]
    return {
        machine: {row[0]: int(row[column]) for row in rows if row[column] != "-"}
        for column, machine in enumerate(("x86_64", "aarch64"), 1)
    }


# System calls that no program under test needs. `socket` shuts off the loopback device too, which runs share, as
# the System V and message queue calls do for the ipc namespace: one of its own for each run would double the cost.
DENIED = _calls("""
socket 41 198, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, mount 165 40, umount2 166 39,
unshare 272 97, setns 308 268, pivot_root 155 41, chroot 161 51, bpf 321 280, perf_event_open 298 241,
keyctl 250 219, add_key 248 217, request_key 249 218, userfaultfd 323 282, io_uring_setup 425 425, open_tree 428 428,
move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442,
init_module 175 105, finit_module 313 273, kexec_load 246 104, open_by_handle_at 304 265, pidfd_getfd 438 438,
shmget 29 194, semget 64 190, msgget 68 186, mq_open 240 180
""")
# Without namespaces a program has its user's other processes in reach: no new processes, no signals to any, no say in
# when and where they run. Landlock knows nothing of a file's owner, times and attributes.
DENIED_FALLBACK = _calls("""
fork 57 -, vfork 58 -, kill 62 129, setsid 112 157, setpgid 109 154, execve 59 221, execveat 322 281,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434, prlimit64 302 261,
setpriority 141 140, tkill 200 130, sched_setparam 142 118, sched_setscheduler 144 119, sched_setaffinity 203 122,
sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239, kcmp 312 272,
process_madvise 440 440, process_mrelease 448 448, get_robust_list 274 100, chown 92 -, fchown 93 55, lchown 94 -,
fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15,
fremovexattr 199 16, truncate 76 45, inotify_add_watch 254 27, fanotify_init 300 262, openat2 437 437
""")
# Answered as if done: the mode and the times of a copied file mean nothing to a run, and shutil.copy needs them.
IGNORED = _calls("""
chmod 90 -, fchmod 91 52, fchmodat 268 53, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88
""")
# Without Landlock too, nothing can tell a program's own folder from others: it changes none.
DENIED_READ_ONLY = _calls("""
creat 85 -, mkdir 83 -, mkdirat 258 34, mknod 133 -, mknodat 259 33, rmdir 84 -, unlink 87 -, unlinkat 263 35,
symlink 88 -, symlinkat 266 36, link 86 -, linkat 265 37, rename 82 -, renameat 264 38, renameat2 316 276
""")
# Allowed or refused by what one of their arguments is.
JUDGED = _calls("clone 56 220, tgkill 234 131, fcntl 72 25, ioctl 16 29, open 2 -, openat 257 56")
O_ACCESS, O_CREATE, O_TRUNCATE = 0o3, 0o100, 0o1000
# F_SETOWN, F_SETSIG, F_SETOWN_EX: any signal, by way of a descriptor; F_SETLEASE, F_NOTIFY: files of the user's.
FCNTL_DENIED = (8, 10, 15, 1024, 1026)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what Python itself asks of any descriptor.
IOCTL_ALLOWED = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
FIRST_UNKNOWN = 449  # later calls are the same on all machines and needed by nothing; some change files
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE3, CLONE_THREAD, EPERM, ENOSYS = 435, 0x10000, 1, 38
# The filter's language: (code, lines to skip if true, if false, constant).
Line = tuple[int, int, int, int]
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, GIVE = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
KILL, ERROR = 0x80000000, 0x00050000
REFUSE, ALLOW = (GIVE, 0, 0, ERROR | EPERM), (GIVE, 0, 0, 0x7FFF0000)


def check(result: int, what: str) -> int:
    """What a C call returned; OSError where it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0) -> None:
    check(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def enter_namespaces() -> None:
    """New user, mount and pid namespaces; the next fork is process 1 of the pid namespace."""
    user, group = os.getuid(), os.getgid()
    check(LIBC.unshare(NEW_NAMESPACES), "unshare")
    # The namespace of its own also gives every run its own count of processes for RLIMIT_NPROC.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_folders() -> None:
    """An empty folder to write in at /tmp, and nothing in /proc."""
    flags, options = MS_NOSUID | MS_NODEV, f"size={FOLDER_BYTES},nr_inodes=4096,mode=0700"
    check(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", flags, options.encode()), "mount")
    check(LIBC.mount(b"tmpfs", b"/proc", b"tmpfs", flags | MS_RDONLY, b"size=4k"), "mount")


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


def filter_system_calls(kind: str) -> None:
    """Refuse the system calls that no program needs. The kind says what else is there to keep it in.

    `namespaces`: these. `folder`: Landlock. `read-only`: nothing, so that programs change no file at all. Raises
    OSError where there is no list for this machine and no namespaces either.
    """
    machine = platform.machine()
    if machine not in DENIED:
        if kind == "namespaces":
            return  # the other walls stand without it
        raise OSError(f"there is no filter of system calls for {machine}")
    lines = _bpf(machine, kind)
    filled = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HP", len(lines), ctypes.addressof(filled))
    check(LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp")


def _bpf(machine: str, kind: str) -> list[Line]:
    """The filter of one kind."""
    judged = JUDGED[machine]
    lines = [
        (LOAD, 0, 0, 4),
        (EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (GIVE, 0, 0, KILL),
        (LOAD, 0, 0, 0),
        (AT_LEAST, 0, 1, 0x40000000),  # the x32 interface has other numbers for the same calls
        (GIVE, 0, 0, KILL),
    ]
    lines += _answer(ERROR | ENOSYS, [CLONE3])  # its flags cannot be seen; the C library falls back to clone
    lines += _answer(ERROR | EPERM, DENIED[machine].values())
    if kind == "namespaces":
        lines += _on_argument(judged["clone"], 0, [(ANY_BIT, 0, 1, ANY_NAMESPACE), REFUSE])
        return [*lines, ALLOW]
    lines += [(AT_LEAST, 0, 1, FIRST_UNKNOWN), (GIVE, 0, 0, ERROR | ENOSYS)]
    lines += _answer(ERROR | EPERM, DENIED_FALLBACK[machine].values())
    lines += _answer(ERROR, IGNORED[machine].values())
    lines += _on_argument(judged["clone"], 0, [(ANY_BIT, 1, 0, CLONE_THREAD), REFUSE])  # threads only
    lines += _on_argument(judged["tgkill"], 0, [(EQUAL, 1, 0, os.getpid()), REFUSE])  # signals to oneself only
    commands = [line for command in FCNTL_DENIED for line in ((EQUAL, 0, 1, command), REFUSE)]
    lines += _on_argument(judged["fcntl"], 1, commands)
    commands = [line for command in IOCTL_ALLOWED for line in ((EQUAL, 0, 1, command), ALLOW)]
    lines += _on_argument(judged["ioctl"], 1, [*commands, REFUSE])
    if kind == "read-only":
        lines += _answer(ERROR | EPERM, DENIED_READ_ONLY[machine].values())
        opening = [(ANY_BIT, 0, 1, O_ACCESS | O_CREATE | O_TRUNCATE), REFUSE]
    else:  # before its version 3, Landlock lets a file be emptied that is opened to be read
        opening = [(ANY_BIT, 0, 3, O_TRUNCATE), (AND, 0, 0, O_ACCESS), (EQUAL, 0, 1, os.O_RDONLY), REFUSE]
    for name, flags in (("open", 1), ("openat", 2)):
        if name in judged:
            lines += _on_argument(judged[name], flags, opening)
    return [*lines, ALLOW]


def _answer(answer: int, numbers: Iterable[int]) -> list[Line]:
    """Give one answer to some calls."""
    return [line for number in numbers for line in ((EQUAL, 0, 1, number), (GIVE, 0, 0, answer))]


def _on_argument(number: int, argument: int, lines: list[Line]) -> list[Line]:
    """Judge one call by the low half of one of its arguments; what `lines` do not answer is allowed."""
    lines = [(LOAD, 0, 0, 16 + 8 * argument), *lines, ALLOW]
    return [(EQUAL, 0, len(lines), number), *lines]
