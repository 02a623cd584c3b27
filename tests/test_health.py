"""A run's health: hangs reported, full and unwritable disks, torn checkpoints skipped, a node's place found."""

import errno
import threading
from pathlib import Path

import pytest

from common.checkpoint import Writer, newest_step, save_step, step_folders, write_folder
from common.errors import UserError
from common.runtime import prepare_run_folder
from common.stop import beat, watched
from launch.nodes import Place, expand_hosts, find_place


def test_a_rank_that_hangs_is_reported_with_its_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hang.txt"
    with watched(0.1, file, rank=3):
        threading.Event().wait(0.3)
    assert "rank 3 has not moved for experiment.hang_timeout=0.1 s" in capsys.readouterr().err
    assert file.read_text().count("nothing moved") == 1
    assert "test_a_rank_that_hangs_is_reported_with_its_stack" in file.read_text()


def test_a_rank_that_moves_is_not_reported(tmp_path: Path) -> None:
    with watched(0.6, tmp_path / "hang.txt", rank=0):
        for _ in range(40):
            beat()
            threading.Event().wait(0.02)
    assert not (tmp_path / "hang.txt").exists()


def write_file(writer: Writer, text: str = "whole") -> None:
    writer.do(writer.path("deep", "file").write_text, text)


def test_a_torn_checkpoint_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path / "ckpt", step, write_file, keep_last=2)
    assert [step for step, _ in step_folders(tmp_path / "ckpt")] == [2, 3]
    (tmp_path / "ckpt" / "step-0003" / "deep" / "file").write_text("who")
    (tmp_path / "ckpt" / "step-0004.writing").mkdir()
    (tmp_path / "ckpt" / "step-0005").mkdir()
    assert newest_step(tmp_path) == 2
    out = capsys.readouterr().out
    assert "step-0003 is not whole (deep/file): skipped" in out and "step-0005 is not whole" in out


def test_a_full_disk_costs_the_checkpoint_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was there stays, nothing half written does, and no later file is tried."""
    save_step(tmp_path, 1, write_file, keep_last=1)

    def full(writer: Writer) -> None:
        def fail() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        write_file(writer)
        writer.do(fail)
        writer.do(lambda: pytest.fail("written after the failure"))

    save_step(tmp_path, 2, full, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0001"]
    assert (
        "step-0002 could not be written ([Errno 28] No space left on device); the run goes on"
        in capsys.readouterr().out
    )


def test_a_mistake_in_writing_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a defect"):
        write_folder(tmp_path / "model", lambda writer: writer.do(raise_defect))


def raise_defect() -> None:
    raise ValueError("a defect")


def test_an_unwritable_run_folder_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"experiment\.runs_dir: .* cannot be written"):
        prepare_run_folder(str(tmp_path / "file"), "project", from_scratch=True)


HOSTS = {"MLP_WORKER_0_HOST": "a", "MLP_WORKER_1_HOST": "b"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, Place(0, 1, ("127.0.0.1",), 0)),
        ({"MLP_ROLE_INDEX": "1", "MLP_WORKER_NUM": "2", **HOSTS}, Place(1, 2, ("a", "b"), 6379)),
        (
            {"MLP_ROLE_INDEX": "0", "MLP_WORKER_NUM": "2", "MLP_WORKER_0_PORT": "9000", "MLP_WORKER_0_HOST": "a"},
            Place(0, 2, ("a",), 9001),
        ),
        (
            {"SLURM_NODEID": "2", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "g[1-2],h"},
            Place(2, 3, ("g1", "g2", "h"), 6379),
        ),
        ({"NODE_RANK": "3", "NNODES": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, Place(3, 4, ("a",), 29501)),
        ({"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "a"}, Place(0, 2, ("a",), 6379)),
    ],
)
def test_a_nodes_place(environ: dict[str, str], wanted: Place) -> None:
    assert find_place(environ) == wanted


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"NODE_RANK": "0", "MASTER_ADDR": "a"}, "NNODES or NUM_NODES is not set"),
        ({"NODE_RANK": "two", "NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK=two: expected a whole number"),
        ({"NODE_RANK": "2", "NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2, but the job has 2 nodes"),
        ({"NODE_RANK": "1", "NNODES": "2"}, "NODE_RANK is set, but not MASTER_ADDR"),
        ({"MLP_ROLE_INDEX": "1", "MLP_WORKER_NUM": "2"}, "MLP_ROLE_INDEX is set, but not MLP_WORKER_0_HOST"),
        ({"MLP_ROLE_INDEX": "1", "MLP_WORKER_NUM": "2", "MLP_WORKER_1_HOST": "b"}, "but not MLP_WORKER_0_HOST"),
    ],
)
def test_a_place_that_is_half_told(environ: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        find_place(environ)


def test_slurms_lists_of_nodes() -> None:
    assert expand_hosts("gpu[01-03,7],login") == ["gpu01", "gpu02", "gpu03", "gpu7", "login"]
    assert expand_hosts("a1") == ["a1"] and expand_hosts("rack[1-2]-x") == ["rack1-x", "rack2-x"]
