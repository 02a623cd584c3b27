"""The run page: what is in it, in Chromium, and how rarely it is rewritten."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.page import allow_script
from common.trajectory import Score, ScoredTrajectory, Task, Trajectory
from models import load_model
from rollout import report
from rollout.report import TEMPLATE, RunPage, main, run_data, thin
from tests.browser import chromium, open_page, read_data

HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


def write_run(folder: Path, steps: int = 40) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "eval/dynamic/accuracy": 0.4, "eval/static/accuracy": 0.3}]
    for step in range(1, steps + 1):
        row = {"step": step, "reward": step / steps, "accuracy": 0.5, "kl": 0.001 * step, "mismatch_kl": 10.0**-step}
        rows.append(row | {"lr": 1 / step, "seconds_rollout": 1.0, "seconds_train": 2.0, "seconds_other": None})
    rows.append({"step": steps, "eval/dynamic/accuracy": 0.8, "eval/static/accuracy": 0.7})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"experiment:\n  total_step: {steps}\n  note: '{HOSTILE}'\n")
    return folder


def rollout(task: str, reward: float) -> ScoredTrajectory:
    ids = [1, 2, 3, 4]
    trajectory = Trajectory(task, 0, [5], ids, [0, 0, 1, 2], [-0.1] * 4, [0.9] * 4, 1.0, "stop", 4, 3, 4, 1.0, HOSTILE)
    return ScoredTrajectory(
        Task(task, HOSTILE, "7"), trajectory, Score(reward, reward > 0, "passed" if reward else "failed")
    )


def test_a_living_run(browser: Any, tiny_sdar: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one")
    page = RunPage(folder, load_model(tiny_sdar, "sdar"), 50)
    groups = [[rollout(str(number), (number + half) / 9) for half in (0, 0.1, 0)] for number in range(5)]
    page.note(40, [*groups, [rollout("9", 1.0), rollout("9", 0.0), rollout("9", 1.0)]], 4)
    assert page.refresh()
    opened, faults = open_page(browser, folder / "report.html")
    titles = opened.evaluate("[...document.querySelectorAll('.panel h3')].map(e => e.firstChild.textContent)")
    assert titles == ["reward", "accuracy", "KL", "learning rate", "trainer against engine", "seconds by stage"]
    assert "step 40 of 50, running" in opened.inner_text("#state")
    tiles = opened.inner_text("#tiles")
    assert "held out, dynamic\n80.0 %\nlast\nfrom 40.0 %" in tiles
    assert "reward\n0.963\nlast, smoothed\nfrom 0.0625" in tiles  # means of four steps
    panel = opened.inner_text(".panel >> nth=0").split("\n")
    assert panel[:3] == ["reward", "last, smoothed", "0.963"] and {"mean of responses", "step"} <= set(panel)
    accuracies = opened.inner_text(".panel .names >> nth=1").split("\n")
    assert accuracies == ["training 50.0 %", "held out, dynamic 80.0 %", "held out, static 70.0 %"]
    rate = opened.locator(".panel >> nth=3")
    assert rate.inner_text().split("\n")[1:3] == ["last", "0.0250"] and rate.locator("polyline").count() == 1
    box = opened.locator(".panel svg >> nth=0").bounding_box()
    opened.mouse.move(box["x"] + box["width"] * (42 + 370 * 9 / 39) / 420, box["y"] + 80)
    assert opened.inner_text(".panel >> nth=0").split("\n")[1:3] == ["step 10", "0.250"]
    assert rate.inner_text().split("\n")[1:3] == ["step 10", "0.100"]
    opened.mouse.move(0, 0)
    assert opened.inner_text(".panel h3 >> nth=0").split("\n")[1] == "last, smoothed"
    date = opened.evaluate("new Date(data.runs[0].time * 1000).toLocaleDateString([], {dateStyle: 'medium'})")
    assert f"as of {date}" in opened.inner_text("#state")
    assert opened.evaluate("document.querySelectorAll('.panel polygon').length") == 2  # stages are stacked
    points = opened.evaluate("document.querySelector('.panel polyline').getAttribute('points').split(' ').length")
    assert points == 40
    assert opened.text_content(".response pre") == HOSTILE and opened.evaluate("document.images.length") == 0
    assert HOSTILE in opened.text_content("#configs")
    kept = [
        (one["task"], one["reward"]) for one in read_data((folder / "report.html").read_text())["runs"][0]["responses"]
    ]
    assert kept == [("9", 1.0), ("4", 4.1 / 9), ("3", 3.1 / 9), ("0", 0.0), ("1", 1 / 9), ("2", 2 / 9)]
    opened.click(".response a >> nth=3")  # the first of the worst
    assert opened.title().endswith("trace") and "failed" in opened.inner_text("#verdict")
    assert not faults


def test_several_runs(browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, steps)) for name, steps in (("a", 20), ("b", 40))]
    main(runs)
    opened, faults = open_page(browser, tmp_path / "report.html", scheme="dark", width=380)
    assert opened.title() == "a · b"
    titles = opened.evaluate("[...document.querySelectorAll('.panel h3')].map(e => e.firstChild.textContent)")
    assert titles[:3] == ["reward", "accuracy · training", "accuracy · held out, dynamic"] and "KL" in titles
    assert "seconds by stage · train" in titles
    assert opened.text_content(".panel .names >> nth=0") == "a 0.925b 0.963"  # both means of four steps
    rows = opened.evaluate(
        "[...document.querySelectorAll('tr')].map(r => [...r.children].map(c => c.firstChild.textContent))"
    )
    assert rows[0][1:4] == ["held out, dynamic", "held out, static", "reward"] and rows[0][-1] == "step"
    assert [row[1:4] for row in rows[1:]] == [["80.0 %", "70.0 %", "0.925"], ["80.0 %", "70.0 %", "0.963"]]
    assert [row[-1] for row in rows[1:]] == ["20 of 20", "40 of 40"]
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not faults
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent")])
    assert "absent has no metrics.jsonl" in capsys.readouterr().err


def test_it_is_rewritten_rarely(tiny_sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that takes 2 s is left alone for 400 s; the end of the run does not wait."""
    clock = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])
    slow = run_data

    def run_data_slowly(folder: Path) -> dict[str, Any]:
        clock[0] += 2.0
        return slow(folder)

    monkeypatch.setattr(report, "run_data", run_data_slowly)
    page = RunPage(write_run(tmp_path / "run"), load_model(tiny_sdar, "sdar"), 40)
    assert page.refresh() and page.cost == 2.0
    clock[0] += 399
    assert not page.refresh()
    assert page.refresh(done=True)
    clock[0] += 401
    assert page.refresh()
    assert read_data((tmp_path / "run" / "report.html").read_text())["runs"][0]["live"]


def test_the_page_reaches_nothing() -> None:
    page = TEMPLATE.read_text(encoding="utf-8")
    assert allow_script(page) == page, "run: python -m common.page rollout/report.html"
    assert "default-src 'none'" in page and "https:" not in page and "innerHTML" not in page


def test_long_curves_are_thinned() -> None:
    steps, values = thin((list(range(1, 4001)), [float(step) for step in range(1, 4001)]))
    assert len(steps) == len(values) == 1334 and steps[0] == 3 and values[0] == 2.0 and steps[-1] == 4000
    assert thin(([1, 2], [0.5, 1.0])) == [[1, 2], [0.5, 1.0]]
