"""Value models, views of the user's own, dynamic sampling and importance weights, in the program that runs them."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn_policy import BLOCK, Drawn
from safetensors.torch import save_file
from scored import scored
from test_rl import CONFIG, run_rl, same_weights, steps_of

from common.checkpoint import MANIFEST
from common.config import load_config
from common.errors import UserError
from common.schema import OptimizerParams, RLTrainingConfig, SchedulerConfig
from common.trajectory import Score, ScoredTrajectory, Task
from models import load_model, load_network, save_model
from models.value import HEAD_FILE, ValueNetwork, load_value, save_value
from train import rl_groups
from train.learner import Learner, make_learner
from train.loading import value_learner
from train.network import Critic
from train.objectives import kept_samples
from train.views import Layout, view_method

DOCS = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"
SHORT = {"experiment__eval_every": 0, "evaluation__num_task": 2, "experiment__total_step": 2}


def critic_of(folder: Path, rate: float = 1e-3) -> Learner:
    params = OptimizerParams(learning_rate=rate)
    return make_learner(Critic(load_value(folder, "sdar")), params, SchedulerConfig(), 10, RLTrainingConfig())


# ---- the model


def test_a_value_model_is_saved_whole(tiny_sdar: Path, tmp_path: Path) -> None:
    loaded, value = load_model(tiny_sdar, "sdar"), load_value(tiny_sdar, "sdar")
    assert all(not one.any() for one in value.head.parameters())
    torch.nn.init.normal_(value.head.weight)
    save_value(value, loaded.tokenizer, tmp_path / "value")
    again = load_value(tmp_path / "value", "sdar")
    assert torch.equal(again.head.weight, value.head.weight) and same_weights(tmp_path / "value", tiny_sdar)
    state = {name: tensor * 2 for name, tensor in value.state_dict().items()}  # as gathered from shards
    save_value(value, loaded.tokenizer, tmp_path / "gathered", state)
    doubled = load_value(tmp_path / "gathered", "sdar")
    assert torch.equal(doubled.head.weight, 2 * value.head.weight)
    assert torch.equal(doubled.network.lm_head.weight, 2 * value.network.lm_head.weight)


def test_an_untied_language_head_is_kept_and_not_trained(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden" / "sdar"
    network = load_network(golden, "sdar")
    assert not network.config.tie_word_embeddings
    value = ValueNetwork(network)
    assert not network.lm_head.weight.requires_grad and value.head.weight.requires_grad


def test_an_unfit_value_model(tiny_sdar: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.value_base_model: no folder"):
        load_value(tmp_path / "none", "sdar")
    loaded = load_model(tiny_sdar, "sdar")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "value")
    save_file({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, tmp_path / "value" / HEAD_FILE)
    with pytest.raises(UserError, match=r"^model\.value_base_model: .*value_head\.safetensors holds"):
        load_value(tmp_path / "value", "sdar")


# ---- learning with it


def test_the_value_model_learns_the_reward(drawn: Drawn, tiny_sdar: Path) -> None:
    """From 0 its values approach the returns, at a rate of its own, and explain them; the policy's update is GAE's."""
    critic = critic_of(tiny_sdar)
    samples = [scored(one.trajectory, one.advantage, float(n % 2)) for n, one in enumerate(drawn.samples)]
    rows = [drawn.learn(samples, critic=critic, exact=False, updates_per_step=2) for _ in range(5)]
    assert critic.scheduler.get_last_lr() == [1e-3]
    assert rows[0]["value_mean"] == 0 and rows[0]["explained_variance"] == 0
    assert rows[-1]["value_loss"] < rows[0]["value_loss"] / 2 and rows[-1]["explained_variance"] > 0.3
    assert {"value_grad_norm", "value_clip_fraction", "value_bad_steps", "entropy"} <= rows[0].keys()
    before = [one.clone() for one in critic.network.parameters()]
    drawn.learn(samples, critic=critic, exact=False, train_value=False)
    assert all(torch.equal(one, other) for one, other in zip(before, critic.network.parameters()))


def test_without_values_advantages_would_be_the_group_s(drawn: Drawn, tiny_sdar: Path) -> None:
    """A zero value model, γ = λ = 1: every token's advantage is the response's raw reward, not its z-score."""
    samples = [scored(one.trajectory, one.advantage, 0.5) for one in drawn.samples]
    figures = drawn.learn(samples, critic=critic_of(tiny_sdar), beta=0.0)
    assert figures["loss"] == pytest.approx(-0.5, abs=1e-5)


def test_the_value_model_learns_where_the_policy_has_no_signal(drawn: Drawn, tiny_sdar: Path) -> None:
    """Importance weights of 0 leave the policy without advantages; the value model has its errors all the same."""
    drawn.learn()
    policy, critic = drawn.learner.network, critic_of(tiny_sdar)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    far = [replace(s.trajectory, logp=[one + 1000 for one in s.trajectory.logp]) for s in drawn.samples]
    samples = [scored(other, one.advantage, 1.0) for one, other in zip(drawn.samples, far)]
    rows = [drawn.learn(samples, False, critic, tis_cap=1.0, updates_per_step=2) for _ in range(2)]
    assert all(row["updates"] == 0 and row["updates_skipped"] == 2 for row in rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert rows[1]["value_loss"] < rows[0]["value_loss"]


def test_a_value_run_resumes_exactly(tiny_sdar: Path, tmp_path: Path) -> None:
    keys = SHORT | {"model__value_base_model": tiny_sdar, "experiment__train_value_every": 2}
    keys |= {"optimizer__params__value_learning_rate": 1e-3, "training__updates_per_step": 1}
    whole = run_rl(tiny_sdar, tmp_path / "whole", **keys)
    first, second = steps_of(whole)
    assert "value_loss" not in first and "value_loss" in second, "every second step"
    value = load_value(whole / "ckpt" / "optimized_value", "sdar")
    assert value.head.weight.abs().max() > 0
    run_rl(tiny_sdar, tmp_path / "parts", **keys | {"experiment__total_step": 1})
    parts = run_rl(tiny_sdar, tmp_path / "parts", **keys, experiment__start_from_scratch=False)
    assert steps_of(parts, untimed=True) == steps_of(whole, untimed=True)
    assert same_weights(parts / "ckpt" / "optimized_value", whole / "ckpt" / "optimized_value")
    checkpoint = parts / "ckpt" / "step-0002"  # made to look like one of a run without values
    shutil.rmtree(checkpoint / "critic")
    files = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps({k: n for k, n in files.items() if not k.startswith("critic")}))
    with pytest.raises(UserError, match=r"^model\.value_base_model is set, but .* holds no value model"):
        run_rl(tiny_sdar, tmp_path / "parts", **keys, experiment__start_from_scratch=False)


# ---- other ways to learn


def test_sequence_ratios_start_at_one(drawn: Drawn) -> None:
    """Then the loss is minus the mean advantage over responses, however long each is."""
    for method in ("TraceRL", "coupled"):
        figures = drawn.learn(term="sequence", method=method, beta=0.0, lower_p=0.4, upper_p=0.6)
        assert figures["loss"] == pytest.approx(0.0, abs=1e-4) and figures["kl"] == pytest.approx(0, abs=1e-8)
        samples = [replace(one, advantage=1.0) for one in drawn.samples]
        figures = drawn.learn(samples, exact=False, term="sequence", method=method, beta=0.0, lower_p=0.4)
        assert figures["loss"] == pytest.approx(-1.0, abs=1e-4) and figures["clip_fraction"] == 0
        drawn.learner.network.load_state_dict(drawn.start)


def test_importance_weights_of_an_engine_that_is_off(drawn: Drawn) -> None:
    """Engine numbers too low by log 2 or more: weights of 2, cut at the cap; the ratio itself still starts at 1."""
    low = [replace(s.trajectory, logp=[one - 0.6931472 for one in s.trajectory.logp]) for s in drawn.samples]
    samples = [replace(one, trajectory=other, advantage=1.0) for one, other in zip(drawn.samples, low)]
    for cap, weight in ((10.0, 2.0), (1.5, 1.5)):
        for method, level in (("TraceRL", "token"), ("random_masking", "token"), ("coupled", "sequence")):
            figures = drawn.learn(samples, False, tis_cap=cap, beta=0.0, method=method, term=level)
            assert figures["tis_weight"] == pytest.approx(weight, rel=1e-4)
            assert figures["tis_capped"] == (weight == cap)
            assert figures["loss"] == pytest.approx(-weight, rel=1e-3)
            drawn.learner.network.load_state_dict(drawn.start)


def test_a_long_trajectory_is_said_and_learned(drawn: Drawn, capsys: pytest.CaptureFixture[str]) -> None:
    assert drawn.learn(tokens_per_micro_batch=30)["updates"] == 1
    assert re.search(r"4 of 4 packed trajectories exceed training.tokens_per_micro_batch=30", capsys.readouterr().out)


def test_the_value_model_s_learning_rate_is_its_own_where_given(tiny_sdar: Path) -> None:
    keys = [f"model.pretrained_model={tiny_sdar}", f"model.value_base_model={tiny_sdar}"]
    for given, rate in (("null", 3e-4), ("1e-3", 1e-3)):
        config = load_config("rl", [f"config={CONFIG}", *keys, f"optimizer.params.value_learning_rate={given}"])
        assert value_learner(config, 1).scheduler.get_last_lr() == [rate]


def test_views_of_one_s_own(drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The docs' method, as it stands there, learns; what it masks are the tokens of lowest confidence."""
    code = re.search(r"```python\n(# least_sure\.py\n.*?)```", DOCS.read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) <= 30
    (tmp_path / "least_sure.py").write_text(code + "\n\ndef nothing(*_):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    method, trajectory = view_method("least_sure:least_sure"), drawn.samples[0].trajectory
    rng = SimpleNamespace(uniform=lambda low, high: 0.5)
    for size in (BLOCK, None):
        views = method(trajectory, Layout(drawn.mask_id, size), RLTrainingConfig(), rng)
        masked = {*views.response_index[views.predict].tolist()}
        confidence = trajectory.confidence[: trajectory.length]
        assert len(masked) == -(-len(confidence) // 2)
        assert max(confidence[i] for i in masked) <= min(c for i, c in enumerate(confidence) if i not in masked)
    figures = drawn.learn(method="least_sure:least_sure")
    assert figures["updates"] == 1 and figures["logp_diff_max"] <= 1e-5 and figures["kl"] == pytest.approx(0, abs=1e-9)
    loss = figures["loss"]
    drawn.learner.network.load_state_dict(drawn.start)
    older = code.replace("trajectory, layout, training", "trajectory, block_size, mask_id, training")
    (tmp_path / "older.py").write_text(older.replace("layout.", ""))
    assert "layout" not in (tmp_path / "older.py").read_text()
    assert drawn.learn(method="older:least_sure")["loss"] == loss, "the older arguments do too"
    with pytest.raises(UserError, match=r"training.method: 'least_sure:nothing' returned NoneType"):
        drawn.learn(method="least_sure:nothing")
    with pytest.raises(UserError, match=r"training.method: .* has no function 'least_sur'; did you mean 'least_sure'"):
        view_method("least_sure:least_sur")


def test_groups_of_equal_rewards_can_be_dropped(drawn: Drawn) -> None:
    trajectory = drawn.samples[0].trajectory

    def group(*rewards: float) -> list[ScoredTrajectory]:
        return [ScoredTrajectory(Task("0", "q"), trajectory, Score(one, True, "")) for one in rewards]

    groups = [group(0.5, 0.5), group(0.5, 1.0)]
    assert len(kept_samples(groups, None)) == 4
    assert [one.score.reward for one in kept_samples(groups, None, drop_equal=True)] == [0.5, 1.0]


def test_dynamic_sampling_fills_the_step(tiny_sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other task's group is dropped: as many are drawn again as are missing, until they are there."""
    real, asked = rl_groups.collect, []

    def flat(*args: object, **kwargs: object) -> list[list[ScoredTrajectory]]:
        groups = real(*args, **kwargs)
        asked.append(len(groups))
        for number, group in enumerate(groups):
            for sample, one in enumerate(group):
                one.score = Score(float(number % 2 and sample % 2), True, "")
        return groups

    monkeypatch.setattr(rl_groups, "collect", flat)
    keys = SHORT | {"training__dynamic_sampling": True, "experiment__total_step": 1}
    (row,) = steps_of(run_rl(tiny_sdar, tmp_path / "full", rollout__max_resample=9, **keys))
    assert asked[:2] == [4, 2] and row["groups_kept"] <= 4 and row["groups"] == sum(asked)
    assert row["groups_kept"] == sum(count // 2 for count in asked)
    asked.clear()
    (row,) = steps_of(run_rl(tiny_sdar, tmp_path / "short", rollout__max_resample=1, **keys))
    assert asked == [4, 2] and row["groups_kept"] == 3


def test_bad_updates_are_counted_and_end_the_run(
    drawn: Drawn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN advantages: weights stay as they are, the count goes on over steps."""
    samples = [replace(one, advantage=float("nan")) for one in drawn.samples]
    drawn.learner.max_bad_steps = 3
    figures = drawn.learn(samples, updates_per_step=2)
    assert figures["bad_steps"] == 2 and figures["updates"] == 0 and "loss" not in figures
    assert figures["logp_diff_max"] <= 1e-5
    now = drawn.learner.network.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in drawn.start.items())
    assert not drawn.learner.optimizer.state
    with pytest.raises(UserError, match=r"training.max_bad_steps=3"):
        drawn.learn(samples)
