"""One RL step's learning: groups of rollouts → advantages → views → packed rows → clipped updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import Trajectory
from models import LoadedModel
from rollout.collect import Rollout
from train.advantages import group_advantages, keep_group
from train.objectives import kl_estimate, loss_weights, policy_loss
from train.optimize import Learner, batch_logp, micro_batches, update
from train.packing import PackedBatch, Row, TokenFields, make_rows
from train.views import RL_METHODS

RATIO_TOLERANCE = 1e-4  # fp32: rounding stays under 2e-5, a wrong replay or stale weights move it above 1e-2


@dataclass(frozen=True)
class Layout:
    """How the family's attention lays a response out."""

    mask_id: int
    block_size: int | None  # None: full attention
    logit_offset: int = 0  # the prediction for position i is at i + logit_offset


def layout_of(loaded: LoadedModel, block_size: int) -> Layout:
    """The layout of a family's responses."""
    family = loaded.family
    return Layout(loaded.mask_id, None if family.attention == "full" else block_size, family.logit_offset)


@dataclass(frozen=True)
class Sample:
    """A trajectory and its advantage."""

    trajectory: Trajectory
    advantage: float


def kept_samples(groups: Sequence[Sequence[Rollout]], bounds: Sequence[float] | None) -> list[Sample]:
    """Every response of the groups whose accuracy lies within `bounds`, with its advantage in the group.

    Responses that could not be scored are left out: nothing is known of them.
    """
    samples = []
    for whole in groups:
        group = [rollout for rollout in whole if rollout.score.verdict != "infrastructure"]
        if group and keep_group([rollout.score.correct for rollout in group], bounds):
            advantages = group_advantages([rollout.score.reward for rollout in group])
            samples += [Sample(rollout.trajectory, a) for rollout, a in zip(group, advantages.tolist())]
    return samples


def learn(
    learner: Learner,
    samples: Sequence[Sample],
    training: RLTrainingConfig,
    layout: Layout,
    max_gen_length: int,
    seed: Sequence[int],
    exact: bool,
    reference: Learner | None = None,
) -> dict[str, float]:
    """Update the policy `updates_per_step` times on the samples; returns the step's figures.

    `exact` says that the engine's numbers must be the trainer's (fp32, exact cache): then a larger difference
    stops the run before the first update. `reference` is the frozen first model where the KL refers to it.
    """
    rows = sample_rows(samples, training, layout, seed)
    temperature = samples[0].trajectory.temperature
    replay = training.method == "TraceRL" and training.shrink == 1
    engine_logp = gather(rows, samples, lambda trajectory: trajectory.logp)
    old_logp, mismatch = engine_logp, None
    budget = training.tokens_per_micro_batch
    if training.old_logp == "recompute" or (training.old_logp == "auto" and not (replay and exact)):
        old_logp = batch_logp(learner, micro_batches(rows, budget), len(engine_logp), temperature)
        mismatch = mismatch_of(old_logp, engine_logp) if replay else None
    if not replay:
        mismatch = replay_mismatch(learner, samples, training, layout, temperature)
    if mismatch and exact:
        check_ratios(mismatch["logp_diff_max"])
    reference_logp = old_logp
    if reference is not None:
        reference_logp = batch_logp(reference, micro_batches(rows, budget), len(engine_logp), temperature)
    advantage = torch.tensor([samples[row.trajectory].advantage for row in rows for _ in row.target])

    starts = np.cumsum([0] + [len(row.target) for row in rows])
    row_of = np.array([row.trajectory for row in rows])
    order = np.random.default_rng(seed).permutation(len(samples))
    totals = Totals()
    for number, part in enumerate(np.array_split(order, min(training.updates_per_step, len(samples)))):
        index = np.flatnonzero(np.isin(row_of, part))
        if len(index) == 0:  # random masking left nothing to predict in this share
            continue
        chosen = [rows[i] for i in index]
        tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in index])
        weight = loss_weights(chosen, training.loss_norm, max_gen_length, noisings(training))
        fields = TokenFields(
            old_logp[tokens], reference_logp[tokens], advantage[tokens], torch.tensor(weight, dtype=torch.float32)
        )
        first = FirstLogp(engine_logp[tokens], exact) if number == 0 and mismatch is None else None
        loss = make_loss(training, fields, totals, first)
        before_step = None if first is None else first.check
        totals.grad_norm += update(learner, micro_batches(chosen, budget), loss, temperature, before_step)
        totals.updates += 1
        if first is not None:
            mismatch = mismatch_of(first.trainer, first.engine)
    return totals.means() | mismatch


