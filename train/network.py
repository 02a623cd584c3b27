"""The trained networks as functions of packed rows: log-probabilities, or values, at predicted positions."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.schema import Sampling
from models.value import ValueNetwork
from sample.draw import draw
from train.attention import TILE, attention_mask, take_block_masks
from train.packing import PackedBatch
from train.whole_rows import are_whole, states_of_whole_rows

CHUNK_ELEMENTS = 1 << 23  # of a (positions, vocab) float32 tensor on the CPU: 32 MiB
LEAST_POSITIONS = 256  # in a chunk there
CUDA_POSITIONS = (1024, 2048)  # fewer leave a GPU waiting for the head's weights, more win nothing
CUDA_SHARE = 16  # of the device's memory, the part that a chunk of more than the fewest may take
CHUNK_BYTES = 16  # an element at the backward's peak: logits and their gradient in half precision, three in float32


class Policy(torch.nn.Module):
    """A language model whose forward returns logp and entropy of the predicted tokens of a packed batch.

    Logits exist at predicted positions only and chunk by chunk, recomputed in the backward pass.
    """

    def __init__(self, backbone: PreTrainedModel, mask_id: int):
        super().__init__()
        take_block_masks(backbone)
        self.backbone = backbone
        self.head = Head(backbone.lm_head, mask_id)

    @property
    def saved(self) -> torch.nn.Module:
        """What a checkpoint holds, under the names of its parameters."""
        return self.backbone

    def forward(
        self, batch: PackedBatch, temperature: float = 1.0, uniform: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """logp (predicted,) with gradient, as the engine defines it, and entropy (predicted,) without, in nats.

        `uniform` (predicted,) in [0, 1) takes the place of the targets: the ids that they draw (predicted,) are
        returned with their logp.
        """
        return self.head(predicted_states(self.backbone, batch), batch.target, temperature, uniform)


class Head(torch.nn.Module):
    """From hidden states to logp and entropy, chunk by chunk.

    One module, whatever the number of chunks: ranks that shard its weight gather it once, all at the same time.
    """

    def __init__(self, lm_head: torch.nn.Linear, mask_id: int):
        super().__init__()
        self.lm_head = lm_head
        self.mask_id = mask_id

    def forward(
        self, hidden: Tensor, target: Tensor, temperature: float, uniform: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """logp and entropy (predicted,) of the targets (predicted,) given hidden (predicted, hidden).

        With `uniform` (predicted,) ids drawn by it, and their logp, without gradient.
        """
        size = chunk_positions(self.lm_head.out_features, hidden.device)
        if uniform is not None:
            settings = Sampling(temperature=temperature)
            with torch.no_grad():
                chunks = zip(hidden.split(size), uniform.split(size))
                drawn = [draw(self.lm_head(states), number, self.mask_id, settings) for states, number in chunks]
            return torch.cat([one.tokens for one in drawn]), torch.cat([one.logp for one in drawn])

        def of_chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            return TargetLogp.apply(self.lm_head(states), ids, self.mask_id, temperature)

        chunks = zip(hidden.split(size), target.split(size))
        logp, entropy = zip(*(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks))
        return torch.cat(logp), torch.cat(entropy)


def chunk_positions(vocabulary: int, device: torch.device) -> int:
    """How many positions' logits there are at a time; the same on every call, so that runs repeat."""
    if device.type != "cuda":
        return max(LEAST_POSITIONS, CHUNK_ELEMENTS // vocabulary)
    fewest, most = CUDA_POSITIONS
    memory = torch.cuda.get_device_properties(device).total_memory // CUDA_SHARE
    return min(most, max(fewest, memory // (CHUNK_BYTES * vocabulary) // TILE * TILE))


class TargetLogp(torch.autograd.Function):
    """`sample.draw.token_logp` of the targets, and the entropy without gradient, (chunk,) each.

    Written out because autograd keeps five tensors of the logits' size alive where two do.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, mask_id: int, temperature: float) -> tuple[Tensor, Tensor]:
        """logits (chunk, vocab), target (chunk,)."""
        scaled = logits.float() / temperature  # a new tensor: what follows is in place
        scaled[:, mask_id] = torch.finfo(torch.float32).min  # not -inf: times a probability of 0 it would be NaN
        scaled -= scaled.amax(-1, keepdim=True)
        chosen = scaled.gather(-1, target[:, None])[:, 0]
        scaled.clamp_(min=-1e4)  # the mask token's again, for the product below
        probability = scaled.exp()
        total = probability.sum(-1)
        entropy = total.log() - torch.linalg.vecdot(probability, scaled) / total
        ctx.save_for_backward(probability.div_(total[:, None]), target)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(entropy)
        return chosen - total.log(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        """d logp / d logits = (1 at the target − probability) / T."""
        probability, target = ctx.saved_tensors
        slope = slope / ctx.temperature
        gradient = probability * -slope[:, None]
        gradient.scatter_add_(-1, target[:, None], slope[:, None])
        return gradient.to(ctx.dtype), None, None, None


class Critic(torch.nn.Module):
    """A value model whose forward returns the values of the predicted tokens of a packed batch."""

    def __init__(self, value_network: ValueNetwork):
        super().__init__()
        take_block_masks(value_network.network)
        self.value_network = value_network

    @property
    def saved(self) -> torch.nn.Module:
        """What a checkpoint holds, under the names of its parameters."""
        return self.value_network

    def forward(self, batch: PackedBatch) -> Tensor:
        """Values (predicted,), read where a prediction for those positions is read."""
        return self.value_network.head(predicted_states(self.value_network.network, batch))


def predicted_states(backbone: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The backbone's last hidden states where the batch's tokens are predicted, (predicted, hidden)."""
    if are_whole(backbone, batch):
        return states_of_whole_rows(backbone, batch)
    hidden = backbone.model(
        input_ids=batch.ids, position_ids=batch.position, attention_mask=attention_mask(batch), use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.predict_at]
