"""Routes: the sampler says which experts it gave each token to, and the trainer gives it to the same where told so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from common.config import load_config
from common.errors import UserError
from common.schema import OptimizerParams, RLTrainingConfig, Sampling, SchedulerConfig
from common.trajectory import Request, ScoredTrajectory
from models.mixture import expert_biases, routers
from models.tiny import build_tiny
from rollout.samples import write_samples
from sample.engine import Engine
from tests.scored import scored
from train.learner import Learner, batch_logp, make_learner, micro_batches, route_flips, update
from train.network import Policy
from train.objectives import tokens_of
from train.packing import PackedBatch, Row, make_rows
from train.rl_step import replay_rows
from train.routing import Routing
from train.views import Layout, check_views, trace_views

NAMES = ("sdar_moe", "llada2")
PROMPTS = {"a": [(7 * i) % 33 for i in range(13)], "b": [(3 + 5 * i) % 33 for i in range(6)], "c": [1, 2]}
TRAINING = RLTrainingConfig(tokens_per_micro_batch=200)
LAYOUT = Layout(mask_id=38, block_size=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name in ("sdar", *NAMES):
        build_tiny(name, root / name, seed=3)
    return {name: root / name for name in ("sdar", *NAMES)}


def load(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    network = models.load_network(folder, name, dtype)
    for _, bias in expert_biases(network):
        bias.copy_(torch.linspace(-0.2, 0.2, len(bias)))
    return network


def draw(network: torch.nn.Module, samples: int = 1, **settings: object) -> list[ScoredTrajectory]:
    """Of every prompt, at temperature 1; of a mixture with routes."""
    chosen = {"max_token": 11, "dynamic_threshold": 0.1, "max_active": 4} | settings
    keep = bool(routers(network))
    named = [(task, ids, sample) for sample in range(samples) for task, ids in PROMPTS.items()]
    requests = [Request(*one, keep_routes=keep) for one in named]
    return [scored(one, 1.0, 1.0, None) for one in Engine(network, 38, [14]).generate(requests, Sampling(**chosen))]


def trainer(network: torch.nn.Module) -> Learner:
    learner = make_learner(Policy(network, 38), OptimizerParams(), SchedulerConfig(), 10, TRAINING)
    learner.routing = Routing(network) if routers(network) else None
    return learner


def packed(
    samples: list[ScoredTrajectory], with_routes: bool = True, budget: int = 200
) -> tuple[list[Row], list[PackedBatch]]:
    rows = replay_rows(samples, TRAINING, LAYOUT, with_routes)
    return rows, micro_batches(rows, budget)


def other_experts(samples: list[ScoredTrajectory]) -> list[ScoredTrajectory]:
    """The same responses, said to have been given to the next expert each."""
    moved = []
    for sample in samples:
        routes = sample.trajectory.routes
        next_one = replace(routes, committed=(routes.committed + 1) % 8, steps=(routes.steps + 1) % 8)
        moved.append(replace(sample, trajectory=replace(sample.trajectory, routes=next_one)))
    return moved


@pytest.mark.parametrize("merge, cache_tokens", [(True, 60), (False, None)])
@pytest.mark.parametrize("name", NAMES)
def test_routes_are_those_of_the_packed_forward(
    name: str, merge: bool, cache_tokens: int | None, tiny: dict[str, Path]
) -> None:
    """Of clean tokens, of every view's, also of merged steps, and of shared prefixes.

    In a small cache sequences give way and come back.
    """
    network = load(tiny[name], name)
    samples = draw(network, samples=2, merge_commit=merge, cache_tokens=cache_tokens)
    learner = trainer(network)
    assert route_flips(learner, packed(samples)[1]) == 0
    assert route_flips(learner, packed(other_experts(samples))[1]) > 0.5
    merged = [
        row
        for number, one in enumerate(sample.trajectory for sample in samples)
        for row in make_rows(
            number, one.prompt_ids, one.response_ids, trace_views(one, LAYOUT, shrink=2), routes=one.routes
        )
    ]
    assert len(merged) == len(samples) and sum(map(len, merged)) < sum(map(len, packed(samples)[0]))
    assert route_flips(learner, micro_batches(merged, TRAINING.tokens_per_micro_batch)) == 0
    for trajectory in (sample.trajectory for sample in samples):
        tokens, layers = len(trajectory.prompt_ids) + len(trajectory.response_ids), len(routers(network))
        assert trajectory.routes.committed.shape == (tokens, layers, 2)
        assert trajectory.routes.steps.shape == (trajectory.steps, 4, layers, 2)
        assert trajectory.routes.steps.dtype == np.uint8


@pytest.mark.parametrize("name, checkpointing", [("sdar_moe", True), ("llada2", False)])
def test_replayed_experts_are_those_that_run(
    name: str, checkpointing: bool, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, recomputed or not; own choices replayed change nothing, others' are followed.

    Also where rows are in pieces, of less than their clean copy: experts are counted as in whole rows.
    """
    network = load(tiny[name], name)
    if checkpointing:
        network.gradient_checkpointing_enable()
    samples, learner = draw(network), trainer(network)
    gradients: list[dict[str, torch.Tensor]] = []
    counts: list[torch.Tensor] = []

    def look(learner: Learner) -> float:
        """In place of the optimizer's step."""
        gradients.append({key: one.grad for key, one in network.named_parameters()})
        counts.append(learner.routing.counts.clone())
        learner.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr("train.learner.optimizer_step", look)
    moved = other_experts(samples)
    cases = [(samples, False, 200), (samples, True, 200), (moved, True, 200), (samples, False, 12), (moved, True, 12)]
    for chosen, with_routes, budget in cases:
        rows, batches = packed(chosen, with_routes, budget)
        assert (max(map(len, rows)) > budget) == any(batch.clean_copy for batch in batches)
        difference = (batch_logp(learner, batches, 1.0) - tokens_of(rows, samples).engine_logp).abs().max()
        assert (difference <= 1e-5) if chosen is samples else (difference > 0.1)
        update(learner, batches, lambda batch: learner.forward(batch)[0].sum())
        assert not any(router._forward_hooks for router in routers(network))
    own, replayed, others, own_pieces, others_pieces = gradients
    for whole, pieces in ((own, own_pieces), (others, others_pieces)):
        assert all(torch.allclose(whole[key], pieces[key], rtol=1e-4, atol=1e-4) for key in own)
    assert torch.equal(counts[0], counts[3]) and torch.equal(counts[2], counts[4])
    assert all(torch.allclose(own[key], replayed[key], rtol=1e-4, atol=1e-4) for key in own)
    assert not all(torch.allclose(own[key], others[key], atol=1e-1) for key in own)
    assert torch.equal(counts[0], counts[1])
    assert counts[2].sum() == counts[0].sum() and not torch.equal(counts[2], counts[0])


