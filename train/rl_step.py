"""One RL step's learning: groups of rollouts → advantages → views → packed rows → clipped updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.runtime import console
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory
from train.advantages import explained_variance
from train.mismatch import FirstLogp, check_ratios, importance_weights, mismatch_of, replay
from train.objectives import PolicyLoss, loss_weights, policy_loss, sequence_shares, value_loss
from train.optimize import Learner, batch_logp, batch_values, micro_batches, update
from train.packing import PackedBatch, Row, TokenFields
from train.samples import (
    Layout,
    gather,
    noisings,
    sample_rows,
    trajectory_of,
    value_targets,
)


@dataclass
class StepTokens:
    """The rows of an RL step and what is known of each predicted token before its first update, (predicted,) each."""

    rows: list[Row]
    engine_logp: Tensor
    old_logp: Tensor
    logp_ref: Tensor | None  # None: the policy's own before the step's only update, which the loss has at hand
    advantage: Tensor
    recomputed: bool  # old_logp is the trainer's own, on these views
    mismatch: dict[str, float] | None  # None: to be measured in the first update
    old_value: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """One update's share of a step: whole responses, their tokens' places in the step, and the loss's numbers."""

    rows: list[Row]
    tokens: np.ndarray  # (predicted,) index into StepTokens' fields
    fields: TokenFields
    own_reference: bool  # the KL is to the policy that the update starts from: fields.logp_ref does not count


@dataclass
class Totals:
    """Sums over the step's updates, from which its means are taken."""

    updates: int = 0
    bad_steps: int = 0
    skipped: int = 0  # updates in which no advantage differs from 0
    tokens: int = 0
    terms: int = 0  # ratios: of tokens, or of sequences
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def of_all_ranks(self) -> Totals:
        """The sums of one update over all ranks. All ranks must call it."""
        whole = Totals()
        for tokens, terms, sums in ranks.gather((self.tokens, self.terms, self.sums)):
            whole.tokens += tokens
            whole.terms += terms
            whole.add(**sums)
        return whole

    def take(self, other: Totals) -> None:
        """Add the figures of one update that was taken."""
        self.updates += 1
        self.tokens += other.tokens
        self.terms += other.terms
        self.add(**other.sums)

    def means(self) -> dict[str, float]:
        figures: dict[str, float] = {"updates": self.updates, "bad_steps": self.bad_steps}
        figures["updates_skipped"] = self.skipped
        if self.updates == 0:
            return figures
        per = {"loss": self.updates, "grad_norm": self.updates, "kl": self.terms, "clip_fraction": self.terms}
        means = {name: total / per.get(name, self.tokens) for name, total in self.sums.items()}
        return figures | means | {"predicted_tokens": self.tokens}


def learn(
    learner: Learner,
    samples: Sequence[ScoredTrajectory],
    training: RLTrainingConfig,
    layout: Layout,
    max_gen_length: int,
    seed: Sequence[int],
    exact: bool,
    reference: Learner | None = None,
    critic: Learner | None = None,
    train_value: bool = True,
) -> dict[str, float]:
    """Update the policy `updates_per_step` times on the samples, and the value model with it; the step's figures.

    `exact` says that the engine's numbers must be the trainer's (fp32, exact cache): then a larger difference
    stops the run before the first update. `reference` is the frozen first model where the KL refers to it. `critic`
    is the value model, whose advantages take the place of the group's; it learns too where `train_value`.
    """
    rows = sample_rows(samples, training, layout, seed)
    if not rows:  # random masking may leave nothing to predict
        return Totals().means()
    warn_of_long_rows(rows, training.tokens_per_micro_batch)
    temperature = samples[0].trajectory.temperature
    step = starting_point(learner, rows, samples, training, layout, exact)
    if reference is not None:
        batches = micro_batches(rows, training.tokens_per_micro_batch)
        step.logp_ref = batch_logp(reference, batches, len(step.old_logp), temperature)
    if critic is not None:
        step.old_value = batch_values(critic, micro_batches(rows, training.tokens_per_micro_batch), len(step.old_logp))
        step.advantage, step.returns = value_targets(rows, samples, step.old_value, training.gam, training.lam)
    figures: dict[str, float] = {}
    if training.tis_cap is not None:
        weight = truncated_weights(learner, step, samples, training, layout)
        step.advantage = step.advantage * weight
        figures |= {
            "tis_weight": float(weight.mean()),
            "tis_capped": float((weight >= training.tis_cap).float().mean()),
        }
    parts = list(shares(step, len(samples), training, max_gen_length, seed))
    figures |= update_policy(learner, step, parts, training, temperature, exact)
    if critic is not None:
        figures |= update_value(critic, step, parts if train_value else [], training)
    return figures | (step.mismatch or {})


