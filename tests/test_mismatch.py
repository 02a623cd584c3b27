"""The mismatch is measured on a random part of the replays: no bias, by the seed alone, within its share of a step."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_policy import Drawn
from scored import scored

from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory, Trajectory
from train import rl_step
from train.packing import PackedBatch, Row
from train.rl_step import sampled_mismatch
from train.views import Layout, some_views, trace_views

BLOCK, MASK = 4, 99
LAYOUT = Layout(MASK, BLOCK)
APART = 0.5  # of the two logp, where they differ
K3 = math.exp(APART) - 1 - APART  # of trainer ‖ engine where the engine's logp is higher by it


def responses() -> list[ScoredTrajectory]:
    """A block unmasked at once, in which logp differ (ids below 10), then one to three of a token a step."""
    made = []
    for number, blocks in enumerate((1, 3, 2)):
        ids = [*range(4), *range(10, 10 + 4 * blocks)]
        steps = [0, 0, 0, 0, *range(1, 1 + 4 * blocks)]
        one = Trajectory("t", number, [5] * 4, ids, steps, [-1.0] * len(ids), [], 1, "stop", len(ids), 9, 0, 1.0)
        made.append(scored(one, 1.0))
    return made


def rows_of_tokens(count: int) -> list[Row]:
    """A step whose rows have so many tokens."""
    nothing = np.zeros(0, dtype=np.int64)
    return [Row(0, np.zeros(count, dtype=np.int64), *[nothing] * 7)]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[PackedBatch]:
    """The micro-batches that were computed; the trainer's logp are the engine's, but for ids below 10."""
    seen: list[PackedBatch] = []

    def logp(learner: None, batches: list[PackedBatch], temperature: float) -> torch.Tensor:
        seen.extend(batches)
        result = torch.zeros(sum(len(batch.predicted) for batch in batches))
        for batch in batches:
            result[batch.predicted] = -1.0 - APART * (batch.target < 10)
        return result

    monkeypatch.setattr(rl_step, "batch_logp", logp)
    return seen


def measured(seed: int, most: int, tokens: int = 10**6) -> dict[str, float]:
    training = RLTrainingConfig(mismatch_views=most)
    return sampled_mismatch(None, responses(), rows_of_tokens(tokens), training, LAYOUT, [seed, 1], exact=False)


def test_a_part_gives_the_mean_over_all_tokens(forwards: list[PackedBatch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Views hold one token or four, of which only the latter differ: a mean over what was drawn would be too small."""
    tokens = sum(len(one.trajectory.response_ids) for one in responses())
    whole = measured(0, most=10**6)
    assert whole["mismatch_kl"] == pytest.approx(3 * 4 * K3 / tokens) and whole["logp_diff_max"] == APART
    assert measured(7, 5) == measured(7, 5) and len({measured(seed, 5)["mismatch_kl"] for seed in range(9)}) > 1
    # every view once, instead of one at random
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed: SimpleNamespace(choice=lambda count, size, replace: np.array([seed[0]]))
    )
    found = [measured(view, 1)["mismatch_kl"] for view in range(3 + 24)]
    assert np.mean(found) == pytest.approx(whole["mismatch_kl"])


def test_it_takes_a_twentieth_of_the_step_at_most(forwards: list[PackedBatch]) -> None:
    """A view counts as a forward of the longest response; one is always measured."""
    longest = 4 + 16
    for tokens, views in ((100, 1), (20 * longest, 3), (100 * longest, 15), (10**6, 3 + 24)):
        forwards.clear()
        measured(3, most=64, tokens=tokens)
        predicted = sum((batch.view > 0).sum() // BLOCK for batch in forwards)
        assert predicted == views


def test_some_views_are_some_of_all() -> None:
    views = trace_views(responses()[1].trajectory, LAYOUT)
    some = some_views(views, np.array([0, 5, 6]))
    assert len(some) == 3 and not some.whole and some.inputs.tolist() == views.inputs[[0, 5, 6]].tolist()


def test_a_view_that_differs_is_seen(drawn: Drawn) -> None:
    """With the policy's own numbers nothing is wrong; where a response records others, its view stops the run."""
    keys = {"shrink": 2, "mismatch_views": 10**6}
    assert drawn.learn(**keys)["logp_diff_max"] <= 1e-5
    with torch.no_grad():
        drawn.learner.network.load_state_dict(drawn.start)
    first = drawn.samples[0]
    logp = [*first.trajectory.logp]
    logp[2] += 0.01
    changed = [replace(first, trajectory=replace(first.trajectory, logp=logp)), *drawn.samples[1:]]
    training, layout = RLTrainingConfig(**keys), Layout(drawn.mask_id, BLOCK)
    with pytest.raises(UserError, match=r"logp_diff_max 1\.00e-02 before the first update"):
        sampled_mismatch(drawn.learner, changed, rows_of_tokens(10**6), training, layout, [0], exact=True)
