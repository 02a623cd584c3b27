"""The trained networks as functions of packed rows: log-probabilities, or values, at predicted positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.attention import take_block_masks
from models.value import ValueNetwork
from sample.draw import token_logp
from train.attention import attention_mask
from train.packing import PackedBatch

CHUNK_ELEMENTS = 1 << 26  # of a (positions, vocab) float32 tensor: 256 MiB


class Policy(torch.nn.Module):
    """A language model whose forward returns logp and entropy of the predicted tokens of a packed batch.

    Logits exist at predicted positions only and chunk by chunk, recomputed in the backward pass.
    """

    def __init__(self, model: torch.nn.Module, mask_id: int):
        super().__init__()
        take_block_masks(model)
        self.model = model
        self.mask_id = mask_id

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """logp (predicted,) with gradient, as the engine defines it, and entropy (predicted,) without, in nats."""
        hidden = predicted_states(self.model, batch)
        size = max(1, CHUNK_ELEMENTS // self.model.lm_head.weight.shape[0])
        pairs = [
            checkpoint(self._head, states, target, temperature, use_reentrant=False)
            for states, target in zip(hidden.split(size), batch.target.split(size))
        ]
        return torch.cat([logp for logp, _ in pairs]), torch.cat([entropy for _, entropy in pairs])

    def _head(self, hidden: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logp = token_logp(self.model.lm_head(hidden), self.mask_id, temperature)  # (chunk, vocab)
        with torch.no_grad():
            probability = logp.exp()
            entropy = -torch.where(probability > 0, probability * logp, 0).sum(-1)
        return logp.gather(-1, target[:, None])[:, 0], entropy


class Critic(torch.nn.Module):
    """A value model whose forward returns the values of the predicted tokens of a packed batch."""

    def __init__(self, model: ValueNetwork):
        super().__init__()
        take_block_masks(model.network)
        self.model = model

    def forward(self, batch: PackedBatch) -> Tensor:
        """Values (predicted,), read where a prediction for those positions is read."""
        return self.model.head(predicted_states(self.model.network, batch))


def predicted_states(model: torch.nn.Module, batch: PackedBatch) -> Tensor:
    """The network's last hidden states where the batch's tokens are predicted, (predicted, hidden)."""
    hidden = model.model(
        input_ids=batch.ids, position_ids=batch.position, attention_mask=attention_mask(batch), use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch.predict_at]
