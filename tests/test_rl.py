"""Reinforcement learning from config to exported model on an untrained tiny network; seconds a run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn_policy import Drawn
from safetensors.torch import load_file

from benchmarks.coin_flip import coin_flip
from common.config import load_config
from common.errors import UserError
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory
from models import load_model
from train import rl_groups, rl_trainer
from train.learner import Learner
from train.objectives import kept_samples

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "rl_tiny.yaml"
BLOCK = 4
SMALL = {
    "rollout.num_task_per_step": 4,
    "rollout.num_response_per_task": 4,
    "rollout.max_token": 12,
    "experiment.total_step": 3,
    "optimizer.params.learning_rate": 3e-4,
    "lr_scheduler.scheduler": "constant",
    "experiment.save_every": 1,
    "experiment.eval_every": 1,
    "experiment.trackers": "[]",
    "evaluation.num_task": 4,
    "evaluation.max_token": 12,
    "evaluation.denoising_steps_per_block": 2,
    "training.keep_accuracy": "null",
    # an untrained network solves nothing: another reward gives it something to learn
    "reward.function": "benchmarks.coin_flip:coin_flip",
    "reward.truncated_is_wrong": False,
}
PER_STEP = {
    *("reward", "accuracy", "loss", "kl", "clip_fraction", "grad_norm", "lr", "response_length"),
    *("tokens_per_forward", "tokens_per_second", "mismatch_kl", "logp_diff_max"),
    *("seconds_rollout", "seconds_reward", "seconds_train", "seconds_sync"),
}


@dataclass
class Runs:
    """Two finished runs of one command, and the model they started from."""

    model: Path
    first: Path
    again: Path


def run_rl(model: Path, runs: Path, curves: bool = False, **changes: object) -> Path:
    """One run in `runs`; the run's folder. Keywords are keys with __ for the dot. Curves take longer than the rest."""
    values = SMALL | {"model.pretrained_model": model, "experiment.runs_dir": runs}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    config = load_config("rl", [f"config={CONFIG}", *(f"{key}={value}" for key, value in values.items())])
    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr(rl_trainer, "draw_curves", lambda *_: None)
        rl_trainer.main(config)
    return runs / config.experiment.project


