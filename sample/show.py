"""What generate.py runs: one prompt, its response printed as it is denoised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.live import Live
from rich.text import Text

from common.runtime import console, device_and_dtype
from common.schema import GenerateConfig
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.family import family_of
from models.prompts import encode_prompt, stop_ids_of
from sample.engine import Engine

MASK = "░"


def main(config: GenerateConfig) -> Trajectory:
    """Answer `config.prompt`; returns the trajectory that was shown."""
    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base or family_of(config.model), dtype, device)
    prompt = encode_prompt(loaded, config.prompt, config.prompt_template, config.start_with_think)
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    request = Request("prompt", prompt, seed=config.seed)
    with denoising(engine, loaded, len(prompt)) as on_step:
        stops = stop_ids_of(loaded, config.stop_token_list)
        (trajectory,) = engine.generate([request], config, on_step, stops)
    text = loaded.tokenizer.decode(trajectory.response_ids[: trajectory.length], skip_special_tokens=True)
    console.print(Text(text))
    console.print(
        f"{trajectory.length} tokens in {trajectory.steps} denoising steps, "
        f"{trajectory.length / trajectory.steps:.2f} tokens per forward; ended by {trajectory.finish_reason}"
    )
    return trajectory


@contextmanager
def denoising(engine: Engine, loaded: LoadedModel, start: int) -> Iterator[Callable[[], None]]:
    """Show the response after every step: in place on a terminal, a line a step elsewhere."""

    def current() -> Text:
        slots, end = engine.slots, int(engine.slots.block_start[0]) + engine.settings.block_size
        ids, masked = slots.tokens[0, start:end].tolist(), slots.masked[0, start:end].tolist()
        runs = [MASK if hidden else loaded.tokenizer.decode([token]) for token, hidden in zip(ids, masked)]
        return Text("".join(runs))

    if not console.is_terminal:
        yield lambda: console.print(current())
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda: live.update(current(), refresh=True)
