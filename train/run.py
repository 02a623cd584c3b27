"""A run of either trainer: its folder and records, its held-out tasks, its checkpoints, and how it is stopped.

`rl_trainer` and `sft_trainer` add what differs: the step, what is measured between steps, and the results.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common import ranks
from common.checkpoint import Writer, newest_step, save_step, step_folders, write_folder, write_whole
from common.config import dump_config, settings_of
from common.config_files import flatten
from common.errors import UserError, show
from common.jobs import RLConfig, SFTConfig
from common.metrics import MetricsLog, open_metrics
from common.runtime import console, prepare_run_folder, seed_everything
from common.schema import EvalDatasetConfig
from common.stop import Stopped, watched
from common.trajectory import Task
from models import LoadedModel, load_network
from models.value import load_value
from reward.score import RewardScorer, check_tasks, evaluation_scorer
from rollout.carry import Group, write_groups
from rollout.evaluate import evaluate
from rollout.results import Evaluation
from sample.engine import Engine
from train.learner import Learner, make_accelerator, whole_networks
from train.learner_state import (
    load_learner,
    load_random_state,
    save_learner,
    save_random_state,
    write_adapter,
    write_network,
)
from train.loading import mixed_precision

CARRIED = "carried.pt"  # in a checkpoint


@dataclass
class Progress:
    """How far a run is: what trainer.json of its checkpoints holds. Each trainer adds what it needs to go on."""

    step: int = 0  # RL steps, or updates of finetuning, done


@dataclass(frozen=True)
class HeldOut:
    """Tasks on which a run's model is measured, by their own answers, whatever gives the rewards."""

    tasks: list[Task]
    scorer: RewardScorer
    dataset: EvalDatasetConfig  # how prompts are worded


@dataclass(kw_only=True)
class Run:
    """What lives through a run of either trainer."""

    config: RLConfig | SFTConfig
    folder: Path
    metrics: MetricsLog
    checkpoint: Path | None  # the newest whole one that the folder held at the start: the run goes on from it
    progress: Progress
    held_out: HeldOut
    loaded: LoadedModel  # what draws; the learner's own network, or a copy
    learner: Learner  # of the policy
    critic: Learner | None = None  # of the value model
    unit: str = "step"  # what progress.step counts, in words
    carried: list[Group] = field(default_factory=list)  # groups of responses that go on in the next RL step


# --- before the first step


def begin(config: RLConfig | SFTConfig) -> None:
    """Seed, and join the other ranks: before any network, for ZeRO-3 shards networks as they are loaded."""
    seed_everything(config.training.seed)
    make_accelerator(mixed_precision(config.model.dtype))


def held_out_tasks(
    config: RLConfig | SFTConfig, tasks: list[Task], key: str, judged_as: str, worded_as: str
) -> HeldOut:
    """The first `evaluation.num_task` of the tasks of `key`; UserError where one cannot be judged.

    The data types say how responses are judged and what instruction stands around a prompt.
    """
    tasks = tasks[: config.evaluation.num_task or None]
    scorer = evaluation_scorer(config.reward, judged_as)
    check_tasks(scorer, tasks, key)
    return HeldOut(tasks, scorer, dataclasses.replace(config.dataset, data_type=worded_as))


def make_folder(config: RLConfig | SFTConfig) -> Path:
    """The run's folder. An older run there is moved aside, so all that can be a mistake comes before."""
    experiment = config.experiment
    return prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)


def open_records(config: RLConfig | SFTConfig, folder: Path) -> tuple[MetricsLog, Path | None, dict[str, Any]]:
    """Write config.yaml and open the metrics; returns these, the newest whole checkpoint, and its trainer.json.

    What was logged after that checkpoint is dropped: it is logged again. Keys that are others than before are said.
    """
    experiment = config.experiment
    checkpoints = [] if experiment.start_from_scratch else step_folders(folder / "ckpt")
    step, checkpoint = checkpoints[-1] if checkpoints else (-1, None)
    if ranks.is_main():
        file, content = folder / "config.yaml", dump_config(config)
        if checkpoint is not None and file.is_file():
            say_changes(file.read_text(), content)
        write_whole(file, content)
    resume_step = None if experiment.start_from_scratch else step
    metrics = open_metrics(folder, experiment.trackers, experiment.project, dataclasses.asdict(config), resume_step)
    state = {} if checkpoint is None else json.loads((checkpoint / "trainer.json").read_text())
    return metrics, checkpoint, state


