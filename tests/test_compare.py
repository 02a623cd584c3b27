"""python -m rollout.compare: two evaluations paired by task."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from rollout.compare import changes_between, compare, main
from rollout.statistics import sign_flip_test


def write_run(folder: Path, shares: dict[str, list[bool]], setting: str = "static", step: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "samples.jsonl").open("a") as file:
        for task, verdicts in shares.items():
            for sample, correct in enumerate(verdicts):
                line = {"step": step, "setting": setting, "task_id": task, "sample": sample, "correct": correct}
                file.write(json.dumps(line | {"question": f"q{task}", "length": 8, "steps": 4}) + "\n")
    return folder


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    """A draws 2 responses a task, B 3: shares are compared in sixths, exactly."""
    a = write_run(tmp_path / "a", {"1": [True, False], "2": [False, False], "3": [True, True], "4": [True, True]})
    b = write_run(tmp_path / "b", {"1": [True] * 3, "2": [True, True, False], "3": [True] * 3, "5": [True] * 3})
    (row,) = compare(str(a), str(b))
    assert (row["tasks"], row["unpaired"], row["A better"], row["B better"]) == (3, 2, 0, 2)
    assert row["A"] == "50.0 %" and row["B"] == "88.9 %" and row["B - A"].startswith("+38.9")
    assert row["p"] == f"{sign_flip_test([3, 4, 0]):.2g}" == "0.5"
    assert row["tokens/forward A"] == "2.00"


def test_moments_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {"1": [False], "2": [False]}, step=0)
    write_run(run, {"1": [True], "2": [False]}, step=30)
    main([f"{run}@0", str(run)])
    printed = capsys.readouterr().out
    assert "0.0 %" in printed and "50.0 %" in printed and "+50.0" in printed
    (row,) = compare(f"{run}@30", str(run))
    assert row["p"] == "1"


def test_what_differs_is_told(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, {"1": [True]}) for name in "ab"]
    for run, temperature in zip(runs, (1.0, 0.5)):
        about = {"id": str(temperature), "settings": {"static": {"temperature": temperature}}, "seed": 1}
        (run / "fingerprint.json").write_text(json.dumps(about))
    assert changes_between(*map(str, runs)) == ["settings.static.temperature: 1.0 → 0.5"]


def test_what_cannot_be_paired_is_one_line(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {"1": [True]})
    write_run(a, {"1": [True]}, "dynamic")
    b = write_run(tmp_path / "b", {"1": [True]}, "sequential")
    c = write_run(tmp_path / "c", {"9": [True]})
    d = write_run(tmp_path / "d", {"1": [True]})
    (d / "samples.jsonl").write_text((d / "samples.jsonl").read_text().replace('"q1"', '"other"'))
    for names, words in (
        ((a, b), "A has static, dynamic, B has sequential"),
        ((a, c), "no task in common"),
        ((a, d), "task 1 is another question"),
        ((a, tmp_path / "absent"), "absent"),
        ((f"{a}@7", a), "no evaluation after 7 steps; use @0"),
    ):
        with pytest.raises(UserError, match=words):
            compare(*map(str, names))
    with pytest.raises(SystemExit):
        main([str(a)])


def test_lines_of_another_kind_are_told(tmp_path: Path) -> None:
    """Responses that another program wrote have no verdicts; one that a killed run tore is left out."""
    run = write_run(tmp_path / "run", {"1": [True]})
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"task_id": "2", "correct": tr\n{"task_id": ' + "9" * 5000 + "}\n")
    (row,) = compare(str(run), str(run))
    assert row["tasks"] == 1
    (tmp_path / "foreign.jsonl").write_text('{"task": 0, "response": "x"}\n')
    with pytest.raises(UserError, match=r"foreign.jsonl has a line without `task_id`; give a samples.jsonl"):
        compare(str(tmp_path / "foreign.jsonl"), str(run))


def test_two_settings_of_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {"1": [True], "2": [False]}, setting="static")
    write_run(tmp_path / "other", {"1": [True], "2": [True]}, setting="dynamic")
    with (run / "samples.jsonl").open("a") as file:
        file.write((tmp_path / "other" / "samples.jsonl").read_text())
    (row,) = compare(f"{run}:static", f"{run}:dynamic")
    assert (row["setting"], row["B - A"][:5]) == ("static / dynamic", "+50.0")
    with pytest.raises(UserError, match="no setting threshold; use :static, :dynamic"):
        compare(f"{run}:threshold", str(run))
    main([str(run), str(run)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= max(80, len(f"A: {run}, B: {run}"))
