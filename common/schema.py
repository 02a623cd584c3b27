"""Every key a config may have: its type, its default and one line of explanation.

A job is one of the dataclasses in `JOBS`; `common.config.load_config` fills it from YAML layers and the
command line. `Any` marks a key that takes a scalar or a list (evaluation under several settings).
"""

# ruff: noqa: RUF009 — `key` and `section` make fields, which is what dataclass defaults are for

from dataclasses import dataclass
from typing import Any, ClassVar

from common.keys import key, section
from common.reward_schema import KINDS, RewardConfig, ScoringConfig
from common.training_schema import (
    OptimizerConfig,
    RLOptimizerConfig,
    RLTrainingConfig,
    SchedulerConfig,
    SFTTrainingConfig,
)

# What the classes below have together, a job's config has: a job reads every key of its own (tests/test_key_reads.py).

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded")
DTYPES = ("auto", "float32", "bfloat16")
LONG_TASKS = "tasks with longer prompts are not drawn and count as wrong"


@dataclass
class Sampling:
    """How responses are drawn: all that the engine reads."""

    block_size: Any = key(
        4, "tokens denoised together; blocks are aligned to position 0; not set: the checkpoint's own", low=1
    )
    denoising_steps_per_block: int = key(4, "static: steps in which one block is unmasked", low=1)
    max_token: int = key(
        2000, "longest response in tokens; the prompt's remainder in the first block is not counted", low=1
    )
    temperature: Any = key(1.0, "of the draw; 0 is argmax", low=0)
    top_k: Any = key(0, "draw among the k likeliest tokens; 0 for all, 1 is argmax", low=0)
    top_p: Any = key(
        1.0, "draw among the likeliest tokens that reach this probability, the crossing one kept", low=0, high=1
    )
    remasking_strategy: Any = key(
        "low_confidence_dynamic",
        "which positions are unmasked: low_confidence_static, low_confidence_dynamic, sequential, entropy_bounded, "
        "or my_module:my_function",
        choices=STRATEGIES,
        function=True,
    )
    dynamic_threshold: Any = key(
        0.9, "low_confidence_dynamic: unmask every candidate at or above this probability", low=0, high=1
    )
    eb_threshold: float = key(0.1, "entropy_bounded: largest sum of entropies (nats) unmasked together", low=0)
    confidence_from: str = key(
        "raw", "confidence before (raw) or after (sampled) temperature, top-k and top-p", choices=("raw", "sampled")
    )
    steps: int = key(1024, "full attention: denoising steps of a whole response, divided over its blocks", low=1)
    target: str = key(
        "confidence",
        "full attention: positions are ranked by confidence, margin_confidence, neg_entropy or random",
        choices=("confidence", "margin_confidence", "neg_entropy", "random"),
    )
    alg_temp: float = key(0.0, "full attention: temperature of the choice of positions; 0 takes the best", low=0)
    pad_target_penalty: float = key(
        1.0, "full attention: factor by which a stop token's score is worsened when positions are ranked", low=0.01
    )
    use_cache: bool = key(False, "full attention: keep the keys before a block from its first forward; not exact")
    further_horizon: int | None = key(
        None, "full attention, cached: positions recomputed behind the block, those beyond unseen; null: all", low=0
    )
    max_active: int = key(256, "sequences sampled side by side", low=1)
    cache_tokens: int | None = key(
        None,
        "positions whose keys and values are kept, over all sequences; null: what is needed and memory allows",
        low=1,
    )
    merge_commit: bool | None = key(
        None, "block attention: a block's clean keys are computed in the next one's first forward; null: where it pays"
    )
    stop_token_list: list[str] | None = key(None, "tokens that end a response too, beside the model's own")
    start_with_think: bool = key(False, "begin the assistant's turn with <think>")


@dataclass
class TaskSampling(Sampling):
    """Sampling of several responses to each of many tasks."""

    num_response_per_task: int = key(1, "responses drawn for each task", low=1)


@dataclass
class RankSampling(TaskSampling):
    """Sampling by a job that may have ranks."""

    tensor_parallel_size: int = key(
        1, "ranks that hold one network together and sample with it; it divides their number and the heads", low=1
    )


