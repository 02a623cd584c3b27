"""Every section of a config: sampling, rewards, training, runs, models, data; each key with its explanation and limits.

A section that several jobs share stands here once; a job has no key that its code does not read
(tests/test_key_reads.py).
"""

# ruff: noqa: RUF009 — `key` and `section` make fields, which is what dataclass defaults are for

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

from common.keys import Function, Schedule, key, section

Strategy = Literal[
    "low_confidence_static", "low_confidence_dynamic", "sequential", "entropy_bounded",
    "factor", "hierarchical", "revoke", "edit",
]  # fmt: skip
RLMethod = Literal[
    "TraceRL", "random_masking", "coupled", "coupled_whole", "whole", "counts", "quadrature", "stratified"
]
Dtype = Literal["auto", "float32", "bfloat16"]
Kind = Literal["math", "code", "general", "option", "countdown", "sudoku"]  # of tasks; rows of reward/score.py
STRATEGIES, KINDS = get_args(Strategy), get_args(Kind)
# Sampling keys that may be lists in an evaluation: entry i of each makes setting i.
SETTINGS = ("block_size", "temperature", "top_k", "top_p", "remasking_strategy", "dynamic_threshold")
# Sampling keys that one strategy alone reads, and functions of the user's own.
STRATEGY_KEYS = {
    "factor": ("factor",),
    "hierarchical": ("low_threshold",),
    "revoke": ("revoke_threshold",),
    "edit": ("edit_threshold", "max_edit_steps", "min_unmask"),
}
FAMILIES_HELP = "the family: sdar, trado, sdar_moe, dream, llada, mmada, llada2, or my_module:MY_FAMILY"
CUDA_TOKENS, CPU_TOKENS = 16384, 640  # in a forward of the trainer, where the config does not say
LONG_TASKS = "tasks with longer prompts are not drawn and count as wrong"
ATTENTION = {  # the families that stand in the project, by their attention
    "block": ("sdar", "trado", "sdar_moe", "llada2"),
    "full": ("dream", "llada", "mmada"),
}
NEEDS = {  # the attention that a method's views are of; the others suit both
    "coupled_whole": "full",
    "whole": "full",
    "counts": "full",
    "quadrature": "full",
    "stratified": "block",
}


