"""A page on which to watch a response being denoised: python sample/get_trace_viewer.py model=PATH prompt="…"

`num_response_per_task=4` draws four. `samples=runs/X/samples.jsonl` shows responses that an evaluation or a rollout
wrote, instead of new ones; `task_id=…` those of one task.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launched as a file, the repo is not on the path

from common.config import parse_or_help
from common.errors import UserError, one_line_errors
from common.schema import TraceConfig


def main(config: TraceConfig) -> Path:
    """Draw or read responses and write the page; returns its path."""
    if not config.prompt and not config.samples:
        raise UserError('prompt is empty: give prompt="…", or samples=runs/X/samples.jsonl')
    from common.runtime import console, device_and_dtype  # with torch and transformers, which --help does without
    from models import load_model
    from models.defaults import take_defaults
    from models.family import family_of
    from sample.traces import draw_traces, read_traces, write_trace_page

    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base or family_of(config.model), dtype, device)
    take_defaults(config, loaded)
    traces = read_traces(config, loaded) if config.samples else draw_traces(config, loaded)
    out = Path(config.out)
    write_trace_page(out, traces, config.prompt or config.samples, f"{config.model}, {config.remasking_strategy}")
    console.print(f"written: {out} ({len(traces)} responses); open it in a browser")
    return out


@one_line_errors
def run() -> None:
    """The command."""
    main(parse_or_help("trace", sys.argv[1:], __doc__))


if __name__ == "__main__":
    run()
