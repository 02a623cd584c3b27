"""benchmarks/gpu.py, which is `make gpu`: at the size of a processor, and its tables from results of the real size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import gpu, made_trajectories
from benchmarks.gpu import BEGIN, END, PAGE, RESULTS, Part, parts_of, run_part, tables, write_tables
from benchmarks.rl_steps import figures, fitting_shape


@pytest.mark.command
def test_the_whole_command_at_a_small_size(tmp_path: Path) -> None:
    """The GPU's tests are skipped here, which has no GPU: why is recorded, and the others go on."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--shape", "mini", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    outcomes = {name: part["outcome"] for name, part in found["parts"].items()}
    assert outcomes == {"tests": "ok", "rollout mini": "ok", "training mini": "ok", "rl": "ok"}
    assert "SKIPPED [2]" in found["parts"]["tests"]["end"] and "CUDA" in found["parts"]["tests"]["end"]
    (rollout,), training, (steps,) = (found["parts"][name]["rows"] for name in outcomes if name != "tests")
    assert rollout["batch"] == 2 and rollout["ms/forward"] > 0
    assert [row["checkpointing"] for row in training] == [True, False] and training[0]["tokens/s"] > 0
    assert steps["steps"] == 1 and steps["largest mismatch"] < 1e-4
    assert 99 < sum(value for name, value in steps.items() if name.endswith(" %")) < 101
    assert "updates skipped" not in done.stdout  # so that training had something to do


def test_it_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make gpu needs a CUDA device"):
        gpu.main()


def test_a_missing_package_is_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None if name in ("omegaconf", "pytest") else name)
    with pytest.raises(SystemExit) as ended:
        benchmarks.check_packages("make gpu", "torch", "omegaconf", "pytest")
    line = str(ended.value)
    assert "\n" not in line and "make gpu lacks omegaconf, pytest: pip install omegaconf==" in line
    assert "pytest==" in line and "torch" not in line and "xdist" not in line


def test_a_part_that_does_not_end_is_ended() -> None:
    endless = run_part(Part("server", 1, ["http.server", "0", "--bind", "127.0.0.1"], False), seconds=1)
    assert endless["outcome"] == "out of time" and 1 <= endless["seconds"] < 30
    assert run_part(Part("late", 9, ["this"], False), seconds=0)["outcome"] == "out of time"
    wrong = run_part(Part("wrong", 60, ["this_is_no_module"]), seconds=60)
    assert wrong["outcome"] == "failed" and "this_is_no_module" in wrong["end"] and wrong["rows"] == []


def test_all_parts_fit_the_time() -> None:
    assert sum(part.seconds for part in parts_of(None)) <= 60 * gpu.MINUTES
    assert {part.name.split()[0] for part in parts_of(None)} == {"tests", "rollout", "training", "rl"}
    assert gpu.MADE_PROMPT == made_trajectories.PROMPT


def results(folder: Path, name: str, batch: int, tokens: float) -> None:
    rollout = {"batch": batch, "ms/forward": 25.04, "tokens/s": tokens, "% of limit": 29.2}
    parts = {
        "rollout 8b": {"outcome": "ok", "seconds": 1, "rows": [rollout], "end": ""},
        "training 8b": {"outcome": "out of time", "seconds": 1, "rows": [], "end": "first\nlast | line"},
        "rl": {"outcome": "ok", "seconds": 1, "rows": [{"shape": "1.7b", "rollout %": 51.23}], "end": ""},
    }
    found = {"chip": "h100", "parts": parts}
    (folder / name).write_text(json.dumps(found), encoding="utf-8")


def test_the_tables_take_the_newest_results(tmp_path: Path) -> None:
    results(tmp_path, "h100-2026-12-01.json", 64, 9000)
    results(tmp_path, "h100-2026-12-02.json", 64, 9100)
    lines = tables(tmp_path).splitlines()
    (line,) = [line for line in lines if line.startswith("| h100 | 8b | 64 |")]
    assert "| 25.0 | 29 % | 9100 |" in line and "| 7.3 |" in line
    (other,) = [line for line in lines if line.startswith("| h100 | 8b | 128 |")]
    assert other.count("not measured") == 3
    assert "| h100 | training 8b | out of time | last / line |" in lines
    assert "| h100 | 1.7b | 51.2 |" in lines


def test_the_page_has_the_tables_of_the_results(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert tables(RESULTS) in page, "python -m benchmarks.gpu --tables"
    copy = tmp_path / "page.md"
    copy.write_text(f"above\n{BEGIN}old{END}\nbelow\n", encoding="utf-8")
    write_tables(copy, RESULTS)
    assert copy.read_text(encoding="utf-8") == f"above\n{BEGIN}\n\n{tables(RESULTS)}\n{END}\nbelow\n"


def test_the_first_step_is_not_in_the_means(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    stages = {f"seconds_{stage}": 1.0 for stage in ("rollout", "reward", "train", "sync", "other")}
    step = stages | {"seconds": 5.0, "tokens_per_second": 10.0, "logp_diff_max": 0.5}
    slow = step | {"seconds": 500.0, "logp_diff_max": 0.75}
    file.write_text("\n".join(json.dumps(row) for row in ({"evaluation": 1}, slow, step)), encoding="utf-8")
    got = figures(file)
    assert (got["steps"], got["seconds a step"], got["first step"], got["train %"]) == (2, 5.0, 500.0, 20.0)
    assert got["largest mismatch"] == 0.75


def test_the_processor_takes_the_smallest_shape() -> None:
    assert fitting_shape() == "mini"
