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
        row = {"step": step, "reward": step / steps, "kl": 0.001 * step, "mismatch_kl": 10.0**-step}
        rows.append(row | {"seconds_rollout": 1.0, "seconds_train": 2.0, "seconds_other": None})
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
    page.note(40, [[rollout(str(number), number / 9) for number in range(5)], [rollout("9", 1.0)]], 4)
    assert page.refresh()
    opened, faults = open_page(browser, folder / "report.html")
    titles = opened.evaluate("[...document.querySelectorAll('.panel h3')].map(e => e.textContent)")
    assert titles == ["reward", "accuracy", "KL", "trainer against engine", "seconds by stage"]
    assert "step 40 of 50, running" in opened.inner_text("#state")
    tiles = opened.inner_text("#tiles")
    assert "held out, dynamic\n80.0 %\nfrom 40.0 %" in tiles and "reward" in tiles
    assert opened.evaluate("document.querySelectorAll('.panel polygon').length") == 2  # stages are stacked
    points = opened.evaluate("document.querySelector('.panel polyline').getAttribute('points').split(' ').length")
    assert points == 40
    assert opened.text_content(".response pre") == HOSTILE and opened.evaluate("document.images.length") == 0
    assert HOSTILE in opened.text_content("#configs")
    rewards = [one["reward"] for one in read_data((folder / "report.html").read_text())["runs"][0]["responses"]]
    assert rewards == [1.0, 4 / 9, 3 / 9, 0.0, 1 / 9, 2 / 9]
    opened.click(".response a >> nth=3")  # the first of the worst
    assert opened.title().endswith("trace") and "failed" in opened.inner_text("#verdict")
    assert not faults


def test_several_runs(browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, steps)) for name, steps in (("a", 20), ("b", 40))]
    main(runs)
    opened, faults = open_page(browser, tmp_path / "report.html", scheme="dark", width=380)
    assert opened.title() == "a · b"
    titles = opened.evaluate("[...document.querySelectorAll('.panel h3')].map(e => e.textContent)")
    assert "accuracy · eval dynamic" in titles and "seconds by stage · train" in titles
    assert opened.evaluate("document.querySelectorAll('.panel .names')[0].textContent").startswith("a 1b 1")
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
