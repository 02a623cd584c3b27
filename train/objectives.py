"""Objectives: advantages from rewards, the loss on a term, and the weights that make an update's loss a plain sum.

All take `Tokens`, the one record of what is known of each predicted token of an RL step. A weight holds its token's
whole denominator, counted over the whole update before micro-batches are cut. So neither micro-batch size nor number of
devices changes the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.schema import RLTrainingConfig
from common.trajectory import ScoredTrajectory, Trajectory
from train.packing import Row, moved

ROUNDING = 1e-12  # of a reward, relative
LARGEST_REWARD = 1e15  # summed over ten thousand tokens and squared it is still a float32
CLAMP = 10.0  # of log-ratios, before they are exponentiated


@dataclass
class Tokens:
    """What is known of predicted tokens: columns (predicted,), in the order of the step's rows.

    `learn` fills them one after another; an update and a micro-batch select their tokens by index. Where a ratio is of
    several predictions, the loss takes an entry for each such term instead.
    """

    trajectory: Tensor  # which of the step's responses it belongs to
    response_index: Tensor | None = None  # where in the response
    view: Tensor | None = None  # which of the step's views predicts it
    trace_step: Tensor | None = None  # its step of the trace, the first of those merged; without a trace, its noising
    writing: Tensor | None = None  # of its position: an index into its trace's overwritten ones, -1: the last
    engine_logp: Tensor | None = None  # as it was drawn
    trainer_logp: Tensor | None = None  # the policy's before the step, on these views; None: not computed
    old_logp: Tensor | None = None  # what the ratio starts from; None: the policy's own in the update
    reference_logp: Tensor | None = None  # what the KL refers to; None: the policy's own in the update
    advantage: Tensor | None = None
    old_value: Tensor | None = None  # the value model's before the step
    returns: Tensor | None = None
    coefficient: Tensor | None = None  # in its term, where its views say so
    weight: Tensor | None = None  # in its update's loss: the whole denominator is in it
    kl_weight: Tensor | None = None  # of its KL; None: as of its loss

    def __len__(self) -> int:
        return len(self.trajectory)

    def __getitem__(self, index: np.ndarray) -> "Tokens":
        """Some of the tokens, by index or by bool."""
        return self._each(lambda column: column[torch.from_numpy(index)])

    def to(self, device: torch.device) -> "Tokens":
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return replace(self, **moved(columns, device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        columns = {name: function(column) for name, column in vars(self).items() if column is not None}
        return replace(self, **columns)


def tokens_of(rows: Sequence[Row], samples: Sequence[ScoredTrajectory]) -> Tokens:
    """The predicted tokens of the rows, with the engine's logp and the advantage of their responses."""
    trajectory = np.repeat([row.trajectory for row in rows], [len(row.target) for row in rows])
    view, first = [], 0
    for row in rows:  # whole responses are a row each, views of blocks are numbered in theirs
        view.append(first + row.view[row.predict_at])
        first += 1 + int(row.view.max())
    coefficient = None
    if all(row.weight is not None for row in rows):
        coefficient = torch.tensor(np.concatenate([row.weight for row in rows]), dtype=torch.float32)
    writing = [np.full(len(row.target), -1) if row.writing is None else row.writing for row in rows]
    engine_logp = [recorded_logp(samples[row.trajectory].trajectory, row, one) for row, one in zip(rows, writing)]
    return Tokens(
        trajectory=torch.from_numpy(trajectory),
        response_index=torch.from_numpy(np.concatenate([row.response_index for row in rows])),
        view=torch.from_numpy(np.concatenate(view)),
        trace_step=torch.from_numpy(np.concatenate([row.trace_step for row in rows])),
        writing=torch.from_numpy(np.concatenate(writing)),
        engine_logp=torch.tensor(np.concatenate(engine_logp), dtype=torch.float32),
        coefficient=coefficient,
        advantage=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)[trajectory],
    )


def recorded_logp(trajectory: Trajectory, row: Row, writing: np.ndarray) -> np.ndarray:
    """The engine's logp of what a row predicts, (predicted,): of the position's last writing or an overwritten one."""
    logp = np.asarray(trajectory.logp)[row.response_index]
    earlier = writing >= 0
    logp[earlier] = [trajectory.overwritten[index].logp for index in writing[earlier]]
    return logp


