"""Losses, their denominators and advantages against numbers worked out by hand and the plain reference."""

import math

import numpy as np
import pytest
import torch
import training_reference as plain
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from train.objectives import Tokens, group_advantages, keep_group, kl_estimate, loss_weights, policy_loss


def tokens(old_logp: list[float], advantage: list[float], reference_logp: list[float] | None = None) -> Tokens:
    return Tokens(
        trajectory=torch.zeros(len(old_logp), dtype=torch.long),
        old_logp=torch.tensor(old_logp),
        reference_logp=torch.tensor(reference_logp or old_logp),
        advantage=torch.tensor(advantage),
        weight=torch.ones(len(old_logp)),
    )


def of_traces(*steps: list[int]) -> Tokens:
    """The tokens of some trajectories, by the steps of each one's trace; every step is a view."""
    trajectory = torch.repeat_interleave(torch.arange(len(steps)), torch.tensor([len(one) for one in steps]))
    trace_step = torch.tensor([step for one in steps for step in one])
    return Tokens(trajectory, view=100 * trajectory + trace_step, trace_step=trace_step)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.5, 1.0, -1.2, 0.0, 1),  # good and already likelier: flat
        (0.5, 1.0, -0.5, -0.5, 0),  # good and less likely: pulled back
        (1.5, -1.0, 1.5, 1.5, 0),  # bad and likelier: pushed down
        (0.5, -1.0, 0.8, 0.0, 1),  # bad and already less likely: flat
        (1.1, 2.0, -2.2, -2.2, 0),  # within the clip on either side
        (0.9, -2.0, 1.8, 1.8, 0),
    ],
)
def test_the_clipped_loss(ratio: float, advantage: float, loss: float, slope: float, clipped: int) -> None:
    logp = torch.tensor([-1.0], requires_grad=True)
    result, sums = policy_loss(logp, tokens([-1.0 - math.log(ratio)], [advantage]), eps=0.2, beta=0.0)
    result.backward()
    assert sums["loss"] == float(result.detach()) == pytest.approx(loss, rel=1e-5)
    assert float(logp.grad) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert sums["clipped"] == clipped and sums["terms"] == 1


def test_clip_fraction_counts_flat_tokens() -> None:
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.0, 3.0], [1.0, -1.0, 1.0, -1.0, 1.0, 0.0]
    old = [-1.0 - math.log(ratio) for ratio in ratios]
    result, sums = policy_loss(torch.full((6,), -1.0), tokens(old, advantages), eps=0.2, beta=0.0)
    assert sums["clipped"] == 2 and sums["terms"] == 6
    assert float(result) == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8 - 1.0, rel=1e-5)


def test_a_ratio_is_bounded_before_it_is_exponentiated() -> None:
    result, _ = policy_loss(torch.tensor([0.0]), tokens([-200.0], [-1.0]), eps=0.2, beta=0.0)
    assert float(result) == pytest.approx(math.exp(10), rel=1e-5)