# Sampling -------------------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How responses are drawn: all that the engine reads.

    `common.config.settings_of` makes one of these of each setting where SETTINGS are lists.
    """

    settings: ClassVar[tuple[str, ...]] = SETTINGS
    takes_lists: ClassVar[bool] = False  # for its settings
    prefix: ClassVar[str] = ""  # of these keys in a config

    block_size: int = key(
        4, "tokens denoised together; blocks are aligned to position 0; not set: the checkpoint's own", low=1
    )
    denoising_steps_per_block: int = key(4, "static: steps in which one block is unmasked", low=1)
    max_token: int = key(
        2000, "longest response in tokens; the prompt's remainder in the first block is not counted", low=1
    )
    temperature: float = key(1.0, "of the draw; 0 is argmax", low=0)
    top_k: int = key(0, "draw among the k likeliest tokens; 0 for all, 1 is argmax", low=0)
    top_p: float = key(
        1.0, "draw among the likeliest tokens that reach this probability, the crossing one kept", low=0, high=1
    )
    remasking_strategy: Strategy | Function = key(
        "low_confidence_dynamic",
        "which positions are written: low_confidence_static, low_confidence_dynamic, sequential, entropy_bounded, "
        "factor, hierarchical, revoke, edit, or my_module:my_function",
    )
    dynamic_threshold: float = key(
        0.9,
        "low_confidence_dynamic, hierarchical, revoke, edit: unmask every candidate at or above this probability",
        low=0,
        high=1,
    )
    filter_order: Literal["top_k_first", "top_p_first"] = key(
        "top_k_first", "which of top_k and top_p cuts first: top_k_first, or top_p_first (Dream's)"
    )
    eb_threshold: float = key(
        0.35, "entropy_bounded: largest sum of entropies (nats) unmasked together (0.35: JetEngine's)", low=0
    )
    factor: float = key(
        1.0, "factor: the r-th most confident is unmasked at 1 − factor/(r+1) or above (1.0: Fast-dLLM's)", low=0
    )
    low_threshold: float = key(
        0.62, "hierarchical: the best of a run of masks is unmasked at this probability (0.62: dInfer's)", low=0, high=1
    )
    revoke_threshold: float = key(
        0.9, "revoke: a token under this probability is masked again (0.9: WINO's, beside 0.6 to unmask)", low=0, high=1
    )
    edit_threshold: float = key(
        0.5, "edit: a token is replaced by one above this probability (LLaDA2.1: 0.5, fast 0.0)", low=0, high=1
    )
    max_edit_steps: int = key(
        16, "edit, or a strategy of one's own that overwrites: forwards of a block without masks (LLaDA2.1: 16)", low=0
    )
    min_unmask: int = key(1, "edit: fewest masks that a forward unmasks (LLaDA2.1: 1)", low=1)
    entropy_from: Literal["raw", "sampled"] = key(
        "raw", "entropy before (raw) or after (sampled; Dream's) temperature, top-k and top-p"
    )
    confidence_from: Literal["raw", "sampled"] = key(
        "raw", "confidence before (raw) or after (sampled) temperature, top-k and top-p"
    )
    steps: int = key(1024, "full attention: denoising steps of a whole response, divided over its blocks", low=1)
    target: Literal["confidence", "margin_confidence", "neg_entropy", "random"] = key(
        "confidence", "full attention: positions are ranked by confidence, margin_confidence, neg_entropy or random"
    )
    alg_temp: float = key(0.0, "full attention: temperature of the choice of positions; 0 takes the best", low=0)
    pad_target_penalty: float = key(
        1.0, "full attention: factor by which a stop token's score is worsened when positions are ranked", low=0.01
    )
    confidence_eos_eot_inf: bool = key(
        False, "full attention: candidates that end a response are unmasked last, however sure (LLaDA's evaluation)"
    )
    logits_eos_inf: bool = key(
        False, "the end of sequence is never drawn; a response ends by its other stop tokens (LLaDA's evaluation)"
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
    compile_kernels: bool = key(
        True, "on CUDA: each layer's rotary embedding and gate are compiled, once a process, which takes a while"
    )
    stop_token_list: list[str] | None = key(None, "tokens that end a response too, beside the model's own")
    start_with_think: bool = key(False, "begin the assistant's turn with <think>")

    def at_step(self, number: int) -> Self:
        """The keys as they are in that RL step, counted from 1: a number for each schedule."""
        schedules = {name: value for name, value in vars(self).items() if isinstance(value, dict)}
        latest = {name: max(done for done in value if done < number) for name, value in schedules.items()}
        return replace(self, **{name: schedules[name][done] for name, done in latest.items()})


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
    prefix: ClassVar[str] = "rollout."
    block_size: int | Schedule = key(
        4,
        "tokens denoised together; blocks are aligned to position 0; not set: the checkpoint's own; {0: 4, 40: 8}: "
        "8 when 40 steps are done",
        low=1,
    )
    denoising_steps_per_block: int | Schedule = key(
        4, "static: steps in which one block is unmasked; not set beside a schedule of block_size: one a token", low=1
    )
    num_task_per_step: int = key(64, "tasks drawn in one RL step, over all devices", low=1)
    free_cache: bool = key(True, "give the cache's memory back while training")
    max_resample: int = key(1, "how many times more tasks are drawn when every group was filtered away", low=0)
    carry: bool = key(
        False,
        "a step ends when num_task_per_step groups are complete; responses that are not go on in the next step, under "
        "the new weights",
    )
    max_stale_steps: int = key(
        4,
        "carry: steps after the one that began it by which a group is trained; what would come later is waited for",
        low=0,
    )
    spare: int = key(
        0,
        "groups started beyond num_task_per_step, of which the first complete ones are taken: that favours short "
        "responses",
        low=0,
    )
    in_flight: int | None = key(
        None,
        "carry, spare: responses drawn at once over all devices, which decides what is complete first; null: those of "
        "num_task_per_step and spare groups",
        low=1,
    )

    def settled_until(self, number: int) -> int | None:
        """The last RL step that draws as step `number` does, before a schedule changes; None: all that come."""
        changes = [done for value in vars(self).values() if isinstance(value, dict) for done in value]
        return min((done for done in changes if done >= number), default=None)


@dataclass
class SFTEvaluationConfig(TaskSampling):
    """Evaluation by a job that trains."""

    takes_lists: ClassVar[bool] = True
    prefix: ClassVar[str] = "evaluation."
    num_task: int = key(0, "use the first n tasks; 0 for all", low=0)
    max_prompt_len: int = key(4096, LONG_TASKS, low=1)


@dataclass
class EvaluationConfig(SFTEvaluationConfig):
    block_size: int | Schedule = key(
        4,
        "tokens denoised together; not set: the checkpoint's own, or rollout.block_size's schedule: the size of the "
        "last step",
        low=1,
    )
    denoising_steps_per_block: int | Schedule = key(4, "static: steps in which one block is unmasked", low=1)
    eval_dataset: str = key("", "name, path or hub id; empty: dataset.eval_dataset")
    data_type: Kind | None = key(
        None,
        "math, code, general, option, countdown or sudoku: what decides here; null: reward.kind, or dataset.data_type",
    )


@dataclass
class EvalRolloutConfig(RankSampling):
    takes_lists: ClassVar[bool] = True
    prefix: ClassVar[str] = "rollout."
    num_task: int = key(0, "use the first n tasks; 0 for all", low=0)


# Rewards --------------------------------------------------------------------------------------------------------------


@dataclass
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that scores responses; used where base_url is given."""

    base_url: str = key("", "of the endpoint, as http://127.0.0.1:8000/v1; empty: no judge")
    model: str = key("", "name by which the endpoint knows the model")
    api_key_env: str = key("OPENAI_API_KEY", "environment variable that holds the key; it may be unset")
    reward_chunk_length: int | None = key(
        None, "score every chunk of so many tokens (process rewards); null: the response as a whole", low=1
    )
    k_sample: int = key(1, "votes on each score; the reward is their mean", low=1)
    temperature: float = key(0.6, "of the judge", low=0)
    max_generation_token: int = key(10000, "longest answer of the judge in tokens", low=1)
    timeout: float = key(600.0, "seconds to wait for one answer", low=0.01)
    retries: int = key(5, "further attempts after a failed request, each after twice the wait", low=0)
    first_wait: float = key(1.0, "seconds before the first further attempt", low=0)
    parallel: int = key(8, "requests at once from one scoring process", low=1)
    prompt: str | None = key(
        None, "instruction with {question}, {response}, {chunk}, {reference}; null: as in reward/judge.py"
    )


