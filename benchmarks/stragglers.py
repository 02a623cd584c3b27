"""How long ranks wait for the slowest in a rollout, by how the work is shared: python -m benchmarks.stragglers [RUN]

RUN is the folder of an RL run; the denoising steps of its responses (rollouts/*.jsonl) are the distribution drawn
from. Without one it is that of step_maps.json beside this file, responses of the tiny model. A slot takes one unit of
time per denoising step, however many slots of its rank are busy, as a sampler bound by memory does.

Printed is the share of slot time spent waiting, over the steps of a simulated run:

  fixed split     every rank has an even share of a step's responses
  shared queue    a slot that becomes free takes the next response of the step, whoever has it (what this project does)
  one step off    a shared queue that goes on with the next step's responses while the step's last ones are drawn
"""

import heapq
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.metrics import print_table

RANKS = (8, 64, 512)
SLOTS = 16  # of a rank
PER_SLOT = (2, 8)  # responses of a step for each slot
STEPS = 20


def denoising_steps(run: Path | None) -> np.ndarray:
    """The denoising steps of every response of an RL run, or of the tiny model's that are kept here."""
    if run is None:
        orders = json.loads(Path(__file__).with_name("step_maps.json").read_text())  # "0010 0000": block by block
        return np.array([sum(int(max(block)) + 1 for block in order.split()) for order in orders])
    files = sorted((run / "rollouts").glob("step-*.jsonl"))
    return np.array([json.loads(line)["steps"] for file in files for line in file.read_text().splitlines()])


def finish(slots: list[float], lengths: Sequence[float]) -> float:
    """Give the responses in order to the slot that is free first; returns when the last one ends. Slots: a heap."""
    end = 0.0
    for length in lengths:
        done = heapq.heappop(slots) + length
        heapq.heappush(slots, done)
        end = max(end, done)
    return end


def fixed_split(lengths: np.ndarray, ranks: int) -> float:
    """Time of one step in which every rank draws its own share."""
    return max(finish([0.0] * SLOTS, share) for share in lengths.reshape(ranks, -1))


def shared_queue(lengths: np.ndarray, ranks: int) -> float:
    """Time of one step in which all slots draw from one queue."""
    return finish([0.0] * (ranks * SLOTS), lengths)


def one_step_off(lengths: np.ndarray, ranks: int) -> float:
    """Time of all the steps (rows) where a step's responses may start once the step before the last is whole."""
    slots, ends = [0.0] * (ranks * SLOTS), [0.0, 0.0]
    for row in lengths:
        slots = [max(slot, ends[-2]) for slot in slots]
        heapq.heapify(slots)
        ends.append(finish(slots, row))
    return ends[-1]


def idle_shares(distribution: np.ndarray, ranks: int, per_slot: int, rng: np.random.Generator) -> dict[str, float]:
    """The share of slot time spent waiting, by how the work is shared."""
    lengths = rng.choice(distribution, (STEPS, ranks * SLOTS * per_slot)).astype(float)
    seconds = {
        "fixed split": sum(fixed_split(row, ranks) for row in lengths),
        "shared queue": sum(shared_queue(row, ranks) for row in lengths),
        "one step off": one_step_off(lengths, ranks),
    }
    return {name: 1 - lengths.sum() / (time * ranks * SLOTS) for name, time in seconds.items()}


def main(run: Path | None) -> None:
    """Print the table."""
    distribution, rng = denoising_steps(run), np.random.default_rng(0)
    low, middle, high = np.percentile(distribution, [5, 50, 95]).tolist()
    print(
        f"{len(distribution)} responses of {run or 'the tiny model'}: {middle:g} denoising steps (median), "
        f"{low:g} to {high:g} (5 to 95 %), {distribution.max()} at most; {SLOTS} slots a rank, {STEPS} steps"
    )
    rows = []
    for per_slot in PER_SLOT:
        for ranks in RANKS:
            shares = idle_shares(distribution, ranks, per_slot, rng)
            shown = {name: f"{100 * share:.1f} %" for name, share in shares.items()}
            rows.append({"responses a slot and step": per_slot, "ranks": ranks} | shown)
    print_table(rows, title="slot time spent waiting")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
