"""Jobs over two hosts, each with an address of its own: `make test-cluster`. Needs root, iproute2, openssh-server."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.config import load_config
from rollout import evaluate
from tests.cluster.hosts import Host, joined_hosts, missing, ssh_server
from train import rl_trainer

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(missing()), reason=missing() or "can run")]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds for a job, on a busy machine too
# so many that a node which dies after its first ones leaves some undone
SAMPLING = {"num_task": 120, "num_response_per_task": 2, "max_token": 16, "max_active": 1}
EVAL = {f"rollout.{key}": value for key, value in SAMPLING.items()} | {
    "rollout.remasking_strategy": "low_confidence_static",
    "experiment.project": "eval",
    "experiment.join_timeout": 200,
    "dataset.eval_dataset": "arithmetic_4_test",
    "reward.workers": 0,
}
RL = {
    "rollout.num_task_per_step": 2,
    "rollout.num_response_per_task": 2,
    "rollout.max_token": 8,
    "experiment.total_step": 8,
    "experiment.save_every": 1,
    "experiment.eval_every": 0,
    "experiment.trackers": "[]",
    "experiment.join_timeout": 200,
    "evaluation.num_task": 2,
    "evaluation.max_token": 8,
    "optimizer.params.epsilon": 1e-5,
    "training.keep_accuracy": "null",
    "reward.function": "benchmarks.coin_flip:coin_flip",
    "reward.truncated_is_wrong": False,
    "reward.workers": 0,
}


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with joined_hosts(2) as both:
        yield both


def arguments(config: str, values: dict[str, object], runs: Path) -> list[str]:
    pairs = values | {"experiment.runs_dir": runs}
    return [f"config={ROOT}/configs/{config}.yaml", *(f"{key}={value}" for key, value in pairs.items())]


def start(hosts: tuple[Host, ...], role: int, script: str, told: list[str], log: Path) -> subprocess.Popen:
    """The job's command on a host, in the environment that a scheduler would make."""
    place = {"MLP_ROLE_INDEX": role, "MLP_WORKER_NUM": len(hosts)}
    place |= {f"MLP_WORKER_{n}_HOST": host.address for n, host in enumerate(hosts)}
    return hosts[role].start([sys.executable, ROOT / script, *told], log, OMP_NUM_THREADS=1, **place)


def wait_until(happened: Callable[[], bool], job: subprocess.Popen, log: Path) -> None:
    limit = time.monotonic() + PATIENCE
    while not happened():
        assert job.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
        time.sleep(0.05)


def end(job: subprocess.Popen, log: Path) -> None:
    assert job.wait(timeout=PATIENCE) == 0, log.read_text()[-3000:]


def samples_of(folder: Path) -> list[str]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return sorted(
        json.dumps([line["task_id"], line["sample"], line["response_ids"], line["verdict"]]) for line in lines
    )


@pytest.fixture(scope="module")
def evaluated(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation on one node."""
    runs = tmp_path_factory.mktemp("one")
    evaluate.main(load_config("eval", arguments("eval_tiny", EVAL | {"model": tiny_sdar}, runs)))
    return runs / "eval"


@pytest.fixture(scope="module")
def trained(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The RL run on one node."""
    runs = tmp_path_factory.mktemp("one")
    rl_trainer.main(load_config("rl", arguments("rl_tiny", RL | {"model.pretrained_model": tiny_sdar}, runs)))
    return runs / "rl_tiny"


def assert_same_steps(one: Path, other: Path) -> None:
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)
    ]
    assert len(rows[0]) == len(rows[1])
    for first, second in zip(*rows):
        for key in ("step", "reward", "loss", "grad_norm", "eval/static/accuracy"):
            assert (key in first) == (key in second)
            if key in first:
                assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-3), (first["step"], key)


def test_evaluation_when_a_node_dies(
    hosts: tuple[Host, Host], tiny_sdar: Path, evaluated: Path, tmp_path: Path
) -> None:
    """Every node runs the command; the second dies, and every response is there once all the same."""
    log = tmp_path / "log"
    told = arguments("eval_tiny", EVAL | {"model": tiny_sdar}, tmp_path)
    first = start(hosts, 0, "multinode_eval.py", told, log)
    start(hosts, 1, "multinode_eval.py", told, tmp_path / "log1")
    wait_until(lambda: "first responses from 10.77.0.2" in log.read_text(), first, log)
    hosts[1].kill()
    end(first, log)
    assert "the worker on 10.77.0.2 is lost" in log.read_text()
    assert samples_of(tmp_path / "eval") == samples_of(evaluated)


def test_evaluation_over_ssh(hosts: tuple[Host, Host], tiny_sdar: Path, evaluated: Path, tmp_path: Path) -> None:
    """The second node waits idly; the first reaches it."""
    ssh = f"[{','.join(ssh_server(hosts[1], tmp_path))}]"
    log = tmp_path / "log"
    told = arguments("eval_tiny", EVAL | {"model": tiny_sdar, "experiment.ssh": ssh}, tmp_path)
    end(start(hosts, 0, "multinode_eval.py", told, log), log)
    assert "first responses from 10.77.0.2" in log.read_text()
    assert samples_of(tmp_path / "eval") == samples_of(evaluated)


def test_rl_when_a_node_dies(hosts: tuple[Host, Host], tiny_sdar: Path, trained: Path, tmp_path: Path) -> None:
    """Every node runs the command; the second dies and comes back, and the run goes on with it to its last step."""
    log = tmp_path / "log"
    told = arguments("rl_tiny", RL | {"model.pretrained_model": tiny_sdar}, tmp_path)
    first = start(hosts, 0, "multinode_rl.py", told, log)
    start(hosts, 1, "multinode_rl.py", told, tmp_path / "log1")
    wait_until((tmp_path / "rl_tiny" / "ckpt" / "step-0002").exists, first, log)
    hosts[1].kill()
    second = start(hosts, 1, "multinode_rl.py", told, tmp_path / "log1")
    end(first, log)
    assert "lost " in log.read_text() and "going on after step" in log.read_text()
    assert "the run goes on with them" not in log.read_text()
    assert second.wait(timeout=PATIENCE) == 0, (tmp_path / "log1").read_text()[-3000:]
    assert_same_steps(trained, tmp_path / "rl_tiny")


def test_rl_over_ssh(hosts: tuple[Host, Host], tiny_sdar: Path, trained: Path, tmp_path: Path) -> None:
    """The second node waits idly, is reached, and dies for good: the run goes on with one."""
    ssh = f"[{','.join(ssh_server(hosts[1], tmp_path))}]"
    log = tmp_path / "log"
    told = arguments("rl_tiny", RL | {"model.pretrained_model": tiny_sdar, "experiment.ssh": ssh}, tmp_path)
    first = start(hosts, 0, "multinode_rl.py", [*told, "experiment.join_timeout=100"], log)
    wait_until((tmp_path / "rl_tiny" / "ckpt" / "step-0002").exists, first, log)
    hosts[1].kill()
    end(first, log)
    assert "1 of 2 nodes are there: the run goes on with them" in log.read_text()
    assert_same_steps(trained, tmp_path / "rl_tiny")