@dataclass
class ScoringConfig:
    """How an answer is checked against the task's own."""

    workers: int = key(1, "processes that score beside the rollout; 0 scores in the rollout's own", low=0)
    time_limit: float = key(5.0, "code: seconds of processor time where a task has no test_time_limit", low=0.01)
    memory_mb: int = key(1024, "code: memory of a program", low=64)
    output_mb: int = key(16, "code: what a program may write to stdout and stderr", low=1)
    float_tolerance: float = key(
        1e-6, "code: how far a printed number may be from the wanted one, absolutely or relative to it", low=0
    )
    match: Literal["exact", "fuzzy"] = key("exact", "general: exact, or fuzzy (the reward is the similarity)")
    fuzzy_threshold: float = key(0.8, "general, fuzzy: similarity from which a response is correct", low=0, high=1)


@dataclass
class RewardConfig(ScoringConfig):
    kind: Literal[Kind, "judge"] | None = key(
        None,
        "math, code, general, option, countdown, sudoku or judge: what decides whether a response is right; null: "
        "dataset.data_type",
    )
    code_reward: Literal["all", "share"] = key(
        "all", "code: 1 where a program passes all tests, else 0 (all); or the share of the tests it passes (share)"
    )
    function: Function | None = key(
        None, "my_module:my_reward, called with (response, task), returns a number or one for each token"
    )
    judge: JudgeConfig = section(JudgeConfig)


