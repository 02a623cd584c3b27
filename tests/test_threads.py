"""Threads and memory of the processor: threads by what a network is worth and what is free, waiting threads asleep, and
freed memory kept."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from common import runtime

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("eval.py", "rl.py", "generate.py", "serve.py", "multinode_eval.py", "multinode_rl.py")
SCRIPTS += ("train/sft_sdar.py", "train/sft_llada.py", "sample/get_trace_viewer.py", "rollout/lm_harness.py")
# runs a script's imports and says what the variable was when torch was asked for, or at their end
SPY = """
import os, runpy, sys
class Spy:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Spy())
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[1], run_name="imported")
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


def spied(script: str, **variables: str) -> str:
    """What waiting threads are told to do when a script comes to import torch."""
    environment = {key: value for key, value in os.environ.items() if key not in common.WAITING} | variables
    command = [sys.executable, "-c", SPY, script]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_wait_asleep_before_torch_is_imported(script: str) -> None:
    assert spied(script) == "PASSIVE None"


def test_what_the_user_set_stays() -> None:
    assert spied("generate.py", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert spied("generate.py", GOMP_SPINCOUNT="1000") == "None 1000"


@pytest.mark.parametrize(
    ("parameters", "free", "number"),
    [(800_000, 64, 1), (800_000, 1, 1), (3_000_000, 64, 3), (3_000_000, 2, 2), (8_000_000_000, 64, 64), (10**9, 0, 1)],
)
def test_threads_by_size_and_by_what_is_free(parameters: int, free: int, number: int) -> None:
    assert runtime.number_for(parameters, free) == number


def test_torch_gets_them_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in runtime.THREADS_SET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "free_cores", lambda: 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runtime.settle_threads(800_000)
        runtime.settle_threads(700_000)
        assert torch.get_num_threads() == 1
        told = capsys.readouterr().out
        assert told.count("\n") == 1 and told.startswith("threads: 1, for a network of 0.8 M parameters where 6 of")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        runtime.settle_threads(10**9)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        runtime.settle_threads(800_000)
        assert torch.get_num_threads() == 3, "the user's choice is not touched"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], cores: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert runtime.quota(tmp_path) == cores


def test_at_least_one_core_is_free() -> None:
    assert 1 <= runtime.free_cores() <= runtime.cores()


# says how many MiB stay in memory of 64 that were given back, before and after freed memory is kept
KEPT = """
from pathlib import Path
from common.runtime import keep_freed_memory

def stays():
    pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
    before = pages()
    bytearray(b"1" * (64 << 20))
    return pages() - before

first = stays()
keep_freed_memory()
print(first, stays())
"""


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="the C library is not glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    def stays(**variables: str) -> list[int]:
        environment = {key: value for key, value in os.environ.items() if key not in runtime.MALLOC_SET} | variables
        command = [sys.executable, "-c", KEPT]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        return list(map(int, done.stdout.split()))

    before, after = stays()
    assert before < 8 and after > 56
    assert max(stays(MALLOC_TRIM_THRESHOLD_="131072")) < 8