def written_tokens(*parts: Tokens) -> list[np.ndarray]:
    """For each of the parts a number of the token that every prediction is of, (predicted,), the same in all parts.

    It ascends by response, position and writing: several random views predict one token, the last of its position,
    and a trace with edits predicts several tokens of one position.
    """
    columns = [(one.trajectory, one.response_index, 1 + last_writings(one)) for one in parts]
    sizes = [1 + int(torch.cat(column).max()) for column in zip(*columns)]
    return [np.ravel_multi_index([column.numpy() for column in one], sizes) for one in columns]


def last_writings(tokens: Tokens) -> Tensor:
    """`Tokens.writing`, (predicted,), -1 everywhere where it is not there."""
    return torch.full_like(tokens.response_index, -1) if tokens.writing is None else tokens.writing


# ---- advantages of a group


def group_advantages(rewards: Sequence[float], kind: str = "zscore") -> np.ndarray:
    """Each reward against its group's, 0 where all are equal.

    zscore: in population deviations from the mean (GRPO). mean: the difference to the mean. loo: to the mean of the
    others (leave one out).
    Rewards that differ by rounding only, as means over different numbers of equal terms do, are equal. UserError where
    rewards or their deviation are not finite, or the deviation underflows to 0.
    """
    values = np.asarray(rewards, dtype=np.float64)
    low, high = values.min(), values.max()
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite([low, high]).all() and high - low <= ROUNDING * max(abs(low), abs(high)):
            return np.zeros_like(values)
        deviation = values.std()
    if not 0 < deviation < np.inf:
        raise UserError(
            f"rewards from {low:g} to {high:g} for one task cannot be compared: their deviation is {deviation:g}; "
            "scale what reward.function (or the judge) returns to moderate numbers"
        )
    difference = values - values.mean()
    return {
        "zscore": difference / deviation,
        "mean": difference,
        "loo": difference * len(values) / (len(values) - 1),
    }[kind]


def keep_group(correct: Sequence[bool], bounds: Sequence[float] | None) -> bool:
    """Whether the group's accuracy lies within [low, high]; `None` keeps every group."""
    if bounds is None:
        return True
    low, high = bounds
    return low <= float(np.mean(correct)) <= high


def kept_samples(
    groups: Sequence[Sequence[ScoredTrajectory]],
    bounds: Sequence[float] | None,
    drop_equal: bool = False,
    kind: str = "zscore",
) -> list[ScoredTrajectory]:
    """Every response of the groups whose accuracy lies within `bounds`, with its advantage in the group.

    Responses that could not be scored are left out: nothing is known of them. `drop_equal` leaves out groups whose
    rewards are all equal too. `kind` of advantage, as in `group_advantages`.
    """
    samples = []
    for whole in groups:
        group = [scored for scored in whole if scored.score.verdict != "infrastructure"]
        if not group or not keep_group([scored.score.correct for scored in group], bounds):
            continue
        advantages = group_advantages([scored.score.reward for scored in group], kind)
        if drop_equal and not advantages.any():
            continue
        samples += [replace(scored, advantage=advantage) for scored, advantage in zip(group, advantages.tolist())]
    return samples


# ---- advantages along a trace, by a value model


