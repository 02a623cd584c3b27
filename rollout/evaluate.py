"""Evaluation: every task answered under each of several settings, counted, and written down."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UserError
from common.ranks import main_only
from common.runtime import Stopwatch
from common.schema import DatasetConfig, Sampling, SFTDatasetConfig
from common.trajectory import Task
from models import LoadedModel
from rollout.collect import Rollout, Scorer, collect, prompts_within
from sample.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Figures of one setting over one set of tasks."""

    setting: str
    tasks: int
    responses: int
    accuracy: float  # share of correct responses
    standard_error: float  # of the accuracy, over tasks
    tokens_per_forward: float  # response tokens over denoising steps; commit and prefill forwards apart
    response_length: float  # mean tokens through the stop token
    truncated: float  # share cut at the limit
    tokens_per_second: float


def evaluate(
    engine: Engine,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    settings: Sequence[Sampling],
    scorer: Scorer,
    dataset: DatasetConfig | SFTDatasetConfig,
    max_prompt_len: int,
    seed: int,
    samples_file: Path | None = None,
    step: int = 0,
) -> dict[str, Evaluation]:
    """Accuracy and cost under each setting, by the setting's name; every response is appended to `samples_file`.
    `step` says there after how many steps of training.

    Draws depend on (seed, task, sample) alone, so two models or two moments are compared under the same numbers.
    """
    results = {}
    for name, setting in name_settings(settings).items():
        prompts = prompts_within(loaded, tasks, dataset, setting, max_prompt_len)
        if not prompts:
            raise UserError(f"max_prompt_len: every prompt of the evaluation is longer than {max_prompt_len}; raise it")
        watch = Stopwatch()
        groups = collect(engine, loaded, prompts, setting, scorer, watch, seed, description=f"evaluate {name}")
        results[name] = summarize(name, groups, watch.seconds.get("rollout", 0.0))
        if samples_file is not None:
            write_samples(samples_file, groups, {"step": step, "setting": name})
    return results


def summarize(name: str, groups: Sequence[Sequence[Rollout]], seconds: float) -> Evaluation:
    """Count one setting's responses, one group per task."""
    rollouts = [rollout for group in groups for rollout in group]
    per_task = [sum(rollout.score.correct for rollout in group) / len(group) for group in groups]
    mean = sum(per_task) / len(per_task)
    spread = sum((share - mean) ** 2 for share in per_task) / max(1, len(per_task) - 1)
    tokens = sum(rollout.trajectory.length for rollout in rollouts)
    return Evaluation(
        setting=name,
        tasks=len(groups),
        responses=len(rollouts),
        accuracy=mean,
        standard_error=math.sqrt(spread / len(per_task)),
        tokens_per_forward=tokens_per_forward(rollouts),
        response_length=tokens / len(rollouts),
        truncated=sum(rollout.trajectory.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        tokens_per_second=tokens / seconds if seconds else 0.0,
    )


def tokens_per_forward(rollouts: Sequence[Rollout]) -> float:
    """Response tokens, through the stop token, over denoising steps (TPF)."""
    return sum(r.trajectory.length for r in rollouts) / sum(r.trajectory.steps for r in rollouts)


def name_settings(settings: Sequence[Sampling]) -> dict[str, Sampling]:
    """A short name for each setting: its strategy and, where that is not enough, whatever else tells them apart."""
    rows = [asdict(setting) for setting in settings]
    names = [row["remasking_strategy"].removeprefix("low_confidence_") for row in rows]
    if len(set(names)) < len(names):
        differing = [key for key in rows[0] if len({str(row[key]) for row in rows}) > 1]
        differing = [key for key in differing if key != "remasking_strategy"]
        names = ["-".join([name, *(f"{key}={row[key]}" for key in differing)]) for name, row in zip(names, rows)]
    return dict(zip(names, settings))


@main_only
def write_samples(path: Path, groups: Sequence[Sequence[Rollout]], about: dict[str, int | str] | None = None) -> None:
    """Append every response with its task, trace and verdict, one JSON object a line, `about` first."""
    with path.open("a", encoding="utf-8") as file:
        for rollout in (rollout for group in groups for rollout in group):
            line = (about or {}) | {"question": rollout.task.question}
            line |= {"ground_truth_answer": rollout.task.ground_truth_answer}
            line |= vars(rollout.score) | rollout.trajectory.to_json()
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
