"""The optimizer's side of training: AdamW and its schedule live through the run; one `update` is one step of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from common.errors import UserError
from common.runtime import console
from common.schema import OptimizerParams, SchedulerConfig, TrainingBase
from train.packing import PackedBatch


@dataclass
class Learner:
    """A network, policy or value model, with what its updates need and a checkpoint keeps."""

    network: torch.nn.Module  # packed batch → what it predicts there; train.policy has the two
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float
    max_bad_steps: int = 1
    bad_in_a_row: int = 0

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "bad_in_a_row": self.bad_in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.bad_in_a_row = state["bad_in_a_row"]


@dataclass(frozen=True)
class Update:
    """What came of one update."""

    loss: float  # the sum over its micro-batches
    grad_norm: float  # before clipping
    taken: bool  # False: one of the two was not finite; weights, optimizer and schedule are as they were


def make_learner(
    network: torch.nn.Module,
    optimizer: OptimizerParams,
    schedule: SchedulerConfig,
    updates: int,
    training: TrainingBase,
    mixed_precision: str = "no",
    learning_rate: float | None = None,
) -> Learner:
    """AdamW over what of the network is trained and a schedule of `updates` updates, prepared by accelerate.

    `learning_rate` takes the place of the optimizer's own.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    adamw = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=optimizer.learning_rate if learning_rate is None else learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )
    network, adamw = accelerator.prepare(network, adamw)
    # not prepared: accelerate would advance it once per process and per accumulated micro-batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: rate_factor(schedule, done, updates))
    return Learner(network, adamw, scheduler, accelerator, training.max_grad_norm, training.max_bad_steps)


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


def update(learner: Learner, batches: Iterable[PackedBatch], loss: Callable[[PackedBatch], Tensor]) -> Update:
    """One optimizer step on the sum of `loss(batch)` over all micro-batches; the loss runs the learner's network.

    The loss holds the update's denominators, so gradients just add up. Where loss or gradient is not finite the step
    is skipped; `max_bad_steps` such in a row raise UserError.
    """
    total = 0.0
    learner.network.train()  # without it transformers ignores gradient checkpointing
    try:
        for batch in batches:
            part = loss(batch.to(learner.accelerator.device))
            learner.accelerator.backward(part)
            total += float(part.detach())
    finally:
        learner.network.eval()  # the engine may share the network
    norm = float(learner.accelerator.clip_grad_norm_(learner.network.parameters(), learner.max_grad_norm))
    taken = math.isfinite(total) and math.isfinite(norm)
    if taken:
        learner.optimizer.step()
        learner.scheduler.step()
    learner.optimizer.zero_grad()
    learner.bad_in_a_row = 0 if taken else learner.bad_in_a_row + 1
    if not taken:
        console.print(f"update skipped: the loss is {total}, the gradient's norm {norm}")
    if learner.bad_in_a_row >= learner.max_bad_steps:
        raise UserError(
            f"training.max_bad_steps={learner.max_bad_steps}: that many updates in a row had a loss or gradient that "
            "is not finite; lower the learning rate, or resume from the last checkpoint "
            "(experiment.start_from_scratch=False)"
        )
    return Update(total, norm, taken)


@torch.no_grad()
def batch_outputs(
    learner: Learner, batches: Iterable[PackedBatch], count: int, forward: Callable[[PackedBatch], Tensor]
) -> Tensor:
    """`forward` of every batch at the predicted tokens, (count,) float32 on the CPU, in the order of their rows."""
    result = torch.empty(count)
    for batch in batches:
        result[batch.predicted] = forward(batch.to(learner.accelerator.device)).float().cpu()
    return result


def batch_logp(learner: Learner, batches: Iterable[PackedBatch], count: int, temperature: float) -> Tensor:
    """logp of the predicted tokens of all batches under the policy's present weights, as `batch_outputs`."""
    return batch_outputs(learner, batches, count, lambda batch: learner.network(batch, temperature)[0])


def batch_values(learner: Learner, batches: Iterable[PackedBatch], count: int) -> Tensor:
    """The value model's present values at the predicted tokens of all batches, as `batch_outputs`."""
    return batch_outputs(learner, batches, count, learner.network)
