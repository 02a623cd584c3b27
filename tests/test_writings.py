"""Traces whose tokens were overwritten: the record, the reference's responses, the engine against a plain loop."""

import json
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request, Score, ScoredTrajectory, Task, Trajectory, Writing
from models import LoadedModel, load_model, load_network
from models.tiny import build_tiny
from rollout.results import overwriting_figures
from rollout.samples import take_up, write_samples
from sample.engine import Engine
from sample.step import Graphs
from sample.traces import trace_of
from tests.reference import sample_block_attention
from tests.test_engine import DRAWS, check, requests_of, run
from tests.test_engine_cuda import LateWatch

GOLDEN = Path(__file__).parent / "golden" / "llada2"
CASES = [case for case in json.loads((GOLDEN / "expected.json").read_text())["cases"] if "edits" in case]
# of an untrained network, whose probabilities are 0.02 to 0.25: these bounds cut both ways
BOUNDS = {
    "dynamic_threshold": 0.1,
    "low_threshold": 0.07,
    "revoke_threshold": 0.09,
    "edit_threshold": 0.09,
    "factor": 2.75,
    "max_edit_steps": 3,
}

EDITED = Trajectory(
    "a", 0, [1], [5, 6], [2, 1], [-0.5, -1.0], [0.6, 0.4], 1.0, "length", 2, 3, 4, 1.0, "text",
    [Writing(0, 0, 9, 0.0), Writing(1, 0, 7, -0.25)],
)  # fmt: skip
PLAIN = Trajectory("b", 1, [1], [5], [0], [-0.5], [0.6], 1.0, "length", 1, 1, 2, 1.0, "text")


def test_overwritten_writings_are_written_and_read_back(tmp_path: Path) -> None:
    tasks = [Task("a", "q"), Task("b", "q")]
    group = [ScoredTrajectory(task, one, Score(0.0, False, "failed")) for task, one in zip(tasks, (EDITED, PLAIN))]
    path = tmp_path / "samples.jsonl"
    write_samples(path, [group], {"step": 0, "setting": "edit"})
    edited, plain = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert edited["overwritten"] == [[0, 0, 9, 0.0], [1, 0, 7, -0.25]]
    # where nothing was overwritten the line is as it always was
    names = [one.name for one in fields(Trajectory) if one.name not in ("overwritten", "segments", "routes")]
    assert list(plain)[-len(names) :] == names
    back = take_up(path, tasks, step=0)["edit"]
    assert (back["a", 0].trajectory, back["b", 1].trajectory) == (EDITED, PLAIN)
    assert overwriting_figures(group) == {"overwritten": 2 / 3, "ended_by_edits": 0}
    assert overwriting_figures(group[1:]) == {}
    assert isinstance(back["a", 0].trajectory.overwritten[1], Writing)


def test_the_trace_page_gets_the_text_of_what_was_overwritten(tiny: LoadedModel) -> None:
    mask, ids = tiny.mask_id, tiny.tokenizer.encode("12")
    one = replace(
        EDITED, overwritten=[Writing(0, 0, ids[0], -0.25), Writing(1, 0, mask, 0.0), Writing(1, 1, ids[1], -1)]
    )
    assert trace_of(tiny, one, 4)["overwritten"] == [[0, 0, "1", -0.25], [1, 0, None, 0.0], [1, 1, "2", -1]]
    assert "overwritten" not in trace_of(tiny, PLAIN, 4)


def history(one: Trajectory) -> dict[int, list[tuple[int, int]]]:
    """Step and token of every writing of each response position, in order."""
    written: dict[int, list[tuple[int, int]]] = {}
    for writing in one.overwritten:
        written.setdefault(writing.position, []).append((writing.step, writing.token))
    for position, last in enumerate(zip(one.step_map, one.response_ids)):
        written.setdefault(position, []).append(last)
    return written


# many tokens are accepted and revoked
RESTLESS = BOUNDS | {"dynamic_threshold": 0.06, "revoke_threshold": 0.3}


@pytest.fixture(scope="module")
def golden() -> torch.nn.Module:
    return load_network(GOLDEN, "llada2")


@pytest.fixture(scope="module")
def tiny(tiny_sdar: Path) -> LoadedModel:
    return load_model(tiny_sdar, "sdar")