def test_in_bfloat16_a_replay_is_about_as_close_as_a_dense_network(tiny: dict[str, Path]) -> None:
    def difference(name: str, *with_routes: bool) -> list[float]:
        samples, learner = draw(load(tiny[name], name, torch.bfloat16), samples=2), trainer(load(tiny[name], name))
        found = []
        for chosen in with_routes:
            rows, batches = packed(samples, chosen)
            with torch.autocast("cpu", torch.bfloat16):
                logp = batch_logp(learner, batches, 1.0)
            found.append(float((logp - tokens_of(rows, samples).engine_logp).abs().max()))
        return found

    (dense,) = difference("sdar", False)
    assert 0.01 < dense < 0.15
    for name in NAMES:
        own, replayed = difference(name, False, True)
        assert replayed <= 1.5 * dense and own > 2 * replayed  # the largest of few tokens: they vary


def test_routes_stay_in_memory(tiny: dict[str, Path], tmp_path: Path) -> None:
    samples = draw(load(tiny["sdar_moe"], "sdar_moe"), samples=1)
    write_samples(tmp_path / "samples.jsonl", [samples])
    text = (tmp_path / "samples.jsonl").read_text()
    assert len(text.splitlines()) == len(samples) == 3 and "routes" not in text


def test_what_cannot_be_replayed_is_refused() -> None:
    config = load_config("rl", ["config=configs/rl_tiny.yaml", "training.replay_routes=True"])
    for name in ("sdar", "llada"):
        with pytest.raises(UserError, match=rf"training\.replay_routes: model\.model_base={name} is no mixture"):
            check_views(config, models.find_family(name))
    check_views(config, models.find_family("llada2"))