@pytest.fixture(scope="module")
def runs(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same command twice in one folder: the second moves the first run aside."""
    parent = tmp_path_factory.mktemp("runs")
    run_rl(tiny_sdar, parent, curves=True)
    (parent / "rl_tiny" / "mine.txt").write_text("a user's own file")
    again = run_rl(tiny_sdar, parent)
    return Runs(tiny_sdar, parent / "rl_tiny.old-1", again)


def rows_of(folder: Path, untimed: bool = False) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if untimed:
        timed = ("seconds", "tokens_per_second")
        rows = [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]
    return rows


def steps_of(folder: Path, untimed: bool = False) -> list[dict]:
    return [row for row in rows_of(folder, untimed) if "reward" in row]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- what a run leaves behind


def test_files_of_a_run(runs: Runs) -> None:
    folder = runs.first
    expected = {"config.yaml", "metrics.jsonl", "results.json", "samples.jsonl", "summary.json", "curves.png"}
    assert expected <= {path.name for path in folder.iterdir()}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_config("rl", [f"config={folder}/config.yaml"]).rollout.max_token == 12
    assert {path.name for path in (folder / "rollouts").iterdir()} == {f"step-000{n}.jsonl" for n in (1, 2, 3)}
    # the newest two checkpoints are kept, none half written
    assert {path.name for path in (folder / "ckpt").iterdir()} == {"step-0002", "step-0003", "optimized"}


def test_metrics_of_a_run(runs: Runs) -> None:
    steps = steps_of(runs.first)
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row.keys() >= PER_STEP
        assert None not in row.values()
        assert 0 <= row["logp_diff_max"] <= 2e-5 and abs(row["mismatch_kl"]) < 1e-6
        assert row["updates"] == 2 and row["updates_skipped"] == 0 and row["groups"] == row["groups_kept"] == 4
        assert row["lr"] == pytest.approx(3e-4) and row["grad_norm"] > 0
        assert row["kl"] > 0  # the second update's, to the policy before the first
        parts = [value for key, value in row.items() if key.startswith("seconds_")]
        assert sum(parts) == pytest.approx(row["seconds"], rel=1e-3) and row["seconds_train"] > 0
    evaluations = [row for row in rows_of(runs.first) if "eval/static/accuracy" in row]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3]
    assert all("eval/dynamic/tokens_per_forward" in row for row in evaluations)


def test_a_prefix_is_prompt_and_never_learned(tiny_sdar: Path, tmp_path: Path) -> None:
    tests = {"test_method": "function", "test_list": ["assert f(1) == 1"], "prefix": "12:+3\n"}
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"question": f"{n}+1", "id": n} | tests) + "\n" for n in range(4)))
    sets = {"dataset__train_dataset": tasks, "dataset__eval_dataset": tasks, "dataset__data_type": "code"}
    code = {"dataset__prompts__code_function": "{question}", "experiment__eval_every": 0, "experiment__total_step": 1}
    folder = run_rl(tiny_sdar, tmp_path, **sets, **code)
    tokenizer, lines = load_model(tiny_sdar, "sdar").tokenizer, lines_of(folder / "rollouts" / "step-0001.jsonl")
    for line in lines:
        assert tokenizer.decode(line["prompt_ids"]).endswith(f"{line['task_id']}+1<|assistant|>\n12:+3")
        assert line["prefix"] == "12:+3" and line["text"] == tokenizer.decode(
            line["response_ids"][: line["length"]], skip_special_tokens=True
        )
    (step,) = steps_of(folder)
    assert step["predicted_tokens"] == sum(line["length"] for line in lines) and step["logp_diff_max"] <= 2e-5
    assert "12:+3" in (folder / "trace.html").read_text()


def test_rollouts_hold_what_the_metrics_count(runs: Runs) -> None:
    steps = steps_of(runs.first)
    for number, row in enumerate(steps, 1):
        rollouts = lines_of(runs.first / "rollouts" / f"step-{number:04d}.jsonl")
        assert len(rollouts) == 16 and len({(one["task_id"], one["sample"]) for one in rollouts}) == 16
        assert row["predicted_tokens"] == sum(one["length"] for one in rollouts)
        assert row["response_length"] == pytest.approx(sum(one["length"] for one in rollouts) / 16)
        tokens, forwards = sum(one["length"] for one in rollouts), sum(one["steps"] for one in rollouts)
        assert row["tokens_per_forward"] == pytest.approx(tokens / forwards)
        for one in rollouts:
            assert one["reward"] == coin_flip(one["text"], Task(one["task_id"], one["question"]))
            assert one["correct"] == (one["reward"] > 0)
            assert len(one["response_ids"]) == len(one["step_map"]) == len(one["logp"])
            assert (len(one["prompt_ids"]) + len(one["response_ids"])) % BLOCK == 0
        assert row["reward"] == row["accuracy"] == sum(one["reward"] for one in rollouts) / 16
    tasks = [{one["task_id"] for one in lines_of(path)} for path in sorted((runs.first / "rollouts").iterdir())]
    assert not tasks[0] & tasks[1]


def test_results_and_summary(runs: Runs) -> None:
    results = json.loads((runs.first / "results.json").read_text())
    summary = json.loads((runs.first / "summary.json").read_text())
    assert summary["seed"] == 1
    assert {"rollout", "train", "evaluation", "total"} <= summary["seconds"].keys()
    # load + evaluation + … of one program, none of them more than the whole
    assert 0 < max(summary["seconds"].values()) == summary["seconds"]["total"]
    for moment in ("before", "after"):
        assert summary[moment].keys() == results[moment].keys() == {"static", "dynamic"}
        for name, row in results[moment].items():
            assert row["tasks"] == row["responses"] == 4
            for key in ("accuracy", "tokens_per_forward"):
                assert summary[moment][name][key] == pytest.approx(row[key], abs=1e-4)
    # before, after each of three steps, two settings, four tasks
    assert len(lines_of(runs.first / "samples.jsonl")) == 4 * 2 * 4


def test_the_exported_model_loads_and_was_trained(runs: Runs) -> None:
    optimized = runs.first / "ckpt" / "optimized"
    loaded = load_model(optimized, "sdar")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("1+2")) == "1+2"
    assert same_weights(optimized, runs.first / "ckpt" / "step-0003" / "model")
    before, after = weights(runs.model), weights(optimized)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_command_gives_the_same_run(runs: Runs) -> None:
    assert rows_of(runs.first, untimed=True) == rows_of(runs.again, untimed=True)
    for name in ("samples.jsonl", "rollouts/step-0003.jsonl"):
        assert (runs.first / name).read_bytes() == (runs.again / name).read_bytes()
    assert same_weights(runs.first / "ckpt" / "optimized", runs.again / "ckpt" / "optimized")


def test_an_older_run_is_moved_aside(runs: Runs) -> None:
    assert (runs.first / "mine.txt").read_text() == "a user's own file"
    assert not (runs.again / "mine.txt").exists()


def test_another_seed_gives_another_run(runs: Runs, tmp_path: Path) -> None:
    other = run_rl(runs.model, tmp_path, training__seed=2, experiment__total_step=1, experiment__eval_every=0)
    assert steps_of(other, untimed=True)[0]["loss"] != steps_of(runs.first, untimed=True)[0]["loss"]


def test_a_resumed_run_equals_an_uninterrupted_one(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the second step learns, after its rollouts were written; then taken up again."""
    real, calls = rl_trainer.learn, []

    def stops(*args: object, **kwargs: object) -> dict[str, float]:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(rl_trainer, "learn", stops)
    with pytest.raises(KeyboardInterrupt):
        run_rl(runs.model, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "rl_tiny" / "rollouts" / "step-0002.jsonl").exists()
    resumed = run_rl(runs.model, tmp_path, experiment__start_from_scratch=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "resumed from" in printed and "held-out accuracy after step 3: static" in printed
    assert "sampling tasks before after gain tokens/forward" in printed
    for command in ("generate.py model={}/ckpt/optimized", "-m rollout.compare {}@0 {}"):
        assert command.format(resumed, resumed) in printed
    assert rows_of(resumed, untimed=True) == rows_of(runs.first, untimed=True)
    assert same_weights(resumed / "ckpt" / "optimized", runs.first / "ckpt" / "optimized")
    for number in (1, 2, 3):
        name = f"rollouts/step-{number:04d}.jsonl"
        assert (resumed / name).read_bytes() == (runs.first / name).read_bytes()
    before = [json.loads((folder / "results.json").read_text())["before"] for folder in (resumed, runs.first)]
    for results in before:
        for row in results.values():
            del row["tokens_per_second"]
    assert before[0] == before[1]


def test_a_finished_run_can_be_prolonged(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_rl(runs.model, tmp_path, experiment__total_step=2)
    longer = run_rl(runs.model, tmp_path, experiment__total_step=3, experiment__start_from_scratch=False)
    told = "goes on under other keys than it began with: experiment.total_step=3 (was 2)\n"
    assert told in capsys.readouterr().out
    assert steps_of(longer, untimed=True) == steps_of(runs.first, untimed=True)
    assert same_weights(longer / "ckpt" / "optimized", runs.first / "ckpt" / "optimized")


def test_blocks_grow_by_schedule(tiny_sdar: Path, tmp_path: Path) -> None:
    """Two steps in blocks of 4, one in blocks of 8: drawn, learned, evaluated and saved so, and resumed in the last."""
    grow = {"rollout__block_size": "{0: 4, 2: 8}", "rollout__max_token": 10, "evaluation__denoising_steps_per_block": 2}
    grow |= {"model__value_base_model": tiny_sdar, "evaluation__num_task": 2, "evaluation__max_token": 8}
    grow |= {"rollout__num_task_per_step": 2, "rollout__num_response_per_task": 2}
    folder = run_rl(tiny_sdar, tmp_path / "whole", **grow)
    for number, (row, size) in enumerate(zip(steps_of(folder), (4, 4, 8), strict=True), 1):
        lines = lines_of(folder / "rollouts" / f"step-{number:04d}.jsonl")
        ends = {(len(one["prompt_ids"]) + len(one["response_ids"])) % 8 for one in lines}
        assert row["logp_diff_max"] <= 2e-5 and (ends == {0}) == (size == 8)
    named = {path.parent.name: json.loads(path.read_text())["block_size"] for path in folder.glob("ckpt/*/config.json")}
    named |= {
        step: load_model(folder / "ckpt" / step / "model", "sdar").block_size for step in ("step-0002", "step-0003")
    }
    assert named == {"step-0002": 4, "step-0003": 8, "optimized": 8, "optimized_value": 8}
    assert '"block_size":8' in (folder / "trace.html").read_text()
    evaluated = [(one["step"], one["steps"], len(one["response_ids"])) for one in lines_of(folder / "samples.jsonl")]
    assert {steps for step, steps, _ in evaluated if step == 2} != {steps for step, steps, _ in evaluated if step == 3}

    stopped = tmp_path / "stopped" / "rl_tiny"
    shutil.copytree(folder, stopped)
    shutil.rmtree(stopped / "ckpt" / "step-0003")
    resumed = run_rl(tiny_sdar, stopped.parent, **grow, experiment__start_from_scratch=False)
    assert rows_of(resumed, untimed=True) == rows_of(folder, untimed=True)
    assert same_weights(resumed / "ckpt" / "optimized", folder / "ckpt" / "optimized")


# ---- what a step may meet


def test_all_groups_filtered(tiny_sdar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Untrained, every answer is wrong: more tasks are drawn once, then the update is skipped, and said."""
    folder = run_rl(
        tiny_sdar,
        tmp_path,
        reward__function="null",
        training__keep_accuracy="[0.2,0.8]",
        experiment__total_step=1,
        evaluation__remasking_strategy="low_confidence_static",
    )
    (row,) = steps_of(folder)
    assert row["updates"] == row["groups_kept"] == 0 and row["groups"] == 8
    assert row["seconds_sync"] == 0, "weights that did not move are not handed over"
    assert "loss" not in row
    assert len(lines_of(folder / "rollouts" / "step-0001.jsonl")) == 32
    words = "no update; no group has an accuracy within training.keep_accuracy [0.2, 0.8] (they are"
    assert words in capsys.readouterr().out
    assert same_weights(tiny_sdar, folder / "ckpt" / "optimized")


def test_tasks_with_long_prompts_are_dropped(
    tiny_sdar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt is its characters and two tokens; the held-out tasks have 7 characters."""
    answers = {"1+1": 2, "2+3": 5, "1+1+1+1+1+1": 6, "4+4": 8}
    tasks = [json.dumps({"question": one, "ground_truth_answer": str(answer)}) for one, answer in answers.items()]
    (tmp_path / "tasks.jsonl").write_text("\n".join(tasks))
    short = {"experiment__total_step": 1, "evaluation__num_task": 2, "training__max_prompt_len": 9}
    short |= {"dataset__train_dataset": tmp_path / "tasks.jsonl"}
    folder = run_rl(tiny_sdar, tmp_path / "runs", **short)
    assert "1 of 4 tasks not drawn" in (out := capsys.readouterr().out) and "max_prompt_len 9 (longest 13)" in out
    asked = {one["question"] for one in lines_of(folder / "rollouts" / "step-0001.jsonl")}
    assert asked == {"1+1", "2+3", "4+4"}
    assert steps_of(folder)[0]["groups"] == 3
    before = json.loads((folder / "results.json").read_text())["before"]
    assert {(row["tasks"], row["unanswered"]) for row in before.values()} == {(2, 0)}  # that limit is training's
    with pytest.raises(UserError, match=r"max_prompt_len: every prompt of the evaluation is longer than 4"):
        run_rl(tiny_sdar, tmp_path / "runs", **short | {"evaluation__max_prompt_len": 4})
    (tmp_path / "tasks.jsonl").write_text(tasks[2])
    with pytest.raises(UserError, match=r"training\.max_prompt_len: every prompt of the step is longer"):
        run_rl(tiny_sdar, tmp_path / "runs", rollout__num_task_per_step=1, **short)
    assert not (folder / "rollouts" / "step-0001.jsonl").exists(), "told before anything of the step is written"


def test_too_few_tasks(tiny_sdar: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"question": "1+1", "ground_truth_answer": "2"}))
    with pytest.raises(UserError, match=r"rollout\.num_task_per_step: 4 is more than the 1 tasks"):
        run_rl(tiny_sdar, tmp_path / "runs", dataset__train_dataset=tasks)


def test_kl_to_the_initial_model(tiny_sdar: Path, tmp_path: Path) -> None:
    """With one update a step the KL to the step's own start is 0; to the first model it is from step two on not."""
    changes = {
        "training__updates_per_step": 1,
        "experiment__total_step": 2,
        "experiment__eval_every": 0,
        "evaluation__num_task": 2,
    }
    old = steps_of(run_rl(tiny_sdar, tmp_path / "old", **changes))
    initial = steps_of(run_rl(tiny_sdar, tmp_path / "initial", training__kl_reference="initial", **changes))
    assert [row["kl"] for row in old] == pytest.approx([0, 0], abs=1e-9)
    assert initial[0]["kl"] == pytest.approx(0, abs=1e-9) and initial[1]["kl"] > 1e-5
    assert initial[0]["loss"] == pytest.approx(old[0]["loss"], abs=1e-6)
    # a resumed run compares with the first model too, not with the one it resumed from
    again = changes | {"training__kl_reference": "initial", "experiment__start_from_scratch": False}
    run_rl(tiny_sdar, tmp_path / "resumed", **again | {"experiment__total_step": 1})
    resumed = run_rl(tiny_sdar, tmp_path / "resumed", **again)
    assert steps_of(resumed, untimed=True)[1] == steps_of(tmp_path / "initial" / "rl_tiny", untimed=True)[1]


# ---- updates without a signal


def state_of(learner: Learner) -> list[torch.Tensor]:
    """Copies of the weights and of the optimizer's moments, and the schedule's place."""
    moments = [tensor for state in learner.optimizer.state_dict()["state"].values() for tensor in state.values()]
    place = torch.tensor(learner.scheduler.last_epoch)
    return [tensor.clone() for tensor in (*learner.network.state_dict().values(), *moments, place)]


def unchanged(learner: Learner, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(state_of(learner), before, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.01, 1.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "coupled"},
        {"shrink": 2, "old_logp": "engine"},
        {"term": "sequence"},
        {"use_kl_estimator_k3": False},
        {"tis_cap": 2.0},
    ],
    ids=str,
)
def test_without_a_signal_nothing_moves(
    drawn: Drawn, changes: dict, beta: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """All advantages 0: weights, moments and schedule are bit-equal whatever beta is, and the mismatch is measured."""
    drawn.learn(updates_per_step=1)  # the optimizer has moments, which alone would move the weights
    before, equal = state_of(drawn.learner), [replace(one, advantage=0.0) for one in drawn.samples]
    figures = drawn.learn(equal, exact=False, updates_per_step=2, beta=beta, **changes)
    assert unchanged(drawn.learner, before)
    assert (figures["updates"], figures["updates_skipped"], figures["bad_steps"]) == (0, 2, 0)
    assert figures["logp_diff_max"] > 0 and "loss" not in figures
    assert capsys.readouterr().out.count("2 of 2 updates skipped: every advantage is 0") == 1


def test_updates_with_a_signal_are_taken_beside_those_without(drawn: Drawn) -> None:
    samples = [replace(one, advantage=float(number == 2)) for number, one in enumerate(drawn.samples)]
    figures = drawn.learn(samples, updates_per_step=4)
    assert (figures["updates"], figures["updates_skipped"]) == (1, 3)
    assert figures["predicted_tokens"] == samples[2].trajectory.length and figures["logp_diff_max"] <= 1e-5
    assert drawn.learn(exact=False, updates_per_step=2)["updates_skipped"] == 0


def test_stale_weights_are_seen_without_a_signal(drawn: Drawn) -> None:
    with torch.no_grad():
        drawn.learner.network.backbone.model.layers[2].mlp.up_proj.weight.mul_(1.05)
    with pytest.raises(UserError, match="logp_diff_max"):
        drawn.learn([replace(one, advantage=0.0) for one in drawn.samples])


@pytest.mark.parametrize("value", ["null", "model"])
def test_a_run_of_equal_rewards_ends_where_it_began(tiny_sdar: Path, tmp_path: Path, value: str) -> None:
    """Untrained, every answer is wrong; no group is dropped. A new value model expects 0, which is what comes."""
    folder = run_rl(
        tiny_sdar,
        tmp_path,
        reward__function="null",
        experiment__total_step=2,
        experiment__eval_every=0,
        model__value_base_model=tiny_sdar if value == "model" else "null",
        dataset__eval_dataset="null" if value == "null" else "arithmetic_4_test",
        evaluation__remasking_strategy="low_confidence_static",
    )
    assert (folder / "samples.jsonl").exists() == (value == "model"), "without held-out tasks nothing is evaluated"
    for row in steps_of(folder):
        assert row["groups_kept"] == 4 and row["updates"] == 0 and row["updates_skipped"] == 2
    assert same_weights(tiny_sdar, folder / "ckpt" / "optimized")


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (
            [[False, False]] * 2,
            "0% to 0%, 0% in the mean): nothing is right. 4 of 4 responses reached rollout.max_token",
        ),
        ([[True, True]], "100% to 100%, 100% in the mean): all is right; take harder tasks"),
        (
            [[True, True], [False, False]],
            "no group has an accuracy within training.keep_accuracy [0.2, 0.8] (they are 0%",
        ),
    ],
)
def test_why_no_group_is_kept(verdicts: list[list[bool]], words: str) -> None:
    config = load_config("rl", ["config=configs/rl_trado.yaml"])
    trajectory = SimpleNamespace(finish_reason="length")
    groups = [
        [SimpleNamespace(score=SimpleNamespace(correct=one), trajectory=trajectory) for one in group]
        for group in verdicts
    ]
    assert words in rl_groups.why_none_is_kept(config, groups)


