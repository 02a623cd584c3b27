"""What a run stands on: its folder, its device and dtype, seeds, the console and progress bars."""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common import ranks
from common.errors import UserError

# one rank speaks for all; brackets in paths and errors are no markup
console = Console(stderr=False, highlight=False, markup=False, soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_and_dtype(dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device to run on and the dtype that `auto` or a name stands for there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, DTYPES[dtype]


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators and forbid nondeterministic kernels where torch knows them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def prepare_run_folder(runs_dir: str, project: str, from_scratch: bool) -> Path:
    """The run's folder, made; one that exists is moved aside (from scratch) or kept for resuming, never overwritten.

    One rank does it, the others wait.
    """
    folder = Path(runs_dir) / project
    if ranks.is_main():
        if folder.exists() and any(folder.iterdir()) and from_scratch:
            move_aside(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_writable(folder)
        except OSError as error:
            raise UserError(
                f"experiment.runs_dir: {folder} cannot be written ({error.strerror}); name another"
            ) from error
    ranks.wait_for_all()
    return folder


def move_aside(folder: Path) -> None:
    """Rename a folder to the first free name beside it, and say so."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
    console.print(
        f"{folder} exists and experiment.start_from_scratch is True: moved it to {aside} "
        "(experiment.start_from_scratch=False resumes instead)"
    )


def check_writable(folder: Path) -> None:
    """OSError where a file cannot be written in the folder, as on a full or read-only disk."""
    file = folder / ".writable"
    with file.open("wb") as stream:
        stream.write(b"\0" * (1 << 16))
        stream.flush()
        os.fsync(stream.fileno())
    file.unlink()


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere; calling what it yields advances it by one, with a note."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = not console.is_terminal or console.quiet
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
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
