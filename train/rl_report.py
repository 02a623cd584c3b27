"""What a run tells: a step's figures, its line on the console, and the results of the whole."""

import dataclasses
import json

from common.errors import UserError
from common.metrics import print_table
from common.runtime import Stopwatch, console
from common.trajectory import ScoredTrajectory
from rollout.results import Evaluation, tokens_per_forward
from train.rl_setup import Run


def rollout_figures(groups: list[list[ScoredTrajectory]], samples: list[ScoredTrajectory]) -> dict[str, float]:
    """Means over the step's responses."""
    rollouts = [rollout for group in groups for rollout in group]
    if not rollouts:
        raise UserError("training.max_prompt_len: every prompt of the step is longer; raise it")
    count = len(rollouts)
    return {
        "reward": sum(rollout.score.reward for rollout in rollouts) / count,
        "accuracy": sum(rollout.score.correct for rollout in rollouts) / count,
        "response_length": sum(rollout.trajectory.length for rollout in rollouts) / count,
        "truncated": sum(rollout.trajectory.finish_reason == "length" for rollout in rollouts) / count,
        "tokens_per_forward": tokens_per_forward(rollouts),
        "kept_mass": sum(rollout.trajectory.kept_mass for rollout in rollouts) / count,
        "groups": len(groups),
        "groups_kept": len({sample.trajectory.task_id for sample in samples}),
    }


def step_times(run: Run, groups: list[list[ScoredTrajectory]], watch: Stopwatch) -> dict[str, float]:
    """Tokens per second of the rollout, and the step's seconds by stage."""
    tokens = sum(rollout.trajectory.length for group in groups for rollout in group)
    total = watch.total()
    named = {stage: watch.seconds.get(stage, 0.0) for stage in ("rollout", "reward", "train", "sync")}
    return {
        "tokens_per_second": tokens / named["rollout"],
        **{f"seconds_{stage}": seconds for stage, seconds in named.items()},
        "seconds_other": total - sum(named.values()),
        "seconds": total,
    }


def report_step(step: int, total: int, figures: dict[str, float]) -> None:
    """One line on the console."""
    console.print(
        f"step {step}/{total}  reward {figures['reward']:.3f}  length {figures['response_length']:.1f}  "
        f"tokens/forward {figures['tokens_per_forward']:.2f}  kl {figures.get('kl', 0):.2e}  "
        f"mismatch {figures.get('logp_diff_max', 0):.1e}  {figures['seconds']:.1f} s"
    )


def write_results(run: Run, before: dict[str, dict[str, float]], after: dict[str, Evaluation]) -> None:
    """results.json (every figure), summary.json (accuracy before and after, seconds by stage) and a table."""
    results = {"before": before, "after": {name: dataclasses.asdict(result) for name, result in after.items()}}
    (run.folder / "results.json").write_text(json.dumps(results, indent=2))
    keep = ("accuracy", "tokens_per_forward")
    short = {
        moment: {name: {key: round(row[key], 4) for key in keep} for name, row in rows.items()}
        for moment, rows in results.items()
    }
    seconds = {stage: round(value, 2) for stage, value in run.stages.seconds.items()}
    seconds["total"] = round(run.stages.total(), 2)
    summary = {"seed": run.config.training.seed} | short | {"seconds": seconds}
    (run.folder / "summary.json").write_text(json.dumps(summary, indent=2))
    rows = []
    for name, now in short["after"].items():
        then = short["before"][name]
        gain = 100 * (now["accuracy"] - then["accuracy"])
        rows.append(
            {
                "sampling": name,
                "tasks": after[name].tasks,
                "accuracy before": f"{100 * then['accuracy']:.1f} %",
                "after": f"{100 * now['accuracy']:.1f} %",
                "gain": f"{gain:+.1f}",
                "tokens/forward before": f"{then['tokens_per_forward']:.2f}",
                "tokens/forward after": f"{now['tokens_per_forward']:.2f}",
            }
        )
    print_table(rows, title=f"held-out tasks, {run.folder}")
    console.print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))
