"""The run page: curves, config, the best and worst responses; rewritten while a run lives, or made afterwards:

    python -m rollout.report runs/a [runs/b …] [out=FILE.html]

One run's page lies in its folder; several are drawn over one another into `out`.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.checkpoint import unless_full, write_whole
from common.errors import UserError, one_line_errors
from common.metrics import PANELS, curves_of, read_rows
from common.page import fill_page
from common.ranks import is_main
from common.runtime import console
from common.trajectory import ScoredTrajectory
from models import LoadedModel
from rollout.results import trace_of_response
from sample.traces import write_trace_page

TEMPLATE = Path(__file__).with_name("report.html")
SHOWN = 3  # best responses of as many tasks, and as many worst of others
POINTS = 1500  # of a curve; longer ones are thinned
RARELY = 200  # the page is rewritten when so many times its last cost has passed: half a percent of the run
# the figures at the top, beside accuracies of evaluations
HEADLINES = ("reward", "accuracy", "response_length", "tokens_per_forward", "mismatch_kl")


@dataclass
class RunPage:
    """report.html of a run that lives. `note` keeps what a step drew, `refresh` rewrites the page now and then."""

    folder: Path
    loaded: LoadedModel
    total_step: int
    block_size: int = 1  # of the responses kept
    responses: list[tuple[str, int, ScoredTrajectory]] = field(default_factory=list)  # (best or worst, step, response)
    written: float = 0.0  # when the page was last finished, monotonic seconds
    cost: float = 0.0  # seconds that took

    def note(self, step: int, groups: Sequence[Sequence[ScoredTrajectory]], block_size: int) -> None:
        """Keep the best and the worst responses of a step, each of another task, drawn in blocks of that size."""
        self.block_size = block_size
        ranked = sorted((response for group in groups for response in group), key=lambda one: one.score.reward)
        taken: set[str] = set()
        most = min(SHOWN, max(1, len({response.task.id for response in ranked}) // 2))
        self.responses = [("best", step, response) for response in of_new_tasks(ranked[::-1], taken, most)]
        self.responses += [("worst", step, response) for response in of_new_tasks(ranked, taken, most)]

    def refresh(self, done: bool = False) -> bool:
        """Rewrite the page if enough time has passed, or the run is done; returns whether it was rewritten.

        One rank writes it.
        """
        begin = time.monotonic()
        if not is_main() or (not done and begin - self.written < RARELY * self.cost):
            return False
        traces, rows = [], []
        for number, (kind, step, response) in enumerate(self.responses, start=1):
            task, trajectory, score = response.task, response.trajectory, response.score
            name = {"name": f"{kind} of step {step}: {task.id}"}
            traces.append(trace_of_response(self.loaded, response, self.block_size) | name)
            row = {"kind": kind, "step": step, "task": task.id, "question": task.question, "text": trajectory.text}
            row |= {"reward": score.reward, "verdict": score.verdict, "length": trajectory.length}
            rows.append(row | {"steps": trajectory.steps, "trace": f"trace.html#{number}"})
        page = run_data(self.folder) | {"live": not done, "total": self.total_step, "responses": rows}
        file = self.folder / "report.html"
        with unless_full(file):
            if traces:
                subtitle = "best and worst of the latest step"
                write_trace_page(self.folder / "trace.html", traces, self.folder.name, subtitle)
            write_whole(file, report_page([page]))
        self.written = time.monotonic()
        self.cost = self.written - begin
        return True


def of_new_tasks(ranked: Sequence[ScoredTrajectory], taken: set[str], most: int) -> list[ScoredTrajectory]:
    """The first response of each of the first `most` tasks that are not in `taken`, and are from then on."""
    found: list[ScoredTrajectory] = []
    for response in ranked:
        if len(found) < most and response.task.id not in taken:
            taken.add(response.task.id)
            found.append(response)
    return found


def run_data(folder: Path) -> dict[str, Any]:
    """A run's curves and config, from its folder; UserError where there are none."""
    metrics = folder / "metrics.jsonl"
    rows = read_rows(metrics)
    file = folder / "config.yaml"
    config = file.read_text(encoding="utf-8") if file.is_file() else ""
    experiment = (yaml.safe_load(config) or {}).get("experiment") or {}
    return {
        "name": folder.name,
        "curves": {key: thin(curve) for key, curve in curves_of(rows).items()},
        "config": config,
        "step": max((row["step"] for row in rows), default=0),
        "live": False,
        "total": int(experiment.get("total_step") or 0),
        "time": metrics.stat().st_mtime if metrics.is_file() else time.time(),
        "responses": [],
    }


def thin(curve: tuple[list[int], list[float]]) -> list[list[float]]:
    """Steps and values, at most POINTS of them: means of neighbours where there are more."""
    steps, values = curve
    width = -(-len(steps) // POINTS)
    if width > 1:
        parts = [slice(start, start + width) for start in range(0, len(steps), width)]
        values = [sum(values[part]) / len(values[part]) for part in parts]
        steps = [steps[part][-1] for part in parts]
    return [list(steps), [float(f"{value:.5g}") for value in values]]


def report_page(runs: Sequence[dict[str, Any]]) -> str:
    """The page for one run, or several drawn over one another."""
    panels = [asdict(panel) for panel in PANELS]
    data = {"runs": list(runs), "panels": panels, "headlines": HEADLINES}
    return fill_page(TEMPLATE.read_text(encoding="utf-8"), data)


@one_line_errors
def main(argv: list[str]) -> None:
    """Write the page of one run, or one that compares several."""
    folders = [Path(argument) for argument in argv if not argument.startswith("out=")]
    out = next((Path(argument.partition("=")[2]) for argument in argv if argument.startswith("out=")), None)
    if not folders or "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise UserError(f"{folder} has no metrics.jsonl; give the folder of a run, as runs/demo")
    if out is None:
        out = folders[0] / "report.html" if len(folders) == 1 else folders[0].parent / "report.html"
    write_whole(out, report_page([run_data(folder) for folder in folders]))
    console.print(f"written: {out}; open it in a browser")


if __name__ == "__main__":
    main(sys.argv[1:])
