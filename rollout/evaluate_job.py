"""What eval.py runs: a model's accuracy under every setting of its config, with each response on disk."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from common.config import dump_config, settings_of
from common.metrics import print_table
from common.runtime import console, device_and_dtype, prepare_run_folder, seed_everything
from common.schema import EvalConfig
from data.tasks import load_tasks
from models import LoadedModel, load_model
from reward.score import make_scorer
from rollout.evaluate import Evaluation, evaluate
from sample.engine import Engine


def main(
    config: EvalConfig, load: Callable[[EvalConfig], tuple[LoadedModel, Engine]] | None = None
) -> dict[str, Evaluation]:
    """Evaluate; results.json and samples.jsonl lie in runs/<project>/. `load` makes another engine than one here."""
    seed_everything(config.seed)
    tasks = load_tasks(config.dataset.eval_dataset, key="dataset.eval_dataset")[: config.rollout.num_task or None]
    scorer = make_scorer(config.reward, config.dataset.data_type)
    loaded, engine = (load or load_here)(config)
    experiment = config.experiment
    folder = prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)
    (folder / "config.yaml").write_text(dump_config(config))
    results = evaluate(
        engine,
        loaded,
        tasks,
        settings_of(config.rollout),
        scorer,
        config.dataset,
        config.max_prompt_len,
        config.seed,
        samples_file=folder / "samples.jsonl",
    )
    rows = {name: dataclasses.asdict(result) for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(rows, indent=2))
    print_table([round_row(row) for row in rows.values()], title=f"{config.model} on {config.dataset.eval_dataset}")
    console.print(f"written: {folder}/results.json, samples.jsonl")
    return results


def load_here(config: EvalConfig) -> tuple[LoadedModel, Engine]:
    """The config's model, and an engine over it in this process."""
    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base, dtype, device)
    return loaded, Engine(loaded.model, loaded.mask_id, loaded.stop_ids)


def round_row(row: dict) -> dict:
    """Figures as they are read: shares in percent, the rest to three digits."""
    percent = ("accuracy", "standard_error", "truncated")
    shown = {key: f"{100 * row[key]:.1f} %" if key in percent else row[key] for key in row}
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in shown.items()}
