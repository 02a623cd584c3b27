"""Measurements; each file is a command of its own."""

import os

import common  # noqa: F401 — before torch, see common/__init__.py


def use_threads(number: int) -> None:
    """Give torch this number of threads, as if the user had said so by OMP_NUM_THREADS: no load changes it."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)