@dataclass
class RolloutConfig(RankSampling):
    num_task_per_step: int = key(64, "tasks drawn in one RL step, over all devices", low=1)
    free_cache: bool = key(True, "give the cache's memory back while training")
    max_resample: int = key(1, "how many times more tasks are drawn when every group was filtered away", low=0)


@dataclass
class SFTEvaluationConfig(TaskSampling):
    """Evaluation by a job that trains."""

    num_task: int = key(0, "use the first n tasks; 0 for all", low=0)
    max_prompt_len: int = key(4096, LONG_TASKS, low=1)


@dataclass
class EvaluationConfig(SFTEvaluationConfig):
    eval_dataset: str = key("", "name, path or hub id; empty: dataset.eval_dataset")
    data_type: str | None = key(
        None, "math, code or general: what decides here; null: reward.kind, or dataset.data_type", choices=KINDS
    )


@dataclass
class EvalRolloutConfig(RankSampling):
    num_task: int = key(0, "use the first n tasks; 0 for all", low=0)


@dataclass
class ExperimentBase:
    """Where a run lies."""

    project: str = key("", "name of the run's folder; empty: the config file's stem")
    runs_dir: str = key("runs", "folder of all runs")
    start_from_scratch: bool = key(True, "an existing run folder is moved aside (True) or resumed (False)")


@dataclass
class EvalExperimentConfig(ExperimentBase):
    """Of a job that starts its own ranks, or joins nodes."""

    deepspeed_file: str | None = key(
        None, "a file of accelerate_configs/, by which ranks are launched; null: one process, or as launched already"
    )
    join_timeout: float = key(600.0, "many nodes: seconds to wait for those that are to join", low=1)
    ssh: list[str] | None = key(None, "many nodes: node 0 starts the others by this, as [ssh, -i, KEY]; null: does not")


@dataclass
class TrainingExperiment(ExperimentBase):
    """Of what may run for days."""

    keep_last: int = key(2, "checkpoints kept", low=1)
    trackers: list[str] = key(
        ["tensorboard"],
        "where curves go besides metrics.jsonl: tensorboard, wandb, trackio",
        choices=("tensorboard", "wandb", "trackio"),
    )
    hang_timeout: float = key(1800.0, "a rank that did not move for so many seconds is reported; 0: never", low=0)


@dataclass
class SFTExperimentConfig(TrainingExperiment):
    save_every: int = key(500, "updates between checkpoints to resume from; 0: only the final model", low=0)


@dataclass
class ExperimentConfig(TrainingExperiment, EvalExperimentConfig):
    max_failures: int = key(3, "many nodes: how often a run goes on after it lost a node", low=0)
    total_step: int = key(50, "RL steps", low=1)
    save_every: int = key(10, "steps between checkpoints; 0: only the final model", low=0)
    train_value_every: int = key(1, "RL steps between those in which the value model learns; 1: in every one", low=1)
    eval_every: int = key(10, "steps between evaluations; 0: before and after only", low=0)


@dataclass
class LoraSettings:
    """Low-rank adapters, trained in place of the weights; used where r is above 0."""

    r: int = key(0, "rank of the adapters; 0 trains the weights themselves", low=0)
    alpha: float = key(32.0, "what an adapter adds is scaled by alpha / r", low=0)
    targets: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "layers that get one, by name"
    )


@dataclass
class ModelConfig:
    pretrained_model: str = key("", "folder or hub id of the model; `tiny`: a new small network (SFT only)")
    model_base: str = key("sdar", "the family: sdar, trado, dream, llada, mmada, or my_module:MY_FAMILY")
    optimized_name: str = key("optimized", "folder of the trained model under ckpt/")
    dtype: str = key(
        "auto", "of the weights: auto (bfloat16 on a GPU, float32 elsewhere), float32, bfloat16", choices=DTYPES
    )
    lora: LoraSettings = section(LoraSettings)


@dataclass
class PromptsConfig:
    """The instruction around {question}, by kind of task; null: as the family's published evaluation words it."""

    math: str | None = key(None, "of a maths task")
    code_function: str | None = key(None, "of a code task whose function is called")
    code_stdio: str | None = key(None, "of a code task whose program reads input and prints output")
    general: str | None = key(None, "of any other task")


