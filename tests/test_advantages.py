"""GAE over a trace, the value loss, sequences' ELBOs and importance weights: by hand, by identity, by reference."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import training_reference as plain
from hypothesis import given, settings
from hypothesis import strategies as st
from scored import scored

from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory, Trajectory
from train.objectives import (
    Tokens,
    chunk_rewards,
    explained_variance,
    importance_weights,
    loss_weights,
    place_chunks,
    policy_loss,
    sequence_shares,
    token_rewards,
    tokens_of,
    trace_advantages,
    value_loss,
    value_targets,
)
from train.packing import make_rows
from train.views import Layout, trace_views


def tokens_at(*responses: tuple[list[int], list[int]]) -> Tokens:
    """Predicted tokens of some trajectories: the indices in each response, and the steps they were unmasked at."""
    counts = torch.tensor([len(index) for index, _ in responses])
    return Tokens(
        trajectory=torch.repeat_interleave(torch.arange(len(responses)), counts),
        response_index=torch.tensor([one for index, _ in responses for one in index]),
        trace_step=torch.tensor([step for _, steps in responses for step in steps]),
    )


def trajectory(length: int, total: int | None = None) -> Trajectory:
    count = total or length
    return Trajectory("t", 0, [1], [5] * count, [0] * count, [], [], 1.0, "stop", length, 1, 1, 1.0)


@st.composite
def traces(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, values and steps of up to twelve tokens, steps with gaps and several tokens each."""
    count = draw(st.integers(1, 12))
    numbers = st.lists(st.floats(-3, 3), min_size=count, max_size=count)
    steps = draw(st.lists(st.integers(0, 8), min_size=count, max_size=count))
    return np.array(draw(numbers)), np.array(draw(numbers)), np.array(steps)


# ---- generalised advantage estimation


def test_gae_by_hand() -> None:
    """Two steps of two tokens and one: γ = 1/2, λ = 1/2.

    Last step (one token, r 4, V 2): δ = A = 2, R = 4. First: r* = 1, V* = 2, δ = 1 − 2 + ½·2 = 0, A = 0 + ¼·2 = ½.
    Its tokens: r 2, V 1: A = 1 + 1 + ½ = 2½, R = 2 + 2; r 0, V 3: A = −3 + 1 + ½ = −1½, R = 0 + 2.
    """
    rewards, values, steps = np.array([2.0, 4.0, 0.0]), np.array([1.0, 2.0, 3.0]), np.array([3, 7, 3])
    advantages, returns = trace_advantages(rewards, values, steps, gamma=0.5, lam=0.5)
    assert advantages.tolist() == pytest.approx([2.5, 2.0, -1.5])
    assert returns.tolist() == pytest.approx([4.0, 4.0, 2.0])


