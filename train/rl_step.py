"""One RL step's learning: groups of rollouts → advantages → views → packed rows → clipped updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import Trajectory
from rollout.collect import Rollout
from train.advantages import group_advantages, keep_group
from train.objectives import kl_estimate, loss_weights, policy_loss
from train.optimize import Learner, batch_logp, update
from train.packing import PackedBatch, Row, TokenFields, make_row, pack
from train.views import RL_METHODS

RATIO_TOLERANCE = 1e-4  # fp32: rounding stays under 2e-5, a wrong replay or stale weights move it above 1e-2


@dataclass(frozen=True)
class Sample:
    """A trajectory and its advantage."""

    trajectory: Trajectory
    advantage: float


def kept_samples(groups: Sequence[Sequence[Rollout]], bounds: Sequence[float] | None) -> list[Sample]:
    """Every response of the groups whose accuracy lies within `bounds`, with its advantage in the group."""
    samples = []
    for group in groups:
        if keep_group([rollout.score.correct for rollout in group], bounds):
            advantages = group_advantages([rollout.score.reward for rollout in group])
            samples += [Sample(rollout.trajectory, a) for rollout, a in zip(group, advantages.tolist())]
    return samples


def learn(
    learner: Learner,
    samples: Sequence[Sample],
    training: RLTrainingConfig,
    block_size: int,
    mask_id: int,
    max_gen_length: int,
    seed: Sequence[int],
    exact: bool,
    reference: Learner | None = None,
) -> dict[str, float]:
    """Update the policy `updates_per_step` times on the samples; returns the step's figures.

    `exact` says that the engine's numbers must be the trainer's (fp32, exact cache): then a larger difference
    before the first update stops the run. `reference` is the frozen first model where the KL refers to it.
    """
    rows = sample_rows(samples, training, block_size, mask_id)
    temperature = samples[0].trajectory.temperature
    replay = training.method == "TraceRL" and training.shrink == 1
    engine_logp = gather(rows, samples, lambda trajectory: trajectory.logp)
    old_logp = engine_logp
    budget = training.tokens_per_micro_batch
    if training.old_logp == "recompute" or (training.old_logp == "auto" and not replay):
        old_logp = batch_logp(learner, pack(rows, budget), len(engine_logp), temperature)
    reference_logp = old_logp
    if reference is not None:
        reference_logp = batch_logp(reference, pack(rows, budget), len(engine_logp), temperature)
    advantage = torch.tensor([samples[row.trajectory].advantage for row in rows for _ in row.target])

    starts = np.cumsum([0] + [len(row.target) for row in rows])
    order = np.random.default_rng(seed).permutation(len(rows))
    totals = Totals()
    mismatch = None if replay else replay_mismatch(learner, samples, training, block_size, mask_id, temperature)
    for number, part in enumerate(np.array_split(order, min(training.updates_per_step, len(rows)))):
        chosen = [rows[index] for index in part]
        tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in part])
        weight = loss_weights(chosen, training.loss_norm, max_gen_length)
        fields = TokenFields(
            old_logp[tokens], reference_logp[tokens], advantage[tokens], torch.tensor(weight, dtype=torch.float32)
        )
        seen = torch.empty(len(tokens))
        loss = make_loss(training, fields, totals, seen)
        totals.grad_norm += update(learner, pack(chosen, budget), loss, temperature)
        totals.updates += 1
        if number == 0 and mismatch is None:
            mismatch = mismatch_of(seen, engine_logp[tokens])
            if exact:
                check_ratios(mismatch["logp_diff_max"])
    return totals.means() | mismatch


def sample_rows(samples: Sequence[Sample], training: RLTrainingConfig, block_size: int, mask_id: int) -> list[Row]:
    """One packed row per sample, with the views of the configured method."""
    method = RL_METHODS[training.method]
    rows = []
    for number, sample in enumerate(samples):
        views = method(sample.trajectory, block_size, mask_id, training.shrink, training.post_num)
        rows.append(make_row(number, sample.trajectory.prompt_ids, sample.trajectory.response_ids, views))
    return rows


def gather(rows: Sequence[Row], samples: Sequence[Sample], values: Callable[[Trajectory], list[float]]) -> Tensor:
    """Per-token values of the trajectories at the rows' predicted tokens, (predicted,) float32."""
    parts = [np.asarray(values(samples[row.trajectory].trajectory))[row.response_index] for row in rows]
    return torch.tensor(np.concatenate(parts), dtype=torch.float32)


@dataclass
class Totals:
    """Sums over the step's updates, from which its means are taken."""

    updates: int = 0
    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    grad_norm: float = 0.0

    def means(self) -> dict[str, float]:
        return {
            "loss": self.loss / self.updates,
            "kl": self.kl / self.tokens,
            "clip_fraction": self.clipped / self.tokens,
            "grad_norm": self.grad_norm / self.updates,
            "updates": self.updates,
            "predicted_tokens": self.tokens,
        }


def make_loss(
    training: RLTrainingConfig, fields: TokenFields, totals: Totals, seen: Tensor
) -> Callable[[PackedBatch, Tensor], Tensor]:
    """The loss of a micro-batch under this update's token fields; its figures go to `totals`, its logp to `seen`."""

    def loss(batch: PackedBatch, logp: Tensor) -> Tensor:
        part = fields.select(torch.from_numpy(batch.predicted)).to(logp.device)
        if training.old_logp == "detach":
            part = replace(part, old_logp=logp.detach())
        result = policy_loss(logp, part, training.eps, training.beta, training.use_kl_estimator_k3)
        seen[batch.predicted] = logp.detach().float().cpu()
        totals.tokens += len(logp)
        totals.loss += float(result.loss.detach())
        totals.kl += float(result.kl)
        totals.clipped += float(result.clipped)
        return result.loss

    return loss


def replay_mismatch(
    learner: Learner,
    samples: Sequence[Sample],
    training: RLTrainingConfig,
    block_size: int,
    mask_id: int,
    temperature: float,
) -> dict[str, float]:
    """The mismatch on exact replays of `mismatch_sample` trajectories, for methods whose views are none."""
    chosen = samples[: training.mismatch_sample]
    rows = sample_rows(chosen, replace(training, method="TraceRL", shrink=1), block_size, mask_id)
    engine_logp = gather(rows, chosen, lambda trajectory: trajectory.logp)
    batches = pack(rows, training.tokens_per_micro_batch)
    return mismatch_of(batch_logp(learner, batches, len(engine_logp), temperature), engine_logp)


def mismatch_of(trainer_logp: Tensor, engine_logp: Tensor) -> dict[str, float]:
    """Mean k3 of trainer ‖ engine, and the largest difference of a log-probability."""
    return {
        "mismatch_kl": float(kl_estimate(trainer_logp, engine_logp).mean()),
        "logp_diff_max": float((trainer_logp - engine_logp).abs().max()),
    }


def check_ratios(difference: float) -> None:
    """Stop the run when ratios before a step's first update are not 1."""
    if not difference <= RATIO_TOLERANCE:
        raise UserError(
            f"logp_diff_max {difference:.2e} before the first update exceeds {RATIO_TOLERANCE:.0e}: the trainer does "
            "not reproduce the engine's log-probabilities (stale weights, a wrong replay or another temperature)"
        )
