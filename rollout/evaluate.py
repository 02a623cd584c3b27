"""Evaluation: every task answered under each of several settings and counted. `main` is what eval.py runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common.config import dump_config, settings_of
from common.errors import UserError
from common.jobs import EvalConfig
from common.metrics import print_table
from common.ranks import is_main, join, wait_for_all, world
from common.runtime import Stopwatch, console, device_and_dtype, prepare_run_folder, seed_everything
from common.schema import EvalDatasetConfig, TaskSampling
from common.trajectory import ScoredTrajectory, Task
from data.tasks import load_tasks
from models import LoadedModel, load_model
from models.defaults import take_defaults
from models.files import told_as
from reward.score import RewardScorer, check_tasks, make_scorer
from rollout.collect import Prompt, check_questions, collect, encode_tasks, prompts_within, say_unread_words
from rollout.fingerprint import check_resumable, fingerprint_of
from rollout.results import Evaluation, answer_reader, notable, summarize, table_rows, trace_of_response, write_results
from rollout.samples import take_up, write_samples
from sample.engine import Engine
from sample.parallel import shard
from sample.traces import write_trace_page


@told_as("model", "model_base")
def main(
    config: EvalConfig, load: Callable[[EvalConfig], tuple[LoadedModel, Engine]] | None = None
) -> dict[str, Evaluation]:
    """Evaluate; results.json, results.md, fingerprint.json, samples.jsonl and trace.html lie in runs/<project>/.

    `load` makes another engine than one in this process. All ranks must call it; the first one writes.
    """
    seed_everything(config.seed)
    tasks = load_tasks(config.dataset.eval_dataset, key="dataset.eval_dataset")[: config.rollout.num_task or None]
    scorer = make_scorer(config.reward, config.dataset.data_type)
    check_tasks(scorer, tasks, "dataset.eval_dataset")
    loaded, engine = (load or load_here)(config)
    take_defaults(config, loaded)
    settings = name_settings(settings_of(config.rollout))
    check_questions(loaded, tasks, "dataset.eval_dataset")
    prompts = encode_tasks(loaded, tasks, config.dataset, config.rollout.start_with_think)
    say_unread_words(loaded, prompts[0])
    fingerprint = fingerprint_of(config, loaded, prompts, settings)

    experiment = config.experiment
    folder = prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)
    samples_file = folder / "samples.jsonl"
    check_resumable(folder, fingerprint)
    wait_for_all()  # all have read the fingerprint that was there
    if is_main():
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "fingerprint.json").write_text(json.dumps(fingerprint, indent=2, ensure_ascii=False))
    known = {} if experiment.start_from_scratch else take_up(samples_file, tasks, step=0)

    results, traces = {}, []
    limit, seed = config.max_prompt_len, config.seed
    for name, setting in settings.items():
        before = known.pop(name, {})
        results[name], responses = evaluate_setting(
            engine, loaded, prompts, name, setting, scorer, limit, seed, samples_file, known=before
        )
        if is_main():
            traces += [trace_of_response(loaded, one, setting.block_size, name) for one in notable(responses)]

    if is_main():
        title = f"{config.model} on {config.dataset.eval_dataset}"
        write_results(folder, results, fingerprint)
        if traces:
            write_trace_page(folder / "trace.html", traces, title, f"fingerprint {fingerprint['id']}")
        print_table(table_rows(results), title=title)
        files = "results.md, results.json, samples.jsonl, fingerprint.json" + (", trace.html" if traces else "")
        console.print(f"written: {folder}/{files}; fingerprint {fingerprint['id']}")
    return results


def load_here(config: EvalConfig) -> tuple[LoadedModel, Engine]:
    """The config's model, and an engine over it in this process; ranks may hold one model together."""
    join()
    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base, dtype, device)
    shard(loaded.model, config.rollout.tensor_parallel_size)
    return loaded, Engine(loaded.model, loaded.mask_id, loaded.stop_ids)


def evaluate(
    engine: Engine,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    settings: Sequence[TaskSampling],
    scorer: RewardScorer,
    dataset: EvalDatasetConfig,
    max_prompt_len: int,
    seed: int,
    samples_file: Path | None = None,
    step: int = 0,
) -> dict[str, Evaluation]:
    """Accuracy and cost under each setting, by the setting's name; every response is appended to `samples_file`.

    `step` says there after how many steps of training. All settings share one prompt: they differ in how they unmask.
    """
    prompts = encode_tasks(loaded, tasks, dataset, settings[0].start_with_think)
    results = {}
    for name, setting in name_settings(settings).items():
        results[name], _ = evaluate_setting(
            engine, loaded, prompts, name, setting, scorer, max_prompt_len, seed, samples_file, step
        )
    return results


def evaluate_setting(
    engine: Engine,
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    name: str,
    setting: TaskSampling,
    scorer: RewardScorer,
    max_prompt_len: int,
    seed: int,
    samples_file: Path | None = None,
    step: int = 0,
    known: Mapping[tuple[str, int], ScoredTrajectory] | None = None,
) -> tuple[Evaluation, list[ScoredTrajectory]]:
    """The figures of one setting, and its responses: those `known` before, then the others as they were scored.

    A task that cannot be answered, for its length, is said and counts as wrong. UserError if that is every task.
    Draws depend on (seed, task, sample) alone, so two models or two moments are compared under the same numbers.
    """
    short = prompts_within(prompts, max_prompt_len)
    if not short:
        raise UserError(f"max_prompt_len: every prompt of the evaluation is longer than {max_prompt_len}; raise it")
    drawn: list[ScoredTrajectory] = []

    def keep(response: ScoredTrajectory) -> None:
        drawn.append(response)
        if samples_file is not None:
            write_samples(samples_file, [[response]], {"step": step, "setting": name})

    known = known or {}
    groups = collect(engine, loaded, short, setting, scorer, Stopwatch(), seed, 0, f"evaluate {name}", known, keep)
    answered = {group[0].task.id for group in groups}
    unanswered = [task for task, _ in prompts if task.id not in answered]
    if unanswered:
        console.print(f"{len(unanswered)} of {len(prompts)} tasks have no response and count as wrong")
    seconds = sum(response.seconds for response in drawn) * engine.tensor_group / world()
    tokens = sum(response.trajectory.length for response in drawn)
    return summarize(name, groups, seconds, answer_reader(scorer), tokens, unanswered), [*known.values(), *drawn]


def name_settings(settings: Sequence[TaskSampling]) -> dict[str, TaskSampling]:
    """A short name for each setting: its strategy and, where that is not enough, whatever else tells them apart."""
    rows = [asdict(setting) for setting in settings]
    names = [row["remasking_strategy"].removeprefix("low_confidence_") for row in rows]
    if len(set(names)) < len(names):
        others = [key for key in rows[0] if key != "remasking_strategy"]
        differing = [key for key in others if len({str(row[key]) for row in rows}) > 1]
        names = ["-".join([name, *(f"{key}={row[key]}" for key in differing)]) for name, row in zip(names, rows)]
    return dict(zip(names, settings))