def test_kl_estimates() -> None:
    logp, reference = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0 - math.log(2), -1.0 + math.log(2)])
    expected = torch.tensor([0.0, 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)])
    torch.testing.assert_close(kl_estimate(logp, reference, "k3"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(kl_estimate(logp, reference, "k1"), logp - reference, rtol=0, atol=0)
    assert float(kl_estimate(torch.tensor(-30.0), torch.tensor(-1.0))) == pytest.approx(math.exp(10) - 11, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "kl"), [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5)]
)
def test_the_penalty_is_added_with_beta(estimator: str, kl: float) -> None:
    token = tokens([-1.0], [0.5], reference_logp=[-1.0 - math.log(2)])
    result, sums = policy_loss(torch.tensor([-1.0]), token, eps=0.2, beta=0.1, estimator=estimator)
    assert float(result) == pytest.approx(-0.5 + 0.1 * kl, rel=1e-5)
    assert sums["kl"] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize(
    ("norm", "weights"),
    [
        ("token", [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("length", [1 / 16, 1 / 16, 1 / 16, 1 / 16]),  # / 8 tokens / 2 responses
        ("step", [1 / 4, 1 / 2, 1 / 4, 1 / 2]),  # steps 3 (two tokens), 5 (one), and 0 of the other
        ("view", [1 / 6, 1 / 3, 1 / 6, 1 / 3]),  # three views, whatever responses they are of
        ("view_sum", [1 / 3, 1 / 3, 1 / 3, 1 / 3]),
        ("sum", [1 / 2, 1 / 2, 1 / 2, 1 / 2]),  # / 2 responses
    ],
)
def test_the_norms(norm: str, weights: list[float]) -> None:
    assert loss_weights(of_traces([3, 5, 3], [0]), norm, max_gen_length=8).tolist() == pytest.approx(weights)


def test_the_kl_may_have_weights_of_its_own() -> None:
    given = tokens([-1.0, -1.0], [0.5, -0.5], reference_logp=[-1.0 - math.log(2)] * 2)
    given.weight, given.kl_weight = torch.tensor([0.5, 0.25]), torch.tensor([2.0, 3.0])
    result, sums = policy_loss(torch.tensor([-1.0, -1.0]), given, eps=0.2, beta=0.1, estimator="k1")
    assert float(result) == pytest.approx(-0.25 + 0.125 + 0.1 * 5 * math.log(2), rel=1e-5)
    assert sums["kl"] == pytest.approx(2 * math.log(2), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(["token", "length", "step", "view", "sum"]), st.sampled_from(["k1", "k3"])
)
def test_the_loss_equals_the_reference(seed: int, norm: str, estimator: str) -> None:
    rng = np.random.default_rng(seed)
    traces = [rng.integers(0, 4, rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 4))]
    found = of_traces(*traces)
    count = len(found)
    logp, old, reference, advantage = (rng.normal(0, 0.5, count) for _ in range(4))
    plain_tokens = [
        plain.PlainToken(torch.tensor(logp[i]), old[i], reference[i], advantage[i], step)
        for i, step in enumerate(step for trace in traces for step in trace)
    ]
    ends = np.cumsum([len(trace) for trace in traces])
    responses = [plain_tokens[end - len(trace) : end] for trace, end in zip(traces, ends)]
    expected = plain.update_loss(responses, norm, 20, eps=0.1, beta=0.3, estimator=estimator)
    found.weight = torch.tensor(loss_weights(found, norm, 20))
    found.old_logp, found.reference_logp, found.advantage = map(torch.tensor, (old, reference, advantage))
    result, _ = policy_loss(torch.tensor(logp), found, eps=0.1, beta=0.3, estimator=estimator)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_advantages_by_hand() -> None:
    assert group_advantages([1, 0, 0, 0]).tolist() == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)
    assert group_advantages([2.0, -2.0]).tolist() == [1.0, -1.0]


def test_other_advantages_by_hand() -> None:
    assert group_advantages([3, 1, 2, 0], "mean").tolist() == [1.5, -0.5, 0.5, -1.5]
    assert group_advantages([3, 1, 2, 0], "loo").tolist() == pytest.approx([2, 1 - 5 / 3, 2 - 4 / 3, -2])
    assert group_advantages([0.1 + 0.2, 0.3], "loo").tolist() == group_advantages([2.0], "mean").tolist() * 2


@given(st.floats(-100, 100), st.integers(1, 32))
def test_equal_rewards_have_no_advantage(reward: float, size: int) -> None:
    assert group_advantages([reward] * size).tolist() == [0.0] * size


@pytest.mark.parametrize(
    "rewards",
    [[sum([0.1] * n) / n for n in range(1, 9)], [0.3, 0.1 + 0.2], [1e300, 1e300], [-7e15, -7e15 + 1]],
    ids=str,
)
def test_rewards_that_differ_by_rounding_are_equal(rewards: list[float]) -> None:
    assert group_advantages(rewards).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("rewards", [[1e-9, 2e-9], [1e9, 1e9 + 1], [1e150, -1e150]], ids=str)
def test_small_differences_between_rewards_count(rewards: list[float]) -> None:
    low, high = sorted(range(2), key=rewards.__getitem__)
    assert group_advantages(rewards)[[low, high]].tolist() == pytest.approx([-1.0, 1.0], rel=1e-6)


@pytest.mark.parametrize(
    "rewards",
    [[1e300, 0.0], [1e300, -1e300], [1.7e308, -1.7e308], [math.inf, 0.0], [math.inf] * 2, [math.nan, 1.0], [1e-200, 0]],
    ids=str,
)
def test_rewards_without_a_finite_deviation_are_refused(rewards: list[float]) -> None:
    with pytest.raises(UserError, match=r"^rewards from .* cannot be compared: their deviation is .*reward.function"):
        group_advantages(rewards)


@given(st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=2, max_size=16))
def test_advantages_equal_the_reference(rewards: list[float]) -> None:
    np.testing.assert_allclose(group_advantages(rewards), plain.z_scores(rewards), rtol=1e-9, atol=1e-9)


def test_the_bounds_of_kept_groups_are_inclusive() -> None:
    for size in range(1, 17):
        for right in range(size + 1):
            group, share = [True] * right + [False] * (size - right), right / size
            assert keep_group(group, [share, share])
            assert not keep_group(group, [share + 1e-6, 1.1])
            assert not keep_group(group, [-0.1, share - 1e-6])
            assert keep_group(group, None)
    assert keep_group([True, *[False] * 4], [0.2, 0.8]) and keep_group([False, *[True] * 4], [0.2, 0.8])
    assert not keep_group([False] * 5, [0.2, 0.8]) and not keep_group([True] * 5, [0.2, 0.8])
