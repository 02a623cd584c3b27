"""Keys of the original's YAML files and of earlier versions, and what became of them."""

import math
from collections.abc import Iterator
from typing import Any

from common.errors import UserError, show
from common.schema import ATTENTION

# Keys of the original's YAML files and former ones. A key that the job's schema has is never looked up here.
# Without effect here: pattern → what takes its place.
OBSOLETE_KEYS: dict[str, str] = {
    "system.*": "no paths or proxies are configured",
    "execute.num_chunk": "work is shared out by itself",
    "wandb.*": "experiment.trackers=[wandb], entity in WANDB_ENTITY",
    "experiment.function": "one program samples and trains",
    "experiment.current_epoch": "runs resume by themselves",
    "experiment.num_node": "the launcher says",
    "experiment.node_index": "the launcher says",
    "dataset.optimization_data": "rollouts stay in memory",
    "rollout.reward_model.*": "the judge's server decides",
    "training.num_train_epochs": "each step's responses are learned from once",
    "training.enable_tf32": "model.dtype decides",
    "training.mismatch_sample": "training.mismatch_views counts what is replayed, in views",
    "*.tensor_parallel_size": "rollout.tensor_parallel_size of eval.py and rl.py decides, in evaluation too",
    "rollout.output_unmasking_history": "samples.jsonl always holds the trace",
    "optimizer.params.scale_lr": "the learning rate is taken as it is",
    "lr_scheduler.params.learning_rate": "optimizer.params.learning_rate decides",
}
# Renamed: old key → new key. Where both stand in one file the new one counts.
RENAMED_KEYS: dict[str, str] = {
    "training.max_gen_length": "rollout.max_token",
    "rollout.max_gen_length": "rollout.max_token",
    "evaluation.max_gen_length": "evaluation.max_token",
    "rollout.batch_size": "rollout.max_active",
    "evaluation.batch_size": "evaluation.max_active",
    "training.block_size": "rollout.block_size",
    "training.mixed_precision": "model.dtype",
    "training.ratio_level": "training.term",
    "optimizer.params.policy_learning_rate": "optimizer.params.learning_rate",
    "model.process_reward_model": "reward.judge.model",
    "rollout.reward_model.reward_chunk_length": "reward.judge.reward_chunk_length",
    "rollout.reward_model.k_sample": "reward.judge.k_sample",
    "rollout.reward_model.temperature": "reward.judge.temperature",
    "rollout.reward_model.max_generation_token": "reward.judge.max_generation_token",
}
# Their values that have other names here; PyYAML reads a bare `no` as False.
RENAMED_VALUES: dict[str, dict[Any, str]] = {
    "training.mixed_precision": {"bf16": "bfloat16", "no": "float32", False: "float32"},
}
# The size of an update, in rows per device, and the keys of today that `derive_update_size` sets by it, by job.
UPDATE_SIZE = {"rl": "training.updates_per_step", "sft": "training.batch_size"}
UPDATE_SIZE_KEYS = ("training.gradient_accumulation_steps", "training.batch_size_lm")


def original_objective(cfg: Any, values: dict[str, Any]) -> Iterator[str]:
    """Set what the original's code computes and its files have no key for, where `values` do not; tells it in a line.

    Under full attention its losses are means in each noised copy, and the KL a sum there; under block attention both
    are divided by the longest response. A value model learns the z-scores of groups, of process rewards by chunk.
    Programs earn the share of the tests that they pass, however long they are; other responses nothing within 5 tokens
    of the limit. It merges steps of traces alone.
    """
    full, training = cfg.model.model_base in ATTENTION["full"], cfg.training
    keys: dict[str, Any] = {}
    if not full:
        keys["training.loss_norm"] = "length"
    elif training.term == "token":
        keys["training.loss_norm"] = "view"
        if training.kl_reference != "none":
            keys["training.kl_norm"] = "view_sum"
    if cfg.model.value_base_model:
        keys["training.value_reward"] = "zscore"
        if cfg.reward.judge.reward_chunk_length:
            keys["training.process_placement"] = "chunk_end"
    if cfg.dataset.data_type == "code":
        keys["reward.truncated_is_wrong"] = False
        if cfg.reward.function is None and cfg.reward.kind in (None, "code"):
            keys["reward.code_reward"] = "share"
    else:
        keys["reward.truncated_margin"] = 5
    keys = {key: value for key, value in keys.items() if key not in values}
    for key, value in keys.items():
        section, name = key.split(".")
        setattr(getattr(cfg, section), name, value)
    if keys:
        yield "as the original's code: " + ", ".join(f"{key}={show(value)}" for key, value in keys.items())
    if training.shrink > 1 and training.method in ("random_masking", "coupled"):
        yield f"without effect here: training.shrink={training.shrink} (training.method={training.method} has no trace)"
        training.shrink = 1


def derive_update_size(job: str, cfg: Any, values: dict[str, Any], devices: int) -> str:
    """Set the size of an update on so many devices from the original's keys; returns how, in a line."""
    counts = {key: str(values.get(key, 1)) for key in UPDATE_SIZE_KEYS}
    for key, count in counts.items():
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"{key}={show(values[key])}: expected a whole number, at least 1")
    rows = devices * math.prod(map(int, counts.values()))
    how = " × ".join(f"{key}={count}" for key, count in counts.items())
    how += f" × {devices} device{'s' * (devices > 1)} = {rows} rows an update"
    made, why = rows_of_response(job, cfg, values)
    if job == "sft":
        cfg.training.batch_size = max(round(rows / made), 1)
        return f"{how}, {made} of a sample ({why}) → training.batch_size={cfg.training.batch_size}"
    responses = cfg.rollout.num_task_per_step * cfg.rollout.num_response_per_task
    cfg.training.updates_per_step = min(max(round(responses * made / rows), 1), responses)
    return (
        f"{how}, {responses} responses × {made} rows a step ({why}) → "
        f"training.updates_per_step={cfg.training.updates_per_step} (set it to choose another)"
    )


def rows_of_response(job: str, cfg: Any, values: dict[str, Any]) -> tuple[int, str]:
    """How many rows the original made of one response, as far as the config tells, and of what.

    Here all views of a response count as one.
    """
    training = cfg.training
    if training.method in ("random_masking", "coupled") or (job == "sft" and training.method == "semi-ar"):
        pairs = 2 if training.method == "coupled" else 1
        return training.mask_times_per_sample * pairs, "noised copies"
    if job == "sft" or training.method != "TraceRL":
        return 1, f"training.method={training.method}"
    rollout, family = cfg.rollout.at_step(1), cfg.model.model_base
    # rows are steps of the whole response, or of a block
    if family in ATTENTION["full"] or (":" in family and "rollout.steps" in values):
        steps, of = min(rollout.steps, rollout.max_token), "rollout.steps"
    elif rollout.remasking_strategy in ("low_confidence_static", "low_confidence_dynamic", "sequential"):
        steps, of = rollout.denoising_steps_per_block, "rollout.denoising_steps_per_block"
    else:
        steps, of = rollout.block_size, "rollout.block_size"
    return math.ceil(steps / training.shrink), of if training.shrink == 1 else f"{of} / training.shrink"
