"""Which experts a mixture's tokens are given to in training: counted, compared with the sampler's or replaced by them,
kept fixed, and evened out by their biases."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from common import ranks
from common.errors import UserError
from common.schema import TrainingBase
from models.mixture import after_routing, expert_biases, noting_experts, routers
from train.packing import PackedBatch

FIGURES = ("expert_tokens", "expert_tokens_least", "busiest_expert", "routing_entropy")


def prepare_routers(network: torch.nn.Module, training: TrainingBase) -> None:
    """Freeze the routers where the config says so; UserError where it asks for what the network does not have."""
    found = routers(network)
    if training.freeze_router and not found:
        raise UserError("training.freeze_router: the model has no experts to route to; leave it out")
    if training.expert_bias_rate and not list(expert_biases(network)):
        raise UserError("training.expert_bias_rate: the model's routers have no biases (llada2's have); leave it out")
    for router in found if training.freeze_router else ():
        router.weight.requires_grad_(False)


@dataclass(eq=False)
class Routing:
    """What the forwards of an update gave to each expert, on this rank, every token of every row once; no padding.

    So the figures do not depend on how rows are cut and which of their tokens are shared.
    """

    network: torch.nn.Module
    bias_rate: float = 0.0
    tokens: float = 0.0  # of all forwards
    entropy: float = 0.0  # summed over layers and tokens
    differing: float = 0.0  # (token, layer) pairs whose experts are not the sampler's
    compared: float = 0.0  # of so many

    def __post_init__(self) -> None:
        self.routers = routers(self.network)
        self.counts = torch.zeros(len(self.routers), self.routers[0].num_experts, dtype=torch.float64)

    @contextmanager
    def counting(self, batch: PackedBatch) -> Iterator[None]:
        """Within it the forward of the batch is counted."""
        times = batch.counted.flatten()  # (tokens,)
        self.tokens += float(times.sum())
        with after_routing(self.routers, lambda layer, router, output: self.count(layer, times, *output)):
            yield

    @contextmanager
    def replaying(self, batch: PackedBatch) -> Iterator[None]:
        """Within it the batch's tokens are given to the sampler's experts, where it knows them, forward and backward.

        Which experts a token is given to is not differentiated; their weights are the trainer's own for these experts,
        with their gradient (rollout routing replay, arXiv 2510.11370).
        """
        if batch.routes is None:
            yield
            return
        routes = batch.routes.flatten(0, 1)  # (tokens, layers, chosen)

        def given(layer: int, router: torch.nn.Module, output: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
            logits, experts = output[0], routes[:, layer].long()
            return logits, self.network.expert_weights(router, logits, experts), experts

        with after_routing(self.routers, given):
            yield

    @contextmanager
    def comparing(self, batch: PackedBatch) -> Iterator[None]:
        """Within it the experts of the batch's forward are compared with the sampler's, as sets."""
        with noting_experts(self.routers) as chosen:
            yield
        times = batch.counted.flatten()[:, None]  # (tokens, 1)
        theirs = batch.routes.flatten(0, 1).long().sort(-1).values  # (tokens, layers, chosen)
        ours = torch.stack(chosen, 1).sort(-1).values
        self.differing += float((times * (ours != theirs).any(-1)).sum())
        self.compared += float(times.sum() * ours.shape[1])

    def take_flips(self) -> float:
        """The share of pairs that differed since it was asked last, over all ranks. All ranks call it."""
        differing, compared = ranks.add_up(torch.tensor([self.differing, self.compared], dtype=torch.float64)).tolist()
        self.differing = self.compared = 0.0
        return differing / compared

    @torch.no_grad()
    def count(self, layer: int, times: Tensor, logits: Tensor, weights: Tensor, experts: Tensor) -> None:
        """Add one layer's choices for tokens that count so many times, (tokens,).

        logits (tokens, experts), weights and experts (tokens, chosen).
        """
        chosen = experts.repeat_interleave(times, 0).flatten()
        self.counts[layer] += torch.bincount(chosen, minlength=logits.shape[1]).double().cpu()
        scores = self.network.expert_scores(self.routers[layer], logits)
        entropy = torch.special.entr(scores / scores.sum(-1, keepdim=True)).sum(-1)  # (tokens,)
        self.entropy += float((times * entropy).sum())

    @torch.no_grad()
    def end_update(self, taken: bool) -> dict[str, float]:
        """The update's figures over all ranks; the biases take their step where it was `taken`. All ranks call it.

        A bias of an expert that got fewer tokens than its layer's mean rises by the rate, else it falls by as much
        (auxiliary-loss-free load balancing, arXiv 2408.15664, algorithm 1).
        """
        counts = ranks.add_up(self.counts.clone())
        tokens, entropy = ranks.add_up(torch.tensor([self.tokens, self.entropy], dtype=torch.float64)).tolist()
        self.counts.zero_()
        self.tokens = self.entropy = 0.0
        if self.bias_rate and taken:
            for (_, bias), layer in zip(expert_biases(self.network), counts, strict=True):
                bias += self.bias_rate * torch.sign(layer.mean() - layer).to(bias)
        return {
            "expert_tokens": float(counts.mean()),
            "expert_tokens_least": float(counts.min()),
            "busiest_expert": float((counts.amax(1) / counts.sum(1)).max()),
            "routing_entropy": entropy / tokens / len(counts),
        }