def say_changes(before: str, now: str) -> None:
    """Say which keys of a run that goes on are others than they were; both configs as config.yaml holds them."""
    old, new = (flatten(yaml.safe_load(text) or {}) for text in (before, now))
    del new["experiment.start_from_scratch"]
    changed = [f"{key}={show(new[key])} (was {show(old[key])})" for key in new if key in old and old[key] != new[key]]
    if changed:
        console.print(f"goes on under other keys than it began with: {', '.join(changed)}")


# --- measuring


def evaluate_held_out(
    run: Run, engine: Engine, loaded: LoadedModel, samples_file: Path | None = None
) -> tuple[dict[str, Evaluation], dict[str, float]]:
    """Accuracy on the held-out tasks under each evaluation setting, whole and as figures of metrics.jsonl."""
    config, held_out = run.config, run.held_out
    results = evaluate(
        engine,
        loaded,
        held_out.tasks,
        settings_of(config.evaluation.at_step(max(run.progress.step, 1))),
        held_out.scorer,
        held_out.dataset,
        config.evaluation.max_prompt_len,
        config.training.seed,
        samples_file=samples_file,
        step=run.progress.step,
    )
    figures = {f"eval/{name}/accuracy": result.accuracy for name, result in results.items()}
    figures |= {f"eval/{name}/tokens_per_forward": result.tokens_per_forward for name, result in results.items()}
    return results, figures


# --- checkpoints


def save(run: Run) -> None:
    """A checkpoint from which the run goes on as if it had not stopped. All ranks must call it."""

    def write(writer: Writer) -> None:
        write_network(run.learner, run.loaded.tokenizer, writer, "model")
        save_learner(run.learner, writer, "learner")
        if run.critic is not None:
            write_network(run.critic, run.loaded.tokenizer, writer, "value")
            save_learner(run.critic, writer, "critic")
        save_random_state(writer, "random.pt")
        if run.carried:
            writer.do(write_groups, writer.path(CARRIED), run.carried, run.config.rollout)
        writer.do(writer.path("trainer.json").write_text, json.dumps(vars(run.progress)))

    save_step(run.folder / "ckpt", run.progress.step, write, run.config.experiment.keep_last)


def resume(run: Run) -> None:
    """Take up `run.checkpoint`, if there is one; also one by another number of ranks. All ranks must call it."""
    folder, family = run.checkpoint, run.config.model.model_base
    if folder is None:
        return
    if run.critic is not None and not (folder / "critic").exists():
        raise UserError(
            f"model.value_base_model is set, but {folder} holds no value model: the run was started without one; "
            "give another experiment.project, or experiment.start_from_scratch=True"
        )
    with whole_networks(run.learner.accelerator):
        load_learner(run.learner, folder / "learner", load_network(folder / "model", family).state_dict())
        if run.critic is not None:
            load_learner(run.critic, folder / "critic", load_value(folder / "value", family).state_dict())
    if (folder / "random.pt").exists():  # finetuning did not always write it, and does without
        load_random_state(folder / "random.pt")
    console.print(f"resumed from {folder} after {run.unit} {run.progress.step}")


def export(run: Run) -> Path:
    """The trained model in the family's own format, and adapters and value model beside it; returns its folder.

    All ranks must call it.
    """
    model_config, folder, tokenizer = run.config.model, run.folder / "ckpt", run.loaded.tokenizer
    target = folder / model_config.optimized_name
    write_folder(target, lambda writer: write_network(run.learner, tokenizer, writer))
    write_adapter(run.learner, model_config, folder)
    if run.critic is not None:
        value = folder / model_config.optimized_value_name
        write_folder(value, lambda writer: write_network(run.critic, tokenizer, writer))
    return target


# --- the end


@contextlib.contextmanager
def until_stopped(run: Run) -> Iterator[None]:
    """Within it a rank that hangs is reported. Where the run is stopped, what is done is saved, and Stopped goes on."""
    file = run.folder / f"hang-rank-{ranks.rank()}.txt"
    with watched(run.config.experiment.hang_timeout, file, ranks.rank()):
        try:
            yield
        except Stopped:
            if run.progress.step > 0 and newest_step(run.folder) < run.progress.step:
                save(run)
            run.metrics.close()
            console.print(f"stopped after {run.unit} {run.progress.step}")
            raise
