"""Files of a run on a disk that may fill up: what cannot be written is said, once a file, and the run goes on."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import FULL
from common.runtime import console


@contextmanager
def unless_full(path: Path) -> Iterator[None]:
    """Within it a full disk raises nothing: what was to be written there is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        _tell(path, str(error.strerror))


@functools.cache
def _tell(path: Path, why: str) -> None:
    console.print(f"{path} could not be written ({why}); the run goes on, and what belongs there is missing")


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
