"""Measurements; each file is a command of its own."""

import os
from importlib.util import find_spec
from pathlib import Path

import common  # noqa: F401 — before torch, see common/__init__.py

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def check_packages(command: str, *names: str) -> None:
    """SystemExit, in one line with the way out, where a package that the command needs is not there."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
        pins = " ".join(line for line in lines if line.partition("==")[0] in missing)
        raise SystemExit(
            f"{command} lacks {', '.join(missing)}: pip install {pins} (without a network: pip download them "
            "elsewhere, and pip install --no-index --find-links FOLDER)"
        )


def use_threads(number: int) -> None:
    """Give torch this number of threads, as if the user had said so by OMP_NUM_THREADS: no load changes it."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)
