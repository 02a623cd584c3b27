"""pass@k, majority@k, clustered errors and the paired tests, each against counting by hand."""

import itertools
import math
import random
import statistics

import pytest

from rollout.statistics import (
    bootstrap_interval,
    majority_at_k,
    mean_and_error,
    pass_at_k,
    shown_ks,
    sign_flip_test,
)


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(correct: int, k: int) -> None:
    responses = [True] * correct + [False] * (5 - correct)
    subsets = list(itertools.combinations(responses, k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_majority_by_hand() -> None:
    # the right answer 7, written twice in different ways, against 8 and an abstention
    assert majority_at_k(["7", "8", "7.0", None], [True, False, True, False], 4) == 1
    assert majority_at_k(["7", "8", "8"], [True, False, False], 3) == 0
    assert majority_at_k(["7", "8"], [True, False], 2) == 0.5  # a tie
    assert majority_at_k(["1", "2", "3"], [True, False, False], 3) == pytest.approx(1 / 3)
    assert majority_at_k([None, None], [False, False], 2) == 0
    # two of three: {7, 8} and {7, 8} tie, {8, 8} is wrong
    assert majority_at_k(["7", "8", "8"], [True, False, False], 2) == pytest.approx(1 / 3)


def test_majority_of_many_is_close_to_the_exact_one() -> None:
    """40 responses, k = 3: 9,880 subsets are sampled, and the expectation is known in closed form."""
    votes, right = ["a"] * 24 + ["b"] * 16, [True] * 24 + [False] * 16
    exact = (math.comb(24, 3) + math.comb(24, 2) * 16) / math.comb(40, 3)
    found = majority_at_k(votes, right, 3)
    assert found == pytest.approx(exact, abs=0.03) and found == majority_at_k(votes, right, 3)


def test_shown_ks() -> None:
    assert [shown_ks(n) for n in (1, 2, 3, 8, 10)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]


def test_the_error_is_over_tasks() -> None:
    values = [0.5, 1.0, 0.25, 0.0]
    assert mean_and_error(values) == (pytest.approx(0.4375), pytest.approx(statistics.stdev(values) / 2))
    assert mean_and_error([0.5]) == (0.5, 0.0)


def all_signs(differences: list[int]) -> float:
    observed = abs(sum(differences))
    sums = [sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=9)]
    return sum(abs(one) >= observed for one in sums) / len(sums)


@pytest.mark.parametrize("seed", range(5))
def test_the_permutation_test_equals_all_512_sign_patterns(seed: int) -> None:
    draw = random.Random(seed)
    differences = [draw.randint(-4, 6) for _ in range(9)]
    assert sign_flip_test(differences) == pytest.approx(all_signs(differences))


def test_with_single_responses_it_is_mcnemars_exact_test() -> None:
    better, worse = 14, 5
    tail = sum(math.comb(19, k) for k in range(worse + 1)) / 2**19
    assert sign_flip_test([1] * better + [-1] * worse + [0] * 30) == pytest.approx(2 * tail)
    assert sign_flip_test([0, 0]) == 1 and sign_flip_test([1, -1]) == 1
    assert sign_flip_test([3] * 1000) == pytest.approx(2.0**-999, rel=1e-6)


def test_the_bootstrap_interval_covers_the_mean_and_repeats() -> None:
    draw = random.Random(1)
    values = [draw.gauss(0.2, 1) for _ in range(400)]
    low, high = bootstrap_interval(values, rounds=2000)
    assert (low, high) == bootstrap_interval(values, rounds=2000)
    mean, error = mean_and_error(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.02) and high == pytest.approx(mean + 1.96 * error, abs=0.02)
