"""Before the first step: what the config names is checked and loaded."""

import copy
import dataclasses
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.checkpoint import newest_step
from common.config import dump_config
from common.errors import UserError
from common.metrics import MetricsLog, open_metrics
from common.ranks import is_main
from common.runtime import Stopwatch, device_and_dtype, prepare_run_folder, seed_everything
from common.schema import RLConfig
from common.trajectory import Task
from data.tasks import load_tasks
from models import LoadedModel, load_model, load_network
from models.defaults import take_defaults
from models.lora import add_lora
from models.value import load_value
from reward.score import RewardScorer, check_tasks, evaluation_scorer, make_scorer
from rollout.report import RunPage
from sample.engine import Engine
from sample.parallel import shard
from train.learner import Learner, make_accelerator, make_learner, whole_networks
from train.network import Critic, Policy
from train.views import view_method


@dataclasses.dataclass
class Run:
    """All that lives through the run."""

    config: RLConfig
    folder: Path
    loaded: LoadedModel  # the engine's network: the learner's own where precision allows
    engine: Engine
    learner: Learner
    reference: Learner | None
    critic: Learner | None  # the value model
    tasks: list[Task]
    eval_tasks: list[Task]
    scorer: RewardScorer
    eval_scorer: RewardScorer
    metrics: MetricsLog
    stages: Stopwatch  # seconds by stage of the whole run
    page: RunPage
    cursor: int = 0  # place in the endless sequence of shuffled tasks
    step: int = 0  # RL steps done


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run reads before any network: tasks, and the function that scores answers to them."""

    tasks: list[Task]
    eval_tasks: list[Task]
    scorer: RewardScorer
    eval_scorer: RewardScorer  # by the tasks' own answers, whatever gives the rewards


def read_inputs(config: RLConfig) -> Inputs:
    """Load what the config names beside models; UserError for a mistake in it."""
    tasks = load_tasks(config.dataset.train_dataset, key="dataset.train_dataset")
    eval_name = config.evaluation.eval_dataset or config.dataset.eval_dataset
    eval_tasks = load_tasks(eval_name, key="evaluation.eval_dataset")[: config.evaluation.num_task or None]
    if config.rollout.num_task_per_step > len(tasks):
        raise UserError(
            f"rollout.num_task_per_step: {config.rollout.num_task_per_step} is more than the {len(tasks)} tasks "
            f"of dataset.train_dataset {config.dataset.train_dataset}"
        )
    scorer = make_scorer(config.reward, config.dataset.data_type)
    check_tasks(scorer, tasks, "dataset.train_dataset")
    kind = None if config.reward.kind == "judge" else config.reward.kind
    eval_scorer = evaluation_scorer(config.reward, config.evaluation.data_type or kind or config.dataset.data_type)
    check_tasks(eval_scorer, eval_tasks, "evaluation.eval_dataset")
    view_method(config.training.method)
    return Inputs(tasks, eval_tasks, scorer, eval_scorer)


def set_up(config: RLConfig, inputs: Inputs, stages: Stopwatch) -> Run:
    """Load the networks, and open the run's folder and its records."""
    with stages("load"):
        seed_everything(config.training.seed)
        loaded, learner, reference = load_networks(config)
        take_defaults(config, loaded)
        critic = load_critic(config)
        experiment = config.experiment
        # last, so that a mistake above leaves an older run where it is
        folder = prepare_run_folder(experiment.runs_dir, experiment.project, experiment.start_from_scratch)
        if is_main():
            (folder / "rollouts").mkdir(exist_ok=True)
            (folder / "config.yaml").write_text(dump_config(config))
        engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
        resume_step = None if experiment.start_from_scratch else newest_step(folder)
        metrics = open_metrics(
            folder, experiment.trackers, experiment.project, dataclasses.asdict(config), resume_step=resume_step
        )
    return Run(
        config=config,
        folder=folder,
        loaded=loaded,
        engine=engine,
        learner=learner,
        reference=reference,
        critic=critic,
        tasks=inputs.tasks,
        eval_tasks=inputs.eval_tasks,
        scorer=inputs.scorer,
        eval_scorer=inputs.eval_scorer,
        metrics=metrics,
        stages=stages,
        page=RunPage(folder, loaded, config.rollout.block_size, experiment.total_step),
    )


def load_networks(config: RLConfig) -> tuple[LoadedModel, Learner, Learner | None]:
    """The engine's network, the learner, and the frozen first model where the KL refers to it.

    The learner's weights are float32, or sharded; the engine's network is the same one, or a copy in its dtype, which
    is whole or divided over `rollout.tensor_parallel_size` ranks.
    """
    names, (device, dtype) = config.model, device_and_dtype(config.model.dtype)
    accelerator = make_accelerator(mixed_precision(dtype))  # before any network: ZeRO-3 shards it as it is loaded
    trained = load_model(names.pretrained_model, names.model_base, torch.float32, device)
    if names.lora.r:
        add_lora(trained.model, names.lora)
    if config.training.gradient_checkpointing_enable:
        trained.model.gradient_checkpointing_enable()
    updates = config.experiment.total_step * config.training.updates_per_step
    policy = Policy(trained.model, trained.mask_id)
    learner = make_learner(
        policy, config.optimizer.params, config.lr_scheduler, updates, config.training, mixed_precision(dtype)
    )

    def copy_of_first() -> PreTrainedModel:
        with whole_networks(accelerator):
            return load_network(names.pretrained_model, names.model_base, dtype, device)

    loaded, reference, tensor_group = trained, None, config.rollout.tensor_parallel_size
    if learner.sharded or names.lora.r or tensor_group > 1 or next(trained.model.parameters()).dtype != dtype:
        loaded = dataclasses.replace(trained, model=copy_of_first())
        shard(loaded.model, tensor_group)
    if config.training.kl_reference == "initial":
        first = Policy(copy_of_first(), trained.mask_id) if learner.deepspeed else copy.deepcopy(learner.network)
        reference = dataclasses.replace(learner, network=first.requires_grad_(False), deepspeed=None)
    return loaded, learner, reference


def load_critic(config: RLConfig) -> Learner | None:
    """The value model with an optimizer of its own, where the config names one."""
    if not config.model.value_base_model:
        return None
    device, dtype = device_and_dtype(config.model.dtype)
    value = load_value(config.model.value_base_model, config.model.model_base, torch.float32, device)
    if config.training.gradient_checkpointing_enable:
        value.network.gradient_checkpointing_enable()
    params = config.optimizer.params
    return make_learner(
        Critic(value),
        params,
        config.lr_scheduler,
        config.experiment.total_step // config.experiment.train_value_every * config.training.updates_per_step,
        config.training,
        mixed_precision(dtype),
        params.value_learning_rate,
    )


def mixed_precision(dtype: torch.dtype) -> str:
    """Accelerate's word for the arithmetic of float32 weights in that dtype."""
    return "bf16" if dtype == torch.bfloat16 else "no"
