"""One RL step's learning, top to bottom: scored trajectories → views → packed rows → tokens → updates → figures."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.runtime import console
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory
from train.learner import Learner, batch_logp, batch_values, micro_batches, update
from train.mismatch import importance_weights, mismatch_of, replay
from train.objectives import (
    PolicyLoss,
    explained_variance,
    loss_weights,
    noisings,
    policy_loss,
    sequence_shares,
    value_loss,
    value_targets,
)
from train.packing import PackedBatch, Row, make_rows
from train.routing import FIGURES as ROUTING_FIGURES
from train.tokens import Tokens, tokens_of
from train.views import Layout, view_method

# An update's share of the step: its micro-batches, and what is known of the tokens that they predict.
Share = tuple[list[PackedBatch], Tokens]


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
        return policy_figures(Counter())
    warn_of_long_rows(rows, training.tokens_per_micro_batch)
    batches = micro_batches(rows, training.tokens_per_micro_batch)
    temperature = samples[0].trajectory.temperature
    tokens = tokens_of(rows, samples)
    figures = {}

    # log-probabilities that ratios and KL start from, and whether they are the engine's
    take_starting_logp(learner, batches, tokens, training, temperature, exact)
    mismatch = None  # None: to be measured in the first update
    if not replays(training):
        replayed = replay(learner, samples[: training.mismatch_sample], training, layout)
        mismatch = mismatch_of(replayed.trainer_logp, replayed.engine_logp, exact)
    elif tokens.trainer_logp is not None:
        mismatch = mismatch_of(tokens.trainer_logp, tokens.engine_logp, exact)
    if reference is not None:
        tokens.reference_logp = batch_logp(reference, batches, temperature)

    # advantages: the group's, or the value model's, times importance weights
    if critic is not None:
        tokens.old_value = batch_values(critic, batches)
        tokens.advantage, tokens.returns = value_targets(tokens, samples, training.gam, training.lam)
    if training.tis_cap is not None:
        known = replays(training) and tokens.trainer_logp is not None
        replayed = tokens if known else replay(learner, samples, training, layout)
        weight = importance_weights(tokens, replayed, training.tis_cap, training.ratio_level == "sequence")
        tokens.advantage = tokens.advantage * weight
        figures["tis_weight"] = float(weight.mean())
        figures["tis_capped"] = float((weight >= training.tis_cap).float().mean())

    # updates
    shares = shares_of(rows, tokens, len(samples), training, max_gen_length, seed)
    figures |= update_policy(learner, shares, training, temperature, exact, measure_mismatch=mismatch is None)
    if critic is not None:
        figures |= update_value(critic, tokens, shares if train_value else [], training)
    return figures | (mismatch or {})


def sample_rows(
    samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, layout: Layout, seed: Sequence[int]
) -> list[Row]:
    """The packed rows of all samples, in their order, with the views of the configured method."""
    method = view_method(training.method)
    rows = []
    for number, sample in enumerate(samples):
        trajectory = sample.trajectory
        views = method(trajectory, layout, training, np.random.default_rng([*seed, number]))
        rows += make_rows(number, trajectory.prompt_ids, trajectory.response_ids, views, layout.logit_offset)
    return rows


def warn_of_long_rows(rows: Sequence[Row], budget: int) -> None:
    """Say where a trajectory alone exceeds a micro-batch's tokens; it is learned from all the same."""
    long = [len(row) for row in rows if len(row) > budget]
    if long:
        console.print(
            f"{len(long)} of {len(rows)} packed trajectories exceed training.tokens_per_micro_batch={budget} (longest "
            f"{max(long)}): each is a micro-batch of its own; raise it where memory allows, or lower rollout.max_token"
        )


def replays(training: RLTrainingConfig) -> bool:
    """Whether the views are the very ones that the engine drew from."""
    return training.method == "TraceRL" and training.shrink == 1


def take_starting_logp(
    learner: Learner,
    batches: Sequence[PackedBatch],
    tokens: Tokens,
    training: RLTrainingConfig,
    temperature: float,
    exact: bool,
) -> None:
    """Fill in what the ratios and the KL start from, and for them the policy's logp before the step where it is needed.

    Where views are replays and the engine is exact its numbers are the policy's, and no forward is spent on them.
    """
    engine_is_policy = replays(training) and exact
    auto_recomputes = training.old_logp == "auto" and not (engine_is_policy and training.tis_cap is None)
    recompute = training.old_logp == "recompute" or auto_recomputes
    old_reference = training.kl_reference == "old"
    policy_moves = training.updates_per_step > 1  # away from the start of the step, while the step goes on
    if recompute or (old_reference and policy_moves and not engine_is_policy):
        tokens.trainer_logp = batch_logp(learner, batches, temperature)
    if training.old_logp != "detach":
        tokens.old_logp = tokens.trainer_logp if recompute else tokens.engine_logp
    if policy_moves or not old_reference:
        tokens.reference_logp = tokens.engine_logp if tokens.trainer_logp is None else tokens.trainer_logp


