"""Is what is trained what was sampled? The trainer's log-probabilities beside the engine's, before any update."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory
from train.objectives import kl_estimate
from train.optimize import Learner, batch_logp, micro_batches
from train.packing import Row
from train.samples import Layout, gather, predicted_count, sample_rows, trajectory_of

RATIO_TOLERANCE = 1e-4  # fp32: rounding stays under 2e-5, a wrong replay or stale weights move it above 1e-2


def mismatch_of(trainer_logp: Tensor, engine_logp: Tensor) -> dict[str, float]:
    """Mean k3 of trainer ‖ engine, and the largest difference of a log-probability."""
    return {
        "mismatch_kl": float(kl_estimate(trainer_logp.double(), engine_logp.double()).mean()),
        "logp_diff_max": float((trainer_logp - engine_logp).abs().max()),
    }


def check_ratios(difference: float) -> None:
    """Stop the run when ratios before a step's first update are not 1."""
    if not difference <= RATIO_TOLERANCE:
        raise UserError(
            f"logp_diff_max {difference:.2e} before the first update exceeds {RATIO_TOLERANCE:.0e}: the trainer does "
            "not reproduce the engine's log-probabilities (stale weights, a wrong replay or another temperature)"
        )


class FirstLogp:
    """The trainer's log-probabilities in the step's first update, beside the engine's of the same tokens."""

    def __init__(self, engine: Tensor, exact: bool):
        self.engine, self.exact = engine, exact
        self.trainer = torch.zeros_like(engine)

    def see(self, predicted: np.ndarray, logp: Tensor) -> None:
        """Take a micro-batch's."""
        self.trainer[predicted] = logp.detach().float().cpu()

    def check(self) -> None:
        """Put those of all ranks together; where the two must be equal, stop before the optimizer steps."""
        ranks.add_up(self.trainer)
        if self.exact:
            check_ratios(float((self.trainer - self.engine).abs().max()))


def replay(
    learner: Learner, samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, layout: Layout
) -> tuple[list[Row], Tensor, Tensor]:
    """The exact replays of the trajectories: their rows, and the trainer's and the engine's logp, (predicted,) each."""
    rows = sample_rows(samples, replace(training, method="TraceRL", shrink=1), layout, seed=[0])
    batches = micro_batches(rows, training.tokens_per_micro_batch)
    temperature = samples[0].trajectory.temperature
    trainer_logp = batch_logp(learner, batches, predicted_count(rows), temperature)
    return rows, trainer_logp, gather(rows, samples, lambda trajectory: trajectory.logp)


def importance_weights(
    rows: Sequence[Row], replayed: Sequence[Row], difference: Tensor, cap: float, by_sequence: bool
) -> Tensor:
    """min(π_trainer / π_engine, cap) of every predicted token of `rows`, (predicted,) (truncated importance sampling).

    `difference` is the trainer's logp minus the engine's at the predicted tokens of `replayed`, the same trajectories'
    exact replays. `by_sequence`: of a response's mean difference, as its ratio is. Tokens no replay predicts weigh 1.
    """
    trajectory = trajectory_of(replayed)
    index = np.concatenate([row.response_index for row in replayed])
    values = difference.double().numpy()
    if by_sequence:
        total, size = np.bincount(trajectory, values), np.bincount(trajectory)
        values = (total / np.maximum(size, 1))[trajectory]
    found = dict(zip(zip(trajectory.tolist(), index.tolist()), np.minimum(np.exp(values), cap).tolist()))
    wanted = zip(trajectory_of(rows).tolist(), (i for row in rows for i in row.response_index.tolist()))
    return torch.tensor([found.get(place, 1.0) for place in wanted])
