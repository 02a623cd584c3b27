"""Trajectories made visible: what trace.viewer.html shows, the page with it, and what get_trace_viewer.py runs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.board import board_of
from common.checkpoint import write_whole
from common.errors import UserError
from common.jobs import TraceConfig
from common.page import fill_page
from common.records import read_lines
from common.runtime import console
from common.trajectory import MAY_BE_ABSENT, Request, Trajectory
from models import LoadedModel
from models.defaults import load_one
from models.files import told_as
from models.prompts import encode_prompt, stop_ids_of
from sample.engine import Engine
from sample.slots import check_drawn

TEMPLATE = Path(__file__).with_name("trace.viewer.html")
Trace = dict[str, Any]


def trace_of(
    loaded: LoadedModel,
    trajectory: Trajectory,
    block_size: int,
    name: str = "",
    setting: str = "",
    verdict: str = "",
    reference: str = "",
    puzzle: str | None = None,
) -> Trace:
    """What the page shows of one response: the text of every token with its step, confidence and log-probability.

    `name` stands in the list of responses; `verdict` and `reference` are left out where they are empty. Where tokens
    were overwritten, `overwritten` has the step, position, text (None: the mask) and log-probability of these writings.
    `puzzle`: a Sudoku's, whose response is shown as a board too.
    """
    tokenizer, ids = loaded.tokenizer, trajectory.response_ids
    pieces = pieces_of(tokenizer, ids)
    board = board_of(puzzle, reference, pieces[: trajectory.length])
    special = set(tokenizer.all_special_ids)
    first = len(trajectory.prompt_ids) if loaded.family.attention == "block" else 0  # blocks are aligned to it
    trace = {
        "name": name or f"{trajectory.task_id} · {trajectory.sample + 1}",
        "setting": setting,
        "verdict": verdict,
        "reference": reference,
        "prompt": tokenizer.decode(trajectory.prompt_ids, skip_special_tokens=False),
        "pieces": pieces,
        "special": [index for index, token in enumerate(ids) if token in special],
        "steps": trajectory.step_map,
        "confidence": [round(value, 4) for value in trajectory.confidence],
        "logp": [round(value, 4) for value in trajectory.logp],
        "first": first,
        "block_size": block_size,
        "length": trajectory.length,
        "denoising_steps": trajectory.steps,
        "forwards": trajectory.forwards,
        "finish": trajectory.finish_reason,
    }
    if board:
        trace["board"] = board
    if trajectory.overwritten:
        old = tokenizer.batch_decode([[writing.token] for writing in trajectory.overwritten], skip_special_tokens=False)
        trace["overwritten"] = [
            [step, position, None if token == loaded.mask_id else text, round(logp, 4)]
            for (step, position, token, logp), text in zip(trajectory.overwritten, old)
        ]
    return trace


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token. Where several make one character, the first has it and the others are empty."""
    single = tokenizer.batch_decode([[token] for token in ids], skip_special_tokens=False)
    pieces: list[str] = []
    while len(pieces) < len(ids):
        start = len(pieces)
        text, end = single[start], start + 1
        while "\ufffd" in text and end < min(len(ids), start + 4):  # at most four bytes make a character
            joined = tokenizer.decode(ids[start : end + 1], skip_special_tokens=False)
            end += 1
            if "\ufffd" not in joined:
                text = joined
        if "\ufffd" in text:  # no character came of it
            text, end = single[start], start + 1
        pieces += [text, *[""] * (end - start - 1)]
    return pieces


def trace_page(traces: Sequence[Trace], title: str, subtitle: str = "") -> str:
    """The viewer with these responses in it, one file that opens by double click."""
    data = {"title": title, "subtitle": subtitle, "responses": list(traces)}
    return fill_page(TEMPLATE.read_text(encoding="utf-8"), data)


def write_trace_page(path: Path, traces: Sequence[Trace], title: str, subtitle: str = "") -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, trace_page(traces, title, subtitle))


# ---- the command


@told_as("model", "model_base")
def main(config: TraceConfig) -> Path:
    """Draw or read responses and write the page; returns its path."""
    if not config.prompt and not config.samples:
        raise UserError('prompt is empty: give prompt="…", or samples=runs/X/samples.jsonl')
    loaded = load_one(config)
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
    trajectories = list(engine.generate(requests, config, stop_ids=stop_ids_of(loaded, config.stop_token_list)))
    check_drawn(trajectories[0])
    return [
        trace_of(loaded, drawn, config.block_size, f"response {drawn.sample + 1}", config.remasking_strategy)
        for drawn in sorted(trajectories, key=lambda trajectory: trajectory.sample)
    ]


def read_traces(config: TraceConfig, loaded: LoadedModel) -> list[Trace]:
    """The first `num_response_per_task` responses of a file, those of `task_id` where it is given."""
    path = Path(config.samples)
    if not path.is_file():
        raise UserError(f"samples: no file {path}; give the samples.jsonl of a run")
    names = {field.name for field in dataclasses.fields(Trajectory)} - set(MAY_BE_ABSENT)
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
            raise UserError(
                f"samples: {path} holds no traces: line {number} has no step_map, as eval.py and rl.py write it"
            )
        if not names <= line.keys():
            raise foreign
        trajectory = Trajectory.of(line)
        setting, verdict, reference = (line.get(key) or "" for key in ("setting", "verdict", "ground_truth_answer"))
        puzzle = line.get("puzzle", line.get("question"))  # a puzzle's record may ask in other words
        traces.append(trace_of(loaded, trajectory, config.block_size, "", setting, verdict, reference, puzzle))
    if not traces:
        raise UserError(f"task_id={config.task_id}: {path} has no response to it")
    return traces
