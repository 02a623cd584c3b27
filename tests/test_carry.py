"""Responses that outlive a step: the engine draws them in parts, and steps end where the responses alone say so."""

import functools
import multiprocessing
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from drawn_policy import Drawn
from test_rl import CONFIG, lines_of, rows_of, run_rl, same_weights, steps_of

from common.config import load_config
from common.errors import UserError
from common.runtime import Stopwatch
from common.schema import RewardConfig, RLTrainingConfig, RolloutConfig, Sampling
from common.trajectory import Request, Score, ScoredTrajectory, Segment, Task, Trajectory
from models import LoadedModel, load_model
from models.mixture import routers
from models.tiny import build_tiny
from reward.score import make_scorer
from rollout.carry import Group, Rule, read_groups, take_groups, write_groups
from sample.engine import Engine
from sample.step import Graphs
from tests.test_engine import BOUNDS, check, requests_of
from tests.test_engine_cuda import LateWatch
from tests.test_full_attention import BASE
from train.rl_step import learn
from train.views import Layout

STRIDE = 3
SAMPLING = RolloutConfig(max_token=24, num_response_per_task=2, dynamic_threshold=0.05)


@pytest.fixture(scope="module")
def tiny(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    """Untrained networks of block and full attention, and a mixture of experts."""
    root = tmp_path_factory.mktemp("carry")
    for name in ("dream", "sdar_moe"):
        build_tiny(name, root / name, seed=3)
    return {name: load_model(root / name, name) for name in ("dream", "sdar_moe")} | {
        "sdar": load_model(tiny_sdar, "sdar")
    }


# ---- the engine


def in_parts(engine_of: Callable[[], Engine], requests: list[Request], settings: Sampling) -> dict[str, Trajectory]:
    """Every response drawn in parts of two strides, each part by another engine."""
    done: dict[str, Trajectory] = {}
    engine = engine_of()
    engine.set_up(settings, requests, pace=len(requests))
    engine.add(requests)
    for part in range(100):
        for _stride in (1, 2):
            engine.allow(STRIDE)
            while not engine.paused:
                engine.step()
                done |= {finished.trajectory.task_id: finished.trajectory for finished in engine.finished()}
        begun = engine.suspend()
        assert not engine.busy and {one.request.task_id for one in begun}.isdisjoint(done)
        steps = [one.steps for one in begun]
        if settings.use_cache:  # blocks are made whole
            assert all(one.state["masked"][0, int(one.state["block_start"]) :].all() for one in begun)
        else:
            assert steps == [2 * STRIDE * (part + 1)] * len(steps)
        if not begun:
            return done
        engine = engine_of()
        engine.set_up(settings, requests, pace=len(begun))
        for one in begun:
            engine.go_on(one)
    raise AssertionError("the responses did not end")


def late(engine: Engine) -> Engine:
    """An engine that steps in fixed shapes and looks late at what they did, as on CUDA."""
    engine.graphs, engine.watch = Graphs(), LateWatch()
    engine.graphs.usable = False
    return engine


EDITS = {"revoke_threshold": 0.09, "edit_threshold": 0.09, "max_edit_steps": 3}
CASES = {
    "dynamic": ("sdar", {"merge_commit": True}),
    "commits apart": ("sdar", {"merge_commit": False}),
    "little room": ("sdar", {"cache_tokens": 60, "merge_commit": True}),
    "few rows": ("sdar", {"max_active": 2, "merge_commit": False}),
    "revoked": ("sdar", {"remasking_strategy": "revoke", "merge_commit": True, "cache_tokens": 60}),
    "edited": ("sdar", {"remasking_strategy": "edit", "merge_commit": False}),
    "full": ("dream", {"temperature": 1.0}),
    "full, cached": ("dream", {"use_cache": True, "max_active": 2}),
    "full, revoked": ("dream", {"remasking_strategy": "revoke", "use_cache": True, "further_horizon": 3}),
    "routes": ("sdar_moe", {"cache_tokens": 40}),
}
LATE = ("commits apart", "edited", "full, cached")
TAKE_TURNS = ("little room", "few rows", "revoked", "full, cached", "routes")


@pytest.mark.parametrize(("case", "looks"), [(case, "late" if case in LATE else "at once") for case in CASES])
def test_a_response_in_parts_is_the_response(
    tiny: dict[str, LoadedModel], capsys: pytest.CaptureFixture[str], case: str, looks: str
) -> None:
    """The same weights: token for token, with its writings, its forwards and its experts."""
    family, changes = CASES[case]
    loaded = tiny[family]
    layout = BASE if family == "dream" else {"max_token": 24 if family == "sdar" else 12}
    settings = Sampling(**layout | BOUNDS | EDITS | changes, compile_kernels=False)
    keep = bool(routers(loaded.model))
    requests = [Request(one.task_id, one.prompt_ids, one.sample, 0, 2, keep) for one in requests_of(9, 3, 13, 4)]
    prepare = late if looks == "late" else lambda engine: engine
    drawn = in_parts(lambda: prepare(Engine(loaded.model, loaded.mask_id, [14])), requests, settings)
    assert ("take turns" in capsys.readouterr().out) == (case in TAKE_TURNS)
    for whole in Engine(loaded.model, loaded.mask_id, [14]).generate(requests, settings):
        part = drawn.pop(whole.task_id)
        check(part, whole)
        if keep:
            assert (part.routes.steps == whole.routes.steps).all()
            assert (part.routes.committed == whole.routes.committed).all()
    assert not drawn


# ---- when a step is complete


def rule(step: int = 1, **changes: object) -> Rule:
    keys = {"carry": True, "num_task_per_step": 2, "num_response_per_task": 2, "in_flight": 3, "max_stale_steps": 2}
    return Rule.of(replace(RolloutConfig(max_token=24), **keys | changes), step)


def prompt_of(number: int) -> list[int]:
    return [3 + number, 7, 2]


def plain(
    rule: Rule, groups: list[Group], count: int, lengths: dict[tuple[str, int, int], int]
) -> tuple[list[str], dict[tuple[str, int], int]]:
    """The rule in a plain loop: the tasks that are taken, and the steps made of each response that is left."""
    waiting = [(group, sample) for group in groups for sample in range(2) if sample not in group.done]
    steps = {(group.task.id, sample): one.steps for group in groups for sample, one in group.begun.items()}
    done = {(group.task.id, sample) for group in groups for sample in group.done}
    open_groups = {group.task.id: group for group in groups if group.done or group.begun}
    seats: list[tuple[Group, int]] = []
    while True:
        whole = [group for group in groups if {(group.task.id, 0), (group.task.id, 1)} <= done][:count]
        left = [group for group in open_groups.values() if group not in whole]
        may_wait = all(
            sum(other.step + rule.stale <= later for other in left) <= rule.wanted * (later - rule.step)
            for later in range(rule.step, rule.step + rule.stale + 1)
        )
        if (len(whole) == count and may_wait) or not (waiting or seats):
            names = [group.task.id for group in whole]
            return names, {one: made for one, made in steps.items() if one not in done}
        while waiting and len(seats) < rule.seats:
            seats.append(waiting.pop(0))
            open_groups[seats[-1][0].task.id] = seats[-1][0]
            steps.setdefault((seats[-1][0].task.id, seats[-1][1]), 0)
        for group, sample in list(seats):
            one, length = (group.task.id, sample), lengths[group.task.id, sample, group.step]
            steps[one] = min(steps[one] + rule.stride, length)
            if steps[one] == length:
                done.add(one)
                seats.remove((group, sample))


@pytest.fixture(scope="module")
def lengths(tiny: dict[str, LoadedModel]) -> dict[tuple[str, int, int], int]:
    """Denoising steps of the responses to sixteen tasks, by task, sample and the step that begins them."""
    loaded, steps = tiny["sdar"], {}
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    for step in range(1, 5):
        requests = [Request(f"task {n}", prompt_of(n), sample, 5, step) for n in range(16) for sample in (0, 1)]
        steps |= {(one.task_id, one.sample, step): one.steps for one in engine.generate(requests, SAMPLING)}
    return steps


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"max_stale_steps": 1, "in_flight": 8},  # in a cache in which not all fit
        {"max_stale_steps": 0},
        {"carry": False, "spare": 2, "in_flight": None},
    ],
    ids=["carry", "little room", "no step late", "spare"],
)
def test_groups_are_those_of_the_plain_loop(
    tiny: dict[str, LoadedModel], lengths: dict[tuple[str, int, int], int], keys: dict[str, object]
) -> None:
    """Four steps of one network: which groups a step takes, and how far the others are."""
    loaded = tiny["sdar"]
    sampling = replace(SAMPLING, cache_tokens=60 if keys.get("in_flight") == 8 else None)
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    carried: list[Group] = []
    number, before = 0, []
    with make_scorer(RewardConfig(function="tests.scored:all_right", workers=0), "math") as scorer:
        for step in range(1, 5):
            now = rule(step, **keys)
            new = range(number, number + now.most_groups(2) - len(carried))
            groups = [*carried, *(Group(Task(f"task {n}", ""), prompt_of(n), step, n + 1) for n in new)]
            taken = take_groups(engine, loaded, groups, 2, now, sampling, scorer, Stopwatch(), 5)
            names, left = plain(now, groups, 2, lengths)
            assert [group[0].task.id for group in taken.groups] == names
            begun = {(group.task.id, sample): one.steps for group in taken.left for sample, one in group.begun.items()}
            assert begun == (left if now.carries else {})
            assert all(group.step + now.stale > step for group in taken.left)
            carried, number, before = taken.left, taken.cursor, before + names
    assert len(set(before)) == 8
    if keys.get("max_stale_steps") == 0:
        assert before == [f"task {n}" for n in range(8)] and not carried


