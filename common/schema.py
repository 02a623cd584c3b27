"""Every key a config may have: its type, its default and one line of explanation.

A job is one of the dataclasses in `JOBS`; `common.config.load_config` fills it from YAML layers and the
command line. `Any` marks a key that takes a scalar or a list (evaluation under several settings).
"""

# ruff: noqa: RUF009 — `key` and `section` make fields, which is what dataclass defaults are for

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.keys import key, section
from common.reward_schema import KINDS, RewardConfig

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class Sampling:
    """How responses are drawn; shared by rollout, evaluation and generate.py."""

    block_size: Any = key(4, "tokens denoised together; blocks are aligned to position 0", low=1)
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
    num_response_per_task: int = key(1, "responses drawn for each task", low=1)
    max_active: int = key(256, "sequences sampled side by side", low=1)
    cache_tokens: int | None = key(
        None,
        "positions whose keys and values are kept, over all sequences; null: what is needed and memory allows",
        low=1,
    )
    merge_commit: bool | None = key(
        None, "block attention: a block's clean keys are computed in the next one's first forward; null: where it pays"
    )
    stop_token_list: list[str] | None = key(None, "tokens that end a response; null: the tokenizer's own")
    start_with_think: bool = key(False, "begin the assistant's turn with <think>")


@dataclass
class RolloutConfig(Sampling):
    num_task_per_step: int = key(64, "tasks drawn in one RL step, over all devices", low=1)
    free_cache: bool = key(True, "give the cache's memory back while training")
    max_resample: int = key(1, "how many times more tasks are drawn when every group was filtered away", low=0)


@dataclass
class EvaluationConfig(Sampling):
    eval_dataset: str = key("", "name, path or hub id; empty: dataset.eval_dataset or the held-out split")
    data_type: str | None = key(None, "math, code or general; null: dataset.data_type", choices=KINDS)
    num_task: int = key(0, "use the first n tasks; 0 for all", low=0)


@dataclass
class EvalRolloutConfig(Sampling):
    num_task: int = key(0, "use the first n tasks; 0 for all", low=0)


@dataclass
class ExperimentBase:
    project: str = key("", "name of the run's folder; empty: the config file's stem")
    runs_dir: str = key("runs", "folder of all runs")
    start_from_scratch: bool = key(True, "an existing run folder is moved aside (True) or resumed (False)")
    keep_last: int = key(2, "checkpoints kept", low=1)
    trackers: list[str] = key(
        ["tensorboard"],
        "where curves go besides metrics.jsonl: tensorboard, wandb, trackio",
        choices=("tensorboard", "wandb", "trackio"),
    )


@dataclass
class SFTExperimentConfig(ExperimentBase):
    save_every: int = key(500, "updates between checkpoints to resume from; 0: only the final model", low=0)


@dataclass
class ExperimentConfig(ExperimentBase):
    deepspeed_file: str | None = key(
        None, "a file of accelerate_configs/, by which ranks are launched; null: one process, or as launched already"
    )
    hang_timeout: float = key(1800.0, "a rank that did not move for so many seconds is reported; 0: never", low=0)
    join_timeout: float = key(600.0, "many nodes: seconds to wait for those that are to join", low=1)
    max_failures: int = key(3, "many nodes: how often a run goes on after it lost a node", low=0)
    ssh: list[str] | None = key(None, "many nodes: node 0 starts the others by this, as [ssh, -i, KEY]; null: does not")
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
    made_by: str | None = key(None, "an SFT config that makes pretrained_model where that folder is missing")
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
    value_base_model: str | None = key(None, "folder or hub id of the value model's start; null: no value model")
    optimized_value_name: str = key("optimized_value", "folder of the trained value model under ckpt/")


@dataclass
class DatasetConfig:
    train_dataset: str = key("", "tasks to learn from: a name, a path (json, jsonl, parquet) or a hub id")
    eval_dataset: str = key("", "tasks to evaluate on")
    data_type: str = key("math", "how answers are checked: math, code or general", choices=KINDS)
    prompts: PromptsConfig = section(PromptsConfig)


