"""The comparison of recipes on the tiny models: benchmarks/learning.py."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import learning
from benchmarks.learning import COIN, PARTS, RATES, START, TUNING_SEED, Budget, Curve, Job
from common.config_files import recipes

BUDGET = Budget(steps=2, tasks=4, evaluations=1, eval_tasks=8)


def write(path: Path, job: Job, curve: Curve) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(job) | asdict(curve)) + "\n")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Of the block part: every start, the tuning runs of TraceRL and of one rate of dapo, TraceRL's run of seed 2."""
    path = tmp_path / "results.jsonl"
    for seed in (TUNING_SEED, *PARTS["block"].seeds):
        write(path, Job("block", START, seed, 0.0, BUDGET), Curve([0], [0.0], [0.4]))
    for rate, accuracy in zip(RATES, (0.5, 0.7, 0.6), strict=True):
        write(path, Job("block", "tracerl", TUNING_SEED, rate, BUDGET), Curve([64], [8.0], [accuracy]))
    write(path, Job("block", "dapo", TUNING_SEED, RATES[0], BUDGET), Curve([64], [8.0], [0.5]))
    write(path, Job("block", "tracerl", 2, RATES[1], BUDGET), Curve([128], [10.0], [0.8]))
    return path


def test_every_recipe_has_its_part() -> None:
    assert {recipe for part in ("block", "full") for recipe in PARTS[part].recipes} == {*recipes(), COIN}


def test_the_table_says_what_was_not_run(results: Path) -> None:
    curves = learning.read_curves(results)
    lines = learning.table_of(curves, "block", BUDGET).splitlines()
    reported = [line for line in lines if line.startswith("| tracerl")]
    # 64 rollouts are half of what the run drew: half of the way from 40 to 80 %; alone it is the fastest too
    assert reported[0] == f"| tracerl | {RATES[1]:g} | 1 of 3 | 40.0 | 60.0 | 80.0 | 10 |"
    assert reported[1] == "| tracerl | 50.0 | 70.0 | 60.0 |"
    assert [line for line in lines if line.startswith("| dapo")] == [
        "| dapo | – | 0 | not run | not run | not run | not run |",
        "| dapo | 50.0 | not run | not run |",
    ]


def test_a_part_without_a_run_is_a_line(results: Path) -> None:
    lines = learning.table_of(learning.read_curves(results), "countdown", BUDGET).splitlines()
    assert lines[2:] == ["tracerl, dapo, just_grpo, coin flip: not run."]


def test_a_part_may_have_rates_of_its_own(results: Path) -> None:
    assert PARTS["countdown_full"].rates != RATES
    for rate, accuracy in zip(PARTS["countdown_full"].rates, (0.5, 0.6), strict=True):
        write(results, Job("countdown_full", "gdpo", TUNING_SEED, rate, BUDGET), Curve([64], [8.0], [accuracy]))
    curves = learning.read_curves(results)
    assert learning.best_rate(curves, "countdown_full", "gdpo", BUDGET) == PARTS["countdown_full"].rates[1]
    lines = learning.table_of(curves, "countdown_full", BUDGET).splitlines()
    assert "| recipe | 0.0001 | 0.0003 |" in lines and "| gdpo | 50.0 | 60.0 |" in lines


def test_equal_seconds_are_those_of_the_fastest(results: Path) -> None:
    for rate in RATES[1:]:
        write(results, Job("block", "dapo", TUNING_SEED, rate, BUDGET), Curve([64], [8.0], [0.4]))
    write(results, Job("block", "dapo", 2, RATES[0], BUDGET), Curve([64], [40.0], [0.6]))
    table = learning.table_of(learning.read_curves(results), "block", BUDGET)
    assert f"| dapo | {RATES[0]:g} | 1 of 3 | 40.0 | 60.0 | 45.0 | 40 |" in table


def test_only_what_is_missing_is_run(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "learning.md").write_text("before <!-- recipes --> <!-- end --> behind")
    asked: list[list[Job]] = []
    monkeypatch.setattr(learning, "run_all", lambda jobs, _options: asked.append(jobs))
    monkeypatch.setattr(learning, "DOCS", tmp_path)
    arguments = f"--parts block --recipes tracerl dapo --results {results} --steps 2 --tasks 4 --evaluations 1"
    monkeypatch.setattr(sys, "argv", ["learning", *arguments.split(), "--eval-tasks", "8"])
    learning.main()
    starts, tuning, reported = asked
    assert not starts
    assert [(job.recipe, job.rate) for job in tuning] == [("dapo", rate) for rate in RATES[1:]]
    assert [(job.recipe, job.seed, job.rate) for job in reported] == [("tracerl", seed, RATES[1]) for seed in (1, 3)]
    page = (tmp_path / "learning.md").read_text()
    assert page.startswith("before <!-- recipes -->\n### ") and page.endswith("<!-- end --> behind")


def test_a_run_gives_its_curve(tiny_sdar: Path, tmp_path: Path) -> None:
    model = learning.model_of(PARTS["block"], 1, tmp_path)
    model.parent.mkdir(parents=True)
    model.symlink_to(tiny_sdar)
    curve = learning.learn(Job("block", COIN, 1, 1e-3, BUDGET), tmp_path)
    assert curve.rollouts == [2 * 4 * learning.RESPONSES] and curve.seconds[0] > 0 and 0 <= curve.accuracy[0] <= 1
    assert [folder.name for folder in tmp_path.iterdir()] == ["sft_tiny_sdar_1"]