@settings(max_examples=60, deadline=None)
@given(traces(), st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_the_reference(trace: tuple, gamma: float, lam: float) -> None:
    found = trace_advantages(*trace, gamma, lam)
    for one, other in zip(found, plain.gae(*(list(part) for part in trace), gamma, lam)):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(traces())
def test_without_discount_advantages_are_returns_less_values(trace: tuple) -> None:
    advantages, returns = trace_advantages(*trace, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(advantages, returns - trace[1], rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(traces())
def test_with_lambda_zero_one_step_is_looked_ahead(trace: tuple) -> None:
    rewards, values, steps = trace
    advantages, _ = trace_advantages(rewards, values, steps, gamma=1.0, lam=0.0)
    for advantage, reward, value, step in zip(advantages, rewards, values, steps):
        later = sorted({other for other in steps if other > step})
        following = values[steps == later[0]].mean() if later else 0.0
        assert advantage == pytest.approx(reward - value + following, abs=1e-9)


def test_an_outcome_s_reward_lies_on_the_last_step() -> None:
    """Two trajectories, the second with process rewards; the tokens behind its end earn nothing."""
    tokens = tokens_at(([2, 0, 1], [4, 4, 5]), ([0, 1, 2], [0, 1, 1]))
    tokens.old_value = torch.zeros(6)
    samples = [scored(trajectory(3), 9.0, reward=2.0), scored(trajectory(2, 4), 9.0, 0.5, [1.0, -1.0])]
    advantages, returns = value_targets(tokens, samples, RLTrainingConfig(gam=0.5, lam=1.0), 4)
    assert returns.tolist() == [1.0, 1.0, 2.0, 1 - 0.25, -1.0, 0.0]
    assert torch.equal(advantages, returns)


def test_an_outcome_s_z_score_may_be_its_reward() -> None:
    tokens = tokens_at(([2, 0, 1], [4, 4, 5]))
    tokens.old_value = torch.zeros(3)
    settings_ = RLTrainingConfig(gam=0.5, value_reward="zscore")
    _, returns = value_targets(tokens, [scored(trajectory(3), -1.5, reward=2.0)], settings_, 4)
    assert returns.tolist() == [-0.75, -0.75, -1.5]


def chunked(votes: list[tuple[int, int]] | None, correct: bool, length: int = 8, task: str = "t") -> ScoredTrajectory:
    """A response behind a prompt of three tokens, with a judge's agreement on its chunks."""
    sample = scored(replace(trajectory(length), prompt_ids=[1, 2, 3], task_id=task))
    return replace(sample, score=replace(sample.score, correct=correct, chunk_votes=votes))


def test_chunks_earn_a_z_score_by_their_number() -> None:
    """Where the votes differ the outcome decides; of a number that one response alone has, there is no deviation."""
    samples = [
        chunked([(4, 1), (8, 0)], correct=True),
        chunked([(4, -1), (8, 0)], correct=False),
        chunked([(4, 0), (8, -1), (9, 1)], correct=False),
        chunked(None, correct=False),  # truncated: judged by nobody
        chunked([(4, 1)], correct=True, task="another"),
    ]
    root = math.sqrt(3)  # of one good and three bad
    found = chunk_rewards(samples)
    assert [[end for end, _ in one] for one in found] == [[4, 8], [4, 8], [4, 8, 9], [0], [4]]
    assert [one[0][1] for one in found] == pytest.approx([root, -1 / root, -1 / root, -1 / root, 0])
    assert [one[1][1] for one in found[:3]] == pytest.approx([math.sqrt(2), -1 / math.sqrt(2), -1 / math.sqrt(2)])
    assert found[2][2][1] == 0


@pytest.mark.parametrize(
    ("block_size", "wanted"),
    [
        # blocks: token 0 | 1 to 4 | 5 to 7; the first chunk's last token is 4, whose block ends with step 5 at token 2
        (4, [0, 0, 2.0, 0, 0, 0, 0, 3.0]),
        (None, [0, 0, 2.0, 0, 0, 0, 0, 3.0]),
        (2, [0, 0, 0, 2.0, 2.0, 0, 0, 3.0]),  # blocks: 0 | 1, 2 | 3, 4 | …
    ],
)
def test_a_chunk_s_reward_lies_on_the_last_step_of_its_last_block(block_size: int | None, wanted: list[float]) -> None:
    index, step = np.arange(8), np.array([0, 3, 5, 4, 4, 6, 7, 8])
    assert place_chunks([(5, 2.0), (8, 3.0)], index, step, prompt=3, block_size=block_size).tolist() == wanted


def test_chunks_take_the_place_of_rewards_of_tokens() -> None:
    tokens = tokens_at((list(range(8)), list(range(8))), (list(range(8)), list(range(8))))
    tokens.old_value = torch.zeros(16)
    samples = [chunked([(5, 1), (8, 1)], True), chunked([(5, -1), (8, -1)], False)]
    _, returns = value_targets(tokens, samples, RLTrainingConfig(process_placement="chunk_end"), 4)
    assert returns.tolist() == [2.0] * 5 + [1.0] * 3 + [-2.0] * 5 + [-1.0] * 3


def merged(shrink: int, block_size: int | None) -> Tokens:
    """The tokens of a response of eight tokens, unmasked one by one, with `shrink` steps merged."""
    ids, steps = list(range(10, 18)), list(range(8))
    whole = Trajectory("t", 0, [1, 2, 3, 4], ids, steps, [0.0] * 8, [], 1.0, "stop", 8, 8, 8, 1.0)
    views = trace_views(whole, Layout(9, block_size), shrink=shrink)
    return tokens_of(make_rows(0, whole.prompt_ids, ids, views), [scored(whole)])


@pytest.mark.parametrize("block_size", [4, None])
@pytest.mark.parametrize("shrink", [1, 2, 3, 4, 8])
def test_a_merged_step_is_one_step_to_the_loss_and_to_time(shrink: int, block_size: int | None) -> None:
    """Eight tokens in steps of `shrink`, of a block or of all: `loss_norm: step` and GAE go by them."""
    tokens = merged(shrink, block_size)
    width = block_size or 8
    sizes = [min(shrink, width - start) for _ in range(8 // width) for start in range(0, width, shrink)]
    weight = loss_weights(tokens, "step", max_gen_length=8)
    assert weight.tolist() == pytest.approx([1 / size for size in sizes for _ in range(size)])
    assert weight.sum() == pytest.approx(len(sizes))
    values = np.linspace(-1, 1, 8)
    own = np.repeat(np.arange(len(sizes)), sizes)
    rewards = [2.0 * (step == len(sizes) - 1) for step in own]
    wanted = plain.gae(rewards, values.tolist(), own.tolist(), 0.9, 0.8)
    tokens.old_value = torch.tensor(values)
    found = value_targets(tokens, [scored(trajectory(8), reward=2.0)], RLTrainingConfig(gam=0.9, lam=0.8), None)
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-6)


def test_weights_of_merged_steps_by_hand() -> None:
    assert loss_weights(merged(4, 4), "step", 8).tolist() == [1 / 4] * 8  # two steps: they sum to 2
    assert loss_weights(merged(3, 4), "step", 8).tolist() == [1 / 3] * 3 + [1.0] + [1 / 3] * 3 + [1.0]
    assert loss_weights(merged(3, None), "step", 8).tolist() == [1 / 3] * 6 + [1 / 2] * 2


@pytest.mark.parametrize("tokens", [None, [0.0, 1e300, 0.0]])
def test_a_value_model_is_given_no_reward_beyond_float32(tokens: list[float] | None) -> None:
    samples = [scored(trajectory(3), 0.0, -1e300, tokens)]
    given = tokens_at(([0, 1, 2], [0, 1, 2]))
    given.old_value = torch.zeros(3)
    with pytest.raises(UserError, match=r"^task 't': a reward of size 1e\+300; .* scale what reward.function"):
        value_targets(given, samples, RLTrainingConfig(), 4)


@pytest.mark.parametrize("count", [2, 4])
def test_process_rewards_must_match_the_tokens(count: int) -> None:
    sample = scored(trajectory(3, 5), 0.0, 0.0, [1.0] * count)
    with pytest.raises(UserError, match=rf"^task 't', response 0: {count} rewards for 3 tokens; .* one for each token"):
        token_rewards(sample, np.array([0]), np.array([0]))


def test_explained_variance() -> None:
    returns = np.array([0.0, 1.0, 2.0])
    assert explained_variance(returns + 5, returns) == 1.0 and explained_variance(np.zeros(3), returns) == 0.0
    assert explained_variance(2 - returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, np.ones(3)) == 0.0


# ---- the value loss


@pytest.mark.parametrize(
    ("value", "goal", "loss", "slope", "clipped"),
    [
        (0.1, 1.0, 0.405, -0.9, 0),  # within ε of the old value 0
        (0.5, 1.0, 0.32, 0.0, 1),  # towards the goal and beyond ε: flat, at (0.2 − 1)² / 2
        (-0.5, 1.0, 1.125, -1.5, 0),  # away from the goal: pulled back
        (2.0, 1.0, 0.5, 1.0, 0),  # past the goal, and further from it than the clip is
    ],
)
def test_the_clipped_value_loss(value: float, goal: float, loss: float, slope: float, clipped: int) -> None:
    now = torch.tensor([value], requires_grad=True)
    token = Tokens(torch.zeros(1), old_value=torch.zeros(1), returns=torch.tensor([goal]), weight=torch.ones(1))
    result, sums = value_loss(now, token, eps=0.2)
    result.backward()
    assert sums["loss"] == float(result.detach()) == pytest.approx(loss) and sums["clipped"] == clipped
    assert float(now.grad) == pytest.approx(slope, abs=1e-6)
    assert loss == pytest.approx(float(plain.value_term(now.detach(), 0.0, goal, 0.2)))


# ---- sequences


def test_shares_of_a_sequence() -> None:
    """A trace weighs its tokens alike; noisings of two tokens and of one weigh alike, each over its own."""
    tokens = tokens_at(([0, 1, 2], [0, 0, 1]), ([], []), ([], []), ([1], [4]))
    response, share = sequence_shares(tokens, by_noising=False)
    assert response.tolist() == [0, 0, 0, 1] and share.tolist() == pytest.approx([1 / 3] * 3 + [1])
    _, share = sequence_shares(tokens, by_noising=True)
    assert share.tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 2, 1])


def one_term(old_logp: float, reference_logp: float, advantage: float) -> Tokens:
    """What the loss takes of one token, or of one sequence."""
    values = {"old_logp": old_logp, "reference_logp": reference_logp, "advantage": advantage, "weight": 1.0}
    return Tokens(torch.zeros(1, dtype=torch.long), **{name: torch.tensor([value]) for name, value in values.items()})


def test_a_sequence_s_ratio_by_hand() -> None:
    """Three tokens' logp rise by 0.3, 0.6 and 0: the ratio is e^0.3, clipped at 1.2; the KL k2 of 0.3 per token."""
    new, old = torch.tensor([-0.7, -0.4, -1.0]), torch.full((3,), -1.0)
    _, share = sequence_shares(tokens_at(([0, 1, 2], [0, 1, 2])), by_noising=False)
    elbos = [(share * one).sum()[None] for one in (new, old)]
    whole = one_term(old_logp=float(elbos[1]), reference_logp=float(elbos[1]), advantage=2.0)
    result, sums = policy_loss(elbos[0], whole, eps=0.2, beta=0.5, estimator="k2")
    assert float(result) == pytest.approx(-1.2 * 2 + 0.5 * 0.3**2 / 2, rel=1e-5) and sums["clipped"] == 1
    assert math.exp(0.3) > 1.2


@pytest.mark.parametrize(("ratio", "eps_high", "loss"), [(1.25, None, -1.2), (1.25, 0.28, -1.25), (0.7, 0.28, -0.7)])
def test_the_upper_clip_has_a_range_of_its_own(ratio: float, eps_high: float | None, loss: float) -> None:
    above = one_term(-math.log(ratio), 0.0, 1.0)
    result, _ = policy_loss(torch.zeros(1), above, eps=0.2, beta=0.0, eps_high=eps_high)
    assert float(result) == pytest.approx(loss, rel=1e-5)
    below = one_term(-math.log(0.7), 0.0, -1.0)
    assert float(policy_loss(torch.zeros(1), below, 0.2, 0.0, eps_high=0.28)[0]) == pytest.approx(0.8, rel=1e-5)


# ---- truncated importance weights


def test_importance_weights_find_their_tokens() -> None:
    """Two views predict a token twice, in another order than the replay; one token the replay does not know."""
    replayed = tokens_at(([0, 1, 2], [0, 1, 2]), ([0], [0]))
    replayed.engine_logp = torch.full((4,), -9.0)
    replayed.trainer_logp = replayed.engine_logp + torch.tensor([0.5, 1.5, 4, 3]).log()
    tokens = tokens_at(([2, 0, 0, 1], [0, 0, 1, 1]), ([0, 5], [0, 0]))
    weights = importance_weights(tokens, replayed, cap=2.0, by_sequence=False)
    assert weights.tolist() == pytest.approx([2.0, 0.5, 0.5, 1.5, 2.0, 1.0])
    weights = importance_weights(tokens[np.arange(4)], replayed, cap=2.0, by_sequence=True)
    assert weights.tolist() == pytest.approx([3 ** (1 / 3)] * 4)
    assert importance_weights(tokens[np.arange(2)], replayed, cap=1.0, by_sequence=True).tolist() == [1.0, 1.0]