def test_a_checkpoint_holds_a_mixtures_responses(tiny: dict[str, LoadedModel], tmp_path: Path) -> None:
    """Routes too; where another setting would go on with them they are dropped."""
    loaded, rollout = tiny["sdar_moe"], replace(SAMPLING, carry=True)
    engine = Engine(loaded.model, loaded.mask_id, [])
    requests = [Request("a", prompt_of(0), sample, 5, 1, True) for sample in (0, 1)]
    (done,) = engine.generate(requests[:1], replace(SAMPLING, max_token=4))
    engine.set_up(SAMPLING, requests, pace=1)
    engine.add(requests[1])
    engine.allow(3)
    while not engine.paused:
        engine.step()
        engine.finished()
    (begun,) = engine.suspend()
    task = Task("a", "", record={"tests": [1.5, None]})
    scored = ScoredTrajectory(task, replace(done, segments=[Segment(1, 0)]), Score(1.0, True, "passed"))
    group = Group(task, prompt_of(0), 1, 1, {0: scored}, {1: begun}, {1: [Segment(1, 0)]})
    file = tmp_path / "carried.pt"
    write_groups(file, [group], rollout)
    (back,) = read_groups(file, rollout, [task], 2)
    assert (back.task, back.step, back.done, back.segments) == (task, 1, {0: scored}, group.segments)
    assert (back.done[0].trajectory.routes.steps == done.routes.steps).all()
    assert back.begun[1].request == requests[1] and (back.begun[1].routes == begun.routes).all()
    assert all((back.begun[1].state[name] == store).all() for name, store in begun.state.items())
    for changed in (replace(rollout, max_token=23), replace(rollout, carry=False)):
        assert read_groups(file, changed, [task], 2) == []
    assert read_groups(file, rollout, [], 2) == [] == read_groups(file, rollout, [task], 6)


