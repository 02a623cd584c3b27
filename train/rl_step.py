"""One RL step's learning, top to bottom: scored trajectories → views → packed rows → tokens → updates → figures."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from common import ranks
from common.errors import UserError
from common.runtime import console
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory
from train.learner import Learner, batch_logp, batch_outputs, micro_batches, route_flips, update
from train.objectives import (
    Tokens,
    explained_variance,
    importance_weights,
    kl_estimate,
    loss_weights,
    noisings,
    policy_loss,
    response_lengths,
    terms_of,
    tokens_of,
    value_loss,
    value_targets,
)
from train.packing import PackedBatch, Row, cut, make_rows
from train.routing import FIGURES as ROUTING_FIGURES
from train.views import Layout, some_views, trace_views, view_method

FLIPS_SAMPLE = 16  # responses on which a mixture's choice of experts is compared with the sampler's
MISMATCH_SHARE = 0.05  # of a step's work that measuring the mismatch may take
UPDATE_COST = 3  # forward and backward, over a forward alone
RATIO_TOLERANCE = 1e-4  # fp32: rounding stays under 2e-5, a wrong replay or stale weights move it above 1e-2

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
    step: int = 0,
) -> dict[str, float]:
    """Update the policy on the samples, and the value model with it; the step's figures.

    The samples are gone through `epochs_per_step` times in `updates_per_step` updates, each time with fresh noise.
    `exact` says that the engine's numbers must be the trainer's (fp32, exact cache): then a larger difference
    stops the run before the first update. `reference` is the frozen first model where the KL refers to it. `critic`
    is the value model, whose advantages take the place of the group's; it learns too where `train_value`. What older
    weights than those of RL step `step` drew is left out where the engine's numbers are compared with the trainer's.
    """
    temperature = samples[0].trajectory.temperature
    figures: dict[str, float] = {}
    mismatch: dict[str, float] = {}  # empty: to be measured in the first update
    passes: list[Tokens] = []
    shares: list[Share] = []
    replays = training.method == "TraceRL" and training.shrink == 1  # the views are the very ones the engine drew from
    carried = any(sample.trajectory.drawn_by(step) > 0 for sample in samples)  # some by older weights
    if known := [sample for sample in samples if sample.trajectory.routes is not None]:
        compared = replay_rows(known[:FLIPS_SAMPLE], training, layout, with_routes=True)
        figures["route_flips"] = route_flips(learner, micro_batches(compared, training.tokens_per_micro_batch))
    for epoch in range(training.epochs_per_step):
        # all before the first update: ratios of every pass start from the policy before the step
        epoch_seed = [*seed, epoch] if epoch else seed
        rows = sample_rows(samples, training, layout, epoch_seed)
        if not rows:  # random masking may leave nothing to predict
            continue
        batches = micro_batches(rows, training.tokens_per_micro_batch)
        tokens = tokens_of(rows, samples)

        # log-probabilities that ratios and KL start from, and whether they are the engine's
        take_starting_logp(learner, batches, tokens, training, temperature, replays and exact and not carried)
        if not passes and not replays:
            mismatch = sampled_mismatch(learner, samples, rows, training, layout, seed, exact, step)
        elif not passes and tokens.trainer_logp is not None:
            now = tokens[drawn_now(tokens, samples, step)]
            mismatch = mismatch_of(now.trainer_logp, now.engine_logp, exact)
        if reference is not None:
            tokens.reference_logp = batch_logp(reference, batches, temperature)

        # advantages: the group's, or the value model's, times importance weights
        if critic is not None:
            tokens.old_value = batch_outputs(critic, batches, critic.forward)
            tokens.advantage, tokens.returns = value_targets(tokens, samples, training, layout.block_size)
        if training.tis_cap is not None:
            known = replays and tokens.trainer_logp is not None
            replayed = tokens if known else replay(learner, samples, training, layout)
            weight = importance_weights(tokens, replayed, training.tis_cap, training.term == "sequence")
            tokens.advantage = tokens.advantage * weight
            figures["tis_weight"] = float(weight.mean())
            figures["tis_capped"] = float((weight >= training.tis_cap).float().mean())
        shares += shares_of(rows, tokens, len(samples), training, max_gen_length, epoch_seed)
        passes.append(tokens)
    if not passes:
        return policy_figures(Counter())
    figures |= update_policy(
        learner, shares, training, temperature, max_gen_length, exact, measure_mismatch=not (mismatch or carried)
    )
    if critic is not None:
        figures |= update_value(critic, passes[0], shares if train_value else [], training)
    return figures | mismatch


def sample_rows(
    samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, layout: Layout, seed: Sequence[int]
) -> list[Row]:
    """The packed rows of all samples, in their order, with the views of the configured method.

    How many of them exceed the budget of a micro-batch is printed, and what cutting them costs.
    """
    method = view_method(training.method)
    rows = []
    for number, sample in enumerate(samples):
        trajectory = sample.trajectory
        views = method(trajectory, layout, training, np.random.default_rng([*seed, number]))
        routes = trajectory.routes if training.replay_routes else None
        rows += make_rows(number, trajectory.prompt_ids, trajectory.response_ids, views, layout.logit_offset, routes)
    if training.tokens_per_micro_batch:
        report_long(rows, training.tokens_per_micro_batch)
    return rows


def report_long(rows: Sequence[Row], token_budget: int) -> None:
    """Print how many of the rows exceed the budget, how many pieces these have, and what that costs."""
    long = [row for row in rows if len(row) > token_budget]
    if not long:
        return
    line = f"{len(long)} of {len(rows)} packed trajectories exceed training.tokens_per_micro_batch={token_budget}"
    line += f" (longest {max(map(len, long))})"
    if long[0].view[-1]:
        pieces = [cut(row, token_budget) for row in long]
        again = sum(int((row.view[np.concatenate(own[:-1])] == 0).sum()) for row, own in zip(long, pieces))
        line += f": computed in {sum(map(len, pieces))} pieces, for which {again / sum(map(len, long)):.0%} of the "
        line += "tokens are forwarded twice; fewer where memory allows a larger one"
    else:
        line += ": each is a micro-batch of its own; raise it where memory allows, or lower rollout.max_token"
    console.print(line)


def take_starting_logp(
    learner: Learner,
    batches: Sequence[PackedBatch],
    tokens: Tokens,
    training: RLTrainingConfig,
    temperature: float,
    engine_is_policy: bool,
) -> None:
    """Fill in what the ratios and the KL start from, and for them the policy's logp before the step where it is needed.

    Where `engine_is_policy`, as views are replays and the engine is exact, no forward is spent on these numbers.
    """
    auto_recomputes = training.old_logp == "auto" and not (engine_is_policy and training.tis_cap is None)
    recompute = training.old_logp == "recompute" or auto_recomputes
    old_reference = training.kl_reference == "old"
    updates = training.updates_per_step * training.epochs_per_step
    policy_moves = updates > 1  # away from the start of the step, while the step goes on
    if recompute or (old_reference and policy_moves and not engine_is_policy):
        tokens.trainer_logp = batch_logp(learner, batches, temperature)
    if training.old_logp != "detach":
        tokens.old_logp = tokens.trainer_logp if recompute else tokens.engine_logp
    if training.kl_reference != "none" and (policy_moves or not old_reference):
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
        if training.kl_norm == "view_sum":
            kl_weight = loss_weights(own, training.kl_norm, max_gen_length)
            own.kl_weight = torch.tensor(kl_weight, dtype=torch.float32)
        shares.append((micro_batches(own_rows, training.tokens_per_micro_batch), own))
    return shares


# ---- is what is trained what was sampled?


def drawn_now(tokens: Tokens, samples: Sequence[ScoredTrajectory], step: int) -> np.ndarray:
    """Which tokens of exact replays the weights of RL step `step` drew, bool (predicted,)."""
    starts = np.array([sample.trajectory.drawn_by(step) for sample in samples])
    return tokens.trace_step.numpy() >= starts[tokens.trajectory.numpy()]


def mismatch_of(
    trainer_logp: Tensor, engine_logp: Tensor, exact: bool, expected: float | None = None
) -> dict[str, float]:
    """Mean k3 of trainer ‖ engine, and the largest difference of a log-probability; (predicted,) each.

    Of a random part the k3 are summed over the `expected` size of such a part, so that the mean has no bias. Where the
    two must be equal (`exact`) and are not, UserError: ratios before the step's first update would not be 1. Of nothing
    it is empty.
    """
    if len(trainer_logp) == 0:
        return {}
    difference = float((trainer_logp - engine_logp).abs().max())
    if exact and not difference <= RATIO_TOLERANCE:
        raise UserError(
            f"logp_diff_max {difference:.2e} before the first update exceeds {RATIO_TOLERANCE:.0e}: the trainer does "
            "not reproduce the engine's log-probabilities (stale weights, a wrong replay or another temperature)"
        )
    total = float(kl_estimate(trainer_logp.double(), engine_logp.double()).sum())
    return {"mismatch_kl": total / (expected or len(trainer_logp)), "logp_diff_max": difference}


def sampled_mismatch(
    learner: Learner,
    samples: Sequence[ScoredTrajectory],
    rows: Sequence[Row],
    training: RLTrainingConfig,
    layout: Layout,
    seed: Sequence[int],
    exact: bool,
    step: int = 0,
) -> dict[str, float]:
    """`mismatch_of` some views of the exact replays of all trajectories, each as likely as any other.

    What older weights than those of RL step `step` drew is left out; empty where they drew all.
    They are `mismatch_views`, or as many fewer as keep this within its share of the step whose rows are given. A view
    may take a forward of its whole trajectory, and is counted so.
    """
    known, predicted = [], 0  # views of each trajectory
    for sample in samples:  # made for one after another: those of all may not fit the memory
        own = trace_views(sample.trajectory, layout, post_num=training.post_num)
        known.append(np.flatnonzero(own.step[:, 0] >= sample.trajectory.drawn_by(step)))
        predicted += int(own.predict[known[-1]].sum())
    views = np.array([len(own) for own in known])
    if not views.any():
        return {}
    tokens = sum(len(row) for row in rows)
    longest = max(len(one.trajectory.prompt_ids) + len(one.trajectory.response_ids) for one in samples)
    affordable = int(MISMATCH_SHARE * UPDATE_COST * tokens / longest)
    size = min(training.mismatch_views, max(1, affordable), int(views.sum()))
    # no trajectory's own views are drawn by a seed of this length and end
    drawn = np.random.default_rng([*seed, len(samples)]).choice(int(views.sum()), size, replace=False)
    first = np.cumsum(views) - views  # number of each trajectory's first view
    chosen = [
        own[np.sort(drawn[(drawn >= start) & (drawn < start + len(own))]) - start] for start, own in zip(first, known)
    ]
    replayed = replay(learner, samples, training, layout, chosen)
    return mismatch_of(replayed.trainer_logp, replayed.engine_logp, exact, predicted * size / int(views.sum()))


def replay(
    learner: Learner,
    samples: Sequence[ScoredTrajectory],
    training: RLTrainingConfig,
    layout: Layout,
    chosen: Sequence[np.ndarray] | None = None,
) -> Tokens:
    """The tokens of the trajectories' exact replays, whatever the method, with the trainer's and the engine's logp.

    `chosen` are the indices of the views of each that are replayed, else all.
    """
    rows = replay_rows(samples, training, layout, training.replay_routes, chosen)
    tokens = tokens_of(rows, samples)
    batches = micro_batches(rows, training.tokens_per_micro_batch)
    tokens.trainer_logp = batch_logp(learner, batches, samples[0].trajectory.temperature)
    return tokens


def replay_rows(
    samples: Sequence[ScoredTrajectory],
    training: RLTrainingConfig,
    layout: Layout,
    with_routes: bool,
    chosen: Sequence[np.ndarray] | None = None,
) -> list[Row]:
    """The packed rows of the trajectories' exact replays; `with_routes`: with the sampler's experts.

    `chosen` are the indices of the views of each that are replayed, else all.
    """
    rows = []
    for number, sample in enumerate(samples):
        if chosen is not None and len(chosen[number]) == 0:
            continue
        one = sample.trajectory
        views = trace_views(one, layout, post_num=training.post_num)
        if chosen is not None:
            views = some_views(views, chosen[number])
        routes = one.routes if with_routes else None
        rows += make_rows(number, one.prompt_ids, one.response_ids, views, layout.logit_offset, routes)
    return rows


# ---- the policy


def update_policy(
    learner: Learner,
    shares: Sequence[Share],
    training: RLTrainingConfig,
    temperature: float,
    max_gen_length: int,
    exact: bool,
    measure_mismatch: bool,
) -> dict[str, float]:
    """One update of the policy for every share that has a signal; the figures of the step.

    Where every advantage is 0 only the KL would be left, and of its rounding noise Adam makes full steps.
    `measure_mismatch`: the first update's own forward is compared with the engine before the optimizer steps.
    """
    totals, mismatch = Counter(), {}

    def measure(seen: Tensor, tokens: Tokens) -> None:
        mismatch.update(mismatch_of(ranks.add_up(seen), tokens.engine_logp, exact))

    for batches, tokens in shares:
        if not ranks.any_rank(bool(tokens.advantage.any())):
            totals["skipped"] += 1
            continue
        slope, of_terms = None, {}
        if training.term != "token":
            known = training.old_logp in ("auto", "recompute") and not totals["updates"]
            present = tokens.trainer_logp if known else None  # the policy's logp before this update
            if present is None:
                present = batch_logp(learner, batches, temperature)
            slope, of_terms = term_slope(present, tokens, training, max_gen_length)
        seen = torch.zeros(len(tokens))
        loss = partial(batch_policy_loss, learner, tokens, training, temperature, slope, seen)
        before_step = partial(measure, seen, tokens) if measure_mismatch and not mismatch else None
        done = counted_update(learner, batches, loss, before_step)
        totals.update(done)
        if done["updates"]:
            totals.update(of_terms)  # all ranks know these of all responses
    if totals["skipped"]:
        console.print(
            f"{totals['skipped']} of {len(shares)} updates skipped: every advantage is 0, as of equal rewards"
        )
    if measure_mismatch and not mismatch and shares:  # all were skipped
        batches, tokens = shares[0]
        mismatch = mismatch_of(batch_logp(learner, batches, temperature), tokens.engine_logp, exact)
    return policy_figures(totals) | mismatch


def batch_policy_loss(
    learner: Learner,
    tokens: Tokens,
    training: RLTrainingConfig,
    temperature: float,
    slope: Tensor | None,
    seen: Tensor,
    batch: PackedBatch,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one micro-batch of an update on these tokens, and its sums.

    It has a ratio for every token or, given their `slope`, (predicted,), for every term. The logp of its tokens is
    written into `seen`, (predicted,).
    """
    logp, entropy = learner.forward(batch, temperature)
    seen[batch.predicted] = logp.detach().float().cpu()
    figures = {"tokens": len(logp), "entropy": float(entropy.sum())}
    if slope is not None:
        return (slope[batch.predicted].to(logp.device) * logp).sum(), figures
    loss, sums = clipped_loss(logp, tokens[batch.predicted].to(logp.device), training)
    return loss, figures | sums


