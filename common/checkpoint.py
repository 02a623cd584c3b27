"""Checkpoints that are whole or absent: written beside, synced, renamed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

STEP_FOLDER = re.compile(r"step-(\d+)")


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, then put it at `target` in one rename; an older folder there is replaced."""
    beside = target.with_name(f"{target.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    for path in [*beside.rglob("*"), beside]:
        _sync(path)
    old = target.with_name(f"{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    beside.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_step(folder: Path, step: int, write: Callable[[Path], None], keep_last: int) -> None:
    """Write `folder/step-0001` and remove all but the newest `keep_last`."""
    write_folder(folder / f"step-{step:04d}", write)
    for _, old in step_folders(folder)[:-keep_last]:
        shutil.rmtree(old)


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run, oldest first."""
    if not folder.exists():
        return []
    found = [(STEP_FOLDER.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_step(run_folder: Path) -> int:
    """The step of the newest whole checkpoint of a run, -1 if there is none."""
    checkpoints = step_folders(run_folder / "ckpt")
    return checkpoints[-1][0] if checkpoints else -1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
