"""Everything that a GPU is to be asked, in one command that ends within 25 minutes: make gpu

    python -m benchmarks.gpu [--parts tests rl …] [--out FOLDER]   # measure
    python -m benchmarks.gpu --tables                               # only write the tables of docs/performance.md

The GPU's own tests, the sampler and training at the 1.7B, 4B and 8B shapes with random weights, and 20 steps of RL at
the largest shape that fits. Every part is a process with a time limit; one that fails or is ended is recorded and the
others go on. What was found goes to docs/gpu/<chip>-<date>.json and from there, beside what benchmarks/cost_model.py
computes, to docs/performance.md. `--shape mini --out FOLDER` is the same at the size of a processor.
"""

# ruff: noqa: E402 — packages are asked for before anything imports them

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import check_packages

check_packages("make gpu", "torch", "transformers", "accelerate", "peft", "omegaconf", "rich", "pytest", "hypothesis")

import torch

from benchmarks.cost_model import CHIPS, LARGE_PRODUCT, PARTS, Response, chip_of, moved_rows, step_rows, training_flops
from benchmarks.shapes import SHAPES
from common.memory import size_of
from common.metrics import print_table
from common.runtime import version_of

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "gpu"
BEGIN, END = "<!-- tables of benchmarks/gpu.py -->", "<!-- end of the tables -->"
MINUTES, RL_STEPS = 25, 20  # all that the parts may take
PACKAGES = ("torch", "transformers", "accelerate", "peft", "triton")
BATCHES = {"1.7b": (64,), "4b": (128,), "8b": (1, 64, 128), "mini": (2,)}
MEASURED = ("1.7b", "4b", "8b")
PROMPT, TOKENS, TOKENS_PER_FORWARD, CONTEXT = 744, 512, 1.8, 1000  # positions seen on average
LENGTH, MADE_PROMPT = 2000, 64  # of the trajectories of benchmarks/training_gpu.py
MOVED = "8b"  # the shape whose bytes are shown
COMPUTED = ("h100", "h200")  # chips in the table that no measurement is there of
ABSENT = "not measured"


@dataclass(frozen=True)
class Part:
    """A command that writes rows to the file behind its `--out`, or only passes or fails, and the seconds it has."""

    name: str
    seconds: int
    command: list[str]
    writes: bool = True


def parts_of(shape: str | None, steps: int = RL_STEPS) -> list[Part]:
    """What is measured, with so many steps of RL; at one small shape and in one step where `shape` names it."""
    short = shape is not None
    shapes = (shape,) if short else MEASURED
    size = {"prompt": 8 if short else PROMPT, "tokens": 8 if short else TOKENS}
    limits = {"1.7b": (90, 120), "4b": (120, 150), "8b": (300, 180), "mini": (120, 120)}  # sampling, training
    tests = ["pytest", "-q", "-rs", "-m", "gpu", *(["tests/test_attention.py"] if short else [])]
    parts = [Part("tests", 240, tests, False)]
    for name in shapes:
        options = [f"--{key}={value}" for key, value in size.items()] + ["--batch", *map(str, BATCHES[name])]
        options += ["--alone", "--repeats=1", f"--tokens-per-forward={TOKENS_PER_FORWARD}"]
        parts.append(Part(f"rollout {name}", limits[name][0], ["benchmarks.rollout", "--shape", name, *options]))
    for name in shapes:
        few = ["--trajectories=2", "--response=8"] if short else []
        parts.append(Part(f"training {name}", limits[name][1], ["benchmarks.training_gpu", name, *few]))
    # equal rewards by chance would leave nothing to learn: 2 to the power of 14 to one that they are not
    few = ["rollout.num_task_per_step=2", "rollout.num_response_per_task=8", "rollout.max_token=4"]
    few += ["evaluation.max_token=4", "evaluation.num_task=1"]
    options = ["--shape", shape, "--steps=1", *few] if short else [f"--steps={steps}"]
    parts.append(Part("rl", 300, ["benchmarks.rl_steps", *options]))
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=["mini"], help="one small shape: for the processor")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="only these, in this order: rollout, 'training 8b' …"
    )
    parser.add_argument("--rl-steps", type=int, default=RL_STEPS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="that all parts may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tables", action="store_true", help="only write the tables of docs/performance.md")
    options = parser.parse_args()
    if not options.tables:
        if not torch.cuda.is_available() and (options.shape is None or options.out == RESULTS):
            sys.exit("make gpu needs a CUDA device; --shape mini --out FOLDER runs the same on the processor")
        parts = parts_of(options.shape, options.rl_steps)
        if options.parts:
            parts = [part for name in options.parts for part in parts if name in (part.name, part.name.split()[0])]
        found = measure(parts, time.monotonic() + 60 * options.minutes)
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"{found['chip']}-{found['date']}.json"
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print_table([{"part": name} | {key: part[key] for key in ("outcome", "seconds")}
                     for name, part in found["parts"].items()], title=f"\n{file}")  # fmt: skip
    if options.tables or options.out == RESULTS:
        write_tables(PAGE, RESULTS)


# ---- measuring