# ---- the check that the trainer reproduces the engine


def shifted(trajectory: Trajectory) -> Trajectory:
    """Every block's order of unmasking reversed, as from a step map that lost its place."""
    first = len(trajectory.prompt_ids) % BLOCK
    cuts = [0, *range(BLOCK - first, len(trajectory.step_map) + 1, BLOCK)]
    blocks = [trajectory.step_map[a:b] for a, b in pairwise(cuts)]
    return replace(trajectory, step_map=[step for block in blocks for step in block[::-1]])


def test_fresh_responses_pass_the_check(drawn: Drawn) -> None:
    figures = drawn.learn()
    assert figures["logp_diff_max"] <= 1e-5
    assert figures["kl"] == pytest.approx(0, abs=1e-9) and figures["clip_fraction"] == 0


@pytest.mark.parametrize(
    "spoil",
    [shifted, lambda one: replace(one, temperature=0.7), lambda one: replace(one, response_ids=one.response_ids[::-1])],
    ids=["step map", "temperature", "ids"],
)
def test_a_wrong_replay_stops_the_run(drawn: Drawn, spoil: Callable[[Trajectory], Trajectory]) -> None:
    samples = [replace(one, trajectory=spoil(one.trajectory)) for one in drawn.samples]
    with pytest.raises(UserError, match="logp_diff_max"):
        drawn.learn(samples)


