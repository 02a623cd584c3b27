"""Is what is trained what was sampled? The trainer's log-probabilities beside the engine's, before any update."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory
from train.learner import Learner, batch_logp, micro_batches
from train.objectives import kl_estimate
from train.packing import make_rows
from train.tokens import Tokens, tokens_of
from train.views import Layout, trace_views

RATIO_TOLERANCE = 1e-4  # fp32: rounding stays under 2e-5, a wrong replay or stale weights move it above 1e-2


def mismatch_of(trainer_logp: Tensor, engine_logp: Tensor, exact: bool) -> dict[str, float]:
    """Mean k3 of trainer ‖ engine, and the largest difference of a log-probability; (predicted,) each.

    Where the two must be equal (`exact`) and are not, UserError: ratios before the step's first update would not be 1.
    """
    difference = float((trainer_logp - engine_logp).abs().max())
    if exact and not difference <= RATIO_TOLERANCE:
        raise UserError(
            f"logp_diff_max {difference:.2e} before the first update exceeds {RATIO_TOLERANCE:.0e}: the trainer does "
            "not reproduce the engine's log-probabilities (stale weights, a wrong replay or another temperature)"
        )
    mean = float(kl_estimate(trainer_logp.double(), engine_logp.double()).mean())
    return {"mismatch_kl": mean, "logp_diff_max": difference}


def replay(learner: Learner, samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, layout: Layout) -> Tokens:
    """The tokens of the trajectories' exact replays, whatever the method, with the trainer's and the engine's logp."""
    rows = []
    for number, sample in enumerate(samples):
        one = sample.trajectory
        views = trace_views(one, layout, post_num=training.post_num)
        rows += make_rows(number, one.prompt_ids, one.response_ids, views, layout.logit_offset)
    tokens = tokens_of(rows, samples)
    batches = micro_batches(rows, training.tokens_per_micro_batch)
    tokens.trainer_logp = batch_logp(learner, batches, samples[0].trajectory.temperature)
    return tokens


def importance_weights(tokens: Tokens, replayed: Tokens, cap: float, by_sequence: bool) -> Tensor:
    """min(π_trainer / π_engine, cap) of every token, (predicted,) (truncated importance sampling).

    Both log-probabilities are of `replayed`, the same trajectories' exact replays. `by_sequence`: of a response's mean
    difference, as its ratio is. Tokens that no replay predicts weigh 1.
    """
    trajectory = replayed.trajectory.numpy()
    log_ratio = (replayed.trainer_logp - replayed.engine_logp).double().numpy()
    if by_sequence:
        total, size = np.bincount(trajectory, log_ratio), np.bincount(trajectory)
        log_ratio = (total / np.maximum(size, 1))[trajectory]
    width = 1 + int(torch.cat([tokens.response_index, replayed.response_index]).max())
    wanted, known = ((one.trajectory * width + one.response_index).numpy() for one in (tokens, replayed))
    weight = np.ones(1 + max(wanted.max(), known.max()))  # by trajectory and index in the response
    weight[known] = np.minimum(np.exp(log_ratio), cap)
    return torch.from_numpy(weight[wanted]).float()
