"""What a run stands on: console, device, dtype, threads, seeds, its folder, clocks, and its software's versions.

torch is imported where it is used, so that what only prints starts at once.
"""

import ctypes
import functools
import importlib.metadata
import itertools
import math
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.errors import UserError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
THREADS_SET = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
PARAMETERS_PER_THREAD = 1_000_000  # below this a second thread costs more in waiting than it works
MALLOC_SET = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT_BYTES = 512 << 20  # of freed memory
IDLE_WINDOW = 0.2  # seconds over which it is measured how busy the machine is
NUMERIC = ("torch", "transformers", "tokenizers", "numpy", "math-verify")  # whose versions can change a result
# one rank speaks for all; brackets in paths and errors are no markup
console = Console(stderr=False, highlight=False, markup=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")


@functools.cache
def say_once(line: str) -> None:
    """Print a line, the first time that a process has it to say."""
    console.print(line)


def device_and_dtype(dtype: str) -> "tuple[torch.device, torch.dtype]":
    """The device to run on and the dtype that `auto` or a name stands for there."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, dtype)


def settle_threads(parameters: int) -> None:
    """Give torch the threads that a network of that size is worth here, said where that changes their number.

    A number that the user or a launcher chose (OMP_NUM_THREADS) stays.
    """
    if any(os.environ.get(name) for name in THREADS_SET):
        return
    import torch

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

    busy = psutil.cpu_percent(interval=IDLE_WINDOW, percpu=True)
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    idle = sum(1 - busy[core] / 100 for core in mine if core < len(busy))
    return max(1, min(cores(), round(idle)))


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for what comes next, up to 512 MiB, where it is glibc.

    By itself it gives large pieces back at once, and the processor's network asks for them again in the next layer: the
    kernel clears every page anew. What the user set (MALLOC_TRIM_THRESHOLD_ and the like) stays.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or any(os.environ.get(name) for name in MALLOC_SET):
        return
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        library.mallopt(parameter, KEPT_BYTES)


def python_command() -> str:
    """What to type in the current folder for the interpreter that runs this: `python`, `.venv/bin/python` or a path."""
    own, found = Path(sys.executable), shutil.which("python")
    if found is not None and Path(found).parent == own.parent:
        return "python"
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators and forbid nondeterministic kernels where torch knows them."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel more for memory that is written anyway


def prepare_run_folder(runs_dir: str, project: str, from_scratch: bool) -> Path:
    """The run's folder, made; one that exists is moved aside (from scratch) or kept for resuming, never overwritten.

    One rank does it, the others wait. Raises UserError where the folder cannot be written.
    """
    from common import ranks

    folder = Path(runs_dir) / project
    if ranks.is_main():
        if folder.exists() and any(folder.iterdir()) and from_scratch:
            names = (folder.with_name(f"{folder.name}.old-{number}") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            folder.rename(aside)
            console.print(
                f"{folder} exists and experiment.start_from_scratch is True: moved it to {aside} "
                "(experiment.start_from_scratch=False resumes instead)"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            with probe.open("wb") as stream:
                stream.write(b"\0" * (1 << 16))
                stream.flush()
                os.fsync(stream.fileno())  # a full disk is noticed here
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"experiment.runs_dir: {folder} cannot be written ({error.strerror}); name another"
            ) from error
    ranks.wait_for_all()
    return folder


@contextmanager
def progress(description: str, total: int, done: int = 0, at_most: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere; calling what it yields advances it by one, with a note.

    `at_most`: it may end before the total, so that no time that is left is shown.
    """
    count = TextColumn("{task.completed} of at most {task.total}") if at_most else MofNCompleteColumn()
    columns = [TextColumn("{task.description}"), BarColumn(), count, TimeElapsedColumn()]
    columns += [] if at_most else [TimeRemainingColumn()]
    hidden = not console.is_terminal or console.quiet
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda note="": bar.update(task, advance=1, description=f"{description}  {note}".strip())


class Stopwatch:
    """Seconds by stage; `with watch("train"):` adds to a stage, stages may be entered again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def total(self) -> float:
        return time.perf_counter() - self.started


def timed(iterable: Iterable, watch: Stopwatch, stage: str) -> Iterator:
    """Iterate, counting the time spent inside the iterable as that of a stage."""
    iterator = iter(iterable)
    while True:
        with watch(stage):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def project_version() -> str:
    """The project's version, with the commit where it is a git checkout and `+changes` where files differ from it."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if not (ROOT / ".git").exists():
        return version
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{version} {commit}".strip()


def versions() -> dict[str, str]:
    """Of Python, this project and the packages whose versions can change a result."""
    found = {package: version for package in NUMERIC if (version := version_of(package))}
    return {"python": platform.python_version(), "dllm-rl": project_version(), **found}