def measure(parts: list[Part], deadline: float) -> dict[str, Any]:
    """What each part gave, and where: chip, device, versions, date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found: dict[str, Any] = {
        "chip": chip_of(device) or re.sub(r"\W+", "-", device.lower()).strip("-"),
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "parts": {},
    }
    for part in parts:
        print(f"\n{part.name}", flush=True)
        found["parts"][part.name] = run_part(part, min(part.seconds, deadline - time.monotonic()))
    return found


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Its outcome (ok, failed, out of time), seconds, the rows it wrote; and its last lines where it failed."""
    if seconds < 1:
        return {"outcome": "out of time", "seconds": 0.0, "rows": [], "end": "the parts before took all the time"}
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, "-m", *part.command, *(["--out", str(rows)] if part.writes else [])]
        begin = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                outcome = "ok" if process.wait(seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                outcome = "out of time"
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
        text = log.read_text(encoding="utf-8", errors="replace")
        print(text, flush=True)
        return {
            "outcome": outcome,
            "seconds": round(time.monotonic() - begin, 1),
            "rows": json.loads(rows.read_text(encoding="utf-8")) if rows.is_file() else [],
            "end": "" if outcome == "ok" and part.writes else "\n".join(text.splitlines()[-20:]),
        }


# ---- the tables


def write_tables(page: Path, results: Path) -> None:
    """Put the tables of the newest results of each chip between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}", encoding="utf-8")


def tables(results: Path) -> str:
    """Markdown: sampler, training and RL, computed and measured."""
    newest = {found["chip"]: found for found in map(read_results, sorted(results.glob("*.json"), key=date_of))}
    chips = [*newest, *(chip for chip in COMPUTED if chip not in newest)]
    rollout = [row for chip in chips for row in rollout_table(chip, newest.get(chip))]
    training = [row for chip in chips for row in training_table(chip, newest.get(chip))]
    sections = [
        "A step of the sampler in ms: prompts of 744 tokens, responses of 512, 1.8 tokens a denoising step:",
        markdown(rollout),
        f"{MOVED.upper()}: GB that attention and the draw move in such a step, and its kernels, computed:",
        markdown(moved_rows(size_of(SHAPES[MOVED]), BATCHES[MOVED], CONTEXT, PROMPT + TOKENS)),
        "Training, LoRA, 8 trajectories of 2,000 tokens; a forward has 16,384 tokens with activation checkpointing and "
        "8,192 without it; MFU counts no recomputation:",
        markdown(training),
    ]
    steps = [rl_row(chip, found) for chip, found in newest.items() if found["parts"].get("rl", {}).get("rows")]
    if steps:
        sections += ["Steps of RL with random weights, seconds and shares:", markdown(steps)]
    failures = list(failed_parts(newest))
    if failures:
        sections += ["What did not come to its end:", markdown(failures)]
    return "\n\n".join(sections) + "\n"


def date_of(file: Path) -> tuple[str, str]:
    return file.stem[-10:], file.stem


def read_results(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def rows_of(found: dict[str, Any] | None, part: str) -> list[dict[str, Any]]:
    return found["parts"].get(part, {}).get("rows", []) if found else []


def rollout_table(chip: str, found: dict[str, Any] | None) -> Iterator[dict[str, str]]:
    for shape in MEASURED:
        size, measured = size_of(SHAPES[shape]), {row["batch"]: row for row in rows_of(found, f"rollout {shape}")}
        for batch in BATCHES[shape]:
            row = measured.get(batch)
            computed = step_rows(size, [chip], [batch], CONTEXT, PROMPT + TOKENS)[0] if chip in CHIPS else {}
            yield {
                "chip": chip,
                "shape": shape,
                "batch": str(batch),
                **{part: computed.get(part, "") for part in ("limit", *PARTS, "sum")},
                "measured": f"{row['ms/forward']:.1f}" if row else ABSENT,
                "of the limit": f"{row['% of limit']:.0f} %" if row and "% of limit" in row else ABSENT,
                "tokens/s": f"{row['tokens/s']:.0f}" if row else ABSENT,
            }


def training_table(chip: str, found: dict[str, Any] | None) -> Iterator[dict[str, str]]:
    for shape in MEASURED:
        response = Response(MADE_PROMPT, LENGTH)
        flops = training_flops(size_of(SHAPES[shape]), response, frozen=True)
        limit = response.tokens * LARGE_PRODUCT * CHIPS[chip].peak / flops if chip in CHIPS else None
        for row in rows_of(found, f"training {shape}") or [{}]:
            yield {
                "chip": chip,
                "shape": shape,
                "checkpointing": {True: "yes", False: "no"}.get(row.get("checkpointing"), ABSENT),
                "limit tokens/s": f"{limit:.0f}" if limit else "",
                "tokens/s": f"{row['tokens/s']:.0f}" if row else ABSENT,
                "MFU": f"{row['MFU %']:.0f} %" if row.get("MFU %") else ABSENT,
                "GiB": f"{row['GiB']:.1f}" if "GiB" in row else ABSENT,
            }


def rl_row(chip: str, found: dict[str, Any]) -> dict[str, str]:
    row = found["parts"]["rl"]["rows"][0]
    return {"chip": chip} | {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in row.items()}


def failed_parts(newest: dict[str, dict[str, Any]]) -> Iterator[dict[str, str]]:
    for chip, found in newest.items():
        for name, part in found["parts"].items():
            if part["outcome"] != "ok":
                last = part["end"].splitlines()[-1:] or [""]
                yield {"chip": chip, "part": name, "outcome": part["outcome"], "last line": last[0].replace("|", "/")}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
