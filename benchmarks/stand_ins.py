"""Plain readings of how the field samples, trains and scores: the other side of `benchmarks.versus` where no other
project is installed.

Each is written from the published algorithms by the shortest way, in torch's and transformers' own words: padded rows
in lockstep, one forward a step, a dense mask, logits at every position of it, a commit of its own; an update with one
row for each denoising round; samples of mixed length padded to the longest of their group; a program's test in a
process of its own. They are no other project's code, and no figure of theirs is another project's speed.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.ours import (
    Inputs,
    examples_of,
    gradient_sizes,
    loaded_model,
    sampling_of,
    sft_training,
    trajectories_of,
)
from benchmarks.plain_training import PlainRow, plain_batches, plain_logp, plain_rows
from benchmarks.training import KeepGradients
from common.schema import Sampling
from models import LoadedModel
from train.objectives import Tokens, policy_loss
from train.sft_trainer import SFT_METHODS
from train.views import layout_of, trace_views

BUDGET = 8192  # tokens of padded rows in a micro-batch

# ---- sampling


@dataclass
class Canvas:
    """Prompts of a batch, padded on the left to one length, and masks behind them; a column is one place for all."""

    ids: Tensor  # (rows, columns)
    pad: Tensor  # (rows, 1) columns of padding
    start: int  # the first column that is denoised

    @property
    def position(self) -> Tensor:
        """(rows, columns), from 0 at each prompt's first token."""
        return (torch.arange(self.ids.shape[1]) - self.pad).clamp(min=0)

    @property
    def real(self) -> Tensor:
        """(rows, columns), False at padding."""
        return torch.arange(self.ids.shape[1]) >= self.pad


def canvas_of(prompts: list[list[int]], lengths: list[int], masks: int, mask_id: int) -> Canvas:
    """`lengths` of the prompts stand before the first column that is denoised."""
    start = max(lengths)
    ids = torch.full((len(prompts), start + masks), mask_id)
    for row, (prompt, length) in enumerate(zip(prompts, lengths)):
        ids[row, start - length : start - length + len(prompt)] = torch.tensor(prompt)
    return Canvas(ids, torch.tensor([[start - length] for length in lengths]), start)


def choose(logits: Tensor, masked: Tensor, mask_id: int, k: int, settings: Sampling) -> tuple[Tensor, Tensor]:
    """A candidate for each position of a block, and which masks it replaces; logits (rows, block, vocab)."""
    share = torch.softmax(logits.float(), dim=-1)
    allowed = logits.float().clone()
    allowed[..., mask_id] = -torch.inf
    if settings.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        drawn = torch.softmax(allowed / settings.temperature, dim=-1)
        tokens = torch.multinomial(drawn.flatten(0, 1), 1).view(masked.shape)
    sure = share.gather(-1, tokens[..., None])[..., 0].masked_fill(~masked, -torch.inf)
    chosen = torch.zeros_like(masked)
    for row in range(len(masked)):
        left = int(masked[row].sum())
        chosen[row, sure[row].topk(min(k, left)).indices] = True
    if settings.remasking_strategy == "low_confidence_dynamic":
        above = masked & (sure >= settings.dynamic_threshold)
        enough = above.sum(1, keepdim=True) >= k
        chosen = torch.where(enough, above, chosen)
    return tokens, chosen & masked


