"""Every job and its config, a class made of sections, which `common.config.load_config` fills.

`faults` of a job says which values do not go together.
"""

# ruff: noqa: RUF009 — `key` and `section` make fields, which is what dataclass defaults are for

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from common.keys import key, section
from common.schema import (
    ATTENTION,
    FAMILIES_HELP,
    LONG_TASKS,
    NEEDS,
    DatasetConfig,
    Dtype,
    EvalDatasetConfig,
    EvalExperimentConfig,
    EvalRolloutConfig,
    EvaluationConfig,
    ExperimentConfig,
    Kind,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RLMethod,
    RLModelConfig,
    RLOptimizerConfig,
    RLRewardConfig,
    RLTrainingConfig,
    RolloutConfig,
    Sampling,
    SchedulerConfig,
    ScoringConfig,
    SFTDatasetConfig,
    SFTEvaluationConfig,
    SFTExperimentConfig,
    SFTTrainingConfig,
    TaskSampling,
    TrainingBase,
)


class JobConfig:
    """What every job's config has beside its keys."""

    # The keys that YAML or the command line set; the model may set others. None: made in Python, all are as meant.
    written: ClassVar[frozenset[str] | None] = None

    def faults(self) -> Iterator[str]:
        """Values that are each good but not together, one line for each; the first is told."""
        return iter(())


