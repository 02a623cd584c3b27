"""What RL reports: a step's figures and its line on the console, and the results of the whole run."""

import dataclasses
import json
from pathlib import Path

from common.metrics import print_table
from common.runtime import Stopwatch, console
from common.trajectory import ScoredTrajectory
from rollout.results import Evaluation, tokens_per_forward


def rollout_figures(groups: list[list[ScoredTrajectory]], samples: list[ScoredTrajectory]) -> dict[str, float]:
    """Means over the step's responses; `samples` are those that are learned from."""
    responses = [response for group in groups for response in group]
    count = len(responses)
    return {
        "reward": sum(response.score.reward for response in responses) / count,
        "accuracy": sum(response.score.correct for response in responses) / count,
        "response_length": sum(response.trajectory.length for response in responses) / count,
        "truncated": sum(response.trajectory.finish_reason == "length" for response in responses) / count,
        "tokens_per_forward": tokens_per_forward(responses),
        "kept_mass": sum(response.trajectory.kept_mass for response in responses) / count,
        "groups": len(groups),
        "groups_kept": len({sample.trajectory.task_id for sample in samples}),
    }


def step_times(groups: list[list[ScoredTrajectory]], watch: Stopwatch) -> dict[str, float]:
    """Tokens per second of the rollout, and the step's seconds by stage."""
    tokens = sum(response.trajectory.length for group in groups for response in group)
    total = watch.total()
    stages = {stage: watch.seconds.get(stage, 0.0) for stage in ("rollout", "reward", "train", "sync")}
    return {
        "tokens_per_second": tokens / stages["rollout"],
        **{f"seconds_{stage}": seconds for stage, seconds in stages.items()},
        "seconds_other": total - sum(stages.values()),
        "seconds": total,
    }


def report_step(step: int, total: int, figures: dict[str, float]) -> None:
    """One line on the console."""
    console.print(
        f"step {step}/{total}  reward {figures['reward']:.3f}  length {figures['response_length']:.1f}  "
        f"tokens/forward {figures['tokens_per_forward']:.2f}  kl {figures.get('kl', 0):.2e}  "
        f"mismatch {figures.get('logp_diff_max', 0):.1e}  {figures['seconds']:.1f} s"
    )


def write_results(
    folder: Path, seed: int, before: dict[str, dict[str, float]], after: dict[str, Evaluation], stages: Stopwatch
) -> None:
    """results.json (every figure), summary.json (accuracy before and after, seconds by stage) and a table."""
    results = {"before": before, "after": {name: dataclasses.asdict(result) for name, result in after.items()}}
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    keep = ("accuracy", "tokens_per_forward")
    short = {
        moment: {name: {key: round(row[key], 4) for key in keep} for name, row in rows.items()}
        for moment, rows in results.items()
    }
    seconds = {stage: round(value, 2) for stage, value in stages.seconds.items()}
    seconds["total"] = round(stages.total(), 2)
    (folder / "summary.json").write_text(json.dumps({"seed": seed} | short | {"seconds": seconds}, indent=2))
    rows = []
    for name, now in short["after"].items():
        then = short["before"][name]
        rows.append(
            {
                "sampling": name,
                "tasks": after[name].tasks,
                "accuracy before": f"{100 * then['accuracy']:.1f} %",
                "after": f"{100 * now['accuracy']:.1f} %",
                "gain": f"{100 * (now['accuracy'] - then['accuracy']):+.1f}",
                "tokens/forward before": f"{then['tokens_per_forward']:.2f}",
                "tokens/forward after": f"{now['tokens_per_forward']:.2f}",
            }
        )
    print_table(rows, title=f"held-out tasks, {folder}")
    console.print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))
