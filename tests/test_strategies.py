"""Strategies against plain per-row Python: ties, thresholds, and never a position that is not masked."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import schema
from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request
from models import load_model
from sample.draw import Candidates
from sample.engine import Engine
from sample.strategies import (
    STRATEGIES,
    BlockState,
    Writes,
    as_writes,
    even_split,
    find_strategy,
    rank_score,
    top_k_masked,
)
from tests import reference

examples = settings(deadline=None, database=None, derandomize=True, max_examples=100)
# few values, exact in binary, so that ties and sums that just reach a bound are common
SCORES = [0.0, 0.25, 0.5, 0.75, 1.0]
ENTROPIES = [0.0, 0.125, 0.25, 0.5, 1.0]


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A batch of blocks at some denoising step; every field a strategy may look at."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 8))

    def grid(values: st.SearchStrategy) -> torch.Tensor:
        return torch.tensor(
            draw(st.lists(st.lists(values, min_size=width, max_size=width), min_size=rows, max_size=rows))
        )

    return {
        "probability": grid(st.sampled_from(SCORES)),
        "confidence": grid(st.sampled_from([-1.0, *SCORES])),  # a score by which to rank need not be a probability
        "entropy": grid(st.sampled_from(ENTROPIES)),
        "masked": grid(st.booleans()),
        "k": torch.tensor(draw(st.lists(st.integers(1, 9), min_size=rows, max_size=rows))),
    }


def written(name: str, block: dict[str, torch.Tensor], **sampling: float) -> Writes:
    """What a strategy writes."""
    other = torch.zeros_like(block["entropy"])
    drawn, tokens = block.get("drawn", other.long()), block.get("tokens", other.long())
    present = block.get("present", other + 1)
    candidates = Candidates(drawn, block["probability"], other, block["entropy"], other, other, present)
    response, clean_steps = torch.ones_like(block["masked"]), block.get("clean_steps", 0 * block["k"])
    ranked = block["confidence"], block["entropy"], block["masked"], block["k"], other
    state = BlockState(candidates, *ranked, Sampling(**sampling), tokens, response, clean_steps)
    strategy = find_strategy(name)
    return as_writes(strategy(state), state, strategy)


def call(name: str, block: dict[str, torch.Tensor], **sampling: float) -> list[set[int]]:
    """The positions whose candidates a strategy writes, row by row."""
    chosen = written(name, block, **sampling).candidates
    assert chosen.dtype == torch.bool and chosen.shape == block["masked"].shape
    return [set(row.nonzero()[:, 0].tolist()) for row in chosen]


def masked_rows(block: dict[str, torch.Tensor]) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in block["masked"]]


def most_confident(block: dict[str, torch.Tensor], row: int) -> set[int]:
    score = block["confidence"][row].tolist()
    return set(sorted(masked_rows(block)[row], key=lambda i: (-score[i], i))[: int(block["k"][row])])


def leftmost(block: dict[str, torch.Tensor], row: int) -> set[int]:
    return set(masked_rows(block)[row][: int(block["k"][row])])


@examples
@given(blocks())
def test_static_unmasks_the_k_most_confident(block: dict[str, torch.Tensor]) -> None:
    assert call("low_confidence_static", block) == [most_confident(block, row) for row in range(len(block["k"]))]


@examples
@given(blocks(), st.sampled_from(SCORES))
def test_dynamic_unmasks_all_that_reach_the_threshold_or_else_the_static_k(
    block: dict[str, torch.Tensor], threshold: float
) -> None:
    expected = []
    for row, masked in enumerate(masked_rows(block)):
        sure = {i for i in masked if block["probability"][row, i] >= threshold}
        expected.append(sure if len(sure) >= block["k"][row] else most_confident(block, row))
    assert call("low_confidence_dynamic", block, dynamic_threshold=threshold) == expected


@examples
@given(blocks())
def test_sequential_unmasks_the_leftmost_k(block: dict[str, torch.Tensor]) -> None:
    assert call("sequential", block) == [leftmost(block, row) for row in range(len(block["k"]))]


@examples
@given(blocks(), st.sampled_from([0.0, 0.125, 0.5, 1.0, 8.0]))
def test_entropy_bounded_unmasks_while_the_sum_stays_within_the_bound(
    block: dict[str, torch.Tensor], bound: float
) -> None:
    expected = []
    for row, masked in enumerate(masked_rows(block)):
        entropy = {i: block["entropy"][row, i].item() for i in masked}
        expected.append(set(reference.within_bound(entropy, bound)) if entropy else set())
    assert call("entropy_bounded", block, eb_threshold=bound) == expected


def candidates_of(block: dict[str, torch.Tensor], row: int) -> dict[int, reference.Candidate]:
    """Those of a row as the plain loop has them, which ranks by confidence."""
    probability, tokens = block["probability"][row].tolist(), block["drawn"][row].tolist()
    present = block["present"][row].tolist()
    return {i: reference.Candidate(token, probability[i], 0.0, 0.0, 1.0, present[i]) for i, token in enumerate(tokens)}


@settings(examples, max_examples=60)
@given(
    blocks(),
    st.sampled_from(["factor", "hierarchical", "revoke", "edit"]),
    st.sampled_from(SCORES),
    st.sampled_from(SCORES),
    st.integers(0, 2),
)
def test_the_newer_ones_do_as_the_plain_loop(
    block: dict[str, torch.Tensor], name: str, threshold: float, other: float, count: int
) -> None:
    """Where ties are common; the tokens that stand, what is drawn and their probabilities are made of the scores."""
    block["confidence"] = block["probability"]
    block |= {"drawn": (4 * block["probability"]).long(), "tokens": (8 * block["entropy"]).long() % 5}
    block |= {"present": block["entropy"].clamp(max=1), "clean_steps": block["k"] % 3}
    keys = {"factor": 1 + other, "low_threshold": other, "revoke_threshold": other, "edit_threshold": other}
    sampling = Sampling(
        remasking_strategy=name, dynamic_threshold=threshold, max_edit_steps=count, min_unmask=1 + count
    )
    sampling = replace(sampling, **keys)
    got = written(name, block, **vars(sampling))
    for row, masked in enumerate(masked_rows(block)):
        clean = int(block["clean_steps"][row]) + (not masked)
        canvas = reference.Canvas(block["tokens"][row].tolist(), -1)
        left = list(masked)
        _, ends = reference.write(canvas, left, candidates_of(block, row), 0, 0, clean, sampling)
        expected = {i for i, (_, candidate) in canvas.written.items() if candidate.token >= 0}
        assert set(got.candidates[row].nonzero()[:, 0].tolist()) == expected
        if got.masks is not None:
            assert set(got.masks[row].nonzero()[:, 0].tolist()) == canvas.written.keys() - expected
        if got.ends is not None:
            assert bool(got.ends[row]) == ends


@examples
@given(blocks(), st.sampled_from(sorted(STRATEGIES)))
def test_every_strategy_unmasks_masked_positions_only_and_at_least_one(
    block: dict[str, torch.Tensor], name: str
) -> None:
    for masked, chosen in zip(masked_rows(block), call(name, block)):
        assert chosen <= set(masked)
        assert bool(chosen) == bool(masked)


def plain(width: int, **rows: list) -> dict[str, torch.Tensor]:
    """One row of all-masked positions; what is not given is flat."""
    flat = {"probability": [0.5] * width, "confidence": [0.5] * width, "entropy": [1.0] * width}
    block = {name: torch.tensor([rows.get(name, value)]) for name, value in flat.items()}
    return block | {"masked": torch.tensor([rows.get("masked", [True] * width)]), "k": torch.tensor(rows.get("k", [2]))}


def test_by_hand() -> None:
    tied = plain(4, confidence=[0.5, 0.9, 0.5, 0.5], k=[2])
    assert call("low_confidence_static", tied) == [{0, 1}]
    # the threshold is on the probability, the ranking on the score
    other = plain(4, probability=[0.9, 0.1, 0.1, 0.95], confidence=[0.0, 1.0, 0.0, 0.0])
    assert call("low_confidence_dynamic", other, dynamic_threshold=0.9) == [{0, 3}]
    assert call("low_confidence_dynamic", other, dynamic_threshold=0.92) == [{0, 1}]
    hidden = plain(4, masked=[False, True, False, True], k=[3])
    assert call("sequential", hidden) == call("low_confidence_static", hidden) == [{1, 3}]
    # 0.125 + 0.25 is within 0.375, and 0.25 more is not
    low = plain(4, entropy=[0.25, 4.0, 0.125, 0.25])
    assert call("entropy_bounded", low, eb_threshold=0.375) == [{0, 2}]
    assert call("entropy_bounded", low, eb_threshold=0.0) == [{2}]


def test_many_equals_go_to_the_lower_positions() -> None:
    # more than a vector register holds: an unstable sort shows only there
    score, masked = torch.zeros(2, 257), torch.ones(2, 257, dtype=torch.bool)
    masked[1, ::2] = False
    chosen = top_k_masked(score, masked, torch.tensor([5, 3]))
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[0, 1, 2, 3, 4], [1, 3, 5]]


@pytest.mark.parametrize("target", ["confidence", "margin_confidence", "neg_entropy", "random"])
@pytest.mark.parametrize("alg_temp", [0.0, 0.01])
def test_candidates_that_end_the_response_come_last_of_the_masked(target: str, alg_temp: float) -> None:
    """Planted: the two that end (0, 3) are the best by every target; position 1 is not masked."""
    best = torch.tensor([[0.9, 0.99, 0.2, 0.8, 0.3]])
    candidates = Candidates(best.long(), best, best, 1 - best, best, best)
    stop, masked = torch.tensor([[True, False, False, True, False]]), torch.tensor([[True, False, True, True, True]])
    noise = torch.full_like(best, 0.5)

    def chosen(k: int, **sampling: object) -> list[int]:
        settings = Sampling(target=target, alg_temp=alg_temp, **sampling)
        score = rank_score(candidates, best, noise, stop, settings)
        return top_k_masked(score, masked, torch.tensor([k]))[0].nonzero()[:, 0].tolist()

    assert [chosen(k) for k in (1, 2)] == [[0], [0, 3]]
    ranked = [chosen(k, confidence_eos_eot_inf=True) for k in (1, 2, 3, 4)]
    assert ranked == [[4], [2, 4], [0, 2, 4], [0, 2, 3, 4]]  # where nothing else is left they are unmasked


@pytest.mark.parametrize("block", [1, 4, 8, 10])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 16])
def test_the_schedule_is_an_even_split_with_the_remainder_first(block: int, steps: int) -> None:
    split = even_split(block, steps, torch.arange(steps)).tolist()
    assert sum(split) == block
    assert max(split) - min(split) <= 1
    assert split == sorted(split, reverse=True)
    assert split == [reference.static_k(block, steps, step) for step in range(steps)]


def test_the_schema_names_the_strategies_there_are() -> None:
    assert set(schema.STRATEGIES) == set(STRATEGIES)


# ---- by name


@pytest.mark.parametrize(
    "name, words",
    [
        ("low_confidence", "low_confidence_static"),
        ("", "sequential"),
        ("no_such_module:function", "no_such_module"),
        ("common.errors:no_such_function", "no_such_function"),
        ("common.errors:", "module:function"),
    ],
)
def test_an_unknown_strategy_is_one_line_of_error(name: str, words: str) -> None:
    with pytest.raises(UserError, match="remasking_strategy") as caught:
        find_strategy(name)
    assert words in str(caught.value)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_strategy_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strategy_of_mine.py").write_text("def last(*arguments):\n    return arguments[3]\n")
    monkeypatch.syspath_prepend(tmp_path)
    block = plain(3, masked=[True, False, True])
    assert call("strategy_of_mine:last", block) == [{0, 2}]


@pytest.mark.parametrize(
    "number, code",
    enumerate(
        [
            "def mine(block): return block.masked & (block.tokens == 5)",
            "def mine(block, token=5): return block.masked & (block.tokens == token)",
            "def mine(a, b, c, masked, k, uniform, settings): return masked & (uniform == 0) & (settings.top_k == 0)",
            "def mine(a, b, c, masked, *rest): return masked & (len(rest) == 3)",
        ]
    ),
)
def test_what_a_strategy_of_the_users_own_takes(
    number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record; or the older seven arguments where a function can take so many."""
    (tmp_path / f"taken{number}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    block = plain(3, masked=[True, False, True]) | {"tokens": torch.tensor([[5, 5, 4]])}
    assert call(f"taken{number}:mine", block) == [{0, 2} if "masked, " in code else {0}]


@pytest.mark.parametrize(
    "number, name",
    [(0, "sure_and_calm"), (1, "sure_and_calm"), (2, "second_thoughts")],
    ids=["record", "seven arguments", "overwriting"],
)
def test_the_strategies_of_the_docs(number, name, tiny_sdar, tmp_path, monkeypatch):
    """docs/strategies.md: its function draws, unmasks what it says, and takes one position where nothing is sure."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "strategies.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_strategies.py").write_text(code[number])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_strategies", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    loaded = load_model(tiny_sdar, "sdar")
    engine = Engine(loaded.model, loaded.mask_id, ())
    request = Request("a", [1, 2, 3, 4, 5], seed=3)
    # an untrained network: probabilities of 0.02 to 0.2, about 3 nats
    steps = {}
    for bound in (0.0, 100.0):
        settings = Sampling(
            max_token=11,
            dynamic_threshold=0.01,
            eb_threshold=bound,
            remasking_strategy=f"my_strategies:{name}",
        )
        (drawn,) = engine.generate([request], settings)
        assert len(drawn.response_ids) == 11 and min(drawn.step_map) >= 0
        steps[bound] = drawn.steps
    assert steps[100.0] < 11 and (number == 2 or steps[0.0] == 11)