def test_stale_weights_stop_the_run(drawn: Drawn) -> None:
    with torch.no_grad():
        drawn.learner.network.backbone.model.layers[2].mlp.up_proj.weight.mul_(1.05)
    assert drawn.learn(exact=False)["logp_diff_max"] > 1e-3
    with pytest.raises(UserError, match="logp_diff_max"):
        drawn.learn()


def test_merged_steps_start_from_their_own_logp(drawn: Drawn) -> None:
    """With shrink 2 the engine's numbers are not those of the views: `auto` takes the trainer's, so the ratio is 1."""
    figures = drawn.learn(shrink=2, beta=0.0)
    assert figures["kl"] == pytest.approx(0, abs=1e-9) and figures["clip_fraction"] == 0
    lengths = [one.trajectory.length for one in drawn.samples]
    advantages = [one.advantage for one in drawn.samples]
    # the policy loss at ratio 1 is minus the mean advantage over tokens
    mean = sum(a * n for a, n in zip(advantages, lengths)) / sum(lengths)
    assert figures["loss"] == pytest.approx(-mean, abs=1e-5)
    assert figures["logp_diff_max"] <= 1e-5  # measured on exact replays all the same


NO_REPLAY = [{"method": "random_masking", "lower_p": 0.4}, {"method": "coupled"}, {"shrink": 2}, {"stale": True}]


