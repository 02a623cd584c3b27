"""The code of docs/engine.md runs, and gives what the engine gives."""

import re
from pathlib import Path

import pytest

from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel, load_model
from sample.engine import Engine

DOCS = Path(__file__).resolve().parents[1] / "docs" / "engine.md"
REQUESTS = [Request(str(n), [(n + 7 * i) % 33 for i in range(length)], n) for n, length in enumerate((9, 4, 3))]
SETTINGS = Sampling(max_token=9, remasking_strategy="sequential")


@pytest.fixture(scope="module")
def tiny(tiny_sdar: Path) -> LoadedModel:
    return load_model(tiny_sdar, "sdar")


@pytest.fixture(scope="module")
def code(tiny_sdar: Path) -> dict:
    """What the page's Python defines: its evaluation is of the untrained tiny model, and short."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL):
        exec(
            block.replace("runs/demo/ckpt/optimized", f'{tiny_sdar}", "rollout.max_token=6').replace("[:8]", "[:2]"),
            names,
        )
    return names


def drawn(engine: object, tiny: LoadedModel) -> list:
    return sorted(engine.generate(REQUESTS, SETTINGS), key=lambda trajectory: trajectory.task_id)


def test_an_engine_of_ones_own(code: dict, tiny: LoadedModel) -> None:
    mine = drawn(code["LeftToRight"](tiny.model, tiny.mask_id, [14]), tiny)
    for got, expected in zip(mine, drawn(Engine(tiny.model, tiny.mask_id, [14]), tiny), strict=True):
        for name in ("response_ids", "step_map", "finish_reason", "length", "steps", "temperature"):
            assert getattr(got, name) == getattr(expected, name), name
        assert got.logp == pytest.approx(expected.logp, rel=0, abs=1e-5)


def test_an_evaluation_with_it(code: dict) -> None:
    (result,) = code["results"].values()
    assert (result.tasks, result.responses) == (2, 2) and 0 < result.tokens_per_forward <= 1


def test_a_cache_of_ones_own(code: dict, tiny: LoadedModel) -> None:
    rounded = drawn(code["RoundedEngine"](tiny.model, tiny.mask_id, [14]), tiny)
    exact = drawn(Engine(tiny.model, tiny.mask_id, [14]), tiny)
    assert [len(t.response_ids) for t in rounded] and rounded != exact
    first = [t.logp[0] for t in rounded]
    assert first == pytest.approx([t.logp[0] for t in exact], rel=0, abs=0.1) and first != [t.logp[0] for t in exact]


def test_the_pages_files_exist() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in re.findall(r"`([a-z_]+\.py)`", text):
        assert (DOCS.parents[1] / "sample" / name).is_file(), name
