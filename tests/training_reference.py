"""What training computes, written plainly from the design: one view at a time, one row per view, all logits.

Nothing here imports the trainer. Tests hold the packed forward, the vectorised views and the weighted losses to it.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from common.trajectory import Trajectory, Writing


@dataclass
class PlainView:
    """One block as the network is shown it, and what it has to predict there."""

    start: int  # absolute position of the block's first token
    tokens: list[int]
    offsets: list[int]  # of the predicted tokens within the block
    targets: list[int]
    response_indices: list[int]
    steps: list[int]
    recorded: list[float] = field(default_factory=list, compare=False)  # the sampler's logp of each target


@dataclass
class PlainToken:
    """A predicted token's share in the loss."""

    logp: Tensor
    old_logp: float
    reference_logp: float
    advantage: float
    step: int


class RecordingSGD(torch.optim.SGD):
    """Keeps the gradients of every step and changes nothing."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]):
        super().__init__(parameters, lr=0.0)
        self.recorded: list[list[torch.Tensor]] = []

    def step(self, closure: object = None) -> None:
        self.recorded.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def random_trajectory(
    rng: np.random.Generator, prompt_length: int, blocks: int, block_size: int, vocabulary: int, mask_id: int
) -> Trajectory:
    """Random ids in a random order of unmasking; with the prompt's remainder the response fills `blocks` blocks."""
    size = blocks * block_size - prompt_length % block_size
    prompt = [int(token) for token in rng.integers(0, vocabulary - 1, prompt_length)]
    response = [int(token) for token in rng.integers(0, vocabulary - 1, size)]
    # the mask token never occurs in a clean text
    prompt = [token if token != mask_id else vocabulary - 1 for token in prompt]
    response = [token if token != mask_id else vocabulary - 1 for token in response]
    step_map: list[int] = []
    first_step = 0
    for block in range(blocks):
        tokens = block_size - (prompt_length % block_size if block == 0 else 0)
        drawn = [int(step) for step in rng.integers(0, block_size, tokens)]
        distinct = sorted(set(drawn))
        step_map += [first_step + distinct.index(step) for step in drawn]
        first_step += len(distinct)
    return Trajectory(
        task_id="0",
        sample=0,
        prompt_ids=prompt,
        response_ids=response,
        step_map=step_map,
        logp=[-1.0] * size,
        confidence=[0.5] * size,
        kept_mass=1.0,
        finish_reason="stop",
        length=int(rng.integers(1, size + 1)),
        steps=first_step,
        forwards=first_step + blocks,
        temperature=1.0,
    )


def edited_trajectory(
    rng: np.random.Generator,
    trajectory: Trajectory,
    block_size: int | None,
    vocabulary: int,
    mask_id: int,
    logp: Callable[[list[int], int, int], float] | None = None,
) -> Trajectory:
    """The trajectory with its response drawn anew by a plain loop that unmasks, edits and revokes as `rng` says.

    `logp(canvas, position, token)` is what it records of a writing, given all ids up to the block's end; without it
    numbers of no meaning. block_size None: the whole response is one block.
    """
    prompt, size = trajectory.prompt_ids, len(trajectory.response_ids)
    tokens = [token for token in range(vocabulary) if token != mask_id]
    canvas = prompt + [mask_id] * size
    history: list[list[Writing]] = [[] for _ in range(size)]
    step = 0
    width = block_size or len(canvas)
    for end in range(width, len(canvas) + 1, width):
        own = [i for i in range(max(0, end - width - len(prompt)), end - len(prompt))] if end > len(prompt) else []
        first = step
        while any(canvas[len(prompt) + i] == mask_id for i in own) or (own and rng.random() < 0.5):
            before = canvas[:end]
            masked = [i for i in own if before[len(prompt) + i] == mask_id]
            unmasked = rng.choice(masked, int(rng.integers(1, len(masked) + 1)), replace=False) if masked else []
            for i in own:
                kind = "unmask" if i in unmasked else "nothing"
                if i not in masked:
                    kind = rng.choice(["nothing", "edit", "revoke"], p=[0.7, 0.2, 0.1])
                if kind == "nothing" or (kind == "revoke" and step > first + 5):  # it must end
                    continue
                position = len(prompt) + i
                token = mask_id
                if kind != "revoke":
                    token = int(rng.choice([token for token in tokens if token != before[position]]))
                value = 0.0 if token == mask_id else logp(before, position, token) if logp else float(-rng.random())
                history[i].append(Writing(step, i, token, value))
                canvas[position] = token
            step += 1
    last = [one[-1] for one in history]
    return replace(
        trajectory,
        response_ids=[one.token for one in last],
        step_map=[one.step for one in last],
        logp=[one.logp for one in last],
        steps=step,
        overwritten=sorted(writing for one in history for writing in one[:-1]),
    )