def term_slope(
    present: Tensor, tokens: Tokens, training: RLTrainingConfig, max_gen_length: int
) -> tuple[Tensor, dict[str, float]]:
    """The slope, (predicted,), of the loss with one ratio for every term, and the sums of that loss.

    log ρ = Σ c (logp − old_logp) over the term's predictions, c their coefficients. They may lie in several
    micro-batches, so the ratio comes from the log-probabilities at `present`, and a micro-batch's loss is linear in its
    own: by the slope of the term, the same for all its predictions but for their coefficients.
    """
    term, coefficient, share = terms_of(tokens, training)
    count = int(term.max()) + 1

    def combined(column: Tensor | None, factor: Tensor) -> Tensor | None:
        return None if column is None else torch.zeros(count).index_add(0, term, factor * column)

    logp = combined(present, coefficient).requires_grad_()
    terms = Tokens(
        trajectory=torch.zeros(count, dtype=torch.long).scatter(0, term, tokens.trajectory),
        old_logp=combined(tokens.old_logp, coefficient),
        reference_logp=combined(tokens.reference_logp, coefficient),
        advantage=combined(tokens.advantage, share),
    )
    if training.term == "sequence":
        terms.weight = torch.full((count,), 1 / count)
    else:
        terms.weight = torch.tensor(loss_weights(terms, training.loss_norm, max_gen_length), dtype=torch.float32)
    if training.kl_norm == "length":
        terms.kl_weight = terms.weight * torch.from_numpy(response_lengths(tokens))
    loss, figures = clipped_loss(logp, terms, training)
    return torch.autograd.grad(loss, logp)[0][term] * coefficient, figures


