"""Rollout apart from training: engines elsewhere draw a step ahead, here as actors that are threads."""

import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_rl import CONFIG, SMALL, lines_of, steps_of
from threaded_ray import Dies, Ray

from common import ranks
from common.config import load_config
from common.errors import UserError
from common.jobs import RLConfig
from common.runtime import Stopwatch
from common.schema import Sampling
from common.stop import Stopped
from common.trajectory import Request
from launch import engines
from launch.training import train_here, train_over_nodes
from models import load_model
from models.mixture import named_weights
from sample.engine import Engine
from train import ahead, rl_trainer

KEYS = SMALL | {
    "rollout.num_task_per_step": 2,
    "rollout.num_response_per_task": 4,
    "rollout.max_token": 8,
    "optimizer.params.learning_rate": 3e-3,  # the next weights draw other responses
    "training.updates_per_step": 1,
    "experiment.eval_every": 0,
    "experiment.rollout_nodes": 1,
    "evaluation.num_task": 1,
    "evaluation.max_token": 8,
    "evaluation.remasking_strategy": "low_confidence_static",
    "reward.workers": 0,
}


def config_of(model: Path, runs: Path, **changes: object) -> RLConfig:
    values = KEYS | {"model.pretrained_model": model, "experiment.runs_dir": runs}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("rl", [f"config={CONFIG}", *(f"{key}={value}" for key, value in values.items())])


def make_engines(ray: Ray, model: Path, patience: float = 20) -> engines.RemoteEngines:
    return engines.RemoteEngines(str(model), "sdar", "auto", patience, nodes=ray.nodes, trained=True)


@pytest.fixture(scope="module", autouse=True)
def no_cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "device_options", lambda node: [{"node": node["NodeID"]}])
        patch.setattr(engines, "use_own_interface", lambda: None)
        patch.setattr(rl_trainer, "draw_curves", lambda *_: None)
        yield


def ray_of(patch: pytest.MonkeyPatch, *here: str, dies: Dies = lambda *_: False) -> Ray:
    ray = Ray(list(here), dies)
    patch.setitem(sys.modules, "ray", ray)
    return ray


def train(ray: Ray, model: Path, runs: Path, **changes: object) -> Path:
    config = config_of(model, runs, **changes)
    assert rl_trainer.main(config, lambda: make_engines(ray, model)) == 0
    return runs / "rl_tiny"


@dataclass
class Trained:
    """A run of three steps with one engine, and the model it started from."""

    model: Path
    folder: Path