def starting_point(
    learner: Learner,
    rows: list[Row],
    samples: Sequence[ScoredTrajectory],
    training: RLTrainingConfig,
    layout: Layout,
    exact: bool,
) -> StepTokens:
    """The step's tokens with the log-probabilities their ratios start from, and the group's advantages."""
    replays = training.method == "TraceRL" and training.shrink == 1
    engine_logp = gather(rows, samples, lambda trajectory: trajectory.logp)
    auto = training.old_logp == "auto" and not (replays and exact and training.tis_cap is None)
    recomputed = training.old_logp == "recompute" or auto
    # the KL's reference is the trainer's own, or the engine's where the two are the same
    own_reference = training.kl_reference == "old" and training.updates_per_step == 1
    old_logp, logp_ref, mismatch = engine_logp, None if own_reference else engine_logp, None
    if recomputed or (training.kl_reference == "old" and not own_reference and not (replays and exact)):
        temperature = samples[0].trajectory.temperature
        batches = micro_batches(rows, training.tokens_per_micro_batch)
        present = batch_logp(learner, batches, len(engine_logp), temperature)
        old_logp = present if recomputed else engine_logp
        logp_ref = None if own_reference else present
        mismatch = mismatch_of(present, engine_logp) if replays else None
    if not replays:
        _, *logp = replay(learner, samples[: training.mismatch_sample], training, layout)
        mismatch = mismatch_of(*logp)
    if mismatch and exact:
        check_ratios(mismatch["logp_diff_max"])
    advantage = torch.tensor([samples[number].advantage for number in trajectory_of(rows)], dtype=torch.float32)
    return StepTokens(rows, engine_logp, old_logp, logp_ref, advantage, recomputed, mismatch)


def truncated_weights(
    learner: Learner, step: StepTokens, samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, layout: Layout
) -> Tensor:
    """The truncated importance weight of every predicted token, on the exact replay, (predicted,)."""
    if training.method == "TraceRL" and training.shrink == 1 and step.recomputed:
        replayed, difference = step.rows, step.old_logp - step.engine_logp
    else:
        replayed, trainer_logp, engine_logp = replay(learner, samples, training, layout)
        difference = trainer_logp - engine_logp
    return importance_weights(step.rows, replayed, difference, training.tis_cap, training.ratio_level == "sequence")


def shares(
    step: StepTokens, samples: int, training: RLTrainingConfig, max_gen_length: int, seed: Sequence[int]
) -> Iterator[Part]:
    """The step's updates: its responses shuffled and divided among `updates_per_step`."""
    starts = np.cumsum([0] + [len(row.target) for row in step.rows])
    row_of = np.array([row.trajectory for row in step.rows])
    order = np.random.default_rng(seed).permutation(samples)
    for part in np.array_split(order, min(training.updates_per_step, samples)):
        index = np.flatnonzero(np.isin(row_of, part))
        if len(index) == 0:  # random masking left nothing to predict in this share
            continue
        rows = [step.rows[i] for i in index]
        tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in index])
        weight = loss_weights(rows, training.loss_norm, max_gen_length, noisings(training))
        fields = TokenFields(
            step.old_logp[tokens],
            (step.old_logp if step.logp_ref is None else step.logp_ref)[tokens],
            step.advantage[tokens],
            torch.tensor(weight, dtype=torch.float32),
        )
        yield Part(rows, tokens, fields, own_reference=step.logp_ref is None)


