"""Files that are whole or absent, on a disk that may fill up: checkpoints, and the other files of a run.

What is replaced is written beside, synced and renamed; a checkpoint is checked before it is read. What does not fit on
a full disk is reported, once for each file, and the run goes on.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common import ranks
from common.errors import FULL
from common.runtime import console

STEP_FOLDER = re.compile(r"step-(\d+)")
MANIFEST = "files.json"  # of a checkpoint: every other file with its size


class Writer:
    """Writes a folder's files from one rank, and remembers the first failure: the others may be in mid-collective."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.error: OSError | None = None

    def path(self, *parts: str) -> Path:
        """A file's place in the folder, its parent made."""
        path = self.folder.joinpath(*parts)
        self.do(path.parent.mkdir, parents=True, exist_ok=True)
        return path

    def do(self, function: Callable, *args: object, **kwargs: object) -> None:
        """Call what writes, on one rank, unless something failed before."""
        if ranks.is_main() and self.error is None:
            try:
                function(*args, **kwargs)
            except OSError as error:
                self.error = error
            except Exception as error:  # safetensors has an error of its own for a full disk
                if "No space left" not in str(error):
                    raise
                self.error = OSError(str(error))


def write_folder(target: Path, write: Callable[[Writer], None]) -> bool:
    """Let `write` fill a folder, then put it at `target` in one rename; an older folder there is replaced.

    All ranks must call it. Where the disk is full or fails, says so, leaves `target` as it was, and returns False.
    """
    beside = target.with_name(f"{target.name}.writing")
    writer = Writer(beside)
    writer.do(shutil.rmtree, beside, ignore_errors=True)
    writer.do(beside.mkdir, parents=True)
    write(writer)
    writer.do(_finish, beside, target)
    error = ranks.from_main(None if writer.error is None else str(writer.error))
    if error is not None:
        if ranks.is_main():
            shutil.rmtree(beside, ignore_errors=True)
        console.print(f"{target} could not be written ({error}); the run goes on without it")
    return error is None


def save_step(folder: Path, step: int, write: Callable[[Writer], None], keep_last: int) -> None:
    """Write `folder/step-0001` and remove all but the newest `keep_last`. All ranks must call it."""
    if write_folder(folder / f"step-{step:04d}", write) and ranks.is_main():
        for _, old in step_folders(folder)[:-keep_last]:
            shutil.rmtree(old)


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run, oldest first; a torn one is skipped, and said."""
    if not folder.exists():
        return []
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    steps = sorted((int(match[1]), path) for match, path in found if match)
    return [(step, path) for step, path in steps if _is_whole(path)]


def newest_step(run_folder: Path) -> int:
    """The step of the newest whole checkpoint of a run, -1 if there is none."""
    checkpoints = step_folders(run_folder / "ckpt")
    return checkpoints[-1][0] if checkpoints else -1


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        torn = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError):
        torn = [MANIFEST]
    if torn:
        _print_once(f"{folder} is not whole ({torn[0]}): skipped")
    return not torn


def _finish(beside: Path, target: Path) -> None:
    files = [path for path in beside.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(beside)): path.stat().st_size for path in files}
    if STEP_FOLDER.fullmatch(target.name):  # others are a publisher's format, in which nothing is added
        (beside / MANIFEST).write_text(json.dumps(sizes, indent=1))
    for path in [*beside.rglob("*"), beside]:
        _sync(path)
    old = target.with_name(f"{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    beside.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unless_full(path: Path) -> Iterator[None]:
    """Within it a full disk raises nothing: what was to be written there is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        _print_once(
            f"{path} could not be written ({error.strerror}); the run goes on, and what belongs there is missing"
        )


@functools.cache
def _print_once(line: str) -> None:
    """The line on the console, the first time in this process that it is to be printed."""
    console.print(line)


def append_lines(path: Path, text: str) -> None:
    """Add whole lines to a file, or on a full disk none of them; a run that is killed leaves the last one torn."""
    with unless_full(path), path.open("ab", buffering=0) as file:
        size, left = file.tell(), memoryview(text.encode())
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(size)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a file beside and rename it: whoever looks meanwhile, or after a crash, sees the old one whole."""
    beside = path.with_name(f"{path.name}.writing")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