@pytest.fixture(scope="module")
def trained(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        runs = tmp_path_factory.mktemp("apart")
        return Trained(tiny_sdar, train(ray_of(patch, "a"), tiny_sdar, runs, experiment__keep_last=3))


def drawn_in(folder: Path, step: int) -> dict[tuple[str, int], list[int]]:
    lines = lines_of(folder / "rollouts" / f"step-{step:04d}.jsonl")
    found = {(line["task_id"], line["sample"]): line["response_ids"] for line in lines}
    assert len(found) == len(lines) == 8
    return found


# ---- a step ahead


def test_every_step_is_drawn_by_the_last_weights_but_one(trained: Trained) -> None:
    """They are known by what they draw."""
    config = config_of(trained.model, trained.folder)
    for step, drawn_by, weights in (
        (1, 1, trained.model),
        (2, 1, trained.model),
        (3, 2, trained.folder / "ckpt" / "step-0001" / "model"),
    ):
        lines = lines_of(trained.folder / "rollouts" / f"step-{step:04d}.jsonl")
        assert all(line["segments"] == [[drawn_by, 0]] for line in lines)
        loaded = load_model(weights, "sdar")
        requests = [
            Request(line["task_id"], line["prompt_ids"], line["sample"], config.training.seed, step) for line in lines
        ]
        again = Engine(loaded.model, loaded.mask_id, loaded.stop_ids).generate(requests, config.rollout)
        assert {(one.task_id, one.sample): one.response_ids for one in again} == drawn_in(trained.folder, step)


def test_what_a_step_tells(trained: Trained) -> None:
    rows = steps_of(trained.folder)
    assert [row["staleness"] for row in rows] == [0, 1, 1]
    assert all(0 < row["overlap"] <= 1 for row in rows[:2]) and rows[2]["overlap"] == 0
    size = sum(weight.numel() * 4 for weight in named_weights(load_model(trained.model, "sdar").model).values())
    assert [row["bytes_sync"] for row in rows] == [0, size, size]  # w_0 was sent before
    for row in rows:
        parts = [row[f"seconds_{stage}"] for stage in ("wait", "train", "sync", "other") if f"seconds_{stage}" in row]
        assert sum(parts) == pytest.approx(row["seconds"], rel=1e-3) and row["seconds_rollout"] > 0
    # older weights' numbers are not held against the trainer's
    assert "logp_diff_max" in rows[0] and not any("logp_diff_max" in row for row in rows[1:])


def test_engines_come_and_go_and_the_run_is_the_same(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is lost with its part of step 2, one comes then, and draws from the next sending on."""

    def dies(node: str, method: str, arguments: tuple) -> bool:
        if node == "b" and method == "generate" and arguments[0][0].step == 2:
            ray.here[:] = ["a", "c"]
            return True
        return False

    ray = ray_of(monkeypatch, "a", "b", dies=dies)
    folder = train(ray, trained.model, tmp_path, dataset__eval_dataset="null", experiment__save_every=0)
    assert "the worker on b is lost; its 2 responses are drawn by others" in capsys.readouterr().out
    asked = {
        node: [calls[0][0].step for name, calls in actor.calls if name == "generate"]
        for node, actor in ray.actors.items()
    }
    assert 1 in asked["b"] and 2 in asked["b"] and 3 not in asked["b"]
    assert 3 in asked["c"] and 2 not in asked["c"]
    for step in (1, 2, 3):
        assert drawn_in(folder, step) == drawn_in(trained.folder, step)
    own, other = (steps_of(run) for run in (folder, trained.folder))
    for key in ("loss", "grad_norm", "reward", "staleness"):
        assert [row[key] for row in own] == [row[key] for row in other]


def test_a_resumed_run_goes_on_with_its_tasks(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rl_tiny"
    shutil.copytree(trained.folder, folder)
    for name in ("step-0003", "optimized"):
        shutil.rmtree(folder / "ckpt" / name)
    changes = {"experiment__start_from_scratch": False, "dataset__eval_dataset": "null"}
    train(ray_of(monkeypatch, "a"), trained.model, tmp_path, **changes)
    now, before = drawn_in(folder, 3), drawn_in(trained.folder, 3)
    assert now.keys() == before.keys() and now != before  # by w_2 in place of w_1
    (row,) = [row for row in steps_of(folder) if row["step"] == 3]
    assert row["staleness"] == 0 and row["logp_diff_max"] < 1e-4


# ---- engines that are lost


def test_weights_are_sent_again_to_those_that_are_left(
    tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One dies when it has the first tensor."""
    worker = engines.EngineWorker
    receive = worker.receive

    def breaks_off(self: engines.EngineWorker) -> None:
        if self is ray.actors["b"].made:
            ray.actors["b"].dead = True
            self.broadcast(torch.empty(named_weights(self.loaded.model)[self.names[0]].shape))
            self.broadcast.close()
        else:
            receive(self)

    monkeypatch.setattr(worker, "receive", breaks_off)
    ray = ray_of(monkeypatch, "a", "b")
    remote = make_engines(ray, tiny_sdar)
    new = {name: weight + 1 for name, weight in named_weights(load_model(tiny_sdar, "sdar").model).items()}
    assert remote.newcomers() and remote.wants_weights()
    assert remote.send(list(new), iter(new.items()), 5) is None
    assert "the worker on b is lost; the others are sent the weights" in capsys.readouterr().out
    assert [one.step for one in remote.workers] == [None]
    assert remote.send(list(new), iter(new.items()), 5) == sum(weight.nbytes for weight in new.values())
    assert [one.step for one in remote.workers] == [5] and not remote.newcomers()
    own = named_weights(ray.actors["a"].made.loaded.model)
    assert all(torch.equal(own[name], weight) for name, weight in new.items())


class Idle:
    """Engines for jobs that ask nothing of them but whether they have weights."""

    tensor_group, idle_since = 1, 0.0

    def __init__(self) -> None:
        self.have_weights = threading.Event()
        self.sent: list[int] = []

    def send(self, names: list[str], weights: Iterator[tuple[str, torch.Tensor]], step: int) -> int:
        assert [name for name, _ in weights] == names
        self.sent.append(step)
        self.have_weights.set()
        return 4

    def keep_weights(self, step: int) -> None:
        assert self.have_weights.is_set()

    def newcomers(self) -> bool:
        return not self.have_weights.is_set()

    wants_weights = newcomers


def ahead_of(idle: Idle, monkeypatch: pytest.MonkeyPatch) -> ahead.Ahead:
    monkeypatch.setattr(ahead, "LOOK_EVERY", 0.01)
    return ahead.Ahead(idle, lambda: iter([("weight", torch.zeros(1))]), last=2)


def test_new_engines_that_replace_all_are_given_weights_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = Idle()
    steps = ahead_of(idle, monkeypatch)

    def draw(step: int, before: int | None) -> tuple[int, int | None]:
        if step == 2:
            idle.have_weights.clear()
        return (step, before) if idle.have_weights.wait(20) else (0, 0)

    steps.send(1, Stopwatch())
    assert steps.take(1, draw, Stopwatch()) == (1, None)
    assert steps.take(2, draw, Stopwatch()) == (2, (1, None))
    assert idle.sent == [1, 2] and steps.bytes_sent == 4 and not steps.begun


@pytest.mark.parametrize("error", [Stopped(), UserError("training.max_prompt_len")])
def test_what_ends_the_drawing_ends_the_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(step: int, before: None) -> None:
        if step == 2:
            raise error

    steps = ahead_of(Idle(), monkeypatch)
    steps.take(1, draw, Stopwatch())
    with pytest.raises(type(error)):
        steps.take(2, draw, Stopwatch())


def test_no_engine_is_left(tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = make_engines(ray_of(monkeypatch), tiny_sdar, patience=0)
    with pytest.raises(UserError, match=r"experiment\.join_timeout=0: no engine is left"):
        list(remote.generate([Request("1", [1])], Sampling()))
    with pytest.raises(UserError, match="no engine is left"):
        remote.send([], iter(()), 1)


def test_a_thread_may_be_a_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    seen = []
    with ranks.alone():
        other = threading.Thread(target=lambda: seen.append(ranks.world()))
        other.start()
        other.join()
        assert ranks.world() == 1 and ranks.gather("one") == ["one"]
    assert seen == [2] and ranks.world() == 2


# ---- what is refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.carry", True),
        ("rollout.spare", 1),
        ("rollout.tensor_parallel_size", 2),
        ("training.old_logp", "engine"),
    ],
)
def test_refused_beside_engines_elsewhere(tiny_sdar: Path, tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{key}.*experiment.rollout_nodes=1"):
        config_of(tiny_sdar, tmp_path, **{key.replace(".", "__"): value})


def test_refused_without_enough_nodes(tiny_sdar: Path, tmp_path: Path) -> None:
    config = config_of(tiny_sdar, tmp_path)
    with pytest.raises(UserError, match=r"experiment\.rollout_nodes=1 is of multinode_rl.py"):
        train_here(config, [])
    with pytest.raises(UserError, match=r"experiment\.rollout_nodes=1 leaves none of the 1 nodes to train"):
        train_over_nodes(config, [], 1)