def history_of(trajectory: Trajectory, index: int) -> list[Writing]:
    """All writings of one position of the response, in order."""
    last = (trajectory.step_map[index], index, trajectory.response_ids[index], trajectory.logp[index])
    return [one for one in trajectory.overwritten if one.position == index] + [Writing(*last)]


def trace_views(
    trajectory: Trajectory, block_size: int | None, mask_id: int, shrink: int = 1, post_num: int = 0
) -> list[PlainView]:
    """TraceRL's views: for every block, every `shrink` neighbouring steps that wrote tokens in it, one step then.

    block_size None: the response is one block, which starts behind the prompt.
    """
    prompt, response = trajectory.prompt_ids, trajectory.response_ids
    first, width = (0, block_size) if block_size else (len(prompt), len(response))
    views = []
    for start in range(first, len(prompt) + len(response), width):
        indices = [position - len(prompt) for position in range(start, start + width)]
        histories = {i: history_of(trajectory, i) for i in indices if i >= 0}
        steps = sorted({one.step for history in histories.values() for one in history if one.token != mask_id})
        while steps:
            merged, steps = steps[:shrink], steps[shrink:]
            view = PlainView(start, [], [], [], [], [])
            for offset, i in enumerate(indices):
                if i < 0:
                    view.tokens.append(prompt[i + len(prompt)])
                    continue
                before = [one.token for one in histories[i] if one.step < merged[0]]
                view.tokens.append(before[-1] if before else mask_id)
                wrote = [one for one in histories[i] if merged[0] <= one.step <= merged[-1] and one.token != mask_id]
                if wrote and i < trajectory.length + post_num:
                    view.offsets.append(offset)
                    view.targets.append(wrote[-1].token)
                    view.response_indices.append(i)
                    view.steps.append(merged[0])
                    view.recorded.append(wrote[-1].logp)
            if view.offsets:
                views.append(view)
    return views


