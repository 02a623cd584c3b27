"""eval.py as it is typed, and its figures counted again by hand from samples.jsonl."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

import eval as eval_script
from common.boxed import extract_boxed
from common.config import load_config
from common.errors import UserError
from common.schema import EvalDatasetConfig, PromptsConfig, RewardConfig, Sampling, TaskSampling
from common.stop import Stopped
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory
from models import load_model
from reward.score import make_scorer
from rollout.evaluate import evaluate, name_settings
from rollout.results import summarize
from sample.engine import Engine
from train import rl_trainer, run, sft_trainer

ROOT = Path(__file__).resolve().parents[1]


def run_arguments(runs: Path, **changes: object) -> list[str]:
    values = {
        "experiment.runs_dir": runs,
        "made_by": "null",
        "rollout.num_task": 8,
        "rollout.num_response_per_task": 3,
        "rollout.max_token": 12,
        # right or wrong by a coin, so that an untrained network has an accuracy
        "reward.function": "benchmarks.coin_flip:coin_flip",
    }
    return [f"{key}={value}" for key, value in (values | changes).items()]


def run_eval(runs: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval.py", "config=configs/eval_tiny.yaml", *run_arguments(runs, **changes)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def evaluated(tiny_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder and what was printed."""
    folder = tmp_path_factory.mktemp("eval")
    done = run_eval(folder / "runs", model=tiny_sdar)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "eval_tiny", done.stdout