@pytest.mark.parametrize(
    "case, merge",
    [(case, True) for case in CASES] + [(case, False) for case in CASES if case["prompt"] in ("prompt_6", "prompt_10")],
    ids=lambda value: value["prompt"] if isinstance(value, dict) else None,
)
def test_edits_as_the_reference_makes_them(golden: torch.nn.Module, case: dict, merge: bool) -> None:
    """Tokens, the steps of first unmasking, every edit and the number of forwards."""
    expected = load_file(GOLDEN / "expected.safetensors")
    settings = Sampling(
        block_size=case["block_size"],
        max_token=case["gen_length"],
        temperature=0.0,
        remasking_strategy="edit",
        dynamic_threshold=case["threshold"],
        edit_threshold=case["editing_threshold"],
        max_edit_steps=case["max_post_steps"],
        min_unmask=case["num_to_transfer"],
        merge_commit=merge,
    )
    ids = expected[case["prompt"]].tolist()
    (got,) = Engine(golden, 159, [157] if case["eos_early_stop"] else []).generate([Request("one", ids)], settings)
    tokens, count, written = expected[case["tokens"]].tolist()[len(ids) :], len(got.response_ids), history(got)
    assert got.response_ids[: len(tokens)] == tokens[:count]
    steps = expected[case["step_map"]].tolist()
    assert [written[position][0][0] for position in range(min(count, len(steps)))] == steps[:count]
    edits = [
        [step, len(ids) + position, old, new]
        for position, writings in written.items()
        for (_, old), (step, new) in pairwise(writings)
    ]
    assert sorted(edits) == sorted(expected[case["edits"]].tolist())
    assert (got.length, got.steps) == (case["length"], case["nfe"])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("strategy, merge, block", [
    ("factor", True, 4), ("hierarchical", True, 8), ("revoke", True, 8), ("revoke", False, 4), ("edit", True, 4),
    ("edit", False, 8),
])  # fmt: skip
def test_equals_the_plain_loop(tiny: LoadedModel, strategy: str, merge: bool, block: int, draw: str) -> None:
    options = BOUNDS | DRAWS[draw]
    settings = Sampling(block_size=block, max_token=13, remasking_strategy=strategy, merge_commit=merge, **options)
    requests = requests_of(8, 3, 13, seed=block)
    got = run(Engine(tiny.model, tiny.mask_id, [14]), requests, settings)
    for request in requests:
        check(got[request.task_id], sample_block_attention(tiny.model, tiny.mask_id, [14], request, settings))
    overwritten = [one for trajectory in got.values() for one in trajectory.overwritten]
    if strategy in ("factor", "hierarchical"):
        assert not overwritten
    elif draw != "filtered":
        assert overwritten
    assert all((one.token == tiny.mask_id) <= (one.logp == 0) for one in overwritten)


@pytest.mark.parametrize("strategy, merge", [("revoke", False), ("edit", True)])
def test_company_memory_and_late_looks_change_nothing(tiny: LoadedModel, strategy: str, merge: bool) -> None:
    """Alone, side by side, in a cache in which not all fit, in fixed shapes that are looked at every third step."""
    settings = Sampling(block_size=8, max_token=18, remasking_strategy=strategy, merge_commit=merge, **RESTLESS)
    requests = requests_of(3, 9, 13, 4)
    engine = Engine(tiny.model, tiny.mask_id, [14])
    alone = {one.task_id: one for request in requests for one in engine.generate([request], settings)}
    assert any(one.overwritten for one in alone.values())
    for change in ({"max_active": 2}, {"cache_tokens": 96}):
        for task, trajectory in run(engine, requests[::-1], replace(settings, **change)).items():
            check(trajectory, alone[task])
    fixed = Engine(tiny.model, tiny.mask_id, [14])
    fixed.graphs, fixed.watch = Graphs(), LateWatch()
    fixed.graphs.usable = False
    for task, trajectory in run(fixed, requests, replace(settings, max_active=3)).items():
        check(trajectory, alone[task])


@pytest.mark.parametrize("strategy, merge", [("revoke", True), ("edit", False)])
def test_who_gives_way_keeps_what_it_overwrote(tiny: LoadedModel, strategy: str, merge: bool) -> None:
    settings = Sampling(block_size=8, max_token=24, remasking_strategy=strategy, merge_commit=merge, **RESTLESS)
    engine, requests, waited = Engine(tiny.model, tiny.mask_id, []), requests_of(45, 41), []
    alone = {one.task_id: one for request in requests for one in engine.generate([request], settings)}

    def on_step() -> None:
        # who gave way, no call of the door says
        states = [sequence.state for sequence in engine.waiting if sequence.state is not None]
        waited.extend(int(state.overwritten_count[0]) for state in states)

    for one in engine.generate(requests, replace(settings, cache_tokens=132), on_step):
        check(one, alone[one.task_id])
    assert any(waited)


