"""The keys of training: views and losses, the optimizer and its schedule."""

# ruff: noqa: RUF009 — `key` and `section` make fields, which is what dataclass defaults are for

from dataclasses import dataclass

from common.keys import key, section


@dataclass
class TrainingBase:
    seed: int = key(10086, "of weights, data order and draws", low=0)
    max_prompt_len: int = key(784, "longer prompts are dropped and counted", low=1)
    tokens_per_micro_batch: int = key(16384, "packed tokens in one forward of the trainer", low=1)
    max_grad_norm: float = key(1.0, "gradients are clipped to this norm; 0: they are not", low=0)
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
        "token",
        "token, length or step (those that shrink merged are one): over what token losses are averaged",
        choices=("token", "length", "step"),
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
    block_size: int = key(4, "tokens denoised together; not set: the checkpoint's own", low=1)
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