# ---- whole runs

RUN = {
    "rollout__num_task_per_step": 2,
    "rollout__num_response_per_task": 2,
    "rollout__max_token": 24,
    "rollout__dynamic_threshold": 0.1,
    "rollout__carry": True,
    "rollout__max_stale_steps": 2,
    "rollout__in_flight": 3,
    "training__tis_cap": 2.0,
    "reward__workers": 0,
    "optimizer__params__epsilon": 1e-5,
    "experiment__total_step": 5,
    "experiment__eval_every": 0,
    "evaluation__num_task": 1,
    "evaluation__max_token": 4,
    "evaluation__remasking_strategy": "low_confidence_static",
}


@pytest.fixture(scope="module")
def carried(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, all checkpoints kept."""
    return run_rl(tiny_sdar, tmp_path_factory.mktemp("carried"), **RUN, experiment__keep_last=9)


def rollouts(folder: Path, step: int) -> list[dict]:
    return lines_of(folder / "rollouts" / f"step-{step:04d}.jsonl")


def test_a_run_trains_on_what_older_weights_began(carried: Path) -> None:
    begun = set()
    for number, row in enumerate(steps_of(carried), 1):
        lines = rollouts(carried, number)
        assert row["groups"] == 2 and len(lines) == 4 and row["logp_diff_max"] <= 2e-5 and row["tis_weight"] > 0
        ages = []
        for one in lines:
            segments = one["segments"]
            # the last weights that drew it may be older than the step, which other responses of its group were drawn by
            assert segments == sorted(segments) and segments[0][1] == 0 and number - segments[0][0] <= 2
            begun.add((one["task_id"], segments[0][0]))
            starts = [next(rl for rl, start in segments[::-1] if start <= step) for step in one["step_map"]]
            ages += [number - rl for rl in starts[: one["length"]]]
        assert row["staleness"] == pytest.approx(sum(ages) / len(ages))
        assert row["staleness_max"] == max(ages) <= 2
        assert row["carried_tokens"] == pytest.approx(sum(age > 0 for age in ages) / len(ages))
    assert row["carried_tokens"] > 0.2 and len({task for task, _ in begun}) == 10


def test_a_resumed_run_goes_on_with_its_responses(carried: Path, tiny_sdar: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "rl_tiny"
    shutil.copytree(carried, stopped)
    assert (stopped / "ckpt" / "step-0003" / "carried.pt").exists()
    for name in ("step-0004", "step-0005", "optimized"):
        shutil.rmtree(stopped / "ckpt" / name)
    resumed = run_rl(tiny_sdar, tmp_path, **RUN, experiment__keep_last=9, experiment__start_from_scratch=False)
    assert rows_of(resumed, untimed=True) == rows_of(carried, untimed=True)
    assert same_weights(resumed / "ckpt" / "optimized", carried / "ckpt" / "optimized")
    assert all(rollouts(resumed, number) == rollouts(carried, number) for number in range(1, 6))


def test_two_ranks_take_the_same_groups(carried: Path, tiny_sdar: Path, tmp_path: Path) -> None:
    """Two steps by two ranks and three by one, which goes on with the responses of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of_two, args=(rank, port, tiny_sdar, tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    both = run_rl(tiny_sdar, tmp_path, **RUN, experiment__start_from_scratch=False)
    for one, other in zip(steps_of(carried, untimed=True), steps_of(both, untimed=True), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    for number in range(1, 6):
        for one, other in zip(rollouts(carried, number), rollouts(both, number), strict=True):
            names = ("task_id", "sample", "response_ids", "step_map", "segments")
            assert [one[name] for name in names] == [other[name] for name in names]


def rank_of_two(rank: int, port: int, model: Path, runs: Path) -> None:
    """What one of two ranks does, in a process of its own."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()}
    AcceleratorState._reset_state(reset_partial_state=True)
    run_rl(model, runs, **RUN | {"experiment__total_step": 2})


def test_without_a_step_more_it_is_the_run_without(tiny_sdar: Path, tmp_path: Path) -> None:
    """Where no group may come late a step waits for its own, as it does without `carry`."""
    two = {"experiment__total_step": 2, "rollout__in_flight": "null", "training__tis_cap": "null"}
    waits = run_rl(tiny_sdar, tmp_path / "waits", **RUN | two | {"rollout__max_stale_steps": 0})
    usual = {key: value for key, value in RUN.items() if key not in ("rollout__carry", "rollout__max_stale_steps")}
    plainly = run_rl(tiny_sdar, tmp_path / "plainly", **usual | two)
    assert same_weights(waits / "ckpt" / "optimized", plainly / "ckpt" / "optimized")
    for number in (1, 2):
        lines = rollouts(waits, number)
        assert [one.pop("segments") for one in lines] == [[[number, 0]]] * 4
        assert lines == rollouts(plainly, number)
    added = {"staleness", "staleness_max", "carried_tokens", "seats_idle"}
    for one, other in zip(steps_of(waits, untimed=True), steps_of(plainly, untimed=True), strict=True):
        assert {key: value for key, value in one.items() if key not in added} == other


def test_nothing_is_carried_into_other_blocks(tiny_sdar: Path, tmp_path: Path) -> None:
    grow = {"rollout__block_size": "{0: 4, 2: 8}", "experiment__total_step": 3, "experiment__keep_last": 9}
    folder = run_rl(tiny_sdar, tmp_path, **RUN | grow)
    kept = [(folder / "ckpt" / f"step-000{number}" / "carried.pt").exists() for number in (1, 2, 3)]
    assert kept == [True, False, True]
    for number, row in enumerate(steps_of(folder), 1):
        ends = {(len(one["prompt_ids"]) + len(one["response_ids"])) % 8 for one in rollouts(folder, number)}
        assert row["logp_diff_max"] <= 2e-5 and (ends == {0}) == (number > 2)


def test_responses_that_cannot_go_on_are_dropped_and_said(
    carried: Path, tiny_sdar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(carried, tmp_path / "rl_tiny")
    changes = {"rollout__temperature": 0.9, "experiment__total_step": 6, "experiment__start_from_scratch": False}
    folder = run_rl(tiny_sdar, tmp_path, **RUN | changes)
    assert "groups of responses that no step has trained on are dropped: rollout.temperature was 1.0" in (
        capsys.readouterr().out
    )
    assert steps_of(folder)[-1]["carried_tokens"] == 0


def test_only_what_the_present_weights_drew_must_be_reproduced(drawn: Drawn) -> None:
    """The engine's numbers of what older ones drew may differ; `recompute` starts ratios from the trainer's."""

    def older(sample: ScoredTrajectory, start: int) -> ScoredTrajectory:
        one = sample.trajectory
        logp = [value - 0.5 * (step < 3) for value, step in zip(one.logp, one.step_map)]
        return replace(sample, trajectory=replace(one, logp=logp, segments=[Segment(1, 0), Segment(2, start)]))

    learn = functools.partial(learn_of, drawn)
    figures = learn([older(sample, 3) for sample in drawn.samples], step=2)
    assert figures["logp_diff_max"] <= 2e-5 and figures["updates"] == 1
    for method in ("TraceRL", "random_masking"):
        with pytest.raises(UserError, match="does not reproduce"):
            learn([older(sample, 2) for sample in drawn.samples], step=2, method=method)
        assert "logp_diff_max" not in learn([older(sample, 2) for sample in drawn.samples], step=3, method=method)


def learn_of(drawn: Drawn, samples: list[ScoredTrajectory], step: int, **training: object) -> dict[str, float]:
    settings = RLTrainingConfig(**training)
    return learn(drawn.learner, samples, settings, Layout(drawn.mask_id, 4), 16, seed=[0], exact=True, step=step)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["rollout.carry=True", "training.old_logp=engine"], "training.old_logp=engine with rollout.carry"),
        (["rollout.carry=True", "rollout.spare=2"], "rollout.spare=2 with rollout.carry"),
        (["rollout.max_stale_steps=2"], "rollout.max_stale_steps=2 is of rollout.carry=True"),
        (["rollout.in_flight=2"], "rollout.in_flight=2 is of rollout.carry=True or rollout.spare"),
    ],
)
def test_keys_that_do_not_go_together(keys: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config("rl", [f"config={CONFIG}", *keys])


def test_more_at_once_than_a_rank_has_rows_for() -> None:
    with pytest.raises(UserError, match=r"rollout.in_flight=4 \(the responses of a step\) .* rollout.max_active=3"):
        rule(in_flight=None, max_active=3)
