"""What all tests share: no network, one thread, an untrained tiny model."""

import os

# before torch and transformers are imported; subprocesses inherit them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
from drawn_policy import drawn as drawn

from models.tiny import build_tiny

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, in the machine's own words."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (AssertionError, RuntimeError) as error:
            pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="session")
def tiny_sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained tiny model of family sdar; only read it."""
    folder = tmp_path_factory.mktemp("tiny_sdar")  # every xdist worker has its own
    build_tiny("sdar", folder, seed=3)
    return folder