@dataclass
class SFTDatasetConfig:
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
    eval_dataset: str = key("", "tasks on which accuracy is measured by sampling; empty: it is not")
    data_type: str = key("math", "how answers are checked: math, code or general", choices=KINDS)
    prompts: PromptsConfig = section(PromptsConfig)


@dataclass
class TrainingBase:
    seed: int = key(10086, "of weights, data order and draws", low=0)
    max_prompt_len: int = key(784, "longer prompts are dropped and counted", low=1)
    tokens_per_micro_batch: int = key(16384, "packed tokens in one forward of the trainer", low=1)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm", low=0)
    max_bad_steps: int = key(
        3, "updates in a row whose loss or gradient is not finite: they are skipped, so many end the run", low=1
    )
    gradient_checkpointing_enable: bool = key(False, "recompute activations in the backward pass: less memory")
    lower_p: float = key(0.1, "lowest masking probability of a random view", low=0, high=1)
    upper_p: float = key(0.9, "highest masking probability of a random view", low=0.01, high=1)
    mask_times_per_sample: int = key(1, "random masking: noised copies of each response", low=1)
    post_num: int = key(0, "how many tokens after the end of the response are predicted too", low=0)


@dataclass
class RLTrainingConfig(TrainingBase):
    method: str = key(
        "TraceRL",
        "how views are made: TraceRL (replay the trace), random_masking, coupled (random and its complement), or "
        "my_module:my_views",
        choices=("TraceRL", "random_masking", "coupled"),
        function=True,
    )
    ratio_level: str = key(
        "token",
        "what ratio is clipped: of every token, or one of the whole sequence, from its ELBO per token (ESPO)",
        choices=("token", "sequence"),
    )
    shrink: int = key(
        1, "TraceRL: this many neighbouring steps (of a block, under block attention) are merged into one view", low=1
    )
    updates_per_step: int = key(1, "optimizer updates in one RL step", low=1)
    eps: float = key(0.2, "clip range of the ratio, and of the value", low=0, high=1)
    eps_high: float | None = key(None, "clip range of the ratio upwards, as in DAPO; null: eps", low=0)
    beta: float = key(0.01, "weight of the KL penalty", low=0)
    use_kl_estimator_k3: bool = key(True, "k3 estimator of the KL; False: k1, or k2 where ratio_level is sequence")
    kl_reference: str = key(
        "old",
        "the KL is to the policy at the start of the step (old) or the first model (initial)",
        choices=("old", "initial"),
    )
    loss_norm: str = key(
        "token", "token, length or step: over what token losses are averaged", choices=("token", "length", "step")
    )
    keep_accuracy: list[float] | None = key(
        [0.2, 0.8], "groups of other accuracy are dropped; null keeps all", low=0, high=1
    )
    dynamic_sampling: bool = key(
        False,
        "drop groups of equal rewards and draw tasks until num_task_per_step groups are kept, at most "
        "rollout.max_resample times more (DAPO)",
    )
    gam: float = key(1.0, "value model: discount of later steps' rewards and values (γ)", low=0, high=1)
    lam: float = key(1.0, "value model: weight of later steps in the advantage (λ of GAE)", low=0, high=1)
    mismatch_sample: int = key(
        16, "trajectories replayed to measure mismatch_kl where the method's views are no replay", low=1
    )
    old_logp: str = key(
        "auto",
        "auto, engine, recompute or detach: whose log-probabilities the ratio starts from",
        choices=("auto", "engine", "recompute", "detach"),
    )
    tis_cap: float | None = key(
        None, "largest importance weight π_trainer/π_engine of a token, for low precision; null: no weights", low=0.01
    )


