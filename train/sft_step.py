"""One update of finetuning: conversations → views → packed rows → weighted cross-entropy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.schema import SFTTrainingConfig
from models import LoadedModel
from train.learner import Learner, batch_logp, micro_batches, update
from train.packing import PackedBatch, Row, make_rows
from train.sft_data import Conversation
from train.views import SFT_METHODS, join_views, layout_of


def rows_of(
    training: SFTTrainingConfig,
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    rng: np.random.Generator,
) -> list[Row]:
    """Packed rows of conversations under freshly drawn views."""
    method, layout = SFT_METHODS[loaded.family.attention][training.method], layout_of(loaded, training.block_size)
    rows = []
    for number, conversation in enumerate(conversations):
        views = join_views([method(example, layout, training, rng) for example in conversation])
        last = conversation[-1]  # its prompt holds the examples before it
        rows += make_rows(number, last.prompt_ids, last.response_ids, views, layout.logit_offset)
    return rows


def loss_denominator(training: SFTTrainingConfig, conversations: Sequence[Conversation], rows: Sequence[Row]) -> int:
    """What the summed losses of an update are divided by: its predicted tokens, or, for the ELBO, all predictable."""
    if training.loss_weight == "none":
        return sum(len(row.target) for row in rows)
    examples = [example for conversation in conversations for example in conversation]
    predictable = [min(one.length + training.post_num, len(one.response_ids)) for one in examples]
    return training.mask_times_per_sample * sum(predictable)


def elbo_weights(training: SFTTrainingConfig, rows: Sequence[Row]) -> Tensor | None:
    """The weight of each predicted token, (predicted,), in the order of the rows; None: 1 each."""
    if training.loss_weight == "none":
        return None
    return torch.from_numpy(np.concatenate([row.weight for row in rows])).float()


def sft_update(
    learner: Learner,
    rows: Sequence[Row],
    token_budget: int,
    denominator: int | None = None,
    weight: Tensor | None = None,
) -> dict[str, float]:
    """One update on the weighted sum of the predicted tokens' cross-entropies over `denominator`, or on their mean."""
    count = sum(len(row.target) for row in rows)

    def loss(batch: PackedBatch) -> Tensor:
        logp, _ = learner.forward(batch)
        if weight is not None:
            logp = logp * weight[batch.predicted].to(logp.device)
        return -logp.sum() / (denominator or count)

    done = update(learner, micro_batches(rows, token_budget), loss)
    figures = {"loss": done.loss, "grad_norm": done.grad_norm} if done.taken else {}
    return figures | {"predicted_tokens": count, "bad_steps": int(not done.taken)}


def validation_loss(
    learner: Learner, loaded: LoadedModel, conversations: Sequence[Conversation], training: SFTTrainingConfig
) -> float:
    """The loss on samples that are not learned, under the same noise every time."""
    rows = rows_of(training, loaded, conversations, np.random.default_rng([training.seed, 1]))
    batches = micro_batches(rows, training.tokens_per_micro_batch)
    logp = batch_logp(learner, batches, 1.0)  # (predicted,)
    weight = elbo_weights(training, rows)
    total = -float((logp if weight is None else logp * weight).sum())
    return total / loss_denominator(training, conversations, rows)
