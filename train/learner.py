"""The trained network with its optimizer, on one device or many: AdamW and its schedule live through the run.

`update` is one step of them over micro-batches. accelerate joins the ranks, and DeepSpeed shards what belongs to the
network where the launcher's config says so; `whole_weights` makes sharded weights whole again.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from common import ranks
from common.errors import UserError
from common.runtime import console
from common.schema import CPU_TOKENS, CUDA_TOKENS, OptimizerParams, SchedulerConfig, TrainingBase
from common.stop import beat
from models.lora import adapted_layer, is_adapter, merged, plain_name
from models.mixture import expert_biases
from train.attention import TILE
from train.network import Head
from train.packing import PackedBatch, Row, pack
from train.pieces import Kept
from train.routing import Routing

MOST_PADDING = 0.2  # of a micro-batch where a dense mask forbids long rows; benchmarks/finetuning.py compares


@dataclass
class Learner:
    """A network, policy or value model, with what its updates need and a checkpoint keeps."""

    network: torch.nn.Module  # packed batch → what it predicts there; train.network has the two
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float
    max_bad_steps: int = 1
    bad_in_a_row: int = 0
    deepspeed: torch.nn.Module | None = None  # its engine around the network, where DeepSpeed shards what belongs to it
    routing: Routing | None = None  # of a mixture of experts

    @property
    def sharded(self) -> bool:
        """Whether a rank holds but a part of every weight (ZeRO-3)."""
        return self.deepspeed is not None and self.deepspeed.zero_optimization_partition_weights()

    def replaying(self, batch: PackedBatch) -> contextlib.AbstractContextManager:
        """Within it a mixture gives the batch's tokens to the sampler's experts, where the batch knows them."""
        return contextlib.nullcontext() if self.routing is None else self.routing.replaying(batch)

    def forward(self, batch: PackedBatch, *options: float | Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network says of a packed batch. Under ZeRO-3 all ranks must call it."""
        beat()
        return (self.deepspeed or self.network)(batch, *options)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the loss's gradients to those of the update's other micro-batches; `last` marks the update's last."""
        if self.deepspeed is None:
            loss.backward()
        else:
            self.deepspeed.set_gradient_accumulation_boundary(last)
            self.deepspeed.backward(loss * ranks.world())  # it takes the mean over ranks


@dataclass(frozen=True)
class Update:
    """What came of one update."""

    loss: float  # the sum over its micro-batches
    grad_norm: float  # before clipping
    taken: bool  # False: one of the two was not finite; weights, optimizer and schedule are as they were
    routing: dict[str, float] = field(default_factory=dict)  # train.routing.FIGURES of a mixture


def make_learner(
    network: torch.nn.Module,
    optimizer: OptimizerParams,
    schedule: SchedulerConfig,
    updates: int,
    training: TrainingBase,
    mixed_precision: str = "no",
) -> Learner:
    """AdamW over what of the network is trained and a schedule of `updates` updates, prepared by accelerate."""
    accelerator = make_accelerator(mixed_precision)
    adamw = torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
    )
    deepspeed = None
    if accelerator.state.deepspeed_plugin is None:
        # not wrapped, also where ranks are many: `optimizer_step` adds their gradients up
        network = accelerator.prepare_model(network, evaluation_mode=True)
    else:
        deepspeed = with_deepspeed(accelerator, network, adamw, training.max_grad_norm)
        adamw = deepspeed.basic_optimizer
    # not prepared: accelerate would advance it once per process and per accumulated micro-batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, lambda done: rate_factor(schedule, done, updates))
    limits = (training.max_grad_norm, training.max_bad_steps)
    return Learner(network, adamw, scheduler, accelerator, *limits, deepspeed=deepspeed)


def make_accelerator(mixed_precision: str = "no") -> Accelerator:
    """Join the other ranks, if there are any, as the launcher's environment says."""
    on_gpu = torch.cuda.is_available()
    use_deepspeed = under_deepspeed()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset, DeepSpeed warns that it chose so where it is imported
    if use_deepspeed and not on_gpu:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first launch
    handlers = []
    if use_deepspeed or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        handlers = [InitProcessGroupKwargs(backend=None if on_gpu else "gloo", timeout=ranks.TIMEOUT)]
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers)
    assert (accelerator.state.deepspeed_plugin is not None) == use_deepspeed
    assert accelerator.num_processes == ranks.world() == int(os.environ.get("WORLD_SIZE", "1"))
    return accelerator


