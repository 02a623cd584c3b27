"""The trained networks as functions of packed rows: log-probabilities, or values, at predicted positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.value import ValueNetwork
from sample.draw import token_logp
from train.packing import PackedBatch, visible

CHUNK_ELEMENTS = 1 << 26  # of a (positions, vocab) float32 tensor: 256 MiB


class Policy(torch.nn.Module):
    """A language model whose forward returns logp and entropy of the predicted tokens of a packed batch.

    Logits exist at predicted positions only and chunk by chunk, recomputed in the backward pass.
    """

    def __init__(self, model: torch.nn.Module, mask_id: int):
        super().__init__()
        self.model = model
        self.head = Head(model.lm_head, mask_id)

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """logp (predicted,) with gradient, as the engine defines it, and entropy (predicted,) without, in nats."""
        return self.head(predicted_states(self.model, batch), batch.target, temperature)


class Head(torch.nn.Module):
    """From hidden states to logp and entropy, chunk by chunk.

    One module, whatever the number of chunks: ranks that shard its weight gather it once, all at the same time.
    """

    def __init__(self, lm_head: torch.nn.Linear, mask_id: int):
        super().__init__()
        self.lm_head = lm_head
        self.mask_id = mask_id

    def forward(self, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """logp and entropy (predicted,) of the targets (predicted,) given hidden (predicted, hidden)."""
        size = max(1, CHUNK_ELEMENTS // self.lm_head.out_features)
        pairs = [
            checkpoint(self.chunk, states, ids, temperature, use_reentrant=False)
            for states, ids in zip(hidden.split(size), target.split(size))
        ]
        return torch.cat([logp for logp, _ in pairs]), torch.cat([entropy for _, entropy in pairs])

    def chunk(self, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The same of one chunk."""
        logp = token_logp(self.lm_head(hidden), self.mask_id, temperature)  # (chunk, vocab)
        with torch.no_grad():
            probability = logp.exp()
            entropy = -torch.where(probability > 0, probability * logp, 0).sum(-1)
        return logp.gather(-1, target[:, None])[:, 0], entropy


class Critic(torch.nn.Module):
    """A value model whose forward returns the values of the predicted tokens of a packed batch."""

    def __init__(self, model: ValueNetwork):
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        """Values (predicted,), read where a prediction for those positions is read."""
        return self.model.head(predicted_states(self.model.network, batch))


def predicted_states(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """The network's last hidden states where the batch's tokens are predicted, (predicted, hidden)."""
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.position, attention_mask=visible(batch), use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.predict_at]