def samples_of(folder: Path) -> dict[str, list[dict]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    by_setting = defaultdict(list)
    for line in lines:
        by_setting[line["setting"]].append(line)
    return by_setting


def test_every_response_is_on_disk(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    by_setting = samples_of(folder)
    assert by_setting.keys() == {"static", "dynamic"}
    for lines in by_setting.values():
        assert len(lines) == 24
        assert len({(line["task_id"], line["sample"]) for line in lines}) == 24
        assert len({line["question"] for line in lines}) == 8
    assert (folder / "config.yaml").exists()


def test_figures_counted_by_hand(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == {"static", "dynamic"}
    for name, lines in samples_of(folder).items():
        shares = defaultdict(list)
        for line in lines:
            shares[line["task_id"]].append(line["correct"])
        per_task = [sum(group) / 3 for group in shares.values()]
        found = results[name]
        assert (found["setting"], found["tasks"], found["responses"]) == (name, 8, 24)
        assert 0 < found["accuracy"] < 1
        assert found["accuracy"] == pytest.approx(sum(line["correct"] for line in lines) / 24)
        assert found["standard_error"] == pytest.approx(statistics.stdev(per_task) / 8**0.5)
        tokens = sum(line["length"] for line in lines)
        # denoising steps alone: the largest of a response's trace, and one
        steps = sum(max(line["step_map"]) + 1 for line in lines)
        assert found["tokens_per_forward"] == pytest.approx(tokens / steps)
        assert found["response_length"] == pytest.approx(tokens / 24)
        assert found["truncated"] == sum(line["finish_reason"] == "length" for line in lines) / 24
        assert found["tokens_per_second"] > 0
        assert all(line["length"] <= 12 and line["forwards"] >= line["steps"] for line in lines)


def test_a_table_is_printed(evaluated: tuple[Path, str]) -> None:
    folder, printed = evaluated
    results = json.loads((folder / "results.json").read_text())
    for name, figures in (
        ("setting", list(results)),
        ("accuracy", [f"{100 * row['accuracy']:.1f} %" for row in results.values()]),
        ("tokens_per_forward", [f"{row['tokens_per_forward']:.3g}"[:4] for row in results.values()]),
    ):
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert len(line) <= 80 and re.match(".+?".join([name, *map(re.escape, figures)]), line), line
    assert "arithmetic_4_test" in printed


def test_a_page_with_tables_and_a_fingerprint(evaluated: tuple[Path, str]) -> None:
    folder, _ = evaluated
    about = json.loads((folder / "fingerprint.json").read_text())
    page = (folder / "results.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| static |"))
    result = json.loads((folder / "results.json").read_text())["static"]
    for share in (result["accuracy"], result["pass_at"]["2"], result["pass_at"]["3"], result["truncated"]):
        assert f"{100 * share:.1f} %" in row
    assert result["accuracy"] < result["pass_at"]["2"] < result["pass_at"]["3"]
    assert about["id"] in page and about["versions"]["torch"] in page
    assert set(about["settings"]) == {"static", "dynamic"}
    assert any(name.endswith(".safetensors") for name in about["model"]["files"])


def as_sets(folder: Path) -> dict[str, set[str]]:
    """Every response, in whatever order."""
    return {name: set(map(json.dumps, lines)) for name, lines in samples_of(folder).items()}


def test_a_stopped_evaluation_goes_on(
    evaluated: tuple[Path, str], tmp_path: Path, tiny_sdar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with the second setting half done and a line torn: the rest is drawn, nothing twice, figures the same."""
    whole, _ = evaluated
    cut = tmp_path / "runs" / "eval_tiny"
    cut.mkdir(parents=True)
    for name in ("config.yaml", "fingerprint.json"):
        (cut / name).write_bytes((whole / name).read_bytes())
    lines = (whole / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (cut / "samples.jsonl").write_text("".join(lines[:37]) + lines[37][:50], encoding="utf-8")

    drawn = []
    generate = Engine.generate

    def counted(self: Engine, requests: list, *rest: object, **named: object) -> object:
        drawn.append(len(requests))
        return generate(self, requests, *rest, **named)

    monkeypatch.setattr(Engine, "generate", counted)
    monkeypatch.chdir(ROOT)
    arguments = run_arguments(tmp_path / "runs", model=tiny_sdar, **{"experiment.start_from_scratch": False})
    monkeypatch.setattr(sys, "argv", ["eval.py", "config=configs/eval_tiny.yaml", *arguments])
    with pytest.raises(SystemExit) as ended:
        eval_script.main()
    assert ended.value.code == 0 and drawn == [0, 11]
    assert as_sets(cut) == as_sets(whole)
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    for name, row in before.items():
        assert {k: v for k, v in row.items() if k != "tokens_per_second"} == {
            k: v for k, v in after[name].items() if k != "tokens_per_second"
        }

    # the same folder under another temperature would mix two evaluations
    monkeypatch.setattr(sys, "argv", [*sys.argv, "rollout.temperature=0.5"])
    with pytest.raises(SystemExit) as ended:
        eval_script.main()
    assert ended.value.code == 2 and as_sets(cut) == as_sets(whole)


def test_accuracy_by_category_and_majority() -> None:
    def answered(task: str, level: int, *answers: str) -> list[ScoredTrajectory]:
        group = []
        for sample, answer in enumerate(answers):
            one = rollout(task, sample, answer == "7", 6, 4)
            one.trajectory.text = f"\\boxed{{{answer}}}"
            group.append(ScoredTrajectory(Task(task, "q", "7", {"level": level}), one.trajectory, one.score))
        return group

    groups = [answered("a", 1, "7", "7", "8"), answered("b", 1, "8", "9", "7"), answered("c", 5, "8", "8", "7")]
    found = summarize("static", groups, 1.0, extract_boxed)
    assert found.categories["level"]["1"] == {"tasks": 2, "accuracy": 0.5, "standard_error": pytest.approx(1 / 6)}
    assert found.categories["level"]["5"]["accuracy"] == pytest.approx(1 / 3)
    assert found.majority_at[3] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert found.pass_at == {2: pytest.approx((1 + 2 / 3 + 2 / 3) / 3), 3: 1.0}
    assert summarize("static", groups, 1.0).majority_at == {}


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    done = run_eval(tmp_path / "runs", model=tmp_path / "absent")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / "absent") in line
    assert not (tmp_path / "runs").exists()


def test_an_empty_model_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(ROOT)
    arguments = ["made_by=null", f"model={tmp_path}/empty", f"experiment.runs_dir={tmp_path}/runs"]
    monkeypatch.setattr(sys, "argv", ["eval.py", "config=configs/eval_tiny.yaml", *arguments])
    with pytest.raises(SystemExit) as left:
        eval_script.main()
    assert left.value.code == 2
    assert f"{tmp_path}/empty has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def rollout(task: str, sample: int, correct: bool, length: int, steps: int) -> ScoredTrajectory:
    reason = "length" if length == 12 else "stop"
    trajectory = Trajectory(task, sample, [], [], [], [], [], 1.0, reason, length, steps, steps + 1, 1.0)
    return ScoredTrajectory(Task(task, "q"), trajectory, Score(float(correct), correct, ""))


def test_a_summary_by_hand() -> None:
    """Two tasks: one right of two, two right of two; 30 tokens in 20 steps."""
    groups = [
        [rollout("a", 0, True, 6, 4), rollout("a", 1, False, 12, 10)],
        [rollout("b", 0, True, 8, 4), rollout("b", 1, True, 4, 2)],
    ]
    found = summarize("static", groups, seconds=2.0)
    assert found.accuracy == 0.75 and found.tasks == 2 and found.responses == 4
    assert found.standard_error == pytest.approx(0.25)  # deviation of 0.5 and 1 is √(1/8); over √2
    assert found.tokens_per_forward == pytest.approx(1.5)
    assert found.response_length == 7.5 and found.truncated == 0.25 and found.tokens_per_second == 15
    one_task = summarize("static", groups[:1], seconds=0.0)
    assert one_task.standard_error == 0 and one_task.tokens_per_second == 0


def test_names_of_settings() -> None:
    static = Sampling(remasking_strategy="low_confidence_static")
    dynamic = Sampling(remasking_strategy="low_confidence_dynamic")
    assert list(name_settings([static, dynamic])) == ["static", "dynamic"]
    several = [dynamic, replace(dynamic, dynamic_threshold=0.5), replace(static, dynamic_threshold=0.5)]
    named = name_settings(several)
    assert list(named.values()) == several  # none has replaced another
    assert list(named)[1] == "dynamic-dynamic_threshold=0.5"


ALL_RIGHT = make_scorer(RewardConfig(workers=0, function="tests.scored:all_right"))


@pytest.mark.parametrize("limit", [{"max_prompt_len": 9}, {"cache_tokens": 16}], ids=["prompt", "cache"])
def test_tasks_without_a_response_count_as_wrong(
    tiny_sdar: Path, capsys: pytest.CaptureFixture[str], limit: dict[str, int]
) -> None:
    """Two of four tasks are answered, both right: 50 %, of pass@k and of their categories too."""
    loaded = load_model(tiny_sdar, "sdar")
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    questions = {"1+1": 1, "2+3": 2, "1+1+1+1+1+1+1+1": 1, "4+4+4+4+4+4+4+4+4": 1}
    tasks = [Task(str(n), text, "6", {"level": level}) for n, (text, level) in enumerate(questions.items())]
    setting = TaskSampling(max_token=4, num_response_per_task=2, cache_tokens=limit.get("cache_tokens"))
    dataset = EvalDatasetConfig(prompts=PromptsConfig(math="{question}"))
    longest = limit.get("max_prompt_len", 100)
    (found,) = evaluate(
        engine,
        loaded,
        tasks,
        [setting],
        ALL_RIGHT,
        dataset,
        longest,
        seed=1,
    ).values()
    assert (found.tasks, found.unanswered, found.responses, found.accuracy) == (4, 2, 4, 0.5)
    assert found.pass_at == {2: 0.5}
    shares = {level: (row["tasks"], row["accuracy"]) for level, row in found.categories["level"].items()}
    assert shares == {"1": (3, pytest.approx(1 / 3)), "2": (1, 1.0)}
    assert "2 of 4 tasks have no response and count as wrong" in capsys.readouterr().out


def test_all_prompts_too_long(tiny_sdar: Path) -> None:
    loaded = load_model(tiny_sdar, "sdar")
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    tasks = [Task("0", "1+2+3", "6")]
    with pytest.raises(UserError, match="max_prompt_len: every prompt of the evaluation is longer than 3"):
        evaluate(engine, loaded, tasks, [TaskSampling()], ALL_RIGHT, EvalDatasetConfig(), 3, seed=1)


REWARD = ("time_limit=9", "memory_mb=99", "match=fuzzy", "workers=3")
JUDGE = ("reward.judge.base_url=http://127.0.0.1:1/v1", "reward.judge.model=judge")
DECIDED_BY = [  # job, keys, what decides whether a held-out answer is right, the kind of its prompt
    ("rl", [], "math", "math"),
    ("rl", ["reward.kind=general"], "general", "math"),
    ("rl", ["reward.kind=judge", *JUDGE, "dataset.data_type=code"], "code", "code"),
    ("rl", ["reward.kind=general", "evaluation.data_type=code"], "code", "code"),
    ("rl", ["reward.function=benchmarks.coin_flip:coin_flip"], "math", "math"),
    ("sft", ["dataset.data_type=general"], "general", "general"),
]


@pytest.mark.parametrize(("job", "keys", "decides", "asked"), DECIDED_BY)
def test_evaluation_during_training_obeys_the_config(
    job: str,
    keys: list[str],
    decides: str,
    asked: str,
    tiny_sdar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the task's own answer, under the config's limits and words; the limit of training's prompts is another."""
    judged_by = {
        "answers": {"ground_truth_answer": "2"},
        "tests": {"test_method": "function", "test_list": ["assert f() == 2"]},
    }
    for name, fields in judged_by.items():
        tasks = [json.dumps({"question": f"1+{n}"} | fields) for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(tasks))
    keys = [*keys, *(f"reward.{one}" for one in REWARD), "training.max_prompt_len=20", "evaluation.max_prompt_len=77"]
    keys += [f"model.pretrained_model={tiny_sdar}", f"experiment.runs_dir={tmp_path}", "experiment.trackers=[]"]
    keys += [f"dataset.eval_dataset={tmp_path}/{'tests' if decides == 'code' else 'answers'}.jsonl"]
    if job == "rl":
        keys += [f"dataset.train_dataset={tmp_path}/answers.jsonl", "rollout.num_task_per_step=1"]
    else:
        keys += ["training.max_steps=1", "training.batch_size=2"]
    config = load_config(job, [f"config={ROOT}/configs/{job}_tiny.yaml", *keys])
    given: list[tuple] = []

    def stopped(*arguments: object, **others: object) -> None:
        given.append(arguments)
        raise Stopped

    monkeypatch.setattr(run, "evaluate", stopped)
    assert {"rl": rl_trainer, "sft": sft_trainer}[job].main(config) == 0
    ((_, _, _, _, scorer, dataset, longest, _),) = given
    reward = scorer.reward
    assert (reward.time_limit, reward.memory_mb, reward.match, reward.workers) == (9, 99, "fuzzy", 3)
    cut = Trajectory("0", 0, [], [1], [0], [0.0], [0.0], 1.0, "length", 1, 1, 1, 1.0)
    assert not scorer.is_truncated(cut, 1) and reward.function is None and not reward.judge.base_url
    assert (scorer.data_type, reward.kind, dataset.data_type, longest) == (decides, None, asked, 77)
