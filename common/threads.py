"""Threads on the processor: as many as a network is worth and the machine has free, which wait without spinning.

Threads that spin while they wait are quick alone, and hundreds of times slower than one thread where another program
wants the same core: the one that all wait for is not running, because the others spin.
"""

import functools
import math
import os
from pathlib import Path

# What a user may have set, of GNU's and Intel's OpenMP; then nothing is set here.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PARAMETERS_PER_THREAD = 1_000_000  # below this a second thread costs more in waiting than it works
LOOK = 0.2  # seconds over which it is seen how busy the machine is


def wait_passively() -> None:
    """Have waiting threads sleep, here and in the programs started from here. Before torch is imported."""
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def settle_threads(parameters: int) -> None:
    """Give torch the threads that a network of that size is worth here, said where that changes their number.

    A number that the user or a launcher chose (OMP_NUM_THREADS) stays.
    """
    if any(os.environ.get(name) for name in NUMBER):
        return
    import torch  # which must not be imported before wait_passively

    from common.runtime import console

    free, ranks = free_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    number = number_for(parameters, free // ranks)
    if number != torch.get_num_threads():
        torch.set_num_threads(number)
        console.print(
            f"threads: {number}, for a network of {parameters / 1e6:.1f} M parameters where {free} of {cores()} cores "
            "are free; OMP_NUM_THREADS sets another number"
        )


def number_for(parameters: int, free: int) -> int:
    """How many threads a network of that size gets where so many cores are free."""
    return max(1, min(free, math.ceil(parameters / PARAMETERS_PER_THREAD)))


def cores() -> int:
    """Processor cores that this process may use, by its affinity and its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, quota())))


def quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that the container may take, infinite where nothing bounds it; cgroup version 2, then 1."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        if all((root / file).is_file() for file in files):
            words = " ".join((root / file).read_text() for file in files).split()
            if words[0] not in ("max", "-1"):
                return int(words[0]) / int(words[1])
    return math.inf


@functools.cache
def free_cores() -> int:
    """Cores that nobody used over a short while in which this process waited; at least 1. Looked at once."""
    import psutil

    busy = psutil.cpu_percent(interval=LOOK, percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    idle = sum(1 - busy[core] / 100 for core in mine if core < len(busy))
    return max(1, min(cores(), round(idle)))
