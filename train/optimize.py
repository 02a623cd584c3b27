"""The optimizer's side of training: AdamW and its schedule live through the run; one `update` is one step of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from common.schema import OptimizerConfig, SchedulerConfig
from train.packing import PackedBatch
from train.policy import Policy


@dataclass
class Learner:
    """What an update needs and a checkpoint keeps."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def make_learner(
    policy: Policy,
    optimizer: OptimizerConfig,
    schedule: SchedulerConfig,
    updates: int,
    max_grad_norm: float,
    mixed_precision: str = "no",
) -> Learner:
    """AdamW over the policy and a schedule of `updates` updates, prepared by accelerate for this machine."""
    accelerator = Accelerator(mixed_precision=mixed_precision)
    params = optimizer.params
    adamw = torch.optim.AdamW(
        policy.parameters(),
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.epsilon,
        weight_decay=params.weight_decay,
    )
    policy, adamw = accelerator.prepare(policy, adamw)
    # not prepared: accelerate would advance it once per process and per accumulated micro-batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: rate_factor(schedule, done, updates))
    return Learner(policy, adamw, scheduler, accelerator, max_grad_norm)


def rate_factor(schedule: SchedulerConfig, done: int, updates: int) -> float:
    """The learning rate after `done` of `updates` updates, as a share of the peak."""
    warmup, lowest = schedule.params.warmup_steps, schedule.params.min_lr_scale
    if done < warmup:
        return done / warmup
    if schedule.scheduler == "constant":
        return 1.0
    progress = min(1.0, (done - warmup) / max(1, updates - warmup))
    left = 1 - progress if schedule.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return lowest + (1 - lowest) * left


def update(
    learner: Learner,
    batches: Iterable[PackedBatch],
    loss: Callable[[PackedBatch, Tensor], Tensor],
    temperature: float = 1.0,
) -> float:
    """One optimizer step on the sum of `loss(batch, logp)` over all micro-batches; returns the gradient's norm.

    The loss holds the update's denominators, so gradients just add up. Raises FloatingPointError, weights and
    optimizer untouched, where the gradient is not finite.
    """
    learner.policy.train()  # without it transformers ignores gradient checkpointing
    try:
        for batch in batches:
            batch = batch.to(learner.accelerator.device)
            logp, _ = learner.policy(batch, temperature)
            learner.accelerator.backward(loss(batch, logp))
    finally:
        learner.policy.eval()  # the engine may share the network
    norm = float(learner.accelerator.clip_grad_norm_(learner.policy.parameters(), learner.max_grad_norm))
    if not torch.isfinite(torch.tensor(norm)):
        learner.optimizer.zero_grad()
        raise FloatingPointError(f"the gradient's norm is {norm}")
    learner.optimizer.step()
    learner.scheduler.step()
    learner.optimizer.zero_grad()
    return norm


@torch.no_grad()
def batch_logp(learner: Learner, batches: Iterable[PackedBatch], count: int, temperature: float) -> Tensor:
    """logp of the predicted tokens of all batches under the present weights, (count,) on the CPU, in row order."""
    result = torch.empty(count)
    for batch in batches:
        logp, _ = learner.policy(batch.to(learner.accelerator.device), temperature)
        result[batch.predicted] = logp.float().cpu()
    return result
