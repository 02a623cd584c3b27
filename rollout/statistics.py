"""What may be concluded from counts: errors of means, pass@k, majority@k, and whether two evaluations differ."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np

ENUMERATED = 2000  # subsets up to which an expectation over subsets is exact


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error. Over the means of tasks it is the error clustered by task; 0 for one value."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))


def pass_at_k(responses: int, correct: int, k: int) -> float:
    """Probability that k responses drawn from these without replacement hold a correct one (unbiased pass@k)."""
    return 1.0 - math.comb(responses - correct, k) / math.comb(responses, k)


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Expected correctness of the most frequent answer among k of the responses; ties count by their correct share.

    Correct responses agree with one another, whatever their form; None abstains; if all abstain the vote is wrong. The
    mean is over all subsets of size k, or over 2000 seeded ones where there are more.
    """
    votes = [True if right else answer for answer, right in zip(answers, correct)]
    if math.comb(len(votes), k) <= ENUMERATED:
        subsets = itertools.combinations(votes, k)
    else:
        generator = random.Random(k)
        subsets = (generator.sample(votes, k) for _ in range(ENUMERATED))
    shares = [_winner_is_correct(subset) for subset in subsets]
    return sum(shares) / len(shares)


def _winner_is_correct(votes: Sequence[str | bool | None]) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    return float(counts.get(True, 0) == most) / sum(count == most for count in counts.values())


def shown_ks(responses: int) -> list[int]:
    """The k for which pass@k and majority@k are told: 2, 4, 8, … and all."""
    powers = [2**power for power in range(1, 12) if 2**power < responses]
    return [*powers, responses] if responses > 1 else []


def sign_flip_test(differences: Sequence[int]) -> float:
    """Two-sided p of the paired permutation test: how often random signs give a sum as far from 0.

    Exact: the distribution of the sum is built task by task. With one response a task it is McNemar's exact test.
    """
    sizes = [abs(difference) for difference in differences if difference]
    reach = sum(sizes)
    chance = np.zeros(2 * reach + 1)  # of each sum, that of 0 in the middle
    chance[reach] = 1.0
    for size in sizes:
        chance = 0.5 * (np.roll(chance, size) + np.roll(chance, -size))  # the ends are still 0: nothing wraps
    sums = np.abs(np.arange(2 * reach + 1) - reach)
    return min(1.0, float(chance[sums >= abs(sum(differences))].sum()))


def bootstrap_interval(values: Sequence[float], seed: int = 0, rounds: int = 10_000) -> tuple[float, float]:
    """Percentile interval of 95 % of the mean, values (one a task) drawn with replacement; the same seed, the same."""
    generator, data = np.random.default_rng(seed), np.asarray(values, dtype=float)
    means = [data[generator.integers(len(data), size=len(data))].mean() for _ in range(rounds)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
