"""Every objective's update against the plain way: one row per denoising round, padded, dense masks, all logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import training_reference as plain
from accelerate import Accelerator
from scored import scored

from benchmarks.plain_training import PlainRow, plain_batches, plain_logp, plain_rows, plain_values
from common.schema import RLTrainingConfig
from common.trajectory import Trajectory
from models import find_family, load_network
from models.value import ValueNetwork
from train.learner import Learner
from train.network import Critic, Policy
from train.rl_step import learn
from train.views import Layout, Views, view_method

GOLDEN = Path(__file__).parent / "golden"
BLOCK, LIMIT, SEED = 4, 20, [3, 1]
ADVANTAGES = [1.5, -0.5, -1.0]
REWARDS = [1.0, 0.0, 0.25]


@dataclass(frozen=True)
class Case:
    """A policy, a reference, a value model whose head is not zero, trajectories whose logp is not the policy's.

    Two of the three have edits and revocations.
    """

    policy: torch.nn.Module
    reference: torch.nn.Module  # near the policy
    value: ValueNetwork
    layout: Layout
    trajectories: list[Trajectory]


def learner_of(network: torch.nn.Module) -> Learner:
    optimizer = plain.RecordingSGD([one for one in network.parameters() if one.requires_grad])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(network, optimizer, scheduler, Accelerator(), 1e9)


@pytest.fixture(scope="module", params=["sdar", "dream"])
def case(request: pytest.FixtureRequest) -> Case:
    """Block attention, and full attention with the prediction one position earlier."""
    family = find_family(request.param)
    model, value = load_network(GOLDEN / family.name, family.name), load_network(GOLDEN / family.name, family.name)
    torch.manual_seed(0)
    reference = load_network(GOLDEN / family.name, family.name)
    for parameter in reference.parameters():
        parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    critic = ValueNetwork(value)
    torch.nn.init.normal_(critic.head.weight, std=0.2)
    vocabulary, mask_id = model.config.vocab_size, model.config.mask_token_id
    size = BLOCK if family.attention == "block" else None
    rng, trajectories = np.random.default_rng(5), []
    for prompt, blocks, edits in ((5, 3, False), (8, 2, True), (2, 4, True)):
        one = plain.random_trajectory(rng, prompt, blocks, BLOCK, vocabulary, mask_id)
        one = plain.edited_trajectory(rng, one, size, vocabulary, mask_id) if edits else one
        trajectories.append(replace(one, length=len(one.response_ids) - 1, temperature=0.8))
    layout = Layout(mask_id, size, family.logit_offset)
    views = [views_of(one, n, RLTrainingConfig(post_num=LIMIT), layout) for n, one in enumerate(trajectories)]
    with torch.no_grad():
        exact = plain_outputs(trajectories, views, layout, lambda *rows: plain_logp(model, *rows, mask_id, 0.8))
    sizes = [int(one.predict.sum()) for one in views]
    for number, (one, own, logp) in enumerate(zip(trajectories, views, exact.split(sizes))):
        logp = (logp.numpy() + rng.normal(0, 0.3, len(logp))).tolist()  # some ratios beyond the clip
        known = dict(zip(zip(own.response_index[own.predict], own.writing[own.predict]), logp))
        overwritten = [
            writing._replace(logp=known.get((writing.position, index), 0.0))  # not there: a revocation
            for index, writing in enumerate(one.overwritten)
        ]
        last = [known[index, -1] for index in range(len(one.response_ids))]
        trajectories[number] = replace(one, logp=last, overwritten=overwritten)
    return Case(model, reference, critic, layout, trajectories)


def views_of(trajectory: Trajectory, number: int, training: RLTrainingConfig, layout: Layout) -> Views:
    rng = np.random.default_rng([*SEED, number])
    return view_method(training.method)(trajectory, layout, training, rng)


def plain_outputs(trajectories: list[Trajectory], views: list[Views], layout: Layout, forward) -> torch.Tensor:
    """`forward(rows, width)` over micro-batches of the plain way, put in the order of trajectory, view, position."""
    rows = plain_rows(trajectories, views, layout.block_size, layout.logit_offset)
    width, found, places = max(len(row) for row in rows), [], []
    for batch in plain_batches(rows, 5 * width):
        found.append(forward(batch, width))
        places += [place for row in batch for place in row.place]
    assert sorted(places) == list(range(len(places)))
    return torch.cat(found)[np.argsort(places)]


def steps_of(views: Views) -> list[int]:
    """A trace's steps as the views merge them: the view of each predicted token."""
    return np.nonzero(views.predict)[0].tolist()


