"""Views: the replay of a trace, and random blocks for finetuning, against loops written from the design."""

from collections import Counter

import numpy as np
import pytest
import training_reference as plain
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schema import RLTrainingConfig, SFTTrainingConfig
from common.trajectory import Trajectory
from train.views import Example, Layout, Views, block_grid, random_block_views, random_views, trace_views

MASK, VOCABULARY = 7, 40


@st.composite
def cases(draw: st.DrawFn) -> tuple[Trajectory, int]:
    """A random trajectory and its block size; prompts with and without a remainder, lengths before the last token."""
    block_size = draw(st.sampled_from([1, 2, 4, 8]))
    prompt_length = draw(st.one_of(st.integers(1, 19), st.integers(1, 3).map(lambda n: n * block_size)))
    blocks = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return plain.random_trajectory(rng, prompt_length, blocks, block_size, VOCABULARY, MASK), block_size


def as_plain(views: Views, block_size: int) -> list[plain.PlainView]:
    """The views in the reference's words."""
    result = []
    for n in range(len(views)):
        offsets = np.flatnonzero(views.predict[n])
        columns = [values[n][offsets].tolist() for values in (views.targets, views.response_index, views.step)]
        start = int(views.block[n]) * block_size
        result.append(plain.PlainView(start, views.inputs[n].tolist(), offsets.tolist(), *columns))
    return result


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([1, 2, 4]), st.sampled_from([0, 3]))
def test_trace_views_equal_the_loops(case: tuple[Trajectory, int], shrink: int, post_num: int) -> None:
    trajectory, block_size = case
    views = trace_views(trajectory, Layout(MASK, block_size), shrink, post_num)
    assert as_plain(views, block_size) == plain.trace_views(trajectory, block_size, MASK, shrink, post_num)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([1, 2, 4]), st.sampled_from([0, 3]))
def test_every_predictable_token_is_predicted_once(case: tuple[Trajectory, int], shrink: int, post_num: int) -> None:
    trajectory, block_size = case
    views = trace_views(trajectory, Layout(MASK, block_size), shrink, post_num)
    end = min(trajectory.length + post_num, len(trajectory.response_ids))
    assert sorted(views.response_index[views.predict].tolist()) == list(range(end))
    np.testing.assert_array_equal(
        views.targets[views.predict], np.array(trajectory.response_ids)[views.response_index[views.predict]]
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_visible_is_what_was_unmasked_earlier(case: tuple[Trajectory, int]) -> None:
    trajectory, block_size = case
    views = trace_views(trajectory, Layout(MASK, block_size), post_num=len(trajectory.response_ids))
    for view in as_plain(views, block_size):
        (now,) = set(view.steps)
        for offset, token in enumerate(view.tokens):
            index = view.start + offset - len(trajectory.prompt_ids)
            if index < 0:
                assert token == trajectory.prompt_ids[index]
            elif trajectory.step_map[index] < now:
                assert token == trajectory.response_ids[index]
            else:
                assert token == MASK


def test_tokens_behind_the_end_are_replayed_but_not_predicted() -> None:
    trajectory = plain.random_trajectory(np.random.default_rng(0), 2, 2, 4, VOCABULARY, MASK)
    trajectory.step_map = [0, 1, 2, 2, 4, 3]
    trajectory.length = 4  # its second block: two tokens of the answer, two behind it
    views = as_plain(trace_views(trajectory, Layout(MASK, 4)), 4)
    a, b, c, d, _, _ = trajectory.response_ids
    first = trajectory.prompt_ids
    assert [view.tokens for view in views] == [[*first, MASK, MASK], [*first, a, MASK], [MASK, MASK, MASK, MASK]]
    assert [view.targets for view in views] == [[a], [b], [c, d]]
    longer = as_plain(trace_views(trajectory, Layout(MASK, 4), post_num=1), 4)
    assert [view.steps for view in longer] == [[0], [1], [2, 2], [4]]
    assert longer[-1].tokens == [c, d, MASK, trajectory.response_ids[5]]


def test_a_broken_block_is_refused() -> None:
    with pytest.raises(AssertionError, match="no whole number of blocks"):
        block_grid([1, 2, 3], [4, 5], 4)


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([(0.0, 1.0), (0.1, 0.9), (0.0, 0.05)]), st.sampled_from([0, 3]))
def test_random_views(case: tuple[Trajectory, int], bounds: tuple[float, float], post_num: int) -> None:
    trajectory, block_size = case
    prompt, response, length = trajectory.prompt_ids, trajectory.response_ids, trajectory.length
    rng = np.random.default_rng(len(response))
    training = SFTTrainingConfig(lower_p=bounds[0], upper_p=bounds[1], post_num=post_num)
    views = random_block_views(Example(prompt, response, length), Layout(MASK, block_size), training, rng)
    first, end = len(prompt) // block_size, len(prompt) + min(length + post_num, len(response))
    # one view of every block that has a token to predict, and in each at least one
    assert views.block.tolist() == list(range(first, -(-end // block_size)))
    assert views.predict.any(1).all()
    for view in as_plain(views, block_size):
        for offset, token in enumerate(view.tokens):
            index = view.start + offset - len(prompt)
            clean = prompt[index] if index < 0 else response[index]
            assert token in ((clean,) if index < 0 else (clean, MASK))
            assert (offset in view.offsets) == (token == MASK and index < length + post_num)


def test_random_views_noise_what_lies_behind_the_end() -> None:
    rng = np.random.default_rng(5)
    behind, training = Counter(), SFTTrainingConfig(lower_p=0.5, upper_p=0.5)
    for _ in range(200):
        views = random_block_views(Example([1, 2], [3, 4, 5, 6, 8, 9], 3), Layout(MASK, 4), training, rng)
        behind.update((views.inputs[1][1:] == MASK).tolist())
        assert not views.predict[1][1:].any()
    assert 0.4 < behind[True] / behind.total() < 0.6


def test_share_of_masked_tokens_is_uniform() -> None:
    """Each block has a t of its own from U(lower_p, upper_p), whose mean and deviation the masked shares show."""
    rng, shares = np.random.default_rng(0), []
    low, high, block_size = 0.2, 0.8, 256  # so wide that the share of a block is its t
    layout, training = Layout(MASK, block_size), SFTTrainingConfig(lower_p=low, upper_p=high)
    for _ in range(20):
        views = random_block_views(Example([1], [2] * (40 * block_size - 1), 10**6), layout, training, rng)
        shares += views.predict.mean(1).tolist()
    assert len(shares) == 800
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert np.std(shares) == pytest.approx((high - low) / np.sqrt(12), abs=0.02)
    quarters, _ = np.histogram(shares, bins=4, range=(low, high))
    assert quarters.min() > 150


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 3), st.sampled_from([0, 3]))
def test_a_coupled_pair_divides_the_response(case: tuple[Trajectory, int], times: int, post_num: int) -> None:
    """Under block attention: noisings 2n and 2n + 1 predict every predictable token once, and show each other's."""
    trajectory, block_size = case
    rng = np.random.default_rng(len(trajectory.response_ids))
    training = RLTrainingConfig(mask_times_per_sample=times, post_num=post_num)
    views = random_views(trajectory, Layout(MASK, block_size), training, rng, coupled=True)
    end = min(trajectory.length + post_num, len(trajectory.response_ids))
    for pair in range(times):
        own = views.predict & (views.step // 2 == pair)
        assert sorted(views.response_index[own].tolist()) == list(range(end))
    visible = (views.inputs != MASK) & (views.response_index >= 0)
    assert (views.inputs[visible] == views.targets[visible]).all() and not (visible & views.predict).any()