def block_causal_logits(model: torch.nn.Module, ids: Sequence[int], block_size: int) -> Tensor:
    """All logits of one sequence, (length, vocab): a token sees its own block and the earlier ones."""
    mask = [[key // block_size <= query // block_size for key in range(len(ids))] for query in range(len(ids))]
    return model(
        input_ids=torch.tensor([list(ids)]),
        position_ids=torch.arange(len(ids))[None],
        attention_mask=torch.tensor(mask)[None, None],
        use_cache=False,
    ).logits[0]


def view_logp(
    model: torch.nn.Module,
    trajectory: Trajectory,
    views: Sequence[PlainView],
    block_size: int,
    mask_id: int,
    temperature: float = 1.0,
) -> Tensor:
    """logp of every predicted token, view by view: log_softmax(logits / T), the mask token at minus infinity."""
    everything = trajectory.prompt_ids + trajectory.response_ids
    result = []
    for view in views:
        logits = block_causal_logits(model, everything[: view.start] + view.tokens, block_size) / temperature
        allowed = torch.arange(logits.shape[-1]) != mask_id
        logp = logits - torch.where(allowed, logits, -torch.inf).logsumexp(-1, keepdim=True)
        result += [logp[view.start + offset, target] for offset, target in zip(view.offsets, view.targets)]
    return torch.stack(result)


def policy_term(token: PlainToken, eps: float, beta: float, estimator: str, eps_high: float | None = None) -> Tensor:
    """The clipped objective and the KL penalty of one token."""
    ratio = (token.logp - token.old_logp).clamp(-10, 10).exp()
    upper = 1 + (eps if eps_high is None else eps_high)
    low, high = ratio * token.advantage, ratio.clamp(1 - eps, upper) * token.advantage
    policy = -(low if low < high else high)
    d = (token.logp - token.reference_logp).clamp(-10, 10)
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]
    return policy + beta * kl


def update_loss(
    responses: Sequence[Sequence[PlainToken]],
    loss_norm: str,
    max_gen_length: int,
    eps: float = 0.2,
    beta: float = 0.01,
    estimator: str = "k3",
    eps_high: float | None = None,
) -> Tensor:
    """The loss of one update over its responses' predicted tokens."""
    terms = [
        [(policy_term(token, eps, beta, estimator, eps_high), token.step) for token in tokens] for tokens in responses
    ]
    if loss_norm == "token":
        flat = [term for one in terms for term, _ in one]
        return sum(flat) / len(flat)
    if loss_norm == "length":
        return sum(sum(term for term, _ in one) / max_gen_length for one in terms) / len(terms)
    if loss_norm == "sum":
        return sum(term for one in terms for term, _ in one) / len(terms)
    if loss_norm == "view":  # here a view is a step
        views = [[term for term, other in one if other == step] for one in terms for step in {step for _, step in one}]
        return sum(sum(view) / len(view) for view in views) / len(views)
    total = 0
    for one in terms:
        for step in {step for _, step in one}:
            of_step = [term for term, other in one if other == step]
            total = total + sum(of_step) / len(of_step)
    return total / len(terms)


def sequence_loss(
    responses: Sequence[Sequence[PlainToken]],
    by_noising: bool,
    eps: float = 0.2,
    eps_high: float | None = None,
    beta: float = 0.01,
    estimator: str = "k3",
) -> Tensor:
    """One clipped term for each response: its ratio is that of the ELBOs per token (ESPO); their mean.

    by_noising: tokens of one `step` are one noising, whose mean estimates the ELBO per token.
    """

    def elbo(tokens: Sequence[PlainToken], logp: Callable[[PlainToken], Tensor | float]) -> Tensor | float:
        noisings = {token.step if by_noising else 0 for token in tokens}
        groups = [[logp(token) for token in tokens if not by_noising or token.step == one] for one in noisings]
        return sum(sum(group) / len(group) for group in groups) / len(groups)

    total = 0
    for tokens in responses:
        new, old, reference = (
            elbo(tokens, lambda t, n=n: getattr(t, n)) for n in ("logp", "old_logp", "reference_logp")
        )
        whole = PlainToken(new, old, reference, tokens[0].advantage, 0)
        total = total + policy_term(whole, eps, beta, estimator, eps_high)
    return total / len(responses)


def gae(
    rewards: Sequence[float], values: Sequence[float], steps: Sequence[int], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one response's predicted tokens, the sums written out over all later steps."""
    times = sorted(set(steps))
    sets = [[j for j, step in enumerate(steps) if step == time] for time in times]
    reward = [statistics.fmean(rewards[j] for j in one) for one in sets] + [0.0]
    value = [statistics.fmean(values[j] for j in one) for one in sets] + [0.0]
    delta = [reward[t] - value[t] + gamma * value[t + 1] for t in range(len(sets))]
    advantages, returns = [], []
    for j, step in enumerate(steps):
        after = range(times.index(step) + 1, len(sets))
        later_advantage = sum((gamma * lam) ** (t - after.start) * delta[t] for t in after)
        later_return = sum(gamma ** (t - after.start) * reward[t] for t in after)
        advantages.append(rewards[j] - values[j] + gamma * value[after.start] + gamma * lam * later_advantage)
        returns.append(rewards[j] + gamma * later_return)
    return advantages, returns


def value_term(value: Tensor, old_value: float, goal: float, eps: float) -> Tensor:
    """The clipped squared error of one token."""
    held = old_value + (value - old_value).clamp(-eps, eps)
    plain_error, held_error = (value - goal) ** 2, (held - goal) ** 2
    return 0.5 * (plain_error if plain_error > held_error else held_error)


def z_scores(rewards: Sequence[float]) -> list[float]:
    """Distance to the group's mean in population deviations, 0 where all rewards are equal."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
    return [(reward - mean) / deviation for reward in rewards]