@dataclass
class RLModelConfig(ModelConfig):
    made_by: str | None = key(None, "an SFT config that makes pretrained_model where that folder is missing")
    value_base_model: str | None = key(None, "folder or hub id of the value model's start; null: no value model")
    optimized_value_name: str = key("optimized_value", "folder of the trained value model under ckpt/")


@dataclass
class EvalDatasetConfig:
    eval_dataset: str = key("", "tasks to evaluate on: a name, a path (json, jsonl, parquet) or a hub id")
    data_type: str = key("math", "how answers are checked: math, code or general", choices=KINDS)
    prompts: PromptsConfig = section(PromptsConfig)


@dataclass
class DatasetConfig(EvalDatasetConfig):
    train_dataset: str = key("", "tasks to learn from: a name, a path (json, jsonl, parquet) or a hub id")


@dataclass
class SFTDatasetConfig(EvalDatasetConfig):
    eval_dataset: str = key("", "tasks on which accuracy is measured by sampling; empty: it is not")
    optimization_data: str = key("", "samples to learn: a name, a path (json, jsonl, parquet) or a hub id")
    prompt_key: str = key("prompt", "the field of a record that holds the prompt")
    response_key: str = key("response", "the field of a record that holds the response")
    apply_chat_template: bool = key(True, "False: prompts stand in the chat template already")
    correct_only: bool = key(False, "use only records whose `correct` is true, as eval.py writes it")
    bad_samples: str = key(
        "refuse", "samples that cannot be learned: refuse (stop) or skip (and count)", choices=("refuse", "skip")
    )
    validation_share: float = key(
        0.0, "share of the prompts whose samples are kept out and give the validation loss", low=0, high=0.9
    )


class Job:
    """What a job's config knows of itself beside its keys."""

    # The keys that YAML or the command line set; the model may set others. None: made in Python, all are as meant.
    written: ClassVar[frozenset[str] | None] = None


@dataclass
class RLConfig(Job):
    """python rl.py config=… : reinforcement learning."""

    experiment: ExperimentConfig = section(ExperimentConfig)
    model: RLModelConfig = section(RLModelConfig)
    dataset: DatasetConfig = section(DatasetConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    reward: RewardConfig = section(RewardConfig)
    training: RLTrainingConfig = section(RLTrainingConfig)
    optimizer: RLOptimizerConfig = section(RLOptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)


@dataclass
class EvalConfig(Job):
    """python eval.py config=… : accuracy of a model."""

    experiment: EvalExperimentConfig = section(EvalExperimentConfig)
    model: str = key("", "folder or hub id of the model")
    model_base: str = key("sdar", "the family: sdar, trado, dream, llada, mmada, or my_module:MY_FAMILY")
    made_by: str | None = key(None, "an SFT config that makes the model where that folder is missing")
    dtype: str = key("auto", "of the weights: auto, float32, bfloat16", choices=DTYPES)
    seed: int = key(10086, "of the draws", low=0)
    max_prompt_len: int = key(4096, LONG_TASKS, low=1)
    dataset: EvalDatasetConfig = section(EvalDatasetConfig)
    reward: RewardConfig = section(RewardConfig)
    rollout: EvalRolloutConfig = section(EvalRolloutConfig)


@dataclass
class SFTConfig(Job):
    """train/sft_*.py config=… : supervised finetuning."""

    experiment: SFTExperimentConfig = section(SFTExperimentConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: SFTDatasetConfig = section(SFTDatasetConfig)
    reward: ScoringConfig = section(ScoringConfig)
    training: SFTTrainingConfig = section(SFTTrainingConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    evaluation: SFTEvaluationConfig = section(SFTEvaluationConfig)


@dataclass
class OneModel(Job, Sampling):
    model: str = key("", "folder or hub id of the model")
    model_base: str = key("", "the family; empty: the first that reads this kind of checkpoint")
    dtype: str = key("auto", "of the weights: auto, float32, bfloat16", choices=DTYPES)


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


JOBS: dict[str, type] = {"rl": RLConfig, "eval": EvalConfig, "sft": SFTConfig}
JOBS |= {"generate": GenerateConfig, "trace": TraceConfig, "serve": ServeConfig}
