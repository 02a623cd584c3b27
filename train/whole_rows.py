"""Rows of full attention on a processor: every token of a row sees the whole row, and nothing else.

So the mask is one number for each key, and the last layer is needed where something is predicted and nowhere else: one
or two tokens of a row under TraceRL. Its activations are kept where the other layers' are computed again, as they would
be in memory together with its gradients anyway. Block attention, causal rows, rows that share a line and GPUs take
transformers' own forward under the masks of train/attention.py.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from models.family import family_of_network
from models.gates import is_gated
from sample.kernels import PLAIN
from sample.network import PRE_NORM, OwnKeys, bias_of, by_parts
from train.packing import PackedBatch


def are_whole(backbone: PreTrainedModel, batch: PackedBatch) -> bool:
    """Whether `states_of_whole_rows` gives the states of this network and batch."""
    if batch.ids.is_cuda or family_of_network(backbone).attention != "full":
        return False
    # no mixtures: their experts are counted over the tokens of every layer
    known = all(isinstance(layer, PRE_NORM) and is_gated(layer.mlp) for layer in backbone.model.layers)
    dropout = getattr(backbone.config, "attention_dropout", 0.0)
    causal = batch.block.any()  # its blocks are of one token
    joined = ((batch.trajectory != batch.trajectory[:, :1]) & (batch.trajectory >= 0)).any()
    return known and not dropout and not causal and not joined


def states_of_whole_rows(backbone: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """The backbone's last hidden states where the batch's tokens are predicted, (predicted, hidden)."""
    model, (lines, length) = backbone.model, batch.ids.shape
    line, place = batch.predict_at // length, batch.predict_at % length
    counts = line.bincount(minlength=lines)
    number = torch.arange(len(line)) - (counts.cumsum(0) - counts)[line]  # of a prediction in its line
    at = torch.zeros(lines, max(1, int(counts.max())), dtype=torch.long)  # (lines, the most of one)
    at[line, number] = place
    hidden = model.embed_tokens(batch.ids)
    tables = model.rotary_emb(hidden, batch.position)
    attention = OwnKeys(bias_of(batch.trajectory >= 0, hidden.dtype)[:, None, None])
    for layer in model.layers[:-1]:
        own = partial(by_parts, layer, tables=tables, attention=attention, kernels=PLAIN)
        again = layer.gradient_checkpointing and layer.training
        hidden = checkpoint(own, hidden, use_reentrant=False) if again else own(hidden)
    hidden = by_parts(model.layers[-1], hidden, tables, attention, PLAIN, at)
    return model.norm(hidden[line, number])
