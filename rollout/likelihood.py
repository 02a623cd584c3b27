"""A lower bound on the log-likelihood of a given response, by Monte Carlo over masks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models import LoadedModel
from sample.block_attention import block_causal_mask
from sample.draw import token_logp


def spans_of(prompt: int, length: int, block_size: int | None) -> list[tuple[int, int]]:
    """The parts of positions prompt … prompt + length that are noised together: blocks aligned to 0, or all (None)."""
    if block_size is None:
        return [(prompt, prompt + length)]
    starts = [prompt, *range((prompt // block_size + 1) * block_size, prompt + length, block_size)]
    return list(zip(starts, [*starts[1:], prompt + length]))


@torch.inference_mode()
def response_elbo(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    block_size: int | None,
    masks: int,
    seed: int = 0,
    rows: int = 16,
) -> float:
    """An unbiased estimate, in nats, of a lower bound on log p(response | prompt).

    Of each part of n tokens (a block under block attention, else the response) l ~ U{1 … n} tokens are masked at
    random; n / l times the sum of their log-probabilities, the clean tokens before and beside them given, has the
    bound as its mean over masks (LLaDA, arXiv 2502.09992, eq. 6). `masks` patterns are drawn for each part; a part of
    one token has one pattern and is exact.
    """
    device = loaded.model.device
    clean = torch.tensor([*prompt_ids, *response_ids], device=device)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start, end in spans_of(len(prompt_ids), len(response_ids), block_size):
        patterns = _patterns(end - start, masks, generator).to(device)  # (masks, part)
        logp = torch.cat(
            [_masked_logp(loaded, clean[:end], start, part, block_size) for part in patterns.split(rows)]
        )  # (masks, part)
        weight = (end - start) / patterns.sum(1)
        total += float(((logp * patterns).sum(1) * weight).mean())
    return total


def _patterns(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Masks, bool (count, size): l uniform over 1 … size, then l positions uniform."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.bool)
    masked = torch.randint(1, size + 1, (count, 1), generator=generator)
    rank = torch.rand(count, size, generator=generator).argsort(1).argsort(1)
    return rank < masked


def _masked_logp(loaded: LoadedModel, clean: Tensor, start: int, masked: Tensor, block_size: int | None) -> Tensor:
    """log p of the clean tokens from `start` on, those of `masked` (rows, part) hidden; (rows, part)."""
    ids = clean.repeat(len(masked), 1)  # (rows, length)
    ids[:, start:][masked] = loaded.mask_id
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    everything = torch.ones_like(ids, dtype=torch.bool)
    size = ids.shape[1] if block_size is None else block_size  # one block: every token sees every other
    hidden = loaded.model.model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=block_causal_mask(positions, everything, size).expand(-1, 1, -1, -1),
        use_cache=False,
    ).last_hidden_state
    offset = loaded.family.logit_offset
    logits = loaded.model.lm_head(hidden[:, start + offset : ids.shape[1] + offset])  # (rows, part, vocab)
    logp = token_logp(logits, loaded.mask_id, 1.0)
    return logp.gather(-1, clean[start:].expand(len(ids), -1)[..., None])[..., 0]