@dataclass
class RLRewardConfig(RewardConfig):
    truncated_is_wrong: bool = key(
        True, "a response cut at the length limit earns nothing; evaluations score it like any other"
    )
    truncated_margin: int | None = key(
        None,
        "a response within so many tokens of the limit counts as cut too, though it ended; null: it does not",
        low=0,
    )


# Training -------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingBase:
    seed: int = key(10086, "of weights, data order and draws", low=0)
    max_prompt_len: int = key(784, "longer prompts are dropped and counted", low=1)
    tokens_per_micro_batch: int | None = key(
        None,
        f"packed tokens in one forward of the trainer, longer rows are in pieces; null: {CUDA_TOKENS} on a GPU, "
        f"{CPU_TOKENS} on a CPU",
        low=1,
    )
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: they are not", low=0)
    max_bad_steps: int = key(
        3, "updates in a row whose loss or gradient is not finite: they are skipped, so many end the run", low=1
    )
    gradient_checkpointing_enable: bool = key(False, "recompute activations in the backward pass: less memory")
    freeze_router: bool = key(False, "mixtures of experts: what gives tokens to experts is not trained")
    expert_bias_rate: float = key(
        0.0,
        "llada2: by how much an update moves the biases of experts towards equal use (2408.15664); 0: they stay",
        low=0,
    )
    lower_p: float = key(0.1, "lowest masking probability of a random view", low=0, high=1)
    upper_p: float = key(0.9, "highest masking probability of a random view", low=0.01, high=1)
    mask_times_per_sample: int = key(1, "random masking: noised copies of each response", low=1)
    post_num: int = key(0, "how many tokens after the end of the response are predicted too", low=0)


@dataclass
class RLTrainingConfig(TrainingBase):
    method: RLMethod | Function = key(
        "TraceRL",
        "how views are made: TraceRL (replay the trace), random_masking, coupled (random and its complement), "
        "coupled_whole (and the whole response masked), whole, counts (pairs that mask uniform counts), quadrature "
        "(fixed levels), stratified (levels spread over blocks), or my_module:my_views",
    )
    prompt_mask: float = key(
        0.0, "full attention: the probability with which a view masks each token of the prompt", low=0, high=1
    )
    term: Literal["token", "position", "sequence"] = key(
        "token",
        "what one ratio is of: each prediction (token), those of one position in all views (position), or all of a "
        "response (sequence), combined by the views' coefficients",
    )
    shrink: int = key(
        1, "TraceRL: this many neighbouring steps (of a block, under block attention) are merged into one view", low=1
    )
    updates_per_step: int = key(1, "optimizer updates in one RL step", low=1)
    eps: float = key(0.2, "clip range of the ratio, and of the value", low=0, high=1)
    eps_high: float | None = key(None, "clip range of the ratio upwards, as in DAPO; null: eps", low=0)
    beta: float = key(0.01, "weight of the KL penalty", low=0)
    use_kl_estimator_k3: bool = key(True, "k3 estimator of the KL; False: k1, or k2 where term is sequence")
    kl_reference: Literal["old", "initial", "none"] = key(
        "old", "the KL is to the policy at the start of the step (old), to the first model (initial), or absent (none)"
    )
    loss_norm: Literal["token", "view", "length", "step", "sum"] = key(
        "token",
        "over what losses are averaged: token (all predicted tokens), view (in each view, then over views), length "
        "(rollout.max_token, then over responses), step (in each step of a trace, summed, then over responses; those "
        "that shrink merged are one), sum (over responses only)",
    )
    kl_norm: Literal["view_sum", "length"] | None = key(
        None,
        "view_sum: the KL is summed in each view and averaged over views; length: a sequence's is multiplied by its "
        "length; null: weighed as the loss is",
    )
    advantage: Literal["zscore", "mean", "loo"] = key(
        "zscore",
        "a reward against its group's: z-score, difference to the mean, or to the mean of the others (leave one out)",
    )
    epochs_per_step: int = key(
        1,
        "how often a step's responses are gone through, each time with fresh noise and updates_per_step updates",
        low=1,
    )
    keep_accuracy: list[float] | None = key(
        [0.2, 0.8], "groups of other accuracy are dropped; null keeps all", low=0, high=1
    )
    drop_equal: bool = key(False, "drop groups of equal rewards")
    dynamic_sampling: bool = key(
        False,
        "drop groups of equal rewards and draw tasks until num_task_per_step groups are kept, at most "
        "rollout.max_resample times more (DAPO)",
    )
    value_reward: Literal["raw", "zscore"] = key(
        "raw", "value model: an outcome's reward as it is (raw), or its z-score in the group (zscore)"
    )
    process_placement: Literal["all", "chunk_end"] = key(
        "all",
        "value model: where a judge's rewards of chunks lie: on all their tokens as they are, or (chunk_end) on the "
        "last step of each chunk's last block as 1 or -1, z-scored in the group",
    )
    gam: float = key(1.0, "value model: discount of later steps' rewards and values (γ)", low=0, high=1)
    lam: float = key(1.0, "value model: weight of later steps in the advantage (λ of GAE)", low=0, high=1)
    mismatch_views: int = key(
        64,
        "most views replayed to measure mismatch_kl where the method's own are no replay: a random part of all "
        "trajectories', fewer where it would take more than a twentieth of the step",
        low=1,
    )
    replay_routes: bool = key(
        False,
        "mixtures of experts: the update gives every token to the experts that the sampler gave it to (2510.11370)",
    )
    old_logp: Literal["auto", "engine", "recompute", "detach"] = key(
        "auto", "auto, engine, recompute or detach: whose log-probabilities the ratio starts from"
    )
    tis_cap: float | None = key(
        None, "largest importance weight π_trainer/π_engine of a token, for low precision; null: no weights", low=0.01
    )