def sample_rows(
    samples: Sequence[Sample], training: RLTrainingConfig, layout: Layout, seed: Sequence[int]
) -> list[Row]:
    """The packed rows of all samples, in their order, with the views of the configured method."""
    method = RL_METHODS[training.method]
    rows = []
    for number, sample in enumerate(samples):
        trajectory = sample.trajectory
        rng = np.random.default_rng([*seed, number])
        views = method(trajectory, layout.block_size, layout.mask_id, training, rng)
        rows += make_rows(number, trajectory.prompt_ids, trajectory.response_ids, views, layout.logit_offset)
    return rows


def noisings(training: RLTrainingConfig) -> int:
    """How many noised copies of a response its losses are averaged over."""
    return 1 if training.method == "TraceRL" else training.mask_times_per_sample


def gather(rows: Sequence[Row], samples: Sequence[Sample], values: Callable[[Trajectory], list[float]]) -> Tensor:
    """Per-token values of the trajectories at the rows' predicted tokens, (predicted,) float32."""
    parts = [np.asarray(values(samples[row.trajectory].trajectory))[row.response_index] for row in rows]
    return torch.tensor(np.concatenate(parts), dtype=torch.float32)


@dataclass
class Totals:
    """Sums over the step's updates, from which its means are taken; of tokens, over those of this rank."""

    updates: int = 0
    tokens: int = 0
    loss: float = 0.0
    kl: float = 0.0
    clipped: float = 0.0
    grad_norm: float = 0.0

    def means(self) -> dict[str, float]:
        """The step's figures over all ranks. All ranks must call it."""
        sums = torch.tensor([self.tokens, self.loss, self.kl, self.clipped], dtype=torch.float64)
        tokens, loss, kl, clipped = ranks.add_up(sums).tolist()
        return {
            "loss": loss / self.updates,
            "kl": kl / tokens,
            "clip_fraction": clipped / tokens,
            "grad_norm": self.grad_norm / self.updates,
            "updates": self.updates,
            "predicted_tokens": int(tokens),
        }


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


def make_loss(
    training: RLTrainingConfig, fields: TokenFields, totals: Totals, first: FirstLogp | None
) -> Callable[[PackedBatch, Tensor], Tensor]:
    """The loss of a micro-batch under this update's token fields; its figures go to `totals`, its logp to `first`."""

    def loss(batch: PackedBatch, logp: Tensor) -> Tensor:
        part = fields.select(torch.from_numpy(batch.predicted)).to(logp.device)
        if training.old_logp == "detach":
            part = replace(part, old_logp=logp.detach())
        result = policy_loss(logp, part, training.eps, training.beta, training.use_kl_estimator_k3)
        if first is not None:
            first.see(batch.predicted, logp)
        totals.tokens += len(logp)
        totals.loss += float(result.loss.detach())
        totals.kl += float(result.kl)
        totals.clipped += float(result.clipped)
        return result.loss

    return loss


def replay_mismatch(
    learner: Learner, samples: Sequence[Sample], training: RLTrainingConfig, layout: Layout, temperature: float
) -> dict[str, float]:
    """The mismatch on exact replays of `mismatch_sample` trajectories, for methods whose views are none."""
    chosen = samples[: training.mismatch_sample]
    rows = sample_rows(chosen, replace(training, method="TraceRL", shrink=1), layout, seed=[0])
    engine_logp = gather(rows, chosen, lambda trajectory: trajectory.logp)
    batches = micro_batches(rows, training.tokens_per_micro_batch)
    return mismatch_of(batch_logp(learner, batches, len(engine_logp), temperature), engine_logp)


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