def shares_of(
    rows: Sequence[Row],
    tokens: Tokens,
    samples: int,
    training: RLTrainingConfig,
    max_gen_length: int,
    seed: Sequence[int],
) -> list[Share]:
    """The step's updates: its responses shuffled and divided among `updates_per_step`, and the weights of each."""
    order = np.random.default_rng(seed).permutation(samples)
    shares = []
    for chosen in np.array_split(order, min(training.updates_per_step, samples)):
        responses = set(chosen.tolist())
        own_rows = [row for row in rows if row.trajectory in responses]
        if not own_rows:  # random masking left nothing to predict in this share
            continue
        own = tokens[np.isin(tokens.trajectory.numpy(), chosen)]
        weight = loss_weights(own, training.loss_norm, max_gen_length, noisings(training))
        own.weight = torch.tensor(weight, dtype=torch.float32)
        shares.append((micro_batches(own_rows, training.tokens_per_micro_batch), own))
    return shares


# ---- the policy


def update_policy(
    learner: Learner,
    shares: Sequence[Share],
    training: RLTrainingConfig,
    temperature: float,
    exact: bool,
    measure_mismatch: bool,
) -> dict[str, float]:
    """One update of the policy for every share that has a signal; the figures of the step.

    Where every advantage is 0 only the KL would be left, and of its rounding noise Adam makes full steps.
    `measure_mismatch`: the first update's own forward is compared with the engine before the optimizer steps.
    """
    totals, mismatch = Counter(), {}

    def measure(trainer_logp: Tensor, tokens: Tokens) -> None:
        mismatch.update(mismatch_of(trainer_logp, tokens.engine_logp, exact))

    for batches, tokens in shares:
        if not ranks.any_rank(bool(tokens.advantage.any())):
            totals["skipped"] += 1
            continue
        present = None  # the policy's logp before this update, for ratios of whole sequences
        if training.ratio_level == "sequence":
            known = training.old_logp in ("auto", "recompute") and not totals["updates"]
            present = tokens.trainer_logp if known else None
            if present is None:
                present = batch_logp(learner, batches, temperature)
        first = measure_mismatch and not mismatch
        totals.update(
            policy_update(learner, batches, tokens, present, training, temperature, measure if first else None)
        )
    if totals["skipped"]:
        console.print(
            f"{totals['skipped']} of {len(shares)} updates skipped: every advantage is 0, as of equal rewards"
        )
    if measure_mismatch and not mismatch and shares:  # all were skipped
        batches, tokens = shares[0]
        measure(batch_logp(learner, batches, temperature), tokens)
    return policy_figures(totals) | mismatch


def policy_update(
    learner: Learner,
    batches: Sequence[PackedBatch],
    tokens: Tokens,
    present: Tensor | None,
    training: RLTrainingConfig,
    temperature: float,
    before_step: Callable[[Tensor, Tokens], None] | None,
) -> Counter:
    """One update with a ratio for every token or, from the policy's `present` logp, one for every response; its sums.

    `before_step` is called with the logp of the update's forward, (predicted,), of all ranks.
    """
    sums, seen, slope = Counter(), torch.zeros(len(tokens)), None
    if present is not None:
        result, slope = sequence_loss(present, tokens, training)
        if ranks.is_main():  # all ranks know it of all responses
            sums.update(figures_of(result))

    def loss(batch: PackedBatch) -> Tensor:
        logp, entropy = learner.forward(batch, temperature)
        seen[batch.predicted] = logp.detach().float().cpu()
        sums.update(tokens=len(logp), entropy=float(entropy.sum()))
        if slope is not None:
            return (slope[batch.predicted].to(logp.device) * logp).sum()
        result = clipped_loss(logp, tokens[batch.predicted].to(logp.device), training)
        sums.update(figures_of(result))
        return result.loss

    before = (lambda: before_step(ranks.add_up(seen), tokens)) if before_step else None
    return counted_update(learner, batches, loss, sums, before)


