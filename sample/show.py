"""What generate.py runs: one prompt, or a chat, each response printed as it is denoised."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.live import Live
from rich.text import Text

from common.errors import UserError
from common.jobs import GenerateConfig
from common.runtime import console
from common.trajectory import Request, Trajectory
from models import LoadedModel
from models.defaults import load_one
from models.files import told_as
from models.prompts import encode_prompt, encode_turns, stop_ids_of
from models.tokenizer import Unreadable
from sample.engine import Engine
from sample.slots import check_drawn
from sample.traces import trace_of, write_trace_page

MASK = "░"
COMMANDS = "/new begins again, /trace FILE.html writes the last answer's page, /quit leaves"


@told_as("model", "model_base")
def main(config: GenerateConfig) -> None:
    """Answer `config.prompt`; without one, chat until the user leaves."""
    loaded = load_one(config)
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    if config.prompt:
        prompt = encode_prompt(loaded, config.prompt, config.prompt_template, config.start_with_think)
        answer(engine, loaded, config, prompt)
    else:
        chat(engine, loaded, config)


def answer(engine: Engine, loaded: LoadedModel, config: GenerateConfig, prompt: list[int], turn: int = 0) -> Trajectory:
    """Draw a response to the prompt ids, shown meanwhile, and print it; `turn` tells the draws of a chat apart."""
    request = Request("prompt", prompt, seed=config.seed, step=turn)
    with denoising(engine, loaded) as on_step:
        stops = stop_ids_of(loaded, config.stop_token_list)
        (trajectory,) = engine.generate([request], config, on_step, stops)
    check_drawn(trajectory)
    trajectory.text = loaded.tokenizer.decode(trajectory.response_ids[: trajectory.length], skip_special_tokens=True)
    console.print(Text(trajectory.text))
    console.print(
        f"{trajectory.length} tokens in {trajectory.steps} denoising steps, "
        f"{trajectory.length / trajectory.steps:.2f} tokens per forward; ended by {trajectory.finish_reason}",
        style="dim",
    )
    return trajectory


def chat(engine: Engine, loaded: LoadedModel, config: GenerateConfig) -> None:
    """Read lines and answer them, each with the conversation before it, until an empty end of input or /quit."""
    console.print(f"{config.model}. {COMMANDS}", style="dim")
    turns: list[dict[str, str]] = []
    last: Trajectory | None = None
    number = 0
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/new":
            turns = []
            console.print("a new conversation", style="dim")
        elif line.startswith("/trace") and last is None:
            console.print("there is no answer yet", style="dim")
        elif line.startswith("/trace"):
            path = line.removeprefix("/trace").strip() or "trace.html"
            trace = trace_of(loaded, last, config.block_size, "answer", config.remasking_strategy)
            write_trace_page(Path(path), [trace], config.model)
            console.print(f"written: {path}", style="dim", markup=False)
        elif line.startswith("/"):
            console.print(f"{line.split()[0]} is no command. {COMMANDS}", style="dim", markup=False)
        elif line:
            turns.append({"role": "user", "content": line})
            try:
                last = answer(engine, loaded, config, encode_turns(loaded, turns, config.start_with_think), number)
            except (KeyboardInterrupt, UserError) as error:  # of the answer, not of the chat
                turns.pop()
                said = "stopped" if isinstance(error, KeyboardInterrupt) else str(error)
                if isinstance(error, UserError) and not isinstance(error, Unreadable):  # too long
                    said += ", or begin anew by /new"
                console.print(said, style="dim", markup=False)
            else:
                number += 1
                turns.append({"role": "assistant", "content": last.text})


@contextmanager
def denoising(engine: Engine, loaded: LoadedModel) -> Iterator[Callable[[], None]]:
    """Show the response after every step: in place on a terminal, a line a step elsewhere."""
    pieces: list[str] = []  # of the blocks that are finished

    def current() -> Text:
        (progress,) = engine.progress()
        pieces.extend(loaded.tokenizer.decode([token]) for token in progress.tokens)
        block = [MASK if masked else loaded.tokenizer.decode([token]) for token, masked in progress.block]
        return Text("".join(pieces + block))

    if not console.is_terminal:
        yield lambda: console.print(current())
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda: live.update(current(), refresh=True)
