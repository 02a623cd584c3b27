"""Keys of the original's YAML files, and what became of them."""

from typing import Any

# Keys of the original's YAML files. A key that the job's schema has is never looked up here.
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
# Families whose rows are steps of the whole response, not of a block.
FULL_ATTENTION = ("dream", "llada", "mmada")
# The size of an update, in rows per device; `common.config` derives updates_per_step (RL) or batch_size (SFT).
UPDATE_SIZE_KEYS = ("training.gradient_accumulation_steps", "training.batch_size_lm")
