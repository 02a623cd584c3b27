"""The results of an evaluation: figures counted from the responses, and the tables and traces that show them."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

from common.board import extract_puzzle_answer
from common.trajectory import ScoredTrajectory, Task
from models import LoadedModel
from reward import general_reward, math_reward
from reward.option_reward import extract_option
from reward.score import RewardScorer
from rollout.fingerprint import Fingerprint
from rollout.statistics import majority_at_k, mean_and_error, pass_at_k, shown_ks
from sample.traces import Trace, trace_of

# Fields of a task's record by whose values accuracy is broken down, where a data set has them.
CATEGORY_FIELDS = ("level", "subject", "category", "type", "difficulty")
# How the answer is read from a response, for majority@k; kinds of task that are absent have no vote.
ANSWERS: dict[str, Callable[[str], str | None]] = {
    "math": math_reward.extract_answer,
    "general": general_reward.extract_answer,
    "option": extract_option,
    "sudoku": extract_puzzle_answer,
}
SHOWN = 4  # right responses of each setting on the trace page, and as many others


@dataclass(frozen=True)
class Evaluation:
    """Figures of one setting over one set of tasks."""

    setting: str
    tasks: int  # all that were asked for
    responses: int
    accuracy: float  # share of correct responses
    standard_error: float  # of the accuracy, clustered by task
    tokens_per_forward: float  # response tokens over denoising steps; commit and prefill forwards apart
    response_length: float  # mean tokens through the stop token
    truncated: float  # share cut at the limit
    tokens_per_second: float  # of the responses drawn now; 0 where all were there before
    unanswered: int = 0  # tasks that got no response, counted as wrong: too long for max_prompt_len or the cache
    pass_at: dict[int, float] = field(default_factory=dict)  # k → unbiased pass@k
    majority_at: dict[int, float] = field(default_factory=dict)  # k → majority@k, where answers can be compared
    categories: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # field → value → its figures
    overwriting: dict[str, float] = field(default_factory=dict)  # as `overwriting_figures` has them


# --- counting


def summarize(
    name: str,
    groups: Sequence[Sequence[ScoredTrajectory]],
    seconds: float,
    answer: Callable[[str], str | None] | None = None,
    drawn: int | None = None,
    unanswered: Sequence[Task] = (),
) -> Evaluation:
    """Count one setting's responses, one group per task; `answer` reads a text's answer, for majority@k.

    `drawn` is how many of the tokens took those `seconds`, where some were there before. Tasks that are `unanswered`
    count as wrong.
    """
    responses = [response for group in groups for response in group]
    correct = [[response.score.correct for response in group] for group in groups]
    shares = [(group[0].task, sum(right) / len(right)) for group, right in zip(groups, correct)]
    shares += [(task, 0.0) for task in unanswered]
    accuracy, error = mean_and_error([share for _, share in shares])
    tokens = sum(response.trajectory.length for response in responses)
    ks = shown_ks(min(map(len, groups)))
    votes = [[vote(answer(response.trajectory.text)) for response in group] for group in groups] if answer else None

    def over_tasks(values: Iterable[float]) -> float:  # their mean over all tasks, the unanswered counting 0
        return len(groups) / len(shares) * (sum(values) / len(groups))

    return Evaluation(
        setting=name,
        tasks=len(shares),
        responses=len(responses),
        accuracy=accuracy,
        standard_error=error,
        tokens_per_forward=tokens_per_forward(responses),
        response_length=tokens / len(responses),
        truncated=sum(response.trajectory.truncated for response in responses) / len(responses),
        tokens_per_second=(tokens if drawn is None else drawn) / seconds if seconds else 0.0,
        unanswered=len(unanswered),
        pass_at={k: over_tasks(pass_at_k(len(right), sum(right), k) for right in correct) for k in ks},
        majority_at={k: over_tasks(map(majority_at_k, votes, correct, repeat(k))) for k in ks} if votes else {},
        categories=by_category(shares),
        overwriting=overwriting_figures(responses),
    )


def overwriting_figures(responses: Sequence[ScoredTrajectory]) -> dict[str, float]:
    """What was overwritten, a revocation and what came after it included; empty where nothing was.

    `overwritten` writings for each token of the responses, and the share of these that ended for want of room.
    """
    trajectories = [response.trajectory for response in responses]
    overwritten = sum(len(trajectory.overwritten) for trajectory in trajectories)
    if not overwritten:
        return {}
    ended = sum(trajectory.finish_reason == "edits" for trajectory in trajectories)
    tokens = sum(trajectory.length for trajectory in trajectories)
    return {"overwritten": overwritten / tokens, "ended_by_edits": ended / len(trajectories)}


def results_row(result: Evaluation) -> dict[str, Any]:
    """Every figure of a setting, for a JSON file; without what was overwritten where nothing was."""
    row = dataclasses.asdict(result)
    return row if result.overwriting else {name: value for name, value in row.items() if name != "overwriting"}


def vote(answer: str | None) -> str | None:
    """An answer as it is compared for majority@k, without spaces and in lower case; None where there is none."""
    return "".join((answer or "").split()).casefold() or None


def tokens_per_forward(responses: Sequence[ScoredTrajectory]) -> float:
    """Response tokens, through the stop token, over denoising steps (TPF)."""
    tokens = sum(response.trajectory.length for response in responses)
    return tokens / sum(response.trajectory.steps for response in responses)


def answer_reader(scorer: RewardScorer) -> Callable[[str], str | None] | None:
    """How the scorer's kind of task reads an answer from a text; None where answers are programs, or the user's own."""
    return None if scorer.reward.function else ANSWERS.get(scorer.reward.kind or scorer.data_type or "math")


def by_category(shares: Sequence[tuple[Task, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Tasks, accuracy and standard error for each value of each category that the data set has, 2 to 50 values.

    `shares` holds every task with the share of its responses that are right.
    """
    found = {}
    for name in CATEGORY_FIELDS:
        parts: dict[str, list[float]] = defaultdict(list)
        for task, share in shares:
            if isinstance(value := task.record.get(name), (str, int)):
                parts[str(value)].append(share)
        if 2 <= len(parts) <= 50:
            found[name] = {}
            for value, part in sorted(parts.items()):
                accuracy, error = mean_and_error(part)
                found[name][value] = {"tasks": len(part), "accuracy": accuracy, "standard_error": error}
    return found