def test_a_response_ends_where_no_more_can_be_kept(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its final blocks are as they would be; what it overwrote before is whole; others go on."""
    settings = Sampling(max_token=32, remasking_strategy="edit", **BOUNDS | {"edit_threshold": 0.0})
    requests = requests_of(8, 5)
    free = run(Engine(tiny.model, tiny.mask_id, []), requests, settings)
    for module in ("sample.step", "sample.engine"):
        monkeypatch.setattr(f"{module}.OVERWRITTEN_PER_TOKEN", 1)
    cut = run(Engine(tiny.model, tiny.mask_id, []), requests, settings)
    for task, one in cut.items():
        assert one.finish_reason == "edits" and len(one.overwritten) <= 35 < len(free[task].overwritten)
        assert 0 < one.length < len(one.response_ids) < 32
        assert one.response_ids[: one.length] == free[task].response_ids[: one.length]
        kept = [writing for writing in free[task].overwritten if writing.position < one.length]
        assert [writing for writing in one.overwritten if writing.position < one.length] == kept


def test_edits_are_of_block_attention(tmp_path: Path, tiny: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny("llada", tmp_path, seed=3)
    loaded = load_model(tmp_path, "llada")
    settings = Sampling(max_token=8, block_size=8, remasking_strategy="edit", **BOUNDS)
    with pytest.raises(UserError, match=r"'edit' is of block attention.*take 'revoke'") as caught:
        run(Engine(loaded.model, loaded.mask_id, []), requests_of(4), settings)
    assert "\n" not in str(caught.value)
    engine = Engine(tiny.model, tiny.mask_id, [])
    for _ in range(2):
        run(engine, requests_of(4), settings)
    assert capsys.readouterr().out.count("trained_to_edit") == 1


# ---- strategies of the user's own


OWN = """
import torch
from sample.strategies import Writes, overwriting

@overwriting
def endless(block):
    return Writes(block.masked | (block.tokens != block.tokens), ends=block.clean_steps < 0)

@overwriting
def trespasser(block):
    return Writes(block.masked | ~block.response)

@overwriting
def restless(block):  # two a step; the block's first is masked again whenever two were unmasked beside it
    left = block.masked & (block.masked.cumsum(1) <= 2)
    return Writes(left, block.response & ~block.masked & (block.response.cumsum(1) == 1) & (left.sum(1, True) == 2))

@overwriting
def wide(block):
    return Writes(torch.cat((block.masked, block.masked), 1))

@overwriting
def soft(block):
    return Writes(block.masked, masks=block.candidates.probability)

def unmarked(block):
    return Writes(block.masked, masks=block.masked)

@overwriting
def nothing(block):
    pass
"""
FAULTS = [
    ("endless", "wrote into the prompt, or did not end a block in 6 forwards"),
    ("trespasser", "wrote into the prompt, or did not end a block"),
    ("wide", r"returned a tensor \(2, 8\) of torch.bool; what it writes is a bool tensor \(2, 4\)"),
    ("soft", r"returned a tensor \(2, 4\) of torch.float32; what it writes"),
    ("unmarked", "mark it with sample.strategies.overwriting"),
    ("nothing", "returned nothing"),
]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_writings.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name, words", FAULTS)
def test_a_strategy_that_goes_astray_is_one_line(tiny: LoadedModel, own: None, name: str, words: str) -> None:
    settings = Sampling(max_token=6, remasking_strategy=f"own_writings:{name}", max_edit_steps=2)
    with pytest.raises(UserError, match=f"own_writings:{name}.*{words}") as caught:
        run(Engine(tiny.model, tiny.mask_id, []), requests_of(6, 5), settings)
    assert "\n" not in str(caught.value)
    isolated = Engine(tiny.model, tiny.mask_id, [], isolate_faults=True)
    isolated.set_up(settings, requests_of(6, 5))
    ids, errors = isolated.add(requests_of(6, 5)), {}
    while isolated.busy:
        isolated.step()
        errors |= {finished.id: finished.error for finished in isolated.finished()}
    assert errors.keys() == set(ids) and all(isinstance(error, UserError) for error in errors.values())


def test_a_strategy_of_ones_own_may_overwrite(tiny: LoadedModel, own: None) -> None:
    """Two masks a step; the block's first token is masked again while it can be, and comes last."""
    settings = Sampling(max_token=8, remasking_strategy="own_writings:restless")
    (one,) = Engine(tiny.model, tiny.mask_id, []).generate(requests_of(4), settings)
    assert one.step_map == [2, 0, 1, 1, 5, 3, 4, 4]
    assert [writing[:2] for writing in one.overwritten] == [(0, 0), (1, 0), (3, 4), (4, 4)]
    assert [writing.token == tiny.mask_id for writing in one.overwritten] == [False, True] * 2
    assert [writing.logp == 0 for writing in one.overwritten] == [False, True] * 2
