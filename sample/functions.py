"""Sampling by one call from a loaded network: what `from generate import …` gives."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request
from models.family import check_prompt_of_network, stop_ids_of_network
from sample.engine import Engine
from sample.slots import check_drawn


def block_diffusion_generate(
    model: torch.nn.Module,
    prompt: Mapping[str, Tensor] | Tensor,
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 8,
    denoising_steps: int = 8,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_dynamic",
    confidence_threshold: float = 0.85,
    stopping_criteria_idx: Iterable[int] | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int | None = None,
    eb_threshold: float = 0.35,
    factor: float = 1.0,
    low_threshold: float = 0.62,
    revoke_threshold: float = 0.9,
    edit_threshold: float = 0.5,
    max_edit_steps: int = 16,
    min_unmask: int = 1,
) -> Tensor:
    """Prompt and response ids, (batch, prompt length + longest response), padded on the right.

    `prompt` is a tokenizer's output, or its input ids (batch, length); left padding is told by its attention mask.
    A response ends with the first stop token or after `gen_length` tokens. Stop tokens are the model's own, by its
    configs and the tokenizer beside its weights, and those of `stopping_criteria_idx`; `stop_ids` takes the place of
    the model's own. The same `seed` gives the same responses; without one, torch's generator gives a new one at each
    call. A block has at most as many denoising steps as tokens.

    `remasking_strategy` is one of docs/strategies.md or module:function; `confidence_threshold` is its
    `dynamic_threshold`, and the keys from `eb_threshold` on are those of that page.
    """
    check_counts(gen_length=gen_length, block_length=block_length, denoising_steps=denoising_steps)
    settings = Sampling(
        block_size=block_length,
        denoising_steps_per_block=min(block_length, denoising_steps),
        steps=denoising_steps * -(-gen_length // block_length),
        max_token=gen_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        remasking_strategy=remasking_strategy,
        dynamic_threshold=confidence_threshold,
        eb_threshold=eb_threshold,
        factor=factor,
        low_threshold=low_threshold,
        revoke_threshold=revoke_threshold,
        edit_threshold=edit_threshold,
        max_edit_steps=max_edit_steps,
        min_unmask=min_unmask,
    )
    return generate_ids(model, prompt, mask_id, settings, stop_ids, seed, stopping_criteria_idx)


def diffusion_generate(
    model: torch.nn.Module,
    prompt: Mapping[str, Tensor] | Tensor,
    mask_id: int,
    gen_length: int = 128,
    block_length: int = 32,
    steps: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    remasking_strategy: str = "low_confidence_static",
    target: str = "confidence",
    confidence_threshold: float = 0.9,
    use_cache: bool = False,
    further_horizon: int | None = None,
    stopping_criteria_idx: Iterable[int] | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int | None = None,
) -> Tensor:
    """As `block_diffusion_generate`, for models with full attention too; `steps` counts the whole response.

    Steps are divided over the blocks. `use_cache`, `further_horizon` and `target` concern full attention only.
    """
    check_counts(gen_length=gen_length, block_length=block_length, steps=steps)
    blocks = -(-gen_length // block_length)
    settings = Sampling(
        block_size=block_length,
        denoising_steps_per_block=min(block_length, max(1, steps // blocks)),
        steps=steps,
        max_token=gen_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        remasking_strategy=remasking_strategy,
        target=target,
        dynamic_threshold=confidence_threshold,
        use_cache=use_cache,
        further_horizon=further_horizon,
    )
    return generate_ids(model, prompt, mask_id, settings, stop_ids, seed, stopping_criteria_idx)


def check_counts(**given: int) -> None:
    """UserError for the first argument under 1, by its name."""
    for name, count in given.items():
        if count < 1:
            raise UserError(f"{name}={count}: give at least 1")


def generate_ids(
    model: torch.nn.Module,
    prompt: Mapping[str, Tensor] | Tensor,
    mask_id: int,
    settings: Sampling,
    stop_ids: Iterable[int] | None,
    seed: int | None,
    stopping_criteria_idx: Iterable[int] | None = None,
) -> Tensor:
    """Prompt and response ids for each row of `prompt`, drawn side by side; stops as in `block_diffusion_generate`.

    UserError where a prompt is too long, or has characters that the tokenizer beside the weights has no token for.
    """
    own = stop_ids_of_network(model) if stop_ids is None else stop_ids
    stops = sorted({*own, *(stopping_criteria_idx or ())})
    ids, real = (prompt, None) if isinstance(prompt, Tensor) else (prompt["input_ids"], prompt.get("attention_mask"))
    ids = ids.reshape(-1, ids.shape[-1])
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.reshape(ids.shape).bool()
    check_prompt_of_network(model, ids[real].tolist())
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    requests = [Request(str(n), row[keep].tolist(), seed=seed) for n, (row, keep) in enumerate(zip(ids, real))]
    responses: list[list[int]] = [[] for _ in requests]
    for trajectory in Engine(model, mask_id, stops).generate(requests, settings):
        check_drawn(trajectory)
        responses[int(trajectory.task_id)] = trajectory.response_ids[: trajectory.length]
    padding = model.config.pad_token_id if model.config.pad_token_id is not None else (*stops, 0)[0]
    width = max(map(len, responses))
    padded = [response + [padding] * (width - len(response)) for response in responses]
    return torch.cat([ids, torch.tensor(padded, device=ids.device)], dim=1)
