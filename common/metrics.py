"""The run's numbers: metrics.jsonl, trackers beside it, curves drawn from it, and small tables in the terminal."""

import difflib
import importlib
import json
import math
import os
import re
import statistics
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from common.checkpoint import append_lines, unless_full, write_whole
from common.errors import UserError
from common.ranks import is_main

Row = dict[str, Any]
TERMINAL = 80  # columns
SECRET = re.compile(r"(^|_)(api_?key|key|secret|password|credentials?)$|(hf|hub|auth|access|api)_token$", re.IGNORECASE)


@dataclass(frozen=True)
class Tracker:
    """Somewhere else that curves go to."""

    log: Callable[[Row, int], None]
    close: Callable[[], None]


@dataclass
class MetricsLog:
    """The open log of a run; made by `open_metrics`."""

    path: Path
    trackers: list[Tracker] = field(default_factory=list)

    def log(self, row: Row) -> None:
        """Append one row; it has a whole number `step`."""
        row = clean_row(row)
        append_row(self.path, row)
        numbers = {key: value for key, value in row.items() if key != "step" and isinstance(value, (int, float))}
        for tracker in self.trackers:
            with unless_full(self.path.parent):
                tracker.log(numbers, row["step"])

    def close(self) -> None:
        """Flush and close the trackers."""
        for tracker in self.trackers:
            tracker.close()