def stand_still(learner: Learner) -> None:
    """Updates that change nothing, so that all of a step's are its first."""
    learner.optimizer.param_groups[0]["lr"] = learner.scheduler.base_lrs[0] = 0.0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("changes", NO_REPLAY, ids=str)
@pytest.mark.parametrize(("old_logp", "updates"), [("detach", 1), ("engine", 1), ("engine", 2)])
def test_the_kl_is_to_the_start_of_the_step_on_the_same_views(
    drawn: Drawn, old_logp: str, updates: int, changes: dict, level: str
) -> None:
    """Whatever ratios start from, before the first update the KL is 0, also where the engine's numbers are others."""
    stand_still(drawn.learner)
    changes = dict(changes)
    if changes.pop("stale", False):
        with torch.no_grad():
            drawn.learner.network.backbone.model.layers[2].mlp.up_proj.weight.mul_(1.05)
    for k3 in (True, False):
        keys = {"old_logp": old_logp, "updates_per_step": updates, "term": level, "use_kl_estimator_k3": k3}
        figures = drawn.learn(exact=False, **keys, **changes)
        assert figures["updates"] == updates
        assert figures["kl"] == 0.0 if updates == 1 else abs(figures["kl"]) < 1e-6
    # the ratio itself does start from the engine's numbers where they are asked for
    assert (abs(figures["loss"] - drawn.learn(exact=False, **changes, term=level)["loss"]) > 1e-4) == (
        old_logp == "engine"
    )