def update_policy(
    learner: Learner,
    step: StepTokens,
    parts: Sequence[Part],
    training: RLTrainingConfig,
    temperature: float,
    exact: bool,
) -> dict[str, float]:
    """One update of the policy for every part that has a signal; the figures of the step.

    Where every advantage is 0 only the KL would be left, and of its rounding noise Adam makes full steps.
    """
    totals = Totals()
    for part in parts:
        if not ranks.any_rank(bool(part.fields.advantage.any())):
            totals.skipped += 1
            continue
        first = None
        if step.mismatch is None:
            first = FirstLogp(step.engine_logp[part.tokens], exact)
        batches, now = micro_batches(part.rows, training.tokens_per_micro_batch), Totals()
        if training.ratio_level == "sequence":
            present = part.fields.old_logp
            if totals.updates > 0 or not step.recomputed:
                present = batch_logp(learner, batches, len(present), temperature)
            loss = sequence_step_loss(learner, part, present, training, temperature, now, first)
        else:
            loss = token_step_loss(learner, part, training, temperature, now, first)
        done = update(learner, batches, loss, before_step=first.check if first else None)
        if first is not None:
            step.mismatch = mismatch_of(first.trainer, first.engine)
        if done.taken:
            now = now.of_all_ranks()
            now.add(grad_norm=done.grad_norm)
            totals.take(now)
        else:
            totals.bad_steps += 1
    if totals.skipped:
        console.print(f"{totals.skipped} of {len(parts)} updates skipped: every advantage is 0, as of equal rewards")
    if step.mismatch is None and parts:  # all were skipped
        batches = micro_batches(parts[0].rows, training.tokens_per_micro_batch)
        engine_logp = step.engine_logp[parts[0].tokens]
        step.mismatch = mismatch_of(batch_logp(learner, batches, len(engine_logp), temperature), engine_logp)
        if exact:
            check_ratios(step.mismatch["logp_diff_max"])
    return totals.means()


def token_step_loss(
    learner: Learner,
    part: Part,
    training: RLTrainingConfig,
    temperature: float,
    totals: Totals,
    first: FirstLogp | None,
) -> Callable[[PackedBatch], Tensor]:
    """The loss of a micro-batch with a ratio for every token; its figures go to `totals`, its logp to `first`."""

    def loss(batch: PackedBatch) -> Tensor:
        logp, entropy = learner.forward(batch, temperature)
        fields = part.fields.select(torch.from_numpy(batch.predicted)).to(logp.device)
        if training.old_logp == "detach":
            fields = replace(fields, old_logp=logp.detach())
        if part.own_reference:
            fields = replace(fields, logp_ref=logp.detach())
        result = clipped_loss(logp, fields, training)
        if first is not None:
            first.see(batch.predicted, logp)
        totals.tokens += len(logp)
        totals.terms += len(logp)
        totals.add(loss=result.loss.detach(), kl=result.kl, clip_fraction=result.clipped, entropy=entropy.sum())
        return result.loss

    return loss