@dataclass
class RLConfig(JobConfig):
    """python rl.py config=… : reinforcement learning."""

    experiment: ExperimentConfig = section(ExperimentConfig)
    model: RLModelConfig = section(RLModelConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    reward: RLRewardConfig = section(RLRewardConfig)
    training: RLTrainingConfig = section(RLTrainingConfig)
    optimizer: RLOptimizerConfig = section(RLOptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def faults(self) -> Iterator[str]:
        rollout, training, has_value = self.rollout, self.training, bool(self.model.value_base_model)
        responses, keep = rollout.num_task_per_step * rollout.num_response_per_task, training.keep_accuracy
        yield from masking_faults(training)
        family = self.model.model_base
        yield from attention_faults(self, family, next((one for one in ATTENTION if family in ATTENTION[one]), None))
        yield from schedule_faults(self)
        if rollout.num_response_per_task < 2 and not has_value:
            yield (
                f"rollout.num_response_per_task={rollout.num_response_per_task}: "
                "a task's responses are compared with each other, so it takes at least 2"
            )
        margin = self.reward.truncated_margin
        if self.reward.truncated_is_wrong and margin is not None and margin >= rollout.max_token:
            yield (
                f"reward.truncated_margin={margin} reaches rollout.max_token={rollout.max_token}: every response would "
                "count as cut and earn nothing; set it below, or to null"
            )
        if training.updates_per_step > responses:
            yield (
                f"training.updates_per_step={training.updates_per_step} is more than the responses of a step, "
                f"rollout.num_task_per_step={rollout.num_task_per_step} × "
                f"rollout.num_response_per_task={rollout.num_response_per_task}"
            )
        if keep is not None and (len(keep) != 2 or keep[0] > keep[1]):
            yield f"training.keep_accuracy={keep}: expected two ascending numbers, as [0.2, 0.8], or null"
        updates = training.updates_per_step * training.epochs_per_step
        if training.old_logp == "detach" and updates > 1:
            yield (
                f"training.old_logp=detach allows one update, but training.updates_per_step="
                f"{training.updates_per_step} × training.epochs_per_step={training.epochs_per_step} are {updates}"
            )
        if has_value and training.method != "TraceRL":
            yield (
                f"model.value_base_model with training.method={training.method}: a value model learns over the steps "
                "of a trace; set training.method=TraceRL, or model.value_base_model=null"
            )
        if training.kl_norm and training.term != {"view_sum": "token", "length": "sequence"}[training.kl_norm]:
            yield (
                f"training.kl_norm={training.kl_norm} with training.term={training.term}: view_sum is of tokens, "
                "length of sequences; set training.kl_norm=null"
            )
        if training.term == "position" and training.loss_norm in ("view", "step"):
            yield (
                f"training.loss_norm={training.loss_norm} with training.term=position: a position's views are one "
                "term; set training.loss_norm to token, length or sum"
            )
        if has_value and training.value_reward == "zscore" and training.advantage != "zscore":
            yield f"training.value_reward=zscore with training.advantage={training.advantage}: set both to zscore"
        if has_value and training.value_reward == "zscore" and rollout.num_response_per_task < 2:
            yield (
                f"training.value_reward=zscore with rollout.num_response_per_task={rollout.num_response_per_task}: "
                "a task's rewards are compared with each other, so it takes at least 2"
            )
        if training.process_placement == "chunk_end" and not self.reward.judge.reward_chunk_length:
            yield (
                "training.process_placement=chunk_end: chunks are a judge's; set reward.judge.reward_chunk_length, or "
                "training.process_placement=all"
            )
        if has_value and training.term != "token":
            yield (
                f"model.value_base_model with training.term={training.term}: a {training.term} has one advantage, a "
                "value model gives one to each prediction; set training.term=token, or model.value_base_model=null"
            )
        if training.replay_routes and training.method != "TraceRL":
            yield (
                f"training.replay_routes with training.method={training.method}: the sampler made no forward of its "
                "views; set training.method=TraceRL, or training.replay_routes=False"
            )
        if training.tis_cap is not None and training.old_logp == "engine":
            yield (
                f"training.tis_cap={training.tis_cap} with training.old_logp=engine: the ratio holds that weight "
                "already; set training.old_logp=auto, or training.tis_cap=null"
            )
        if self.model.pretrained_model == "tiny":
            yield (
                "model.pretrained_model=tiny is a new, untrained network, for SFT only: give a trained model's folder "
                "(model.made_by names the SFT config that makes it)"
            )
        if rollout.carry and training.old_logp in ("engine", "detach"):
            yield (
                f"training.old_logp={training.old_logp} with rollout.carry: what older weights drew has another ratio; "
                "set training.old_logp=recompute"
            )
        yield from apart_faults(self)
        if rollout.carry and rollout.spare:
            yield f"rollout.spare={rollout.spare} with rollout.carry, which drops no group; set rollout.spare=0"
        yield from idle_faults(self)


def apart_faults(config: RLConfig) -> Iterator[str]:
    """As `JobConfig.faults`, of what engines on nodes of their own do not do."""
    rollout, nodes = config.rollout, f"experiment.rollout_nodes={config.experiment.rollout_nodes}"
    if not config.experiment.rollout_nodes:
        return
    if rollout.carry or rollout.spare:
        written = "rollout.carry" if rollout.carry else f"rollout.spare={rollout.spare}"
        yield (
            f"{written} with {nodes}: there a step waits for all of its responses, which are drawn a step ahead; leave "
            "one of the two out"
        )
    if rollout.tensor_parallel_size > 1:
        yield (
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} with {nodes}, whose devices have an engine "
            "each; set it to 1"
        )
    if config.training.old_logp in ("engine", "detach"):
        yield (
            f"training.old_logp={config.training.old_logp} with {nodes}: what older weights drew has another ratio; "
            "set training.old_logp=recompute"
        )


def attention_faults(config: RLConfig, family: str, attention: str | None) -> Iterator[str]:
    """As `JobConfig.faults`, what is of another attention than the family's; None: one of the user's own, not known."""
    training, size = config.training, config.rollout.block_size
    needs = {f"training.method={training.method}": NEEDS.get(training.method)}
    if training.prompt_mask:
        needs[f"training.prompt_mask={training.prompt_mask}"] = "full"
    if isinstance(size, dict):
        needs[f"rollout.block_size={size}"] = "block"
    for written, needed in needs.items():
        if None not in (attention, needed) and needed != attention:
            yield (
                f"{written} is of {needed} attention, which model.model_base={family} does not have; "
                f"{', '.join(sorted(ATTENTION[needed]))} do"
            )


def idle_faults(config: RLConfig) -> Iterator[str]:
    """As `JobConfig.faults`, of keys that would do nothing beside the others."""
    training, rollout = config.training, config.rollout
    if rollout.max_stale_steps != 4 and not rollout.carry:
        yield f"rollout.max_stale_steps={rollout.max_stale_steps} is of rollout.carry=True; set that too"
    if rollout.in_flight is not None and not (rollout.carry or rollout.spare):
        yield f"rollout.in_flight={rollout.in_flight} is of rollout.carry=True or rollout.spare; set one of them too"
    if not config.model.value_base_model:
        for name, usual in (("value_reward", "raw"), ("process_placement", "all")):
            if (value := getattr(training, name)) != usual:
                yield (
                    f"training.{name}={value} is of a value model, and there is none; set model.value_base_model, or "
                    f"training.{name}={usual}"
                )
    if training.shrink > 1 and training.method in set(get_args(RLMethod)) - {"TraceRL"}:
        yield no_trace(training)
    if training.term == "sequence" and training.loss_norm in ("view", "step"):
        yield (
            f"training.loss_norm={training.loss_norm} with training.term=sequence: a response's views and steps are "
            "one term; set training.loss_norm=token"
        )
    if training.kl_norm and training.kl_reference == "none":
        yield (
            f"training.kl_norm={training.kl_norm} with training.kl_reference=none: there is no KL to weigh; set "
            "training.kl_norm=null, or training.kl_reference=old"
        )
    yield from code_reward_faults(config.reward, config.dataset.data_type)


def no_trace(training: RLTrainingConfig | SFTTrainingConfig) -> str:
    """The fault of a `shrink` that has no steps to merge."""
    return (
        f"training.shrink={training.shrink} with training.method={training.method}: its views have no trace with steps "
        "to merge; set training.shrink=1"
    )


def code_reward_faults(reward: RewardConfig, data_type: str | None) -> Iterator[str]:
    """As `JobConfig.faults`, of a `code_reward` where no program earns anything."""
    kind = f"reward.function={reward.function}" if reward.function else reward.kind or data_type or "code"
    if reward.code_reward == "share" and kind != "code":
        decides = kind if reward.function else f"{'reward.kind' if reward.kind else 'dataset.data_type'}={kind}"
        yield f"reward.code_reward=share is of programs, but {decides} gives the rewards; set reward.code_reward=all"


def schedule_faults(config: RLConfig) -> Iterator[str]:
    """As `JobConfig.faults`, of schedules."""
    for sampling in (config.rollout, config.evaluation):
        size, steps = sampling.block_size, sampling.denoising_steps_per_block
        if isinstance(steps, dict) and (not isinstance(size, dict) or size.keys() != steps.keys()):
            yield (
                f"{sampling.prefix}denoising_steps_per_block={steps} with {sampling.prefix}block_size={size}: both "
                "change at the same steps; leave the former out, or give one number"
            )
        last, total = max(size) if isinstance(size, dict) else 0, config.experiment.total_step
        if last >= total:
            yield (
                f"{sampling.prefix}block_size={size}: experiment.total_step={total} ends before the size of {last} is "
                "drawn with; raise it, or leave that size out"
            )


@dataclass
class EvalConfig(JobConfig):
    """python eval.py config=… : accuracy of a model."""

    experiment: EvalExperimentConfig = section(EvalExperimentConfig)
    model: str = key("", "folder or hub id of the model")
    model_base: str = key("sdar", FAMILIES_HELP)
    made_by: str | None = key(None, "an SFT config that makes the model where that folder is missing")
    dtype: Dtype = key("auto", "of the weights: auto, float32, bfloat16")
    seed: int = key(10086, "of the draws", low=0)
    max_prompt_len: int = key(4096, LONG_TASKS, low=1)
    dataset: EvalDatasetConfig = section(EvalDatasetConfig)
    reward: RewardConfig = section(RewardConfig)
    rollout: EvalRolloutConfig = section(EvalRolloutConfig)

    def faults(self) -> Iterator[str]:
        yield from code_reward_faults(self.reward, self.dataset.data_type)


@dataclass
class SFTConfig(JobConfig):
    """train/sft_*.py config=… : supervised finetuning."""

    experiment: SFTExperimentConfig = section(SFTExperimentConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: SFTDatasetConfig = section(SFTDatasetConfig)
    reward: ScoringConfig = section(ScoringConfig)
    training: SFTTrainingConfig = section(SFTTrainingConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    evaluation: SFTEvaluationConfig = section(SFTEvaluationConfig)

    def faults(self) -> Iterator[str]:
        yield from masking_faults(self.training)
        if self.training.shrink > 1 and self.training.method != "trace":
            yield no_trace(self.training)
        if self.training.loss_weight == "elbo" and self.training.method in ("trace", "ar"):
            yield (
                "training.loss_weight=elbo weighs by a masking probability, which "
                f"training.method={self.training.method} does not have; set it to none"
            )
        if self.training.corrupt_p and self.training.method != "semi-ar":
            yield (
                f"training.corrupt_p={self.training.corrupt_p} with training.method={self.training.method}: only the "
                "views of semi-ar are corrupted; set training.method=semi-ar, or training.corrupt_p=0"
            )
        if self.training.corrupt_p and self.training.loss_weight == "elbo":
            yield (
                f"training.loss_weight=elbo with training.corrupt_p={self.training.corrupt_p}: the bound is of masks "
                "alone; set training.loss_weight=none, or training.corrupt_p=0"
            )


def masking_faults(training: TrainingBase) -> Iterator[str]:
    """As `JobConfig.faults`, of what both trainers have."""
    if training.lower_p > training.upper_p:
        yield f"training.lower_p={training.lower_p} is above training.upper_p={training.upper_p}"


@dataclass
class OneModel(JobConfig, Sampling):
    model: str = key("", "folder or hub id of the model")
    model_base: str = key("", "the family; empty: the first that reads this kind of checkpoint")
    dtype: Dtype = key("auto", "of the weights: auto, float32, bfloat16")


@dataclass
class GenerateConfig(OneModel):
    """python generate.py model=PATH [prompt="…"] : one prompt answered in the terminal, or a chat."""

    prompt: str = key("", "what the user says; empty: a chat")
    prompt_template: str = key("{question}", "an instruction around the prompt, {question}")
    seed: int = key(10086, "of the draws", low=0)


@dataclass
class TraceConfig(GenerateConfig, TaskSampling):
    out: str = key("trace.html", "the page to write")
    samples: str = key("", "show responses of this samples.jsonl or rollouts/step-0001.jsonl instead of new ones")
    task_id: str = key("", "samples: those of one task; empty: the first ones")


@dataclass
class ServeConfig(OneModel):
    served_name: str = key("", "name by which clients know the model; empty: the last part of `model`")
    max_active: int = key(32, "responses drawn side by side; others wait", low=1)
    max_prompt_len: int = key(4096, "longer conversations are refused", low=1)
    host: str = key("127.0.0.1", "address to listen on; others than this machine's own need an API key")
    port: int = key(8000, "to listen on", low=1, high=65535)
    api_key_env: str = key("DLLM_API_KEY", "environment variable with the key that clients must show; unset: none")
    cors_origins: list[str] = key(
        [], "origins whose web pages may ask this server, as http://localhost:3000, or *; empty: none but its own"
    )


@dataclass
class RewardJobConfig(JobConfig, RewardConfig):
    """python -m reward data=TASKS responses=FILE out=FILE : a file of responses scored; `reward.` may be left out."""

    data: str = key("", "tasks in the project's format: a name, a path (json, jsonl, parquet) or a hub id")
    responses: str = key("", 'JSON lines {"task": index, "response": text}, index counting the tasks from 0')
    out: str = key("", "the same lines with `correct`, `reward` and `verdict` added")
    kind: Literal[Kind, "judge"] | None = key(
        None,
        "math, code, general, option, countdown, sudoku or judge; null: by the task: code with a test_method, sudoku "
        "with a puzzle, countdown with numbers, and else math",
    )
    workers: int | None = key(None, "processes that score side by side; null: one for each processor", low=0)

    def faults(self) -> Iterator[str]:
        yield from code_reward_faults(self, None)


@dataclass
class AdaptConfig(JobConfig):
    """python -m models.adapt model=PATH family=NAME out=PATH : an autoregressive checkpoint made a diffusion model."""

    model: str = key("", "folder or hub id of the autoregressive checkpoint")
    family: str = key("", "the family it becomes: sdar, trado, dream, llada, mmada, sdar_moe, or my_module:MY_FAMILY")
    out: str = key("", "the folder to write")
    block_size: int | None = key(None, "tokens denoised together; null: the family's own, or 4", low=1)


@dataclass(frozen=True)
class Job:
    """A kind of program that takes a config."""

    name: str
    script: str  # as messages call it
    config: type[JobConfig]
    required: tuple[str, ...]  # keys that may not be empty
    example: str  # of a key set on the command line
    arguments: str = ""  # what its command needs; empty: a config
    section: str = ""  # of its keys, which may stand before them: reward.kind is kind


JOBS = {
    job.name: job
    for job in (
        Job("rl", "rl.py", RLConfig, ("model.pretrained_model", "dataset.train_dataset"), "training.seed=1"),
        Job("eval", "eval.py", EvalConfig, ("model", "dataset.eval_dataset"), "seed=1"),
        Job(
            "sft",
            "train/sft_<family>.py",
            SFTConfig,
            ("model.pretrained_model", "dataset.optimization_data"),
            "training.seed=1",
        ),
        Job("generate", "generate.py", GenerateConfig, ("model",), "temperature=0", 'model=PATH [prompt="…"]'),
        Job("trace", "sample/get_trace_viewer.py", TraceConfig, ("model",), "out=trace.html", 'model=PATH prompt="…"'),
        Job("serve", "serve.py", ServeConfig, ("model",), "port=8001", "model=PATH"),
        Job(
            "adapt",
            "python -m models.adapt",
            AdaptConfig,
            ("model", "family", "out"),
            "block_size=8",
            "model=PATH family=NAME out=PATH",
        ),
        Job(
            "reward",
            "python -m reward",
            RewardJobConfig,
            ("data", "responses", "out"),
            "kind=code",
            "data=TASKS responses=FILE out=FILE",
            section="reward",
        ),
    )
}