def under_deepspeed() -> bool:
    """Whether the launcher's config puts networks and optimizers in DeepSpeed's hands."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def with_deepspeed(
    accelerator: Accelerator, network: torch.nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> torch.nn.Module:
    """The network and its optimizer in DeepSpeed's hands. It clips, and skips a step whose gradient is not finite."""
    from deepspeed.utils import set_z3_leaf_modules

    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = settings["gradient_accumulation_steps"] = 1  # the learner's to set
    settings["train_batch_size"] = ranks.world()
    settings["gradient_clipping"] = max_grad_norm
    if accelerator.mixed_precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if any(isinstance(module, Head) for module in network.modules()):
        set_z3_leaf_modules(network, [Head])
    deepspeed, _ = accelerator.prepare(network, optimizer)
    return deepspeed


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


def micro_batches(rows: Sequence[Row], token_budget: int | None) -> list[PackedBatch]:
    """The rows of an update as micro-batches, the same on every rank; one for each at least, where rows are enough.

    None takes the device's budget. Packed as suits the device: joined, in whole tiles, where attention skips what is
    not visible, else side by side.
    """
    joined = torch.cuda.is_available()
    multiple = TILE if joined else 1
    token_budget = token_budget or (CUDA_TOKENS if joined else CPU_TOKENS)
    return pack(rows, token_budget, ranks.world(), together=joined, most_padding=MOST_PADDING, multiple=multiple)


@dataclass(frozen=True)
class Turn:
    """What a rank computes while the others compute as much: a micro-batch, or the pieces of a row, ascending."""

    batches: list[PackedBatch]
    clean_copy: list[PackedBatch]  # forwarded before the gradients of pieces


def for_this_rank(batches: Sequence[PackedBatch]) -> list[Turn]:
    """This rank's micro-batches, as many as every other's: filled up with one in which nothing is predicted.

    A row's pieces stay with one rank. They come sorted by length, and rows by their pieces, so that those computed side
    by side are alike.
    """
    nothing = torch.zeros(0, dtype=torch.long)
    empty = {"predict_at": nothing, "target": nothing, "predicted": nothing.numpy()}
    shortest = min(batches, key=lambda batch: batch.ids.numel())
    filler = replace(shortest, **empty, counted=torch.zeros_like(shortest.counted), piece=None, clean_copy=())
    rows: list[list[PackedBatch]] = []
    for batch in batches:
        if batch.piece is None or batch.piece.number == 0:
            rows.append([])
        rows[-1].append(batch)
    rows.sort(key=len)
    turns, world = [], ranks.world()
    for start in range(0, len(rows), world):
        together = rows[start : start + world]
        own = together[ranks.rank()] if ranks.rank() < len(together) else []
        copy = list(own[-1].clean_copy) if own else []
        longest, copies = max(map(len, together)), max(len(row[-1].clean_copy) for row in together)
        turns.append(Turn(own + [filler] * (longest - len(own)), copy + [filler] * (copies - len(copy))))
    return turns


def kept_of(turn: Turn) -> Kept | None:
    """What the turn's pieces keep for each other, still empty."""
    widths = [batch.piece.width for batch in turn.batches if batch.piece is not None]
    return Kept(max(widths)) if widths else None


def on_device(learner: Learner, batch: PackedBatch, kept: Kept | None) -> PackedBatch:
    """The batch where the learner computes, a piece with what is kept of those before it."""
    batch = batch.to(learner.accelerator.device)
    return batch if batch.piece is None else replace(batch, kept=kept)