def plain_tokens(case: Case, training: RLTrainingConfig, critic: bool) -> tuple[list[list[plain.PlainToken]], list]:
    """Per response its predicted tokens, and with a value model (value, return) of each token."""
    views = [views_of(one, n, training, case.layout) for n, one in enumerate(case.trajectories)]
    sizes = [int(one.predict.sum()) for one in views]
    logp, reference = (
        plain_outputs(
            case.trajectories, views, case.layout, lambda *rows, n=n: plain_logp(n, *rows, case.layout.mask_id, 0.8)
        ).split(sizes)
        for n in (case.policy, case.reference)
    )
    values = [None] * len(views)
    if critic:
        values = plain_outputs(
            case.trajectories, views, case.layout, lambda *rows: plain_values(case.value, *rows)
        ).split(sizes)
    responses, targets = [], []
    for number, (one, own) in enumerate(zip(case.trajectories, views)):
        writing = np.full_like(own.response_index, -1) if own.writing is None else own.writing
        predictions = zip(own.response_index[own.predict], writing[own.predict])
        old = [one.logp[i] if index < 0 else one.overwritten[index].logp for i, index in predictions]
        advantage = [ADVANTAGES[number]] * len(old)
        if critic:
            steps = steps_of(own)
            rewards = [REWARDS[number] * (step == max(steps)) for step in steps]
            advantage, goals = plain.gae(rewards, values[number].tolist(), steps, training.gam, training.lam)
            targets.append(list(zip(values[number], goals)))
        steps = own.step[own.predict].tolist() if training.method != "TraceRL" else steps_of(own)
        tokens = zip(logp[number], old, reference[number].tolist(), advantage, steps)
        responses.append([plain.PlainToken(*fields) for fields in tokens])
    return responses, targets


def assert_same(found: Sequence[torch.Tensor], loss: torch.Tensor, network: torch.nn.Module) -> None:
    trained = [(name, one) for name, one in network.named_parameters() if one.requires_grad]
    wanted = torch.autograd.grad(loss, [one for _, one in trained])
    for (name, _), one, other in zip(trained, found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name
    assert max(float(one.abs().max()) for one in wanted) > 1e-3


def update_of(case: Case, training: RLTrainingConfig, critic: bool = False) -> Iterator[list[torch.Tensor]]:
    """The gradients of the packed update, the policy's and then the value model's."""
    samples = [scored(*fields) for fields in zip(case.trajectories, ADVANTAGES, REWARDS)]
    learners = [learner_of(Policy(case.policy, case.layout.mask_id))]
    learners += [learner_of(Critic(case.value))] if critic else []
    value = learners[1] if critic else None
    reference = learner_of(Policy(case.reference, case.layout.mask_id))
    figures = learn(learners[0], samples, training, case.layout, LIMIT, SEED, False, reference, value)
    assert figures["updates"] == 1 and figures["bad_steps"] == 0
    for learner in learners:
        (recorded,) = learner.optimizer.recorded
        yield recorded


SETTINGS = {"old_logp": "engine", "kl_reference": "initial", "eps_high": 0.3, "beta": 0.1, "tokens_per_micro_batch": 90}
METHODS = [("TraceRL", 1), ("TraceRL", 2), ("TraceRL", 4), ("random_masking", 1), ("coupled", 1)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("method", "shrink"), METHODS)
def test_packed_and_plain_gradients(case: Case, method: str, shrink: int, level: str) -> None:
    training = RLTrainingConfig(
        method=method, shrink=shrink, term=level, mask_times_per_sample=2, loss_norm="step", **SETTINGS
    )
    (found,) = update_of(case, training)
    responses, _ = plain_tokens(case, training, critic=False)
    if level == "sequence":
        wanted = plain.sequence_loss(responses, method != "TraceRL", eps_high=0.3, beta=0.1)
    else:
        wanted = plain.update_loss(responses, "step", LIMIT, eps_high=0.3, beta=0.1)
    assert_same(found, wanted, case.policy)


@pytest.mark.parametrize(("shrink", "budget"), [(1, 90), (2, 90), (4, 90), (1, 28)])
def test_packed_and_plain_gradients_with_values(case: Case, shrink: int, budget: int) -> None:
    """Also where rows exceed the budget and are in pieces: means over a step's tokens are of all of them."""
    training = RLTrainingConfig(shrink=shrink, gam=0.9, lam=0.8, **SETTINGS | {"tokens_per_micro_batch": budget})
    policy, value = update_of(case, training, critic=True)
    responses, targets = plain_tokens(case, training, critic=True)
    assert_same(policy, plain.update_loss(responses, "token", LIMIT, eps_high=0.3, beta=0.1), case.policy)
    terms = [plain.value_term(one, float(one.detach()), goal, 0.2) for own in targets for one, goal in own]
    assert_same(value, sum(terms) / len(terms), case.value)


def test_a_round_s_row_is_what_it_says(case: Case) -> None:
    """As many rows as the most steps of a block, each of prompt and twice the response: what packing saves."""
    views = [views_of(one, n, RLTrainingConfig(), case.layout) for n, one in enumerate(case.trajectories)]
    rows: list[PlainRow] = plain_rows(case.trajectories, views, case.layout.block_size)
    counts = [np.unique(one.block, return_counts=True)[1].max() for one in views]
    assert len(rows) == sum(counts)
    size = case.layout.block_size
    for row, one in zip(rows, [t for t, count in zip(case.trajectories, counts) for _ in range(count)]):
        prompt, whole = len(one.prompt_ids), len(one.prompt_ids) + len(one.response_ids)
        assert len(row) == (2 * whole - prompt // size * size if size else whole)
