"""A disk that fills up while a run lives: files stay whole, the run goes on, and each file is named once."""

import errno
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from common.checkpoint import append_lines, unless_full, write_whole

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path(tempfile.gettempdir(), "dllm-rl-full-disk")  # where the small disk is put
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap makes the small disk")


def test_what_did_not_fit_leaves_no_torn_line(tmp_path: Path) -> None:
    """A limit on the file's size cuts a write in its middle, as a full disk does."""
    file = tmp_path / "lines"
    append_lines(file, "first\n")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(OSError) as raised:
            append_lines(file, "much too long for it\n")
        append_lines(file, "last ä\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG and file.read_text() == "first\nlast ä\n"


def test_a_full_disk_is_told_once_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str) -> None:
        with unless_full(tmp_path / name), open("/dev/full", "w") as full:
            full.write("something")

    write("a")
    write("a")
    write("b")
    out = "".join(capsys.readouterr().out.split("\n"))
    assert out.count("could not be written (No space left on device)") == 2 and out.count("/b could") == 1


def test_other_failures_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        append_lines(tmp_path / "absent" / "file", "text\n")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "page", "old")
    (tmp_path / "page.writing").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "old"


def fill_disk(response: object, task: object) -> float:
    """A reward function that leaves no byte free where the runs are."""
    with unless_full(RUNS), (RUNS / "filler").open("ab", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    return len(response.tokens) % 2


@needs_bwrap
def test_a_run_learns_on_while_the_disk_is_full(tiny_sdar: Path, tmp_path: Path) -> None:
    """All steps are made; in the end the results cannot be written, which is an error of one line."""
    RUNS.mkdir(exist_ok=True)
    keys = {"model.pretrained_model": tiny_sdar, "model.made_by": "null", "experiment.runs_dir": RUNS}
    keys |= {"experiment.total_step": 3, "experiment.save_every": 1, "experiment.trackers": "[tensorboard]"}
    keys |= {"rollout.num_task_per_step": 2, "rollout.num_response_per_task": 2, "training.keep_accuracy": "null"}
    keys |= {"evaluation.num_task": 2, "rollout.max_token": 8, "evaluation.max_token": 8}
    keys |= {"reward.function": "tests.test_disk:fill_disk", "reward.truncated_is_wrong": False}
    disk = ["bwrap", "--dev-bind", "/", "/", "--size", "30000000", "--tmpfs", str(RUNS)]
    rl = [sys.executable, "rl.py", "config=configs/rl_tiny.yaml", *(f"{key}={value}" for key, value in keys.items())]
    done = subprocess.run([*disk, *rl], cwd=ROOT, capture_output=True, text=True, timeout=300)
    told = " ".join(done.stdout.split())
    assert "step 3/3" in told and done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]  # tensorboard's thread has said its own before
    assert last.startswith("error: ") and "could not be written: No space left on device" in last, done.stderr
    for name in ("rollouts/step-0003.jsonl", "ckpt/step-0003", "samples.jsonl"):  # others have room in their last page
        assert told.count(f"{RUNS}/rl_tiny/{name} could not be written") == 1, told