def forwarded(learner: Learner, batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
    """This rank's micro-batches on its device, for a forward of each in turn without gradient."""
    for turn in for_this_rank(batches):
        kept = kept_of(turn)
        for batch in turn.batches:
            yield on_device(learner, batch, kept)


def update(
    learner: Learner,
    batches: Sequence[PackedBatch],
    loss: Callable[[PackedBatch], Tensor],
    before_step: Callable[[], None] | None = None,
) -> Update:
    """One optimizer step on the sum of `loss(batch)` over all micro-batches; the loss runs the learner's network.

    `batches` are the whole update's, on every rank; each rank computes its share. The loss holds the update's
    denominators, so gradients just add up. `before_step` is called when they have. Where loss or gradient is not
    finite every rank skips the step; `max_bad_steps` such in a row raise UserError.
    """
    total = torch.zeros((), dtype=torch.float64)
    turns = for_this_rank(batches)
    learner.network.train()  # without it transformers ignores gradient checkpointing
    try:
        for number, turn in enumerate(turns, 1):
            kept = keep_clean_copy(learner, turn)
            for place in reversed(range(len(turn.batches))):  # a piece after all that add to its keys' gradients
                last = number == len(turns) and place == 0
                batch = on_device(learner, turn.batches[place], kept)
                with learner.replaying(batch):  # also in the backward pass, which may compute layers again
                    with learner.routing.counting(batch) if learner.routing else contextlib.nullcontext():
                        part = loss(batch)
                    total += part.detach().double().cpu()
                    if last and not math.isfinite(ranks.add_up(total)):
                        part = part * math.nan  # the gradient's norm tells all ranks to skip the step
                        if kept is not None:  # where a piece predicts nothing, its loss has no gradient to be NaN
                            kept.spoil()
                    learner.backward(part, last)
    finally:
        learner.network.eval()  # the engine may share the network
    if before_step is not None:
        before_step()
    norm = optimizer_step(learner)
    taken = math.isfinite(norm)
    routing = learner.routing.end_update(taken) if learner.routing else {}
    if taken:
        learner.scheduler.step()
        learner.bad_in_a_row = 0
    else:
        learner.bad_in_a_row += 1
        console.print(f"update skipped: the loss is {float(total)}, the gradient's norm {norm}")
    if learner.bad_in_a_row >= learner.max_bad_steps:
        raise UserError(
            f"training.max_bad_steps={learner.max_bad_steps}: that many updates in a row had a loss or gradient that "
            "is not finite; lower the learning rate, or resume from the last checkpoint "
            "(experiment.start_from_scratch=False)"
        )
    return Update(float(total), norm, taken, routing)


@torch.no_grad()
def keep_clean_copy(learner: Learner, turn: Turn) -> Kept | None:
    """Keys and values of the clean tokens that the turn's pieces see of those before them, for passes with gradient."""
    kept = kept_of(turn)
    for batch in turn.clean_copy:
        batch = on_device(learner, batch, kept)
        with learner.replaying(batch):
            learner.forward(batch)
    if kept is not None:
        kept.end_filling()
    return kept


def optimizer_step(learner: Learner) -> float:
    """Clip the gradients and step, unless they are not finite, and forget them; returns their norm over all ranks."""
    if learner.deepspeed is not None:
        learner.deepspeed.step()  # it clips, and skips by itself
        return float(learner.deepspeed.get_global_grad_norm())
    parameters = [parameter for parameter in learner.network.parameters() if parameter.requires_grad]
    if ranks.world() > 1:
        for parameter in parameters:
            torch.distributed.all_reduce(parameter.grad)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, learner.max_grad_norm or math.inf))
    if math.isfinite(norm):
        learner.optimizer.step()
    learner.optimizer.zero_grad()
    return norm


@torch.no_grad()
def batch_outputs(learner: Learner, batches: Sequence[PackedBatch], forward: Callable[[PackedBatch], Tensor]) -> Tensor:
    """`forward` of all batches of some rows at their predicted tokens, (predicted,) float32 on the CPU, in rows' order.

    Each rank computes its share of the batches, and has all the outputs.
    """
    result = torch.zeros(sum(len(batch.predicted) for batch in batches))
    for batch in forwarded(learner, batches):
        result[batch.predicted] = forward(batch).float().cpu()
    return ranks.add_up(result)


def batch_logp(learner: Learner, batches: Sequence[PackedBatch], temperature: float) -> Tensor:
    """logp of the predicted tokens of all batches under the policy's present weights, as `batch_outputs`."""

    def logp(batch: PackedBatch) -> Tensor:
        with learner.replaying(batch):
            return learner.forward(batch, temperature)[0]

    return batch_outputs(learner, batches, logp)


@torch.no_grad()
def route_flips(learner: Learner, batches: Sequence[PackedBatch]) -> float:
    """Share of (token, layer) pairs that a mixture, by its own choice, gives to other experts than the sampler did.

    The batches know the sampler's. All ranks must call it.
    """
    for batch in forwarded(learner, batches):
        with learner.routing.comparing(batch):
            learner.forward(batch)
    return learner.routing.take_flips()


# ---- weights that ranks share out


@contextlib.contextmanager
def whole_networks(accelerator: Accelerator) -> Iterator[None]:
    """Within it networks are loaded whole on every rank, as an engine needs them, also where ZeRO-3 shards others."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # accelerate's zero3_init_context_manager has no effect on transformers any more
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


def whole_weights(network: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, adapters merged; under ZeRO-3 made whole one after another. All ranks must go through all.

    A tensor that was made whole is gone when the next is asked for: one weight more is all the memory it takes.
    """
    for name, parameter in network.named_parameters():
        layer = adapted_layer(network, name)
        if layer is not None:
            with whole(*layer.parameters()):
                yield plain_name(name), merged(layer)
        elif not is_adapter(name):
            with whole(parameter):
                yield plain_name(name), parameter.data
    for name, bias in expert_biases(network):
        yield plain_name(name), bias


def whole(*parameters: torch.nn.Parameter, changed: bool = False) -> contextlib.AbstractContextManager:
    """Within it the parameters are whole on every rank; `changed`: what rank 0 writes to them there is kept."""
    if not hasattr(parameters[0], "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if changed else None)
