"""Responses that outlive a step: the engine draws them in parts, and steps end where the responses alone say so."""

from collections.abc import Callable
from pathlib import Path

import pytest

from common.schema import Sampling
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.mixture import routers
from models.tiny import build_tiny
from sample.engine import Engine
from sample.step import Graphs
from tests.test_engine import BOUNDS, check, requests_of
from tests.test_engine_cuda import LateWatch
from tests.test_full_attention import BASE

STRIDE = 3


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
            assert all(one.state.masked[0, int(one.state.block_start) :].all() for one in begun)
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
    "routes": ("sdar_moe", {"cache_tokens": 60}),
}
LATE = ("commits apart", "few rows", "edited", "full, cached")
TAKE_TURNS = ("little room", "few rows", "revoked", "full, cached", "routes")


@pytest.mark.parametrize(
    ("case", "looks"), [*((case, "at once") for case in CASES), *((case, "late") for case in LATE)]
)
def test_a_response_in_parts_is_the_response(
    tiny: dict[str, LoadedModel], capsys: pytest.CaptureFixture[str], case: str, looks: str
) -> None:
    """The same weights: token for token, with its writings, its forwards and its experts."""
    family, changes = CASES[case]
    loaded = tiny[family]
    layout = BASE if family == "dream" else {"max_token": 24}
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