def sequence_step_loss(
    learner: Learner,
    part: Part,
    present: Tensor,
    training: RLTrainingConfig,
    temperature: float,
    totals: Totals,
    first: FirstLogp | None,
) -> Callable[[PackedBatch], Tensor]:
    """As `token_step_loss`, with one ratio for every response: exp of the difference of its ELBO per token (ESPO).

    A response's tokens may lie in several micro-batches, so its ratio comes from the log-probabilities at `present`,
    and a micro-batch's loss is linear in its own: the slope of the sequence's term, the same for all its tokens.
    """
    response, share = sequence_shares(part.rows, by_noising=training.method != "TraceRL")
    count = int(response.max()) + 1

    def per_response(values: Tensor) -> Tensor:
        return torch.zeros(count).index_add(0, response, share * values)

    old_logp = present if training.old_logp == "detach" else part.fields.old_logp
    fields = TokenFields(
        per_response(old_logp),
        per_response(present if part.own_reference else part.fields.logp_ref),
        per_response(part.fields.advantage),
        torch.full((count,), 1 / count),
    )
    elbo = per_response(present).requires_grad_()
    result = clipped_loss(elbo, fields, training)
    slope = torch.autograd.grad(result.loss, elbo)[0][response] * share  # (predicted,)
    if ranks.is_main():  # all ranks know it of all responses
        totals.terms += count
        totals.add(loss=result.loss.detach(), kl=result.kl, clip_fraction=result.clipped)

    def loss(batch: PackedBatch) -> Tensor:
        logp, entropy = learner.forward(batch, temperature)
        if first is not None:
            first.see(batch.predicted, logp)
        totals.tokens += len(logp)
        totals.add(entropy=entropy.sum())
        return (slope[batch.predicted].to(logp.device) * logp).sum()

    return loss


def clipped_loss(logp: Tensor, fields: TokenFields, training: RLTrainingConfig) -> PolicyLoss:
    """The clipped objective with the config's bounds and estimator; the KL is k3, else k1 (of a sequence: k2)."""
    other = "k2" if training.ratio_level == "sequence" else "k1"
    estimator = "k3" if training.use_kl_estimator_k3 else other
    return policy_loss(logp, fields, training.eps, training.beta, estimator, training.eps_high)


def update_value(
    critic: Learner, step: StepTokens, parts: Sequence[Part], training: RLTrainingConfig
) -> dict[str, float]:
    """One update of the value model for every part; the figures of the step, before its updates where they ask."""
    totals = Totals()
    for part in parts:
        old_value, returns = step.old_value[part.tokens], step.returns[part.tokens]
        now = Totals()

        def loss(batch: PackedBatch, old: Tensor = old_value, goal: Tensor = returns, part: Part = part) -> Tensor:
            value = critic.forward(batch)
            tensors = (one[batch.predicted].to(value.device) for one in (old, goal, part.fields.weight))
            result, clipped = value_loss(value, *tensors, training.eps)
            now.tokens += len(value)  # noqa: B023 — called before `now` is another
            now.add(loss=result.detach(), clip=clipped)  # noqa: B023
            return result

        done = update(critic, micro_batches(part.rows, training.tokens_per_micro_batch), loss)
        if done.taken:
            now = now.of_all_ranks()
            now.add(grad_norm=done.grad_norm)
            totals.take(now)
        else:
            totals.bad_steps += 1
    figures = {
        "value_mean": float(step.old_value.mean()),
        "explained_variance": explained_variance(step.old_value.double().numpy(), step.returns.double().numpy()),
        "value_bad_steps": totals.bad_steps,
    }
    if totals.updates:
        figures |= {
            "value_loss": totals.sums["loss"] / totals.updates,
            "value_grad_norm": totals.sums["grad_norm"] / totals.updates,
            "value_clip_fraction": totals.sums["clip"] / totals.tokens,
        }
    return figures


def warn_of_long_rows(rows: Sequence[Row], budget: int) -> None:
    """Say where a trajectory alone exceeds a micro-batch's tokens; it is learned from all the same."""
    long = [len(row) for row in rows if len(row) > budget]
    if long:
        console.print(
            f"{len(long)} of {len(rows)} packed trajectories exceed training.tokens_per_micro_batch={budget} (longest "
            f"{max(long)}): each is a micro-batch of its own; raise it where memory allows, or lower rollout.max_token"
        )
