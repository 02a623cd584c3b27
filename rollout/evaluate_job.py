"""What eval.py runs: a model's accuracy under every setting of its config, with each response on disk."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.config import dump_config, settings_of
from common.metrics import print_table
from common.ranks import is_main, join, wait_for_all
from common.runtime import console, device_and_dtype, prepare_run_folder, seed_everything
from common.schema import EvalConfig, Sampling
from common.trajectory import Task
from data.tasks import load_tasks
from models import LoadedModel, load_model
from models.defaults import take_defaults
from reward.score import check_tasks, make_scorer
from rollout.evaluate import Evaluation, evaluate, name_settings
from rollout.fingerprint import Fingerprint, check_resumable, fingerprint_of
from rollout.results import table_rows, write_results
from rollout.show import write_evaluation_traces
from sample.engine import Engine
from sample.parallel import shard


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
    settings = settings_of(config.rollout)
    named = name_settings(settings)
    experiment = config.experiment
    folder = prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)
    about = fingerprint_of(config, loaded, tasks, named)
    check_resumable(folder, about)
    wait_for_all()  # all have read the fingerprint that was there
    if is_main():
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "fingerprint.json").write_text(json.dumps(about, indent=2, ensure_ascii=False))
    results = evaluate(
        engine,
        loaded,
        tasks,
        settings,
        scorer,
        config.dataset,
        config.max_prompt_len,
        config.seed,
        samples_file=folder / "samples.jsonl",
        resume=not experiment.start_from_scratch,
    )
    if is_main():
        write_pages(config, folder, loaded, tasks, named, results, about)
    return results


def write_pages(
    config: EvalConfig,
    folder: Path,
    loaded: LoadedModel,
    tasks: Sequence[Task],
    named: Mapping[str, Sampling],
    results: dict[str, Evaluation],
    about: Fingerprint,
) -> None:
    """Write the figures and some responses, and print the table."""
    write_results(folder, results, about)
    title = f"{config.model} on {config.dataset.eval_dataset}"
    samples_file, page = folder / "samples.jsonl", folder / "trace.html"
    shown = write_evaluation_traces(page, samples_file, loaded, tasks, named, title, f"fingerprint {about['id']}")
    print_table(table_rows(results), title=title)
    files = "results.md, results.json, samples.jsonl, fingerprint.json" + (", trace.html" if shown else "")
    console.print(f"written: {folder}/{files}; fingerprint {about['id']}")


def load_here(config: EvalConfig) -> tuple[LoadedModel, Engine]:
    """The config's model, and an engine over it in this process; ranks may hold one model together."""
    join()
    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base, dtype, device)
    shard(loaded.model, config.rollout.tensor_parallel_size)
    return loaded, Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
