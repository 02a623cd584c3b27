"""The losses of the original's programs, read plainly: that of a small batch is ours, up to the constant said here.

In dLLM-RL's train/rl_{llada,dream,mmada,sdar,trado}.py and train_{sdar,trado}_{policy,value}.py a response is several
rows: under full attention one for each merged step, under block attention one for each round, in which every block is
at its next step. Full attention takes the mean over a row's predicted tokens, but their KLs' sum, and the mean over
rows. Block attention divides the sums of both by the padded length of responses, and takes the mean over rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator
from scored import scored
from torch import Tensor

from common.config import load_config
from common.jobs import RLConfig
from common.trajectory import ScoredTrajectory, Trajectory
from models import LoadedModel, load_model
from models.tiny import build_tiny
from train.learner import Learner, batch_logp, micro_batches
from train.network import Policy
from train.objectives import tokens_of, value_loss, value_targets
from train.rl_step import clipped_loss, sample_rows, shares_of
from train.views import layout_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BLOCK, PADDED, LIMIT = 4, 40, 32  # tokens: of a block, of the longest response as the original pads it, allowed
REWARDS = [1.0, 0.0, 0.0]
Logp = Callable[[Trajectory, list[int], list[int]], list[Tensor]]


@dataclass
class Predicted:
    """A token that a row predicts."""

    response: int
    index: int  # in the response
    step: int
    logp: Tensor


# ---- the original's rows


def merged_steps(steps: Sequence[int], shrink: int) -> list[list[int]]:
    """The distinct steps in order, `shrink` at a time."""
    distinct = sorted(set(steps))
    return [distinct[start : start + shrink] for start in range(0, len(distinct), shrink)]


def full_rows(number: int, one: Trajectory, network: LoadedModel, shrink: int, post_num: int) -> list[list[Predicted]]:
    """A row for each merged step of the response: what came earlier is visible, the rest is masked."""
    rows, offset = [], network.family.logit_offset
    for steps in merged_steps(one.step_map, shrink):
        noised = [token if step < steps[0] else network.mask_id for token, step in zip(one.response_ids, one.step_map)]
        own = [i for i, step in enumerate(one.step_map) if step in steps and i < one.length + post_num]
        ids = torch.tensor([one.prompt_ids + noised])
        everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        logits = network.model(input_ids=ids, attention_mask=everything, use_cache=False).logits[0]
        allowed = torch.arange(logits.shape[-1]) != network.mask_id
        logp = torch.where(allowed, logits / one.temperature, -torch.inf).log_softmax(-1)
        at = len(one.prompt_ids) + offset
        rows.append([Predicted(number, i, steps[-1], logp[at + i, one.response_ids[i]]) for i in own])
    return [row for row in rows if row]


def block_rows(number: int, one: Trajectory, network: LoadedModel, shrink: int, post_num: int) -> list[list[Predicted]]:
    """A row for each round: of every block the tokens of its next merged step."""
    views = plain.trace_views(one, BLOCK, network.mask_id, shrink, post_num)
    logp = iter(plain.view_logp(network.model, one, views, BLOCK, network.mask_id, one.temperature))
    rounds: dict[int, list[Predicted]] = {}
    seen: dict[int, int] = {}
    for view in views:
        turn = seen.setdefault(view.start, 0)
        seen[view.start] += 1
        for index, step in zip(view.response_indices, view.steps):
            rounds.setdefault(turn, []).append(Predicted(number, index, step, next(logp)))
    return list(rounds.values())


# ---- the original's losses


def row_losses(
    row: Sequence[Predicted], old: np.ndarray, advantage: np.ndarray, config: RLConfig, full: bool
) -> Tensor:
    """Policy loss and KL penalty of one row; old and advantage (responses, tokens)."""
    training = config.training
    gain, kl = torch.zeros(()), torch.zeros(())
    for token in row:
        d = token.logp - old[token.response, token.index]
        ratio, a = d.exp(), advantage[token.response, token.index]
        gain = gain + torch.min(ratio * a, ratio.clamp(1 - training.eps, 1 + training.eps) * a)
        kl = kl + (-d).exp() - 1 + d
    return -gain / (len(row) if full else PADDED) + training.beta * kl / (1 if full else PADDED)


def in_place(tokens: Sequence[Predicted], values: Sequence[float]) -> np.ndarray:
    """Values of predicted tokens as (responses, tokens)."""
    table = np.zeros((len(REWARDS), LIMIT))
    for token, value in zip(tokens, values):
        table[token.response, token.index] = value
    return table


# ---- both


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("original")
    for family in ("llada", "dream", "mmada", "sdar"):
        build_tiny(family, folder / family, seed=7)
    names = {"llada": "llada", "dream": "dream", "mmada": "mmada", "sdar": "sdar", "trado": "sdar"}
    return {name: load_model(folder / family, family) for name, family in names.items()}


def responses(network: LoadedModel, full: bool) -> list[Trajectory]:
    """Three of different lengths and ends; under full attention over a canvas of 20 tokens."""
    rng, found = np.random.default_rng(11), []
    for prompt, blocks in ((5, 5), (8, 3), (3, 4)):
        if full:
            prompt, blocks = prompt - prompt % BLOCK + BLOCK, 5
        one = plain.random_trajectory(rng, prompt, blocks, BLOCK, 30, network.mask_id)
        found.append(replace(one, length=len(one.response_ids) - int(rng.integers(0, 5)), task_id="t"))
    return found


@pytest.mark.parametrize(
    "name", ["rl_llada", "rl_dream", "rl_mmada", "rl_sdar", "rl_trado", "rl_sdar_with_value", "rl_trado_with_value"]
)
def test_the_loss_is_the_originals(name: str, networks: dict[str, LoadedModel]) -> None:
    keys = [f"rollout.max_token={LIMIT}", "training.updates_per_step=1", "training.post_num=1"]
    config = load_config("rl", [f"config={CONFIGS / name}.yaml", *keys])
    training, network = config.training, networks[config.model.model_base]
    full, has_value = network.family.attention == "full", bool(config.model.value_base_model)
    trajectories, rng = responses(network, full), np.random.default_rng(3)

    make = full_rows if full else block_rows
    with torch.no_grad():
        numbered = enumerate(trajectories)
        rows = [row for n, one in numbered for row in make(n, one, network, training.shrink, training.post_num)]
    assert max(map(len, rows)) > 1 and len(rows) > len(trajectories)
    predicted = [token for row in rows for token in row]
    old = in_place(predicted, [float(token.logp) + rng.normal(0, 0.3) for token in predicted])
    z_scores = plain.z_scores(REWARDS)
    advantage = np.repeat(np.array(z_scores)[:, None], LIMIT, 1)
    values = rng.normal(0, 0.5, len(predicted))
    if has_value:
        returns = np.zeros_like(advantage)
        for number, z_score in enumerate(z_scores):
            own = [n for n, token in enumerate(predicted) if token.response == number]
            steps = [predicted[n].step for n in own]
            rewards = [z_score * (step == max(steps)) for step in steps]
            found = plain.gae(rewards, values[own].tolist(), steps, training.gam, training.lam)
            for n, one, other in zip(own, *found):
                advantage[number, predicted[n].index] = one
                returns[number, predicted[n].index] = other
    wanted = sum(row_losses(row, old, advantage, config, full) for row in rows) / len(rows)

    samples = [
        scored(replace(one, logp=old[number][: len(one.response_ids)].tolist()), z_scores[number], REWARDS[number])
        for number, one in enumerate(trajectories)
    ]
    tokens, logp, ours = our_loss(samples, network, config, in_place(predicted, values) if has_value else None)
    assert len(logp) == len(predicted)
    # ours divides by the longest response allowed and by responses, the original by the padded length and by rows
    constant = 1.0 if full else PADDED * len(rows) / (LIMIT * len(samples))
    assert ours == pytest.approx(constant * float(wanted), rel=1e-5, abs=1e-6)
    if has_value:
        now = tokens.old_value + torch.tensor(rng.normal(0, 0.3, len(tokens)), dtype=torch.float32)
        found, _ = value_loss(now, tokens, training.eps)
        columns = (tokens.trajectory, tokens.response_index, now, tokens.old_value)
        wanted = 0.0
        for response, index, value, before in zip(*(column.tolist() for column in columns)):
            wanted += float(plain.value_term(torch.tensor(value), before, returns[response, index], training.eps))
        assert float(found) == pytest.approx(constant * wanted / PADDED / len(rows), rel=1e-5)


def our_loss(
    samples: list[ScoredTrajectory], network: LoadedModel, config: RLConfig, values: np.ndarray | None
) -> tuple[object, Tensor, float]:
    """The tokens of the step's one update, the policy's logp of them, and the loss."""
    training, layout = config.training, layout_of(network, BLOCK)
    rows = sample_rows(samples, training, layout, [0])
    tokens = tokens_of(rows, samples)
    tokens.old_logp = tokens.reference_logp = tokens.engine_logp
    if values is not None:
        at = (tokens.trajectory.numpy(), tokens.response_index.numpy())
        tokens.old_value = torch.tensor(values[at], dtype=torch.float32)
        tokens.advantage, tokens.returns = value_targets(tokens, samples, training, layout.block_size)
    optimizer = torch.optim.SGD(network.model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    learner = Learner(Policy(network.model, network.mask_id), optimizer, scheduler, Accelerator(), 1e9)
    logp = batch_logp(learner, micro_batches(rows, 10**6), samples[0].trajectory.temperature)
    ((_, own),) = shares_of(rows, tokens, len(samples), training, config.rollout.max_token, [0])
    loss, _ = clipped_loss(logp, own, training)
    return own, logp, float(loss)