@dataclass
class SFTTrainingConfig(TrainingBase):
    method: Literal["semi-ar", "trace", "random_masking", "ar"] = key(
        "semi-ar",
        "how views are made: semi-ar (block by block), trace (replays the samples' step_map), random_masking (the "
        "whole response; full attention), ar (next token; families with shifted logits)",
    )
    shrink: int = key(
        1, "trace: this many neighbouring steps (of a block, under block attention) are merged into one view", low=1
    )
    loss_weight: Literal["none", "elbo"] = key(
        "none", "none: mean over predicted tokens; elbo: each weighted by 1/t, t its masking probability"
    )
    corrupt_p: float = key(
        0.0,
        "semi-ar, block attention: the probability with which a visible token of a view's block is replaced; above 0 "
        "the visible tokens are predicted too, and the model learns to edit",
        low=0,
        high=1,
    )
    corrupt_from: Literal["uniform", "model"] = key(
        "uniform",
        "corrupt_p: by what tokens are replaced: any of the vocabulary (uniform), or what the model draws there",
    )
    corrupt_weight: float = key(
        1.0, "corrupt_p: weight of a visible token's loss, where a masked one's is 1; the mean is by these", low=0.01
    )
    block_size: int = key(4, "tokens denoised together; not set: the checkpoint's own", low=1)
    batch_size: int = key(32, "samples in one update, over all devices", low=1)
    num_train_epochs: int = key(1, "passes over the data", low=1)
    max_steps: int = key(0, "stop after so many updates; 0: by epochs", low=0)
    max_gen_length: int = key(
        2000,
        "samples with longer responses are dropped and counted; full attention: the longest canvas",
        low=1,
    )
    canvas: Literal["batch", "full"] = key(
        "batch",
        "full attention: the end of sequence fills a response up to the longest of four in a row, in whole blocks "
        "(batch), or to max_gen_length (full); trace replays the canvas that was sampled",
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
    name: Literal["adamw"] = key("adamw", "adamw")
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
    scheduler: Literal["constant", "linear", "cosine"] = key("constant", "constant, linear or cosine")
    params: SchedulerParams = section(SchedulerParams)


# Runs, models, data ---------------------------------------------------------------------------------------------------


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
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = key(
        ["tensorboard"], "where curves go besides metrics.jsonl: tensorboard, wandb, trackio"
    )
    hang_timeout: float = key(1800.0, "a rank that did not move for so many seconds is reported; 0: never", low=0)


@dataclass
class SFTExperimentConfig(TrainingExperiment):
    save_every: int = key(500, "updates between checkpoints to resume from; 0: only the final model", low=0)


@dataclass
class ExperimentConfig(TrainingExperiment, EvalExperimentConfig):
    max_failures: int = key(3, "many nodes: how often a run goes on after it lost a node", low=0)
    rollout_nodes: int = key(
        0,
        "many nodes: the last n of them draw only, a step ahead, while the others train; 0: all draw and train in turn",
        low=0,
    )
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
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers that get one, by name; experts: all of a mixture's, each its own",
    )


