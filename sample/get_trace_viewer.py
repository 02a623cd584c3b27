"""A page on which to watch a response being denoised: python sample/get_trace_viewer.py model=PATH prompt="…"

`num_response_per_task=4` draws four. `samples=runs/X/samples.jsonl` shows responses that an evaluation or a rollout
wrote, instead of new ones; `task_id=…` those of one task.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # launched as a file, the repo is not on the path

from common.config import parse_or_help
from common.errors import UserError, one_line_errors
from common.records import read_lines
from common.runtime import console, device_and_dtype
from common.schema import TraceConfig
from common.trajectory import Request, Trajectory
from models import LoadedModel, load_model
from models.defaults import take_defaults
from models.family import family_of
from models.prompts import encode_prompt, stop_ids_of
from sample.engine import Engine
from sample.records import refused
from sample.traces import Trace, trace_of, write_trace_page


def main(config: TraceConfig) -> Path:
    """Draw or read responses and write the page; returns its path."""
    if not config.prompt and not config.samples:
        raise UserError('prompt is empty: give prompt="…", or samples=runs/X/samples.jsonl')
    device, dtype = device_and_dtype(config.dtype)
    loaded = load_model(config.model, config.model_base or family_of(config.model), dtype, device)
    take_defaults(config, loaded)
    traces = read_traces(config, loaded) if config.samples else draw_traces(config, loaded)
    out = Path(config.out)
    write_trace_page(out, traces, config.prompt or config.samples, f"{config.model}, {config.remasking_strategy}")
    console.print(f"written: {out} ({len(traces)} responses); open it in a browser")
    return out


def draw_traces(config: TraceConfig, loaded: LoadedModel) -> list[Trace]:
    """New responses to the prompt."""
    prompt = encode_prompt(loaded, config.prompt, config.prompt_template, config.start_with_think)
    requests = [Request("prompt", prompt, sample, config.seed) for sample in range(config.num_response_per_task)]
    engine = Engine(loaded.model, loaded.mask_id, loaded.stop_ids)
    drawn = list(engine.generate(requests, config, stop_ids=stop_ids_of(loaded, config.stop_token_list)))
    if drawn[0].finish_reason == "refused":
        raise refused(drawn[0])
    return [
        trace_of(loaded, one, config.block_size, f"response {one.sample + 1}", config.remasking_strategy)
        for one in sorted(drawn, key=lambda one: one.sample)
    ]


def read_traces(config: TraceConfig, loaded: LoadedModel) -> list[Trace]:
    """The first `num_response_per_task` responses of a file, those of `task_id` where it is given."""
    path = Path(config.samples)
    if not path.is_file():
        raise UserError(f"samples: no file {path}; give the samples.jsonl of a run")
    names = [field.name for field in dataclasses.fields(Trajectory)]
    traces: list[Trace] = []
    for number, line in read_lines(path, "samples"):
        if len(traces) == config.num_response_per_task:
            break
        if isinstance(line, UserError):
            raise line
        foreign = UserError(f"samples: line {number} of '{path}' is no response as eval.py and rl.py write them")
        if not isinstance(line, dict) or "task_id" not in line:
            raise foreign
        if config.task_id not in ("", str(line["task_id"])):
            continue
        if not line.get("step_map"):
            raise UserError(f"samples: {path} holds no traces (rollout.output_unmasking_history was False)")
        if not set(names) <= line.keys():
            raise foreign
        trajectory = Trajectory(**{name: line[name] for name in names})
        about = {"setting": line.get("setting", ""), "verdict": line.get("verdict", "")}
        about["reference"] = line.get("ground_truth_answer") or ""
        traces.append(trace_of(loaded, trajectory, config.block_size, **about))
    if not traces:
        raise UserError(f"task_id={config.task_id}: {path} has no response to it")
    return traces


@one_line_errors
def run() -> None:
    """The command."""
    main(parse_or_help("trace", sys.argv[1:], __doc__))


if __name__ == "__main__":
    run()
