"""python -m rollout.verify_published: the published rows, and one run against a made-up row on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common.config import load_config, settings_of
from common.errors import UserError
from rollout.evaluate import name_settings
from rollout.verify_published import ROWS, PublishedRow, find_row, main, read_rows, verdict_of

ROOT = Path(__file__).resolve().parents[1]
SANITISED = 427  # tasks of MBPP
SIZES = {"MATH500": {500, 5000}, "AIME2024": {30}, "GSM8K": {1319}, "HumanEval": {164}, "MBPP": {500, SANITISED}}


@pytest.mark.parametrize("row", read_rows(ROWS), ids=lambda row: f"{row.model}-{row.benchmark}")
def test_a_published_row_is_an_evaluation_that_loads(row: PublishedRow) -> None:
    config = load_config("eval", row.arguments([]))
    assert (config.model, config.dataset.eval_dataset) == (row.model, row.benchmark)
    assert config.rollout.num_response_per_task == row.responses
    assert set(name_settings(settings_of(config.rollout))) == set(row.published)
    assert row.tasks in SIZES.get(row.benchmark, {None})
    assert all(0 < value < 100 for value in row.published.values()) and row.source and row.differs
    assert config.dataset.data_type == ("code" if row.benchmark.startswith(("Live", "Human", "MBPP")) else "math")
    if row.config.endswith("_published.yaml"):
        assert config.rollout.steps == config.rollout.max_token and not config.rollout.use_cache


def test_no_row_stands_twice() -> None:
    names = [(row.model, row.benchmark) for row in read_rows(ROWS)]
    assert len(set(names)) == len(names)


def test_a_row_is_found_by_the_models_short_name() -> None:
    rows = read_rows(ROWS)
    row = find_row(rows, "trado-8b-instruct", "math500")
    assert row.model == "Gen-Verse/TraDo-8B-Instruct" and row.published == {"static": 78.5, "dynamic": 75.5}
    assert find_row(rows, "GSAI-ML/LLaDA-1.5", "GSM8K").published == {"static": 83.8}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("TraDo-8B-Instuct", "MATH500"), "MODEL: 'TraDo-8B-Instuct' has no published row; did you mean 'TraDo-8B-I"),
        (("TraDo-8B-Instruct", "MATH50"), "Instruct: 'MATH50' has no published row; did you mean 'MATH500'?"),
        (
            ("LLaDA-1.5", "AIME2024"),
            "BENCHMARK of GSAI-ML/LLaDA-1.5: 'AIME2024' has no published row; use one of GSM8K",
        ),
        (("TraDo-8B-Instruct",), "give a model and a benchmark: python -m rollout.verify_published"),
    ],
)
def test_what_has_no_row_is_one_line(names: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(names)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and message in captured.err and captured.err.count("\n") == 1


ROW = PublishedRow("m", "b", {"static": 80.0}, 400, 1, "s", "c", "d")


@pytest.mark.parametrize(
    ("accuracy", "error", "tasks", "verdict"),
    [
        (0.80, 0.02, 400, "within"),
        (0.855, 0.02, 400, "within"),  # 5.5 points, both errors 2 points: 1.96 · 2.83 = 5.54
        (0.856, 0.02, 400, "above"),
        (0.744, 0.02, 400, "below"),
        (0.755, 0.0, 400, "below"),  # the published figure's error alone: 3.92 points
        (0.765, 0.0, 400, "within"),
        (0.68, 0.06, 40, "within"),  # fewer tasks here: a wider error of this figure only
    ],
)
def test_the_verdict_by_hand(accuracy: float, error: float, tasks: int, verdict: str) -> None:
    measured = {"accuracy": accuracy, "standard_error": error, "tasks": tasks, "responses": tasks}
    found = verdict_of(ROW, "static", measured)
    assert found["verdict"] == verdict and found["published"] == 80.0 and found["tasks"] == tasks
    assert found["difference"] == pytest.approx(100 * accuracy - 80.0)


def test_where_the_source_tells_no_tasks_as_many_as_here_count() -> None:
    row = PublishedRow("m", "b", {"static": 80.0}, None, 1, "s", "c", "d")
    measured = {"accuracy": 0.8, "standard_error": 0.0, "tasks": 100, "responses": 100}
    assert verdict_of(row, "static", measured)["sampling_error"] == 7.84  # 1.96 · √(80 · 20 / 100)


def rows_file(folder: Path, model: Path, **changes: object) -> Path:
    group = {"model": str(model), "config": "configs/eval_tiny.yaml", "source": "made up", "differs": "nothing"}
    row = {"benchmark": "arithmetic_4_test", "published": {"static": 50.0, "dynamic": 50.0}, "tasks": 640}
    overrides = ["made_by=null", "rollout.max_token=12", "reward.function=benchmarks.coin_flip:coin_flip"]
    group |= {"responses": 2, "overrides": overrides, "rows": [row | changes]}
    file = folder / "rows.yaml"
    file.write_text(yaml.safe_dump([group]))
    return file


@pytest.mark.command
def test_a_made_up_row_is_run_and_judged(tiny_sdar: Path, tmp_path: Path) -> None:
    """A coin judges: 50 % is within the error of 16 tasks, the row of one setting that asks for 99 % is not."""
    file = rows_file(tmp_path, tiny_sdar, published={"static": 50.0, "dynamic": 99.0})
    names = [tiny_sdar.name, "arithmetic_4_test", f"rows={file}", "rollout.num_task=16", "seed=3"]
    command = [sys.executable, "-m", "rollout.verify_published", *names, f"experiment.runs_dir={tmp_path / 'runs'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    about = json.loads((folder / "verify.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    figures = {row["setting"]: row for row in about["figures"]}
    assert {name: row["verdict"] for name, row in figures.items()} == {"static": "within", "dynamic": "below"}
    for name, row in figures.items():
        assert row["accuracy"] == pytest.approx(100 * results[name]["accuracy"], abs=0.01)
        assert (row["tasks"], row["responses"]) == (16, 32)
    page = (folder / "verify.md").read_text()
    assert "| dynamic | 16 | 32 |" in page and "made up" in page and "python eval.py config=" in page
    assert "the published figure is of 640 tasks, this one of 16" in done.stdout and "verdict" in done.stdout


def test_a_mistake_is_told_before_anything_starts(tiny_sdar: Path, tmp_path: Path, capsys) -> None:
    file = rows_file(tmp_path, tiny_sdar, published={"stat": 50.0})
    for arguments, message in (
        (["rollout.max_tokens=3"], "rollout.max_tokens"),
        ([f"rows={tmp_path / 'none.yaml'}"], "none.yaml cannot be read"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([tiny_sdar.name, "arithmetic_4_test", *arguments, f"rows={file}"])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    file.write_text("- {model: m, rows: [{benchmark: b, accuracy: 3}]}")
    with pytest.raises(UserError, match=r"rows=.*unexpected keyword argument 'accuracy'.*; give groups with rows of"):
        read_rows(file)
    with pytest.raises(UserError, match=r"rows=.*`published` of arithmetic_4_test is no setting: accuracy in %"):
        read_rows(rows_file(tmp_path, tiny_sdar, published=50.0))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"rows=.* cannot be read \('utf-8' codec"):
        read_rows(file)


def test_the_rows_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    listed = capsys.readouterr().out
    for row in read_rows(ROWS):
        assert any(row.model in line and f" {row.benchmark} " in line for line in listed.splitlines())
    assert "static 78.5, dynamic 75.5" in listed