@dataclass
class SFTTrainingConfig(TrainingBase):
    method: str = key(
        "semi-ar",
        "how views are made: semi-ar (block by block), trace (replays the samples' step_map), random_masking (the "
        "whole response; full attention), ar (next token; families with shifted logits)",
        choices=("semi-ar", "trace", "random_masking", "ar"),
    )
    shrink: int = key(
        1, "trace: this many neighbouring steps (of a block, under block attention) are merged into one view", low=1
    )
    loss_weight: str = key(
        "none",
        "none: mean over predicted tokens; elbo: each weighted by 1/t, t its masking probability",
        choices=("none", "elbo"),
    )
    block_size: int = key(4, "tokens denoised together", low=1)
    batch_size: int = key(32, "samples in one update, over all devices", low=1)
    num_train_epochs: int = key(1, "passes over the data", low=1)
    max_steps: int = key(0, "stop after so many updates; 0: by epochs", low=0)
    max_gen_length: int = key(
        2000,
        "samples with longer responses are dropped and counted; full attention: the canvas they are learned on",
        low=1,
    )
    stop_at_accuracy: float | None = key(
        None, "stop when sampling accuracy on eval_dataset reaches this share", low=0, high=1
    )
    eval_every: int = key(
        50,
        "updates between measurements of accuracy and validation loss; four times as many while accuracy is under "
        "half of stop_at_accuracy",
        low=1,
    )


@dataclass
class OptimizerParams:
    learning_rate: float = key(1e-6, "peak learning rate", low=0)
    beta1: float = key(0.9, "AdamW", low=0, high=0.99999)
    beta2: float = key(0.999, "AdamW", low=0, high=0.99999)
    weight_decay: float = key(0.0, "AdamW", low=0)
    epsilon: float = key(1e-8, "AdamW", low=0)


@dataclass
class RLOptimizerParams(OptimizerParams):
    value_learning_rate: float | None = key(None, "peak of the value model's; null: learning_rate", low=0)


@dataclass
class OptimizerConfig:
    name: str = key("adamw", "adamw", choices=("adamw",))
    params: OptimizerParams = section(OptimizerParams)


@dataclass
class RLOptimizerConfig(OptimizerConfig):
    params: RLOptimizerParams = section(RLOptimizerParams)


@dataclass
class SchedulerParams:
    warmup_steps: int = key(0, "updates over which the rate rises from 0", low=0)
    min_lr_scale: float = key(1.0, "cosine and linear: last rate over the first; 1 is constant", low=0)


@dataclass
class SchedulerConfig:
    scheduler: str = key("constant", "constant, linear or cosine", choices=("constant", "linear", "cosine"))
    params: SchedulerParams = section(SchedulerParams)


@dataclass
class RLConfig:
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
class EvalConfig:
    """python eval.py config=… : accuracy of a model."""

    experiment: ExperimentConfig = section(ExperimentConfig)
    model: str = key("", "folder or hub id of the model")
    model_base: str = key("sdar", "the family: sdar, trado, dream, llada, mmada, or my_module:MY_FAMILY")
    made_by: str | None = key(None, "an SFT config that makes the model where that folder is missing")
    dtype: str = key("auto", "of the weights: auto, float32, bfloat16", choices=DTYPES)
    seed: int = key(10086, "of the draws", low=0)
    max_prompt_len: int = key(4096, "longer prompts are dropped and counted", low=1)
    dataset: DatasetConfig = section(DatasetConfig)
    reward: RewardConfig = section(RewardConfig)
    rollout: EvalRolloutConfig = section(EvalRolloutConfig)


@dataclass
class SFTConfig:
    """train/sft_*.py config=… : supervised finetuning."""

    experiment: SFTExperimentConfig = section(SFTExperimentConfig)
    model: ModelConfig = section(ModelConfig)
    dataset: SFTDatasetConfig = section(SFTDatasetConfig)
    training: SFTTrainingConfig = section(SFTTrainingConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    lr_scheduler: SchedulerConfig = section(SchedulerConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)


@dataclass
class OneModel(Sampling):
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
class TraceConfig(GenerateConfig):
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


JOBS: dict[str, type] = {"rl": RLConfig, "eval": EvalConfig, "sft": SFTConfig}
JOBS |= {"generate": GenerateConfig, "trace": TraceConfig, "serve": ServeConfig}
