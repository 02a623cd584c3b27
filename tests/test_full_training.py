"""Training with full attention: views of the whole response, and the trainer's numbers against the engine's."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scored import scored

from common.config import load_config
from common.schema import RLTrainingConfig, Sampling, SFTTrainingConfig
from common.trajectory import Request, ScoredTrajectory, Trajectory
from models import LoadedModel, load_model
from models.tiny import build_tiny
from sample.engine import Engine
from train.learner import Learner, batch_logp
from train.network import Policy, predicted_states
from train.objectives import noisings, tokens_of
from train.packing import make_rows, pack
from train.rl_step import learn, sample_rows
from train.rl_trainer import main as train_rl
from train.views import SFT_METHODS, Example, Layout, layout_of, random_views, trace_views
from train.whole_rows import are_whole

FAMILIES = ("dream", "llada", "mmada")
MASK = 7
FULL = Layout(MASK, None)
SETTINGS = Sampling(max_token=16, block_size=8, steps=12, dynamic_threshold=0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    folder = tmp_path_factory.mktemp("full")
    for family in FAMILIES:
        build_tiny(family, folder / family, seed=3)
    return {family: load_model(folder / family, family) for family in FAMILIES}


def learner_of(loaded: LoadedModel) -> Learner:
    optimizer = torch.optim.SGD(loaded.model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Learner(Policy(loaded.model, loaded.mask_id), optimizer, scheduler, Accelerator(), 1e9)


def drawn(
    loaded: LoadedModel, settings: Sampling = SETTINGS, stops: tuple[int, ...] = (1, 2, 3)
) -> list[ScoredTrajectory]:
    requests = [Request(f"t{n}", [5 * i % 30 for i in range(n)], seed=3) for n in (3, 5, 8, 9)]
    trajectories = Engine(loaded.model, loaded.mask_id, stops).generate(requests, settings)
    return [scored(one, (-1.0) ** n) for n, one in enumerate(sorted(trajectories, key=lambda one: one.task_id))]


def trajectory(step_map: list[int], length: int) -> Trajectory:
    """A response with token 100 + i at position i, masks where it was never unmasked."""
    ids = [100 + i if step >= 0 else MASK for i, step in enumerate(step_map)]
    count = len(ids)
    return Trajectory("t", 0, [1, 2, 3], ids, step_map, [0.0] * count, [0.0] * count, 1, "stop", length, 4, 4, 1.0)


# ---- views


@pytest.mark.parametrize("shrink", [1, 2, 8])
def test_a_trace_is_replayed_over_the_response(shrink: int) -> None:
    step_map, length = [0, 2, 1, 2, 3, 4, -1, -1], 5
    views = trace_views(trajectory(step_map, length), FULL, shrink)
    distinct = [0, 1, 2, 3, 4]
    groups = [distinct[i : i + shrink] for i in range(0, len(distinct), shrink)]
    groups = [group for group in groups if any(step in group for step in step_map[:length])]
    assert len(views) == len(groups)
    for view, group in enumerate(groups):
        for i, step in enumerate(step_map):
            seen = 0 <= step < group[0]
            assert views.inputs[view, i] == (100 + i if seen else MASK)
            assert views.predict[view, i] == (step in group and i < length)


def test_a_coupled_pair_predicts_every_token_once() -> None:
    one = trajectory([0, 1, 2, 3, 4, 5, -1, -1], 5)
    training = RLTrainingConfig(mask_times_per_sample=7)
    views = random_views(one, FULL, training, np.random.default_rng(0), coupled=True)
    predicted = views.predict.sum(0)
    assert predicted.tolist() == [7] * 5 + [0] * 3
    assert (views.inputs[:, 5:] == MASK).all(), "what lies behind the end would give the length away"
    assert (views.inputs[views.predict] == MASK).all()


@pytest.mark.parametrize("coupled", [False, True])
def test_random_views_of_blocks_are_those_of_the_response(coupled: bool) -> None:
    """Under block attention a noising of the response is one view of each of its blocks."""
    one = trajectory([0, 1, 2, 3, 4, 5, 6, 7, 8], 8)
    training = RLTrainingConfig(lower_p=0.2, upper_p=0.8, mask_times_per_sample=5)
    views = random_views(one, Layout(MASK, 4), training, np.random.default_rng(1), coupled)
    share = views.predict.sum() / (8 * (10 if coupled else 5))
    assert set(views.block.tolist()) <= {0, 1, 2}
    assert (share == 0.5) if coupled else (0.2 < share < 0.8)
    visible = (views.inputs != MASK) & (views.response_index >= 0)
    assert (views.inputs[visible] == 100 + views.response_index[visible]).all()
    assert (
        views.inputs[views.response_index < 0] == np.array([1, 2, 3])[views.response_index[views.response_index < 0]]
    ).all()


def test_sft_views_of_the_canvas() -> None:
    training = SFTTrainingConfig(block_size=4, lower_p=0.2, upper_p=0.8, post_num=2, mask_times_per_sample=3)
    response, length = list(range(100, 112)), 5
    rng = np.random.default_rng(0)
    whole = SFT_METHODS["full"]["random_masking"](Example([1, 2], response, length), FULL, training, rng)
    assert len(whole) == 3 and whole.predict.any(1).all()
    assert not whole.predict[:, 7:].any() and (whole.inputs[:, 7:] == MASK).any()
    blocks = SFT_METHODS["full"]["semi-ar"](Example([1, 2], response, length), FULL, training, rng)
    assert len(blocks) == 6  # two of three blocks hold what is predicted, three times
    for view in range(6):
        block = view // 3
        assert (blocks.inputs[view, : block * 4] == response[: block * 4]).all(), "earlier blocks are clean"
        assert (blocks.inputs[view, (block + 1) * 4 :] == MASK).all(), "later blocks are masked"
        assert np.flatnonzero(blocks.predict[view]).tolist()[0] // 4 == block


# ---- trainer and engine


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.7, "top_k": 6, "top_p": 0.8}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_equals_engine(tiny: dict[str, LoadedModel], family: str, draw: dict) -> None:
    loaded = tiny[family]
    settings = Sampling(**vars(SETTINGS) | draw)
    samples = drawn(loaded, settings)
    rows = sample_rows(samples, RLTrainingConfig(post_num=16), layout_of(loaded, 8), [0])
    engine_logp = tokens_of(rows, samples).engine_logp
    assert len(engine_logp) == sum(step >= 0 for one in samples for step in one.trajectory.step_map)
    logp = batch_logp(learner_of(loaded), pack(rows, 300), samples[0].trajectory.temperature)
    assert (logp - engine_logp).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_cache_the_mismatch_is_measured(tiny: dict[str, LoadedModel], family: str) -> None:
    loaded = tiny[family]
    samples = drawn(loaded, Sampling(**vars(SETTINGS) | {"use_cache": True, "further_horizon": 2}))
    figures = learn(learner_of(loaded), samples, RLTrainingConfig(), layout_of(loaded, 8), 16, [0], exact=False)
    assert figures["logp_diff_max"] > 1e-3 and figures["mismatch_kl"] > 0
    assert figures["kl"] == pytest.approx(0, abs=1e-9), "the ratio starts from the trainer's own numbers"


@pytest.mark.parametrize(("method", "block_size"), [("random_masking", 8), ("coupled", 8), ("TraceRL", 8)])
def test_methods_start_on_policy_and_ignore_the_micro_batch(
    tiny: dict[str, LoadedModel], method: str, block_size: int
) -> None:
    loaded, figures = tiny["dream"], []
    samples = drawn(loaded)
    for budget in (60, 4096):
        training = RLTrainingConfig(
            method=method, mask_times_per_sample=2, shrink=2, tokens_per_micro_batch=budget, loss_norm="length"
        )
        learner = learner_of(loaded)
        figures.append(learn(learner, samples, training, layout_of(loaded, block_size), 16, [0, 1], exact=True))
    assert figures[0]["kl"] == pytest.approx(0, abs=1e-9) and figures[0]["logp_diff_max"] < 1e-5
    for key in ("loss", "grad_norm", "predicted_tokens"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_whole_rows_have_the_states_and_gradients_of_transformers_own_forward(
    tiny: dict[str, LoadedModel], family: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer is computed for what is predicted alone: two shapes, rounding apart, of the same sums."""
    model = copy.deepcopy(tiny[family].model).train()
    if again:
        model.activation_checkpointing_enable()
    training = RLTrainingConfig(method="random_masking", mask_times_per_sample=2)
    batches = pack(sample_rows(drawn(tiny[family]), training, layout_of(tiny[family], 8), [0]), 4096)
    computed, found = {True: 0, False: 0}, []
    for own in computed:
        monkeypatch.setattr("train.network.are_whole", are_whole if own else lambda *_: False)
        model.zero_grad()

        def count(module: torch.nn.Module, given: tuple, out: torch.Tensor, own: bool = own) -> None:
            computed[own] += out[..., 0].numel()

        hook = model.model.layers[-1].mlp.down_proj.register_forward_hook(count)
        states = torch.cat([predicted_states(model, batch) for batch in batches])
        (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
        hook.remove()
        gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
        found.append((states.detach(), *gradients))
    assert len(found[0]) == len(found[1]) > 10 and any((batch.trajectory < 0).any() for batch in batches)
    for one, other in zip(*found):
        assert (one - other).abs().max() <= 3e-6 * other.abs().max()
    assert computed[True] < computed[False] / 1.5


@pytest.mark.parametrize(
    ("method", "joined", "whole"),
    [("random_masking", False, True), ("random_masking", True, False), ("ar", False, False)],
)
def test_causal_rows_and_joined_ones_are_not_whole(
    tiny: dict[str, LoadedModel], method: str, joined: bool, whole: bool
) -> None:
    """Each token of a whole row sees all others, which the last layer's shortcut takes for granted."""
    loaded, rows = tiny["dream"], []
    layout, training, rng = layout_of(loaded, 8), SFTTrainingConfig(block_size=8), np.random.default_rng(0)
    for number, length in enumerate((8, 16)):
        example = Example([1, 2], list(range(length)), length)
        views = SFT_METHODS["full"][method](example, layout, training, rng)
        rows += make_rows(number, example.prompt_ids, example.response_ids, views, layout.logit_offset)
    (batch,) = pack(rows, 4096, together=joined)
    assert len(batch.ids) == (1 if joined else 2) and are_whole(loaded.model, batch) == whole


def test_a_shifted_step_map_is_seen(tiny: dict[str, LoadedModel]) -> None:
    loaded = tiny["dream"]
    samples = drawn(loaded)
    moved = [s.trajectory.step_map[1:8] + s.trajectory.step_map[:1] + s.trajectory.step_map[8:] for s in samples]
    wrong = [scored(Trajectory(**vars(s.trajectory) | {"step_map": m}), s.advantage) for s, m in zip(samples, moved)]
    with pytest.raises(ValueError, match="logp_diff_max"):
        learn(learner_of(loaded), wrong, RLTrainingConfig(), layout_of(loaded, 8), 16, [0], exact=True)


def test_a_view_without_anything_to_predict_makes_no_row() -> None:
    training = RLTrainingConfig(lower_p=0.0, upper_p=0.0, mask_times_per_sample=2)
    views = random_views(trajectory([0, 1, 2, 3], 4), FULL, training, np.random.default_rng(0))
    assert len(views) == 0 and make_rows(0, [1], [2, 3, 4, 5], views) == []
    assert noisings(RLTrainingConfig(method="coupled", mask_times_per_sample=5)) == 5


# ---- the whole job


@pytest.mark.parametrize("family", ["dream", "llada"])
def test_the_main_job(family: str, tmp_path: Path) -> None:
    small = {
        "model.model_base": family,
        "experiment.runs_dir": tmp_path,
        "experiment.total_step": 1,
        "model.made_by": "null",
        "model.pretrained_model": tmp_path / "untrained",
        "rollout.num_task_per_step": 3,
        "rollout.num_response_per_task": 2,
        "training.keep_accuracy": "null",
        "reward.function": "benchmarks.coin_flip:coin_flip",
        "reward.truncated_is_wrong": "false",
        "evaluation.num_task": 3,
    }
    build_tiny(family, tmp_path / "untrained", seed=1)
    train_rl(load_config("rl", ["config=configs/rl_tiny.yaml", *(f"{key}={value}" for key, value in small.items())]))
    trained = load_model(tmp_path / "rl_tiny" / "ckpt" / "optimized", family)
    assert trained.model.config.model_type == load_model(tmp_path / "untrained", family).model.config.model_type
    metrics = (tmp_path / "rl_tiny" / "metrics.jsonl").read_text()
    assert '"logp_diff_max"' in metrics and (tmp_path / "rl_tiny" / "summary.json").exists()
