"""The optimizer's side of training: AdamW and its schedule live through the run; one `update` is one step of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor

from common import ranks
from common.schema import OptimizerConfig, SchedulerConfig
from train.packing import PackedBatch, Row, pack
from train.policy import Policy

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class Learner:
    """What an update needs and a checkpoint keeps."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float
    engine: DeepSpeedEngine | None = None  # around the policy, where DeepSpeed shards it

    @property
    def sharded(self) -> bool:
        """Whether a rank holds but a part of every weight (ZeRO-3)."""
        return self.engine is not None and self.engine.zero_optimization_partition_weights()

    def forward(self, batch: PackedBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """logp and entropy of the batch's predicted tokens, (predicted,) each."""
        return (self.engine or self.policy)(batch.to(self.accelerator.device), temperature)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def make_accelerator(mixed_precision: str = "no") -> Accelerator:
    """Join the other ranks, if there are any, as the launcher's environment says."""
    on_gpu = torch.cuda.is_available()
    use_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if use_deepspeed and not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first launch
    handlers = []
    if use_deepspeed or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers = [InitProcessGroupKwargs(backend=None if on_gpu else "gloo", timeout=timedelta(minutes=30))]
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers)
    assert (accelerator.distributed_type == DistributedType.DEEPSPEED) == use_deepspeed
    return accelerator


def make_learner(
    policy: Policy,
    optimizer: OptimizerConfig,
    schedule: SchedulerConfig,
    updates: int,
    max_grad_norm: float,
    mixed_precision: str = "no",
) -> Learner:
    """AdamW over the policy and a schedule of `updates` updates, prepared by accelerate for this machine."""
    accelerator = make_accelerator(mixed_precision)
    params = optimizer.params
    adamw = torch.optim.AdamW(
        [parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.epsilon,
        weight_decay=params.weight_decay,
    )
    # not prepared: accelerate would advance it once per process and per accumulated micro-batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: rate_factor(schedule, done, updates))
    learner = Learner(policy, adamw, scheduler, accelerator, max_grad_norm)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        learner.engine, learner.optimizer = with_deepspeed(learner)
    else:
        # evaluation_mode: not wrapped for many ranks, whose gradients `step` adds up
        learner.policy = accelerator.prepare_model(policy, evaluation_mode=True)
    return learner


def with_deepspeed(learner: Learner) -> tuple[DeepSpeedEngine, torch.optim.Optimizer]:
    """The policy and its optimizer in DeepSpeed's hands. It clips, and skips a step whose gradient is not finite."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(learner.policy, [type(learner.policy.head)])
    settings = learner.accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = settings["gradient_accumulation_steps"] = 1  # boundaries are set here
    settings["train_batch_size"] = ranks.world()
    settings["gradient_clipping"] = learner.max_grad_norm
    if learner.accelerator.mixed_precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    engine, optimizer = learner.accelerator.prepare(learner.policy, learner.optimizer)
    return engine, optimizer


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


def micro_batches(rows: Sequence[Row], token_budget: int) -> list[PackedBatch]:
    """The rows of an update cut into micro-batches, the same on every rank, and at least one for each where rows do."""
    return pack(rows, token_budget, at_least=ranks.world())


def my_share(batches: Sequence[PackedBatch]) -> list[tuple[PackedBatch, bool]]:
    """This rank's micro-batches, as many as every other's; False marks one that only fills up, to be weighted 0.

    They come sorted by length, so that those computed side by side are alike.
    """
    count, number = ranks.world(), ranks.rank()
    places = range(number, -(-len(batches) // count) * count, count)
    return [(batches[place], True) if place < len(batches) else (batches[0], False) for place in places]


def update(
    learner: Learner,
    batches: Sequence[PackedBatch],
    loss: Callable[[PackedBatch, Tensor], Tensor],
    temperature: float = 1.0,
    before_step: Callable[[], None] | None = None,
) -> float:
    """One optimizer step on the sum of `loss(batch, logp)` over all micro-batches; returns the gradient's norm.

    The batches are the whole update's, the same on every rank; each rank computes its share of them. The loss holds
    the update's denominators, so gradients just add up. `before_step` is called when they have. Raises
    FloatingPointError on every rank, weights and optimizer untouched, where the gradient is not finite.
    """
    share, count = my_share(batches), ranks.world()
    learner.policy.train()  # without it transformers ignores gradient checkpointing
    try:
        for number, (batch, counts) in enumerate(share, 1):
            if learner.engine is not None:
                learner.engine.set_gradient_accumulation_boundary(number == len(share))
            logp, _ = learner.forward(batch, temperature)
            value = loss(batch, logp) if counts else 0 * logp.sum()
            if learner.engine is not None:
                learner.engine.backward(value * count)  # it takes the mean over ranks
            else:
                learner.accelerator.backward(value)
    finally:
        learner.policy.eval()  # the engine may share the network
    if before_step is not None:
        before_step()
    norm = step(learner)
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    learner.scheduler.step()
    return norm


def step(learner: Learner) -> float:
    """Clip and step on the gradients that have added up, unless they are not finite; returns their norm."""
    if learner.engine is not None:
        learner.engine.step()
        norm = float(learner.engine.get_global_grad_norm())
    else:
        if ranks.world() > 1:
            for parameter in learner.policy.parameters():
                if parameter.requires_grad:
                    torch.distributed.all_reduce(parameter.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), learner.max_grad_norm))
        if math.isfinite(norm):
            learner.optimizer.step()
        learner.optimizer.zero_grad()
    return norm


@torch.no_grad()
def batch_logp(learner: Learner, batches: Sequence[PackedBatch], count: int, temperature: float) -> Tensor:
    """logp of the predicted tokens of all batches under the present weights, (count,) on the CPU, in row order."""
    result = torch.zeros(count)
    for batch, counts in my_share(batches):
        logp, _ = learner.forward(batch, temperature)
        if counts:
            result[batch.predicted] = logp.float().cpu()
    return ranks.add_up(result)


def full_weights(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the network by name, whole; where ranks share it out, gathered one after another.

    A gathered tensor is gone when the next is asked for. All ranks must go through all of them.
    """
    for name, parameter in learner.policy.model.named_parameters():
        with gathered(learner, parameter):
            yield name, parameter.data


@contextlib.contextmanager
def whole_networks(accelerator: Accelerator) -> Iterator[None]:
    """Within it networks are loaded whole on every rank, as an engine needs them, also where ZeRO-3 shards others."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # accelerate's zero3_init_context_manager no longer has an effect on transformers
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def gathered(learner: Learner, parameter: torch.nn.Parameter) -> contextlib.AbstractContextManager:
    """Within it the parameter is whole on every rank."""
    if not learner.sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