def block_sampler(inputs: Inputs) -> Callable[[], list[list[int]] | None]:
    """Block attention over transformers' cache, padded rows: a block ends when all rows' blocks are clean."""
    loaded, settings, prompts = loaded_model(inputs), sampling_of(inputs), inputs["prompts"]
    size, model = settings.block_size, loaded.model
    lengths = [len(prompt) // size * size for prompt in prompts]
    blocks = max(-(-(len(prompt) + settings.max_token - length) // size) for prompt, length in zip(prompts, lengths))

    @torch.inference_mode()
    def run() -> list[list[int]] | None:
        canvas, cache = canvas_of(prompts, lengths, blocks * size, loaded.mask_id), DynamicCache()
        position, real, start = canvas.position, canvas.real, canvas.start
        if start:
            block = position[:, :start] // size
            sees = (block[:, None, :] <= block[:, :, None]) & real[:, None, :start]
            sees |= torch.eye(start, dtype=torch.bool)
            model(canvas.ids[:, :start], attention_mask=sees[:, None], position_ids=position[:, :start],
                  past_key_values=cache, use_cache=True)  # fmt: skip
        for first in range(start, start + blocks * size, size):
            here = slice(first, first + size)
            mask = real[:, None, None, : first + size].expand(-1, 1, size, -1)

            def forward(here: slice = here, mask: Tensor = mask) -> Tensor:
                return model(canvas.ids[:, here], attention_mask=mask, position_ids=position[:, here],
                             past_key_values=cache, use_cache=True).logits  # fmt: skip

            while (masked := canvas.ids[:, here] == loaded.mask_id).any():
                logits = forward()
                cache.crop(-size)
                k = size // settings.denoising_steps_per_block
                tokens, chosen = choose(logits, masked, loaded.mask_id, k, settings)
                canvas.ids[:, here] = torch.where(chosen, tokens, canvas.ids[:, here])
            forward()  # the commit
        return responses(canvas, prompts, lengths, settings, size)

    return run


def responses(
    canvas: Canvas, prompts: list[list[int]], lengths: list[int], settings: Sampling, size: int
) -> list[list[int]] | None:
    """Each row's ids behind its prompt, through the block in which its limit lies; None where they were drawn."""
    if settings.temperature > 0:
        return None
    found = []
    for ids, prompt, length in zip(canvas.ids, prompts, lengths):
        end = len(prompt) + settings.max_token - length
        first, end = canvas.start + len(prompt) - length, canvas.start + end + -end % size
        found.append(ids[first:end].tolist())
    return found


def full_sampler(inputs: Inputs) -> Callable[[], list[list[int]] | None]:
    """Full attention, padded rows: the whole canvas at every step, or behind a cache that a block's first step fills
    what lies from the block on."""
    loaded, settings, prompts = loaded_model(inputs), sampling_of(inputs), inputs["prompts"]
    size, model, lengths = settings.block_size, loaded.model, [len(prompt) for prompt in prompts]
    blocks = settings.max_token // size
    k = 1 if settings.remasking_strategy == "low_confidence_dynamic" else max(1, size * blocks // settings.steps)

    @torch.inference_mode()
    def run() -> list[list[int]] | None:
        canvas = canvas_of(prompts, lengths, blocks * size, loaded.mask_id)
        position, real, columns = canvas.position, canvas.real, canvas.ids.shape[1]
        sees = real[:, None, None] | torch.eye(columns, dtype=torch.bool)
        for first in range(canvas.start, columns, size):
            cache = DynamicCache() if settings.use_cache else None
            while (masked := canvas.ids[:, first : first + size] == loaded.mask_id).any():
                begin = first if cache is not None and cache.get_seq_length() else 0
                logits = model(canvas.ids[:, begin:], attention_mask=sees[:, :, begin:], use_cache=cache is not None,
                               position_ids=position[:, begin:], past_key_values=cache).logits  # fmt: skip
                if cache is not None:
                    cache.crop(first - columns)
                tokens, chosen = choose(
                    logits[:, first - begin : first - begin + size], masked, loaded.mask_id, k, settings
                )
                here = canvas.ids[:, first : first + size]
                canvas.ids[:, first : first + size] = torch.where(chosen, tokens, here)
        return responses(canvas, prompts, lengths, settings, size)

    return run


# ---- training


def gradients_of(
    loaded: LoadedModel, batches: Iterator[list[PlainRow]], loss: Callable[[Tensor, list[PlainRow]], Tensor], width: int
) -> list[float]:
    """Gradients of the summed loss of padded rows; `loss` is given logp (predicted,) and its rows."""
    optimizer = KeepGradients(loaded.model.parameters(), lr=0.0)
    loaded.model.train()
    for batch in batches:
        widest = width or max(len(row) for row in batch)
        loss(plain_logp(loaded.model, batch, widest, loaded.mask_id), batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return gradient_sizes(optimizer)


def rl_step(inputs: Inputs) -> Callable[[], list[float]]:
    """TraceRL's update with one row for each denoising round, all padded to the longest."""
    loaded = loaded_model(inputs)
    if inputs.get("checkpointing", True):
        loaded.model.gradient_checkpointing_enable()
    trajectories, layout = trajectories_of(inputs, loaded), layout_of(loaded, 4)

    def run() -> list[float]:
        views = [trace_views(one, layout, inputs.get("shrink", 1)) for one in trajectories]
        rows = plain_rows(trajectories, views, layout.block_size, layout.logit_offset)
        counts = torch.tensor([int(one.predict.sum()) for one in views])
        old = [np.array(one.logp)[own.response_index[own.predict]] for one, own in zip(trajectories, views)]
        old = torch.from_numpy(np.concatenate(old)).float()
        number = torch.arange(len(views)).repeat_interleave(counts)
        weight = torch.full((len(number),), 1 / len(number))
        tokens = Tokens(number, old_logp=old, advantage=1.0 - 2.0 * (number % 2), weight=weight)

        def loss(logp: Tensor, batch: list[PlainRow]) -> Tensor:
            own = tokens[np.concatenate([row.place for row in batch]).astype(np.int64)]
            return policy_loss(logp, own, eps=0.2, beta=0.01)[0]

        width = max(len(row) for row in rows)
        return gradients_of(loaded, plain_batches(rows, BUDGET), loss, width)

    return run


def sft_step(inputs: Inputs) -> Callable[[], list[float]]:
    """An update of finetuning: rows of prompt, response and noised response, padded to the longest of their group."""
    loaded = loaded_model(inputs)
    if inputs.get("checkpointing", True):
        loaded.model.gradient_checkpointing_enable()
    examples, training, layout = examples_of(inputs, loaded), sft_training(loaded), layout_of(loaded, 4)
    method = SFT_METHODS[loaded.family.attention][training.method]

    def run() -> list[float]:
        rng = np.random.default_rng(3)
        views = [method(one, layout, training, rng) for one in examples]
        rows = sorted(plain_rows(examples, views, layout.block_size, layout.logit_offset), key=len, reverse=True)
        count = sum(len(row.target) for row in rows)
        return gradients_of(loaded, grouped(rows), lambda logp, _: -logp.sum() / count, 0)

    return run


def grouped(rows: list[PlainRow]) -> Iterator[list[PlainRow]]:
    """Rows, the longest first, as many at a time as fit the budget at the length of their first."""
    while rows:
        count = max(1, BUDGET // len(rows[0]))
        yield rows[:count]
        rows = rows[count:]


# ---- rewards


def maths(inputs: Inputs) -> Callable[[], list[float]]:
    """Every answer parsed and compared by math-verify, one after another in this process."""
    from math_verify import parse, verify

    references = [parse(f"\\boxed{{{one['answer']}}}") for one in inputs["tasks"]]

    def run() -> list[float]:
        return [float(verify(answer, parse(text))) for text, answer in zip(inputs["texts"], references)]

    return run


def programs(inputs: Inputs) -> Callable[[], list[float]]:
    """Every program with its tests behind it, in a Python process of its own."""

    def passes(text: str, tests: list[str]) -> float:
        program = "\n".join([text.split("```python\n")[1].split("```")[0], *tests])
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=10)
        return float(done.returncode == 0)

    return lambda: [passes(text, one["test_list"]) for text, one in zip(inputs["texts"], inputs["tasks"])]