def sequence_loss(present: Tensor, tokens: Tokens, training: RLTrainingConfig) -> tuple[PolicyLoss, Tensor]:
    """The loss with one ratio for every response, exp of the difference of its ELBO per token (ESPO), and its slope.

    A response's tokens may lie in several micro-batches, so its ratio comes from the log-probabilities at `present`,
    and a micro-batch's loss is linear in its own: by the slope of the sequence's term, (predicted,), which is the same
    for all its tokens but for their shares in the ELBO.
    """
    response, share = sequence_shares(tokens, by_noising=training.method != "TraceRL")
    count = int(response.max()) + 1

    def per_response(column: Tensor | None) -> Tensor | None:
        return None if column is None else torch.zeros(count).index_add(0, response, share * column)

    elbo = per_response(present).requires_grad_()
    responses = Tokens(
        trajectory=torch.arange(count),
        old_logp=per_response(tokens.old_logp),
        reference_logp=per_response(tokens.reference_logp),
        advantage=per_response(tokens.advantage),
        weight=torch.full((count,), 1 / count),
    )
    result = clipped_loss(elbo, responses, training)
    return result, torch.autograd.grad(result.loss, elbo)[0][response] * share


def clipped_loss(logp: Tensor, tokens: Tokens, training: RLTrainingConfig) -> PolicyLoss:
    """The clipped objective with the config's bounds and estimator; the KL is k3, else k1 (of a sequence: k2)."""
    other = "k2" if training.ratio_level == "sequence" else "k1"
    estimator = "k3" if training.use_kl_estimator_k3 else other
    return policy_loss(logp, tokens, training.eps, training.beta, estimator, training.eps_high)


def figures_of(result: PolicyLoss) -> dict[str, float]:
    """The sums of a loss over its terms: ratios of tokens, or of sequences."""
    return {
        "terms": result.terms,
        "loss": float(result.loss.detach()),
        "kl": float(result.kl),
        "clipped": int(result.clipped),
    }


def policy_figures(totals: Counter) -> dict[str, float]:
    """The step's figures from sums over its updates: means over updates, over terms and over tokens."""
    figures = {
        "updates": totals["updates"],
        "bad_steps": totals["bad_steps"],
        "updates_skipped": totals["skipped"],  # no advantage of theirs differs from 0
    }
    if totals["updates"] == 0:
        return figures
    return figures | {
        "loss": totals["loss"] / totals["updates"],
        "kl": totals["kl"] / totals["terms"],
        "clip_fraction": totals["clipped"] / totals["terms"],
        "entropy": totals["entropy"] / totals["tokens"],
        "grad_norm": totals["grad_norm"] / totals["updates"],
        "predicted_tokens": totals["tokens"],
        **{name: totals[name] / totals["updates"] for name in ROUTING_FIGURES if name in totals},
    }


def counted_update(
    learner: Learner,
    batches: Sequence[PackedBatch],
    loss: Callable[[PackedBatch], Tensor],
    sums: Counter,
    before_step: Callable[[], None] | None = None,
) -> Counter:
    """An update whose loss adds to `sums`: these over all ranks with the update and its gradient's norm, or a bad step.

    All ranks must call it.
    """
    done = update(learner, batches, loss, before_step)
    if not done.taken:
        return Counter(bad_steps=1)
    total = Counter(updates=1, grad_norm=done.grad_norm, **done.routing)
    for of_rank in ranks.gather(sums):
        total.update(of_rank)
    return total


# ---- the value model


def update_value(
    critic: Learner, tokens: Tokens, shares: Sequence[Share], training: RLTrainingConfig
) -> dict[str, float]:
    """One update of the value model for every share; the figures of the step, before its updates where they ask."""
    totals = Counter()
    for batches, own in shares:
        totals.update(value_update(critic, batches, own, training))
    figures = {
        "value_mean": float(tokens.old_value.mean()),
        "explained_variance": explained_variance(tokens.old_value.double().numpy(), tokens.returns.double().numpy()),
        "value_bad_steps": totals["bad_steps"],
    }
    if totals["updates"]:
        figures |= {
            "value_loss": totals["loss"] / totals["updates"],
            "value_grad_norm": totals["grad_norm"] / totals["updates"],
            "value_clip_fraction": totals["clipped"] / totals["tokens"],
        }
    return figures


def value_update(
    critic: Learner, batches: Sequence[PackedBatch], tokens: Tokens, training: RLTrainingConfig
) -> Counter:
    """One update of the value model; its sums."""
    sums = Counter()

    def loss(batch: PackedBatch) -> Tensor:
        value = critic.forward(batch)
        own = tokens[batch.predicted].to(value.device)
        result, clipped = value_loss(value, own.old_value, own.returns, own.weight, training.eps)
        sums.update(tokens=len(value), loss=float(result.detach()), clipped=int(clipped))
        return result

    return counted_update(critic, batches, loss, sums)