def value_targets(
    tokens: Tokens, samples: Sequence[ScoredTrajectory], training: RLTrainingConfig, block_size: int | None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token, (predicted,) each, from the value model's `old_value`.

    The views are those of traces, and steps that were merged are one. An outcome's reward, raw or its z-score in the
    group, lies on the tokens of the last predicted step; process rewards on every token or, as `chunk_rewards`, on
    the last step of each chunk. What was overwritten later has no process reward of its own: its position's lies on the
    last writing. UserError where a reward is too large for the loss, in float32.
    """
    chunks = chunk_rewards(samples) if training.process_placement == "chunk_end" else None
    columns = (tokens.trajectory, tokens.response_index, tokens.trace_step, last_writings(tokens))
    trajectory, index, step, writing = (column.numpy() for column in columns)
    value = tokens.old_value.double().numpy()
    advantages, returns = np.zeros_like(value), np.zeros_like(value)
    for number in np.unique(trajectory):
        own = np.flatnonzero(trajectory == number)
        sample = samples[number]
        if chunks is not None:
            prompt = len(sample.trajectory.prompt_ids)
            reward = place_chunks(chunks[number], index[own], step[own], prompt, block_size)
        else:
            reward = token_rewards(sample, index[own], step[own], training.value_reward == "zscore", writing[own])
        if (largest := np.abs(reward).max()) > LARGEST_REWARD:
            raise UserError(
                f"task '{sample.trajectory.task_id}': a reward of size {largest:g}; a value model learns "
                "rewards as they are, so scale what reward.function (or the judge) returns to moderate numbers"
            )
        advantages[own], returns[own] = trace_advantages(reward, value[own], step[own], training.gam, training.lam)
    return torch.tensor(advantages, dtype=torch.float32), torch.tensor(returns, dtype=torch.float32)


def token_rewards(
    sample: ScoredTrajectory,
    index: np.ndarray,
    step: np.ndarray,
    zscore: bool = False,
    writing: np.ndarray | int = -1,
) -> np.ndarray:
    """The reward of each predicted token of one response, (predicted,); `index` into the response, writing as in Views.

    `zscore` takes the group's z-score of an outcome's reward instead of the raw one, as dLLM-RL does. UserError where
    process rewards are not one for each token of the response.
    """
    trajectory = sample.trajectory
    if sample.score.token_rewards is None:
        return np.where(step == step.max(), sample.advantage if zscore else sample.score.reward, 0.0)
    if len(sample.score.token_rewards) != trajectory.length:
        raise UserError(
            f"task '{trajectory.task_id}', response {trajectory.sample}: {len(sample.score.token_rewards)} rewards for "
            f"{trajectory.length} tokens; process rewards are one for each token, the stop token included"
        )
    rewards = np.zeros(len(trajectory.response_ids))  # tokens behind the end earn nothing
    rewards[: trajectory.length] = sample.score.token_rewards
    return np.where(writing == -1, rewards[index], 0.0)


def chunk_rewards(samples: Sequence[ScoredTrajectory]) -> list[list[tuple[int, float]]]:
    """Of every response the chunks that a judge voted on, each as (index behind its last token, reward) (dLLM-RL).

    A chunk earns 1 or -1, by the outcome where its votes differ; then the z-score among the group's chunks of the same
    number. A response without votes, as a truncated one, is one chunk.
    """
    signs = [
        [(end, vote or (1 if one.score.correct else -1)) for end, vote in one.score.chunk_votes or [(0, 0)]]
        for one in samples
    ]
    groups: dict[tuple[str, int], list[int]] = {}
    for sample, chunks in enumerate(signs):
        for number in range(len(chunks)):
            groups.setdefault((samples[sample].trajectory.task_id, number), []).append(sample)
    scored = [[(end, 0.0) for end, _ in chunks] for chunks in signs]
    for (_, number), members in groups.items():
        for sample, score in zip(members, group_advantages([signs[one][number][1] for one in members])):
            scored[sample][number] = (signs[sample][number][0], float(score))
    return scored


def place_chunks(
    chunks: Sequence[tuple[int, float]], index: np.ndarray, step: np.ndarray, prompt: int, block_size: int | None
) -> np.ndarray:
    """The reward of each predicted token of one response, (predicted,), from those of its chunks.

    A chunk's lies on the latest step in the block of its last token (full attention: in the chunk), the last chunk's on
    the response's last step. `index` (predicted,) into the response, `prompt` the tokens before it.
    """
    rewards, start = np.zeros(len(index)), 0
    for end, reward in chunks[:-1]:
        if block_size is None:
            own = (index >= start) & (index < end)
        else:
            own = (prompt + index) // block_size == (prompt + end - 1) // block_size
        rewards[own & (step == step[own].max())] += reward
        start = end
    rewards[step == step.max()] += chunks[-1][1]
    return rewards


def trace_advantages(
    rewards: np.ndarray, values: np.ndarray, steps: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation over the steps of a trace (TraceRL); returns (advantages, returns) per token.

    rewards, values, steps (tokens,): of the predicted tokens of one response, steps in the order of time. With r*_t
    and V*_t the means over the tokens of step t and nothing behind the last: δ_t = r*_t − V*_t + γV*_{t+1}, A*_t = δ_t
    + γλA*_{t+1}, R*_t = r*_t + γR*_{t+1}. A token j of step t has R_j = r_j + γR*_{t+1} and A_j = r_j − V_j +
    γV*_{t+1} + γλA*_{t+1}.
    """
    _, step = np.unique(steps, return_inverse=True)
    size = np.bincount(step)
    reward, value = np.bincount(step, rewards) / size, np.bincount(step, values) / size  # (T,) means
    # one place more: zero behind the last step
    next_value, next_return, next_advantage = (np.zeros(len(size) + 1) for _ in range(3))
    next_value[:-1] = value
    for t in reversed(range(len(size))):
        next_return[t] = reward[t] + gamma * next_return[t + 1]
        next_advantage[t] = reward[t] - value[t] + gamma * (next_value[t + 1] + lam * next_advantage[t + 1])
    after = step + 1
    advantages = rewards - values + gamma * (next_value[after] + lam * next_advantage[after])
    return advantages, rewards + gamma * next_return[after]


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 − Var(R − V) / Var(R): 1 where values predict the returns, 0 where a constant would do as well.

    0 where all returns are equal.
    """
    spread = float(np.var(returns))
    return 1 - float(np.var(returns - values)) / spread if spread > 0 else 0.0


# ---- losses


def policy_loss(
    logp: Tensor, tokens: Tokens, eps: float, beta: float, estimator: str = "k3", eps_high: float | None = None
) -> tuple[Tensor, dict[str, float]]:
    """−min(ρA, clip(ρ, 1−ε, 1+ε_high)A) + β·KL per term, ρ = exp(logp − old_logp) (TraceRL eq. of the policy; PPO).

    logp and every column (predicted,): of tokens, or of whole sequences. Where old_logp or reference_logp is None it is
    the logp itself, without gradient. ε_high is ε unless given (DAPO's clip-higher). The KL to the reference is that of
    `kl_estimate`. Returns the weighted sum, with gradient, and sums over the terms: how many they are, the same loss,
    the KL, and how many are on the flat side of the clip.
    """
    old_logp = logp.detach() if tokens.old_logp is None else tokens.old_logp
    reference_logp = logp.detach() if tokens.reference_logp is None else tokens.reference_logp
    ratio = (logp - old_logp).clamp(-CLAMP, CLAMP).exp()
    plain = ratio * tokens.advantage
    clipped = ratio.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high)) * tokens.advantage
    kl = kl_estimate(logp, reference_logp, estimator)
    if tokens.kl_weight is None:
        loss = (tokens.weight * (-torch.minimum(plain, clipped) + beta * kl)).sum()
    else:
        loss = (tokens.kl_weight * beta * kl - tokens.weight * torch.minimum(plain, clipped)).sum()
    flat = int((clipped < plain).sum())
    return loss, {"terms": len(logp), "loss": float(loss.detach()), "kl": float(kl.detach().sum()), "clipped": flat}


def kl_estimate(logp: Tensor, reference_logp: Tensor, estimator: str = "k3") -> Tensor:
    """Schulman's estimators of KL(policy ‖ reference), d = logp − reference_logp: k1 d, k2 d²/2, k3 exp(−d) − 1 + d."""
    d = (logp - reference_logp).clamp(-CLAMP, CLAMP)
    return {"k1": lambda: d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(-d) + d}[estimator]()


def value_loss(value: Tensor, tokens: Tokens, eps: float) -> tuple[Tensor, dict[str, float]]:
    """½·max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²), value and every column (predicted,).

    Returns the weighted sum, with gradient, and sums over the tokens: how many they are, the same loss, how many are
    clipped.
    """
    plain = (value - tokens.returns).square()
    held = (tokens.old_value + (value - tokens.old_value).clamp(-eps, eps) - tokens.returns).square()
    loss = (tokens.weight * torch.maximum(plain, held)).sum() / 2
    return loss, {"tokens": len(value), "loss": float(loss.detach()), "clipped": int((held > plain).sum())}


# ---- weights of terms


def loss_weights(tokens: Tokens, loss_norm: str, max_gen_length: int, noisings: int = 1) -> np.ndarray:
    """The weight of every predicted token of an update, (predicted,).

    token: the mean over all predicted tokens. view: the mean in each view, mean over all views; view_sum: the sum in
    each. length: the sum over a response's predicted tokens / max_gen_length, mean over the responses and over the
    `noisings` of each (random masking). step: the mean within each trace step, summed over the steps (those that
    `shrink` merged are one), mean over responses. sum: the sum, divided by the number of responses only.
    """
    trajectory = tokens.trajectory.numpy()
    responses = len(np.unique(trajectory))
    if loss_norm == "token":
        return np.full(len(tokens), 1.0 / len(tokens))
    if loss_norm in ("view", "view_sum"):
        _, index, size = np.unique(tokens.view.numpy(), return_inverse=True, return_counts=True)
        return 1.0 / (len(size) * (size[index] if loss_norm == "view" else np.ones(len(tokens))))
    if loss_norm == "length":
        return np.full(len(tokens), 1.0 / (max_gen_length * noisings * responses))
    if loss_norm == "sum":
        return np.full(len(tokens), 1.0 / responses)
    assert loss_norm == "step", loss_norm
    pairs = np.stack([trajectory, tokens.trace_step.numpy()])
    _, index, size = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    return 1.0 / (size[index.ravel()] * responses)


def noisings(training: RLTrainingConfig) -> int:
    """How many noised copies of a response its losses are averaged over; a coupled pair is one."""
    return training.mask_times_per_sample if training.method in ("random_masking", "coupled", "whole") else 1


def terms_of(tokens: Tokens, training: RLTrainingConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Which position or sequence each prediction is in, counted from 0; its coefficient and its share there.

    All (predicted,). Of a position that its trace wrote several times each writing is a term: they are other tokens.
    Coefficients are the views' own; where they have none, of a sequence those of its ELBO per token, of a position
    those of the mean. By the shares, which sum to 1, a term takes the mean of what its predictions share.
    """
    (written,) = written_tokens(tokens)
    owner = written if training.term == "position" else tokens.trajectory.numpy()
    _, term, size = np.unique(owner, return_inverse=True, return_counts=True)
    if training.term == "sequence" and tokens.coefficient is None:
        term, share = sequence_shares(tokens, by_noising=training.method != "TraceRL")
        return term, share, share
    share = torch.tensor(1 / size[term], dtype=torch.float32)
    return torch.from_numpy(term), share if tokens.coefficient is None else tokens.coefficient, share


def response_lengths(tokens: Tokens) -> np.ndarray:
    """How many tokens of each response, in order, are predicted in some view: its positions, and what was overwritten.

    So where all weigh the same, a sequence's length times its mean is the sum over its trace.
    """
    (written,) = written_tokens(tokens)
    _, first = np.unique(written, return_index=True)
    return np.unique(tokens.trajectory.numpy()[first], return_counts=True)[1]


def sequence_shares(tokens: Tokens, by_noising: bool) -> tuple[Tensor, Tensor]:
    """How a response's ELBO per token is made of its predicted tokens' logp: (response, share), (predicted,) each.

    `response` counts the update's responses from 0, and the shares of each sum to 1. Along a trace every writing is
    predicted once: all weigh the same. A noising that masks l of L tokens estimates the ELBO by L/l times their sum
    (ESPO, LLaDA), per token their mean; several noisings of a response are averaged.
    """
    response = np.unique(tokens.trajectory.numpy(), return_inverse=True)[1]
    noising = tokens.trace_step.numpy() if by_noising else np.zeros_like(response)
    pairs = np.stack([response, noising])
    (owner, _), index, size = np.unique(pairs, axis=1, return_inverse=True, return_counts=True)
    share = 1 / (size[index.ravel()] * np.bincount(owner)[response])
    return torch.from_numpy(response), torch.tensor(share, dtype=torch.float32)


def importance_weights(tokens: Tokens, replayed: Tokens, cap: float, by_sequence: bool) -> Tensor:
    """min(π_trainer / π_engine, cap) of every token, (predicted,) (truncated importance sampling).

    Both log-probabilities are of `replayed`, the same trajectories' exact replays. `by_sequence`: of a response's mean
    difference, as its ratio is. What no replay predicts weighs 1, and each writing of a position has its own weight.
    """
    trajectory = replayed.trajectory.numpy()
    log_ratio = (replayed.trainer_logp - replayed.engine_logp).double().numpy()
    if by_sequence:
        total, size = np.bincount(trajectory, log_ratio), np.bincount(trajectory)
        log_ratio = (total / np.maximum(size, 1))[trajectory]
    wanted, known = written_tokens(tokens, replayed)
    _, place = np.unique(np.concatenate([known, wanted]), return_inverse=True)
    weight = np.ones(1 + place.max())  # by token
    weight[place[: len(known)]] = np.minimum(np.exp(log_ratio), cap)
    return torch.from_numpy(weight[place[len(known) :]]).float()
