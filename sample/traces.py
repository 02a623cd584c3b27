"""Trajectories made visible: what trace.viewer.html shows, and the page with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.disk import write_whole
from common.page import fill_page
from common.trajectory import Trajectory
from models import LoadedModel

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
) -> Trace:
    """What the page shows of one response: the text of every token with its step, confidence and log-probability.

    `name` stands in the list of responses; `verdict` and `reference` are left out where they are empty.
    """
    tokenizer, ids = loaded.tokenizer, trajectory.response_ids
    special = set(tokenizer.all_special_ids)
    first = len(trajectory.prompt_ids) if loaded.family.attention == "block" else 0  # blocks are aligned to it
    return {
        "name": name or f"{trajectory.task_id} · {trajectory.sample + 1}",
        "setting": setting,
        "verdict": verdict,
        "reference": reference,
        "prompt": tokenizer.decode(trajectory.prompt_ids, skip_special_tokens=False),
        "pieces": pieces_of(tokenizer, ids),
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