# --- tables


def write_results(folder: Path, results: Mapping[str, Evaluation], fingerprint: Fingerprint) -> None:
    """Write results.json (every figure, by setting) and results.md (tables and what they depend on)."""
    rows = {name: results_row(result) for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (folder / "results.md").write_text(results_page(results, fingerprint), encoding="utf-8")


def table_rows(results: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """One row of readable figures for each setting."""
    rows = []
    for result in results.values():
        row: dict[str, Any] = {
            "setting": result.setting,
            "tasks": result.tasks,
            "responses": result.responses,
            "accuracy": f"{100 * result.accuracy:.1f} % ± {100 * result.standard_error:.1f}",
        }
        if result.unanswered:
            row["unanswered, counted as wrong"] = result.unanswered
        row |= {f"pass@{k}": f"{100 * value:.1f} %" for k, value in result.pass_at.items()}
        row |= {f"majority@{k}": f"{100 * value:.1f} %" for k, value in result.majority_at.items()}
        row |= {
            "response_length": round(result.response_length, 1),
            "truncated": f"{100 * result.truncated:.1f} %",
            "tokens_per_forward": round(result.tokens_per_forward, 3),
            "tokens_per_second": round(result.tokens_per_second, 1),
        }
        rows.append(row)
    return rows


def results_page(results: Mapping[str, Evaluation], fingerprint: Fingerprint) -> str:
    """Markdown: all settings, accuracy by category, the fingerprint."""
    model, data, prompts = fingerprint["model"], fingerprint["data"], fingerprint["prompts"]
    parts = [
        f"# {model['name']} on {data['name']}",
        markdown_table(table_rows(results)),
        "Accuracy ± one standard error, clustered by task. pass@k is the unbiased estimate; majority@k is the mean "
        "over subsets of k responses. tokens_per_forward counts denoising forwards.",
    ]
    first = next(iter(results.values()))
    for name, values in first.categories.items():
        rows = []
        for value, figures in values.items():
            row: dict[str, Any] = {name: value, "tasks": figures["tasks"]}
            for setting, result in results.items():
                figures = result.categories[name][value]
                row[setting] = f"{100 * figures['accuracy']:.1f} % ± {100 * figures['standard_error']:.1f}"
            rows.append(row)
        parts += [f"## By {name}", markdown_table(rows)]
    weights = {file: digest for file, digest in model["files"].items() if file.endswith(".safetensors")}
    facts = {
        "id": fingerprint["id"],
        "model": ", ".join(f"{file} {digest[:12]}" for file, digest in weights.items()),
        "family, dtype, device": f"{model['family']}, {model['dtype']}, {fingerprint['device']}",
        "data": f"{data['tasks']} tasks, {data['sha256'][:12]}",
        "prompts": f"{prompts['sha256'][:12]}, template {json.dumps(prompts['template'])}",
        "seed": fingerprint["seed"],
        "versions": ", ".join(f"{package} {version}" for package, version in fingerprint["versions"].items()),
    }
    parts += ["## Fingerprint", markdown_table([{"what": key, "value": value} for key, value in facts.items()])]
    parts += ["Settings in full: fingerprint.json. Every response: samples.jsonl."]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which keys first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


# --- traces


def notable(responses: Iterable[ScoredTrajectory]) -> list[ScoredTrajectory]:
    """The responses for the trace page: the first right ones, then the first others; without a trace none."""
    traced = [response for response in responses if response.trajectory.step_map]
    right = [response for response in traced if response.score.correct]
    wrong = [response for response in traced if not response.score.correct]
    return right[:SHOWN] + wrong[:SHOWN]


def trace_of_response(loaded: LoadedModel, response: ScoredTrajectory, block_size: int, setting: str = "") -> Trace:
    """What the trace page shows of a scored response."""
    task, trajectory = response.task, response.trajectory
    name = f"{setting} {task.id} · {trajectory.sample + 1}".strip()
    reference = task.ground_truth_answer or ""
    puzzle = task.record.get("puzzle")
    return trace_of(loaded, trajectory, block_size, name, setting, response.score.verdict, reference, puzzle)