def open_metrics(
    folder: Path,
    trackers: list[str] | tuple[str, ...] = (),
    project: str = "",
    config: Row | None = None,
    resume_step: int | None = None,
) -> MetricsLog:
    """Open `folder`/metrics.jsonl and the trackers; `resume_step` drops what was logged after that step.

    `config` (nested dicts) goes to the trackers that show one; what looks like a credential is left out. What any
    rank but the first logs is forgotten. Raises UserError where a tracker is unknown or not installed.
    """
    for name in trackers:
        if name not in TRACKERS:
            close = difflib.get_close_matches(str(name), TRACKERS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"use {', '.join(TRACKERS)}, or [] for none"
            raise UserError(f"experiment.trackers: '{name}' is unknown; {hint}")
    if not is_main():
        return MetricsLog(Path(os.devnull))
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(folder / "metrics.jsonl")
    if resume_step is not None:
        truncate_after(log.path, resume_step)
    for name in trackers:
        module, open_tracker = TRACKERS[name]
        try:
            opened = importlib.import_module(module)
        except ImportError:
            raise UserError(
                f"experiment.trackers: '{name}' is not installed: pip install {name}; or leave it out"
            ) from None
        shown = without_secrets(config or {})
        log.trackers.append(open_tracker(opened, folder, project or folder.resolve().name, shown, resume_step))
    return log


# --- the file


def clean_row(row: Row) -> Row:
    """A row as it is written: step first, the other keys sorted, floats rounded, scalars of torch or NumPy plain.

    NaN and infinities become null, which every JSON reader takes. Raises ValueError where `step` is no whole number.
    """
    if type(row.get("step")) is not int:
        raise ValueError(f"a row of metrics needs a whole number `step`, not {row.get('step')!r}")
    return {key: _clean(row[key]) for key in ("step", *sorted(row.keys() - {"step"}))}


def _clean(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def append_row(path: Path, row: Row) -> None:
    """Append a row as one line."""
    append_lines(path, json.dumps(row) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Every whole row of the file, none where there is no file; torn lines are left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def truncate_after(path: Path, step: int) -> None:
    """Drop the rows of later steps and torn lines: a run resumed from step `step` logs them again."""
    if path.is_file():
        write_whole(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))


# --- trackers


def without_secrets(config: Row) -> Row:
    """A copy of nested dicts without the keys that look like credentials."""
    return {
        key: without_secrets(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not SECRET.search(str(key))
    }


def _open_tensorboard(writers: ModuleType, folder: Path, project: str, config: Row, resume_step: int | None) -> Tracker:
    # purge_step hides what an interrupted run wrote after its checkpoint.
    purge = None if resume_step is None else resume_step + 1
    writer = writers.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(row: Row, step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _open_wandb(wandb: ModuleType, folder: Path, project: str, config: Row, resume_step: int | None) -> Tracker:
    mode = os.environ.get("WANDB_MODE")
    if mode is None and not wandb.api.api_key:
        mode = "offline"  # asking for a login would stop a job that nobody watches
        print("wandb: no login found, so the run is kept offline; `wandb sync` uploads it later", file=sys.stderr)
    run_id = _run_id(folder / "wandb-run-id", resume_step)
    name = folder.resolve().name
    run = wandb.init(project=project, name=name, dir=str(folder), id=run_id, resume="allow", mode=mode, config=config)
    return Tracker(lambda row, step: run.log(row, step=step), run.finish)


def _open_trackio(trackio: ModuleType, folder: Path, project: str, config: Row, resume_step: int | None) -> Tracker:
    name = f"{folder.resolve().name}-{_run_id(folder / 'trackio-run-id', resume_step)}"
    run = trackio.init(project=project, name=name, resume="allow", config=config)
    return Tracker(lambda row, step: run.log(row, step=step), run.finish)


TRACKERS: dict[str, tuple[str, Callable[..., Tracker]]] = {  # the module of each, and what opens it
    "tensorboard": ("torch.utils.tensorboard", _open_tensorboard),
    "wandb": ("wandb", _open_wandb),
    "trackio": ("trackio", _open_trackio),
}


def _run_id(file: Path, resume_step: int | None) -> str:
    """The id that a run's folder keeps, so that a resumed run goes on in the same curves."""
    if resume_step is None or not file.is_file():
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


# --- curves


@dataclass(frozen=True)
class Panel:
    """One plot: its title, a pattern of the keys in it, and what its upright axis counts."""

    title: str
    keys: str
    axis: str
    share: bool = False  # shown in per cent
    stacked: bool = False
    log: bool = False
    smooth: bool = True


PANELS = [
    Panel("reward", r"reward", "mean of responses"),
    Panel("accuracy", r"accuracy|eval/.+/accuracy|eval/accuracy", "of responses", share=True),
    Panel("loss", r"loss|eval/loss", "loss"),
    Panel("KL", r"kl", "nats"),
    Panel("response length", r"response_length|eval/.+/response_length", "tokens"),
    Panel("truncated", r"truncated|eval/.+/truncated", "of responses", share=True),
    Panel("tokens per forward", r"tokens_per_forward|eval/.+/tokens_per_forward", "tokens"),
    Panel("tokens per second", r"tokens_per_second", "tokens / s"),
    Panel("gradient norm", r"grad_norm", "norm"),
    Panel("clipped", r"clip_fraction", "of terms", share=True),
    Panel("learning rate", r"lr", "rate", smooth=False),
    Panel("trainer against engine", r"logp_diff_max|mismatch_kl", "nats", log=True),
    Panel("seconds by stage", r"seconds_.+", "seconds", stacked=True),
]
STAGES = ["rollout", "reward", "train", "sync", "other"]


def draw_curves(metrics: Path, png: Path) -> int:
    """Draw metrics.jsonl; keys that are absent are skipped. Returns how many plots were drawn (0: no file)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        # Said, not raised: a finished run is not failed for want of a picture.
        print("curves.png was not drawn: pip install matplotlib", file=sys.stderr)
        return 0
    curves = curves_of(read_rows(metrics))
    keys = sorted(curves, key=lambda key: (key.startswith("eval/"), key))
    panels = [(panel, {key: curves[key] for key in keys if re.fullmatch(panel.keys, key)}) for panel in PANELS]
    panels = [(panel, chosen) for panel, chosen in panels if chosen]
    if not panels:
        return 0
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (panel, chosen) in zip(axes, panels):
        _stack(axis, chosen) if panel.stacked else _lines(axis, chosen, panel.smooth)
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylabel(panel.axis, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if panel.log and any(y > 0 for _, ys in chosen.values() for y in ys):
            axis.set_yscale("log")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    beside = png.with_suffix(".tmp.png")  # whoever looks while it is drawn sees the old one whole
    figure.savefig(beside, dpi=110)
    os.replace(beside, png)
    return len(panels)


Curve = tuple[list[int], list[float]]


def curves_of(rows: list[Row]) -> dict[str, Curve]:
    """Steps and values of every key that has numbers."""
    curves: dict[str, Curve] = {}
    for row in rows:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = curves.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _lines(axis: Any, curves: dict[str, Curve], smooth: bool) -> None:
    """Training as lines, with a running mean where they are long and `smooth`; evaluations as dots joined."""
    for number, (key, (steps, values)) in enumerate(curves.items()):
        color = f"C{number % 10}"
        if key.startswith("eval/"):
            setting = key.split("/", 1)[1].rpartition("/")[0]
            axis.plot(steps, values, "o--", color=color, markersize=4, linewidth=1.2, label=f"eval {setting}".strip())
        elif len(values) < 30 or not smooth:
            axis.plot(steps, values, ".-" if len(values) < 30 else "-", color=color, linewidth=1.4, label=key)
        else:
            axis.plot(steps, values, color=color, linewidth=0.7, alpha=0.35)
            window = len(values) // 20 + 2
            means = [statistics.fmean(values[max(0, end - window) : end + 1]) for end in range(len(values))]
            axis.plot(steps, means, color=color, linewidth=1.8, label=key)
    if len(curves) > 1:
        axis.legend(fontsize=7)


def _stack(axis: Any, curves: dict[str, Curve]) -> None:
    """Stages on top of one another, those that are usual first."""
    names = sorted(curves, key=lambda key: (*[key != f"seconds_{stage}" for stage in STAGES], key))
    steps = sorted({step for name in names for step in curves[name][0]})
    heights = [[dict(zip(*curves[name])).get(step, 0.0) for step in steps] for name in names]
    if len(steps) == 1:  # an area needs a width
        steps, heights = [steps[0] - 0.5, steps[0] + 0.5], [height * 2 for height in heights]
    axis.stackplot(steps, heights, labels=[name.removeprefix("seconds_") for name in names], alpha=0.85)
    axis.set_ylim(0, 1.25 * max(map(sum, zip(*heights))) or 1)
    axis.legend(fontsize=7, loc="upper center", ncols=min(5, len(names)))


# --- tables


def format_table(rows: list[Row], title: str = "") -> str:
    """Rows as an aligned table; columns in the order in which keys first appear, numbers to the right.

    A table that is too wide for a terminal is turned, so that each row becomes a column, where that makes it narrower.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [any(isinstance(row.get(column), (int, float)) for row in rows) for column in columns]
    lines = _aligned([columns, *cells], right)
    if len(lines[1]) > TERMINAL:
        turned = _aligned([list(line) for line in zip(columns, *cells)], [False] + [True] * len(rows))
        lines = min(lines, turned, key=lambda lines: len(lines[1]))
    return "\n".join([*([title] if title else []), *lines])


def _aligned(cells: list[list[str]], right: list[bool]) -> list[str]:
    """The lines of a table, its head underlined; `right` says which columns are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]

    def align(line: list[str]) -> str:
        parts = [cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(line, widths, right)]
        return "  ".join(parts).rstrip()

    head, *rest = map(align, cells)
    return [head, "  ".join("-" * width for width in widths), *rest]


def print_table(rows: list[Row], title: str = "") -> None:
    """Print rows as an aligned table; the same in a terminal, a pipe and a log."""
    print(format_table(rows, title), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "" if value is None else str(value)
