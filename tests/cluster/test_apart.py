"""RL whose engines have nodes of their own: `experiment.rollout_nodes` over two and three hosts."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.hosts import joined_hosts, missing
from tests.cluster.test_cluster import RL, arguments, end, start, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing() or "can run")]
STEPS, TASKS, RESPONSES = 6, 4, 4
APART = RL | {
    "rollout.num_task_per_step": TASKS,
    "rollout.num_response_per_task": RESPONSES,
    "rollout.max_token": 24,
    "rollout.max_active": 1,  # so that a step takes a while to draw
    "experiment.total_step": STEPS,
    "experiment.rollout_nodes": 1,
    "training.tis_cap": 2,
}


def rollouts_of(folder: Path) -> list[list[dict]]:
    files = sorted((folder / "rollouts").iterdir())
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def assert_drawn_once(folder: Path) -> list[dict]:
    """Every response of every step; returns the steps' rows of metrics.jsonl."""
    steps = rollouts_of(folder)
    assert len(steps) == STEPS
    for lines in steps:
        drawn = Counter((line["task_id"], line["sample"]) for line in lines)
        assert len(drawn) == TASKS * RESPONSES and set(drawn.values()) == {1}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward" in row]


def assert_drawn_once_and_ahead(folder: Path) -> list[dict]:
    """As `assert_drawn_once`, and by the last weights but one."""
    rows = assert_drawn_once(folder)
    for step, lines in enumerate(rollouts_of(folder), 1):
        assert all(line["segments"] == [[max(1, step - 1), 0]] for line in lines)
    assert [row["staleness"] for row in rows] == [0, *[1] * (STEPS - 1)]
    assert all(row["updates"] > 0 for row in rows) and all(row["bytes_sync"] > 0 for row in rows[1:])
    return rows


def test_one_host_draws_while_one_trains(tiny_sdar: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    told = arguments("rl_tiny", APART | {"model.pretrained_model": tiny_sdar}, tmp_path)
    with joined_hosts(2) as hosts:
        first = start(hosts, 0, "multinode_rl.py", told, log)
        second = start(hosts, 1, "multinode_rl.py", told, tmp_path / "log1")
        end(first, log)
        end(second, tmp_path / "log1")
    assert "first responses from 10.77.0.2" in log.read_text() and "responses from 10.77.0.1" not in log.read_text()
    rows = assert_drawn_once_and_ahead(tmp_path / "rl_tiny")
    assert all(row["overlap"] > 0 for row in rows[:-1]) and rows[-1]["overlap"] == 0


def test_a_host_that_draws_dies(tiny_sdar: Path, tmp_path: Path) -> None:
    """The other one draws what it had, and the run goes on without a pause."""
    log = tmp_path / "log"
    told = arguments("rl_tiny", APART | {"experiment.rollout_nodes": 2, "model.pretrained_model": tiny_sdar}, tmp_path)
    with joined_hosts(3) as hosts:
        first = start(hosts, 0, "multinode_rl.py", told, log)
        for role in (1, 2):
            start(hosts, role, "multinode_rl.py", told, tmp_path / f"log{role}")
        wait_until((tmp_path / "rl_tiny" / "rollouts" / "step-0002.jsonl").exists, first, log)
        hosts[2].kill()
        end(first, log)
    said = log.read_text()
    assert "first responses from 10.77.0.3" in said and "the worker on 10.77.0.3 is lost" in said
    assert "going on after step" not in said
    assert_drawn_once_and_ahead(tmp_path / "rl_tiny")


def test_a_host_that_trains_dies_and_comes_back(tiny_sdar: Path, tmp_path: Path) -> None:
    """Ranks on two hosts learn from the first what the third drew; the run goes on from its last checkpoint."""
    log = tmp_path / "log"
    told = arguments("rl_tiny", APART | {"model.pretrained_model": tiny_sdar}, tmp_path)
    with joined_hosts(3) as hosts:
        first = start(hosts, 0, "multinode_rl.py", told, log)
        for role in (1, 2):
            start(hosts, role, "multinode_rl.py", told, tmp_path / f"log{role}")
        wait_until((tmp_path / "rl_tiny" / "ckpt" / "step-0002").exists, first, log)
        hosts[1].kill()
        start(hosts, 1, "multinode_rl.py", told, tmp_path / "log1")
        end(first, log)
    said = log.read_text()
    assert "lost " in said and "going on after step" in said and "the run goes on with them" not in said
    assert "responses from 10.77.0.2" not in said
    rows = assert_drawn_once(tmp_path / "rl_tiny")
    assert max(row["staleness"] for row in rows) == 1