@dataclass
class ModelConfig:
    pretrained_model: str = key("", "folder or hub id of the model; `tiny`: a new small network (SFT only)")
    model_base: str = key("sdar", FAMILIES_HELP)
    optimized_name: str = key("optimized", "folder of the trained model under ckpt/")
    dtype: Dtype = key("auto", "of the weights: auto (bfloat16 on a GPU, float32 elsewhere), float32, bfloat16")
    lora: LoraSettings = section(LoraSettings)


@dataclass
class PromptsConfig:
    """The instruction around {question}, by kind of task; null: as the family's published evaluation words it."""

    math: str | None = key(None, "of a maths task")
    code_function: str | None = key(None, "of a code task whose function is called")
    code_stdio: str | None = key(None, "of a code task whose program reads input and prints output")
    option: str | None = key(None, "of a multiple choice")
    general: str | None = key(None, "of any other task")
    countdown: str | None = key(None, "of a countdown task, whose question reads 3,7,5=22")
    sudoku: str | None = key(None, "of a sudoku, whose question is its sixteen digits, 0 where a cell is empty")


@dataclass
class RLModelConfig(ModelConfig):
    made_by: str | None = key(None, "an SFT config that makes pretrained_model where that folder is missing")
    value_base_model: str | None = key(None, "folder or hub id of the value model's start; null: no value model")
    optimized_value_name: str = key("optimized_value", "folder of the trained value model under ckpt/")


@dataclass
class EvalDatasetConfig:
    eval_dataset: str | None = key(
        "", "tasks to evaluate on: a name, a path (json, jsonl, parquet) or a hub id; null (rl.py, finetuning): none"
    )
    data_type: Kind = key(
        "math", "how answers are checked: math, code, general, option (a letter), countdown or sudoku"
    )
    prompt_style: Literal["template", "published"] = key(
        "template",
        "what stands around a task's turn: the tokenizer's chat template, or the very text of the family's published "
        "evaluation",
    )
    few_shot: int = key(0, "worked examples before each task, within the user's turn", low=0)
    few_shot_dataset: str = key(
        "GSM8K_train", "the first of which set they are, a name, path or hub id; its records: `question`, `solution`"
    )
    prompts: PromptsConfig = section(PromptsConfig)


@dataclass
class DatasetConfig(EvalDatasetConfig):
    train_dataset: str = key("", "tasks to learn from: a name, a path (json, jsonl, parquet) or a hub id")


@dataclass
class SFTDatasetConfig(EvalDatasetConfig):
    eval_dataset: str | None = key("", "tasks on which accuracy is measured by sampling; empty or null: it is not")
    optimization_data: str = key("", "samples to learn: a name, a path (json, jsonl, parquet) or a hub id")
    prompt_key: str = key("prompt", "the field of a record that holds the prompt")
    response_key: str = key("response", "the field of a record that holds the response")
    apply_chat_template: bool = key(True, "False: prompts stand in the chat template already")
    correct_only: bool = key(False, "use only records whose `correct` is true, as eval.py writes it")
    bad_samples: Literal["refuse", "skip"] = key(
        "refuse", "samples that cannot be learned: refuse (stop) or skip (and count)"
    )
    validation_share: float = key(
        0.0, "share of the prompts whose samples are kept out and give the validation loss", low=0, high=0.9
    )
