"""The project's own files, told from those that its user put beside them."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shipped(folder: str, pattern: str) -> list[Path]:
    """Files of a folder that git tracks; all that match where this is no checkout."""
    found = sorted((ROOT / folder).glob(pattern))
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True) if in_git() else None
    if listed is None or listed.returncode != 0:
        return found
    tracked = {ROOT / line for line in listed.stdout.splitlines()}
    return [path for path in found if path in tracked]


def in_git() -> bool:
    """Whether the project lies in a checkout of its own, and git is there to ask."""
    return (ROOT / ".git").exists() and shutil.which("git") is not None
