"""Evaluation: every task answered under each of several settings, counted, and written down."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.boxed import extract_boxed
from common.errors import UserError
from common.ranks import from_main, is_main, world
from common.runtime import Stopwatch, console
from common.schema import EvalDatasetConfig, TaskSampling
from common.trajectory import ScoredTrajectory, Task
from models import LoadedModel
from reward.general_reward import extract_answer
from reward.score import RewardScorer
from rollout.collect import Scorer, collect, prompts_within
from rollout.samples import append_sample, drop_torn_lines, known_rollouts, sample_line
from rollout.statistics import majority_at_k, mean_and_error, pass_at_k, shown_ks
from sample.engine import Engine

# Fields of a task's record by which accuracy is told apart, where a data set has them.
CATEGORY_FIELDS = ("level", "subject", "category", "type", "difficulty")
# How two responses are seen to give the same answer, for majority@k; kinds that are absent have no vote.
ANSWERS: dict[str, Callable[[str], str | None]] = {"math": extract_boxed, "general": extract_answer}


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


def evaluate(
    engine: Engine,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    settings: Sequence[TaskSampling],
    scorer: Scorer,
    dataset: EvalDatasetConfig,
    max_prompt_len: int,
    seed: int,
    samples_file: Path | None = None,
    step: int = 0,
    resume: bool = False,
) -> dict[str, Evaluation]:
    """Accuracy and cost under each setting, by the setting's name; every response is appended to `samples_file`.
    `step` says there after how many steps of training; with `resume` the responses that it holds are not drawn again.
    A task that cannot be answered, for its length, is said and counts as wrong. UserError if that is every task.

    Draws depend on (seed, task, sample) alone, so two models or two moments are compared under the same numbers.
    """
    if resume and samples_file is not None and samples_file.is_file():
        drop_torn_lines(samples_file)
    results = {}
    for name, setting in name_settings(settings).items():
        prompts = prompts_within(loaded, tasks, dataset, setting, max_prompt_len)
        if not prompts:
            raise UserError(f"max_prompt_len: every prompt of the evaluation is longer than {max_prompt_len}; raise it")

        def keep(rollout: ScoredTrajectory, name: str = name) -> None:
            if samples_file is not None:
                append_sample(samples_file, sample_line(rollout, {"step": step, "setting": name}))

        known = {}
        if resume and samples_file is not None and from_main(samples_file.is_file()):
            known = from_main(
                known_rollouts(samples_file, tasks, name, step) if is_main() else {}
            )  # before the first rank adds to it
        groups = collect(
            engine,
            loaded,
            prompts,
            setting,
            scorer,
            Stopwatch(),
            seed,
            description=f"evaluate {name}",
            known=known,
            keep=keep,
        )
        answered = {group[0].task.id for group in groups}
        unanswered = [task for task in tasks if task.id not in answered]
        if unanswered:
            console.print(f"{len(unanswered)} of {len(tasks)} tasks have no response and count as wrong")
        drawn = [one for group in groups for one in group if (one.task.id, one.trajectory.sample) not in known]
        seconds = sum(rollout.seconds for rollout in drawn) * engine.tensor_group / world()
        tokens = sum(rollout.trajectory.length for rollout in drawn)
        results[name] = summarize(name, groups, seconds, answer_of(scorer), tokens, unanswered)
    return results


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
    rollouts = [rollout for group in groups for rollout in group]
    shares = [(group[0].task, sum(one.score.correct for one in group) / len(group)) for group in groups]
    shares += [(task, 0.0) for task in unanswered]
    mean, error = mean_and_error([share for _, share in shares])
    answered = len(groups) / len(shares)
    tokens = sum(rollout.trajectory.length for rollout in rollouts)
    return Evaluation(
        setting=name,
        tasks=len(shares),
        responses=len(rollouts),
        accuracy=mean,
        standard_error=error,
        tokens_per_forward=tokens_per_forward(rollouts),
        response_length=tokens / len(rollouts),
        truncated=sum(rollout.trajectory.finish_reason == "length" for rollout in rollouts) / len(rollouts),
        tokens_per_second=(tokens if drawn is None else drawn) / seconds if seconds else 0.0,
        unanswered=len(unanswered),
        pass_at={k: answered * value for k, value in pass_at(groups).items()},
        majority_at={k: answered * value for k, value in majority_at(groups, answer).items()} if answer else {},
        categories=by_category(shares),
    )


def pass_at(groups: Sequence[Sequence[ScoredTrajectory]]) -> dict[int, float]:
    """Unbiased pass@k, mean over tasks, for k = 2, 4, 8, … and all responses."""
    counts = [(len(group), sum(rollout.score.correct for rollout in group)) for group in groups]
    ks = shown_ks(min(number for number, _ in counts))
    return {k: sum(pass_at_k(number, correct, k) for number, correct in counts) / len(counts) for k in ks}


def majority_at(groups: Sequence[Sequence[ScoredTrajectory]], answer: Callable[[str], str | None]) -> dict[int, float]:
    """majority@k, mean over tasks, for the same k."""
    found: dict[int, float] = {}
    for k in shown_ks(min(map(len, groups))):
        votes = [
            majority_at_k([_plain(answer(r.trajectory.text)) for r in group], [r.score.correct for r in group], k)
            for group in groups
        ]
        found[k] = sum(votes) / len(votes)
    return found


def by_category(shares: Sequence[tuple[Task, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Tasks, accuracy and standard error for each value of each category that the data set has, 2 to 50 values.

    `shares` holds every task with the share of its responses that are right.
    """
    found = {}
    for name in CATEGORY_FIELDS:
        parts: dict[str, list[float]] = defaultdict(list)
        for task, share in shares:
            value = task.record.get(name)
            if isinstance(value, (str, int)):
                parts[str(value)].append(share)
        if 2 <= len(parts) <= 50:
            figures = {value: (len(part), *mean_and_error(part)) for value, part in sorted(parts.items())}
            keys = ("tasks", "accuracy", "standard_error")
            found[name] = {value: dict(zip(keys, numbers)) for value, numbers in figures.items()}
    return found


def answer_of(scorer: Scorer) -> Callable[[str], str | None] | None:
    """How the scorer's kind of task reads an answer from a text; None where answers are programs, or the user's own."""
    if not isinstance(scorer, RewardScorer) or scorer.reward.function:
        return None
    return ANSWERS.get(scorer.reward.kind or scorer.data_type or "math")


def _plain(answer: str | None) -> str | None:
    return "".join(answer.split()).casefold() or None if answer else None


def tokens_per_forward(rollouts: Sequence[ScoredTrajectory]) -> float:
    """Response tokens, through the stop token, over denoising steps (TPF)."""
    return sum(r.trajectory.length for r in rollouts) / sum(r.trajectory.steps for r in rollouts)


def name_settings(settings: Sequence[TaskSampling]) -> dict[str, TaskSampling]:
    """A short name for each setting: its strategy and, where that is not enough, whatever else tells them apart."""
    rows = [asdict(setting) for setting in settings]
    names = [row["remasking_strategy"].removeprefix("low_confidence_") for row in rows]
    if len(set(names)) < len(names):
        differing = [key for key in rows[0] if len({str(row[key]) for row in rows}) > 1]
        differing = [key for key in differing if key != "remasking_strategy"]
        names = ["-".join([name, *(f"{key}={row[key]}" for key in differing)]) for name, row in zip(names, rows)]
    return dict(zip(names, settings))