@pytest.mark.parametrize("old_logp", ["engine", "recompute", "detach"])
def test_every_old_logp_is_on_policy_at_first(drawn: Drawn, old_logp: str) -> None:
    assert drawn.learn(old_logp=old_logp)["kl"] == pytest.approx(0, abs=1e-9)
    figures = drawn.learn(exact=False, old_logp=old_logp)  # a second time the weights are not the engine's
    assert (figures["clip_fraction"] > 0) == (old_logp == "engine")


def test_learning_makes_good_responses_likelier(drawn: Drawn) -> None:
    """A few updates on fixed advantages: the ratio of good tokens rises, that of bad ones falls."""
    for group in drawn.learner.optimizer.param_groups:
        group["lr"] = 1e-4
    drawn.learner.scheduler.base_lrs = [1e-4]
    losses = [drawn.learn(exact=False, old_logp="engine", beta=0.0)["loss"] for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_kept_samples() -> None:
    """Whole groups are dropped, and advantages are those within a group, of raw rewards."""
    trajectory = Trajectory("0", 0, [], [], [], [], [], 1.0, "stop", 0, 0, 0, 1.0)

    def group(*rewards: float) -> list[ScoredTrajectory]:
        return [
            ScoredTrajectory(Task("0", "q"), replace(trajectory, sample=n), Score(r, r > 0, ""))
            for n, r in enumerate(rewards)
        ]

    groups = [group(1, 1, 1, 1), group(3, -1, -1, -1), group(0, 0, 0, 0)]
    samples = kept_samples(groups, [0.2, 0.8])
    assert [one.trajectory.sample for one in samples] == [0, 1, 2, 3]
    assert [one.advantage for one in samples] == pytest.approx([3**0.5, *[-(3**-0.5)] * 3])
    assert [one.advantage for one in kept_samples(groups, None)][:4] == [0.0] * 4
    assert len(kept_samples(groups, None)) == 12 and kept_samples(groups, [0.3, 0.8]) == []
    unknown = [replace(one, score=Score(0.0, False, "infrastructure")) for one in group(0, 0)]
    known = kept_samples([[*group(1, 0), *unknown]], [0.5, 0.5])
    assert [one.advantage for one in known] == [1.0, -1.0], "what could not be scored is in no group"
