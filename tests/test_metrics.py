"""Metrics: the file and its resume, trackers, curves and tables."""

import json
import math
import sys
import types

import numpy as np
import pytest

from common.errors import UserError
from common.metrics import (
    append_row,
    clean_row,
    draw_curves,
    format_table,
    open_metrics,
    read_rows,
    truncate_after,
    without_secrets,
)


def test_rows_are_rounded_ordered_and_plain_json(tmp_path):
    log = open_metrics(tmp_path / "run")
    log.log({"reward": 0.123456789012, "step": 1, "accuracy": np.float32(0.1), "n": np.int64(3), "kl": math.nan})
    log.log({"step": 2, "loss": 1.23456789e-12, "eval/dynamic/accuracy": 1.0})
    log.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 1, "accuracy": 0.1, "kl": null, "n": 3, "reward": 0.1234568}',
        '{"step": 2, "eval/dynamic/accuracy": 1.0, "loss": 1.234568e-12}',
    ]


def test_a_row_is_on_disk_before_the_log_is_closed(tmp_path):
    log = open_metrics(tmp_path)
    log.log({"step": 1, "reward": 1.0})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 1.0}]


@pytest.mark.parametrize("step", [None, 1.0, "1", True])
def test_a_row_needs_a_step(step):
    with pytest.raises(ValueError, match="whole number `step`"):
        clean_row({"step": step, "reward": 1.0})


def test_resume_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_row(path, {"step": step, "reward": step / 10})
    append_row(path, {"step": 3, "eval/dynamic/accuracy": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 6, "rew')  # the run was killed here
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5, 3]
    log = open_metrics(tmp_path, resume_step=3)
    log.log({"step": 4, "reward": 0.9})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row.get("reward")) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3), (3, None), (4, 0.9)]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_what_is_not_there_is_nothing(tmp_path):
    truncate_after(tmp_path / "metrics.jsonl", 3)
    assert read_rows(tmp_path / "metrics.jsonl") == [] and not list(tmp_path.iterdir())


def test_tensorboard_gets_numbers_and_forgets_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_metrics(tmp_path, ["tensorboard"])
    for step in range(1, 5):
        log.log({"step": step, "reward": step / 10, "note": "words", "kl": math.nan})
    log.close()
    log = open_metrics(tmp_path, ["tensorboard"], resume_step=2)
    log.log({"step": 3, "reward": 0.9})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    points = [(event.step, round(event.value, 3)) for event in events.Scalars("reward")]
    assert points == [(1, 0.1), (2, 0.2), (3, 0.9)]


class FakeRun:
    def __init__(self, calls: list):
        self.calls = calls

    def log(self, row, step):
        self.calls.append((step, row))

    def finish(self):
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers(tmp_path, monkeypatch, name, capsys):
    calls, starts = [], []

    def init(**settings):
        starts.append(settings)
        return FakeRun(calls)

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init, api=types.SimpleNamespace(api_key=None)))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = {"model": {"name": "tiny", "hf_token": "secret"}}
    for resume_step in (None, 1, None):
        log = open_metrics(tmp_path / "run", [name], "project", config, resume_step)
        log.log({"step": 2, "reward": 0.5, "note": "words"})
        log.close()
    assert calls == [(2, {"reward": 0.5}), "finish"] * 3
    assert all(start["project"] == "project" and start["config"] == {"model": {"name": "tiny"}} for start in starts)
    identity = "id" if name == "wandb" else "name"
    assert starts[0][identity] == starts[1][identity] != starts[2][identity], (
        "a resumed run goes on, a new one does not"
    )
    if name == "wandb":
        assert starts[0]["mode"] == "offline" and "offline" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_told(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError, match=f"experiment.trackers: '{name}' is not installed: pip install {name}"):
        open_metrics(tmp_path, [name])


def test_an_unknown_tracker_is_told(tmp_path):
    with pytest.raises(UserError, match="'tensorbord' is unknown; did you mean 'tensorboard'"):
        open_metrics(tmp_path / "run", ["tensorbord"])
    assert not (tmp_path / "run").exists()


def test_credentials_are_left_out():
    config = {"max_token": 1, "stop_token_list": [], "api_key": "x", "a": {"hf_token": "x", "password": "x", "b": 1}}
    assert without_secrets(config) == {"max_token": 1, "stop_token_list": [], "a": {"b": 1}}


def rl_rows(steps: int) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        rows.append({"step": step, "reward": step / steps, "loss": -0.1, "kl": 0.01 / step, "response_length": 27.0})
        rows[-1] |= {"seconds_rollout": 1.0, "seconds_train": 2.0, "grad_norm": None, "logp_diff_max": 1e-6 * step}
        if step % 10 == 0:
            rows.append({"step": step, "eval/dynamic T=1/accuracy": 0.5, "eval/static T=1/accuracy": 0.4})
    return rows


@pytest.mark.parametrize(("steps", "panels"), [(1, 6), (50, 7)])
def test_curves_are_drawn_from_the_keys_there_are(tmp_path, steps, panels):
    for row in rl_rows(steps):
        append_row(tmp_path / "metrics.jsonl", clean_row(row))
    assert draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") == panels
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_nothing_to_draw(tmp_path):
    assert draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") == 0
    append_row(tmp_path / "metrics.jsonl", {"step": 1, "unknown": 1.0})
    assert draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") == 0
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_never_fails_a_run(tmp_path, monkeypatch, capsys):
    append_row(tmp_path / "metrics.jsonl", {"step": 1, "reward": 1.0})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png") == 0
    assert "pip install matplotlib" in capsys.readouterr().err


def test_tables():
    rows = [
        {"setting": "dynamic T=1", "before": 45.6, "after": 87.24},
        {"setting": "static", "before": 9, "tasks": 12345.0},
    ]
    assert format_table(rows, "accuracy").splitlines() == [
        "accuracy",
        "setting      before  after   tasks",
        "-----------  ------  -----  ------",
        "dynamic T=1    45.6  87.24",
        "static            9         12,345",
    ]
    assert format_table([]) == "\n"


def test_a_table_wider_than_a_terminal_is_turned_where_that_helps():
    rows = [{"setting": name, **{f"figure_of_{n}": n for n in range(9)}} for name in ("static", "dynamic")]
    lines = format_table(rows, "title").splitlines()
    assert lines[1].split() == ["setting", "static", "dynamic"] and max(map(len, lines)) <= 80
    assert [line.split() for line in lines[3:]] == [[f"figure_of_{n}", str(n), str(n)] for n in range(9)]
    assert len(format_table(rows * 20).splitlines()) == 2 + 40