def clipped_loss(logp: Tensor, tokens: Tokens, training: RLTrainingConfig) -> tuple[Tensor, dict[str, float]]:
    """The clipped objective with the config's bounds and estimator; the KL is k3, else k1 (of a sequence: k2)."""
    other = "k2" if training.term == "sequence" else "k1"
    estimator = "k3" if training.use_kl_estimator_k3 else other
    beta = 0.0 if training.kl_reference == "none" else training.beta
    return policy_loss(logp, tokens, training.eps, beta, estimator, training.eps_high)


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
    loss: Callable[[PackedBatch], tuple[Tensor, dict[str, float]]],
    before_step: Callable[[], None] | None = None,
) -> Counter:
    """An update, counted with its gradient's norm and the sums over all ranks that come with its loss; or a bad step.

    All ranks must call it.
    """
    sums = Counter()

    def summed(batch: PackedBatch) -> Tensor:
        result, figures = loss(batch)
        sums.update(figures)
        return result

    done = update(learner, batches, summed, before_step)
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
        totals.update(counted_update(critic, batches, partial(batch_value_loss, critic, own, training.eps)))
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


def batch_value_loss(
    critic: Learner, tokens: Tokens, eps: float, batch: PackedBatch
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one micro-batch of an update on these tokens, and its sums."""
    value = critic.forward(batch)
    return value_loss(value, tokens[batch.predicted].to(value.device), eps)
