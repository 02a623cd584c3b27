"""How long ranks wait for the slowest in a rollout, by how the work is shared: python -m benchmarks.stragglers [RUN]

RUN is the folder of an RL run; the denoising steps of its responses (rollouts/*.jsonl) are the distribution drawn
from. Without one they are log-normal lengths, of a mean and cut at a limit that one response of LIMIT_SHARE reaches, in
STEPS_PER_TOKEN denoising steps; and those of step_maps.json beside this file, responses of the tiny model. A slot takes
one unit of time per denoising step, however many slots of its rank are busy, as a sampler bound by memory does.

Printed is the share of slot time spent waiting, over the steps of a simulated run:

  fixed split     every rank has an even share of a step's responses
  shared queue    a slot that becomes free takes the next response of the step, whoever has it
  carry           the rule of rollout/carry.py, under which responses outlive their step: with what it makes stale
  spare           its other form, a quarter more groups than are taken: with how much shorter the taken ones are

A second table has the share of all devices' time in which they neither draw nor train, where training a step takes as
long as drawing it would without waiting: in turn, and `apart`, where half of the ranks draw for the next step from one
queue while the others train.
"""

import heapq
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from common.metrics import print_table
from rollout.carry import LONGEST_STRIDE, Rule

RANKS = (8, 64, 512, 4096)
SLOTS = 16  # of a rank
SAMPLES = 8  # responses to a task
PER_SLOT = (2, 8)  # responses of a step for each slot
STEPS = 8
FIRST = 6  # steps of carried responses before those that are counted
STALE = 4  # rollout.max_stale_steps
MEANS, LIMIT, LIMIT_SHARE = (2000, 5434), 30_000, 1 / 1000  # tokens
STEPS_PER_TOKEN = 2.2 / 4  # measured on a large model's traces, blocks of 4


@dataclass(frozen=True)
class Lengths:
    """A distribution of denoising steps."""

    name: str
    values: np.ndarray  # drawn from, each as likely
    stride: int  # denoising steps between two looks at who is done


def log_normal(mean: float) -> Lengths:
    """Of that mean in tokens before they are cut at the limit, which LIMIT_SHARE of them reach.

    With quantile z of that share, μ + zσ = ln limit and μ + σ²/2 = ln mean.
    """
    z = NormalDist().inv_cdf(1 - LIMIT_SHARE)
    sigma = z - np.sqrt(z * z - 2 * np.log(LIMIT / mean))
    drawn = np.random.default_rng(1).normal(np.log(mean) - sigma**2 / 2, sigma, 1_000_000)
    steps = np.ceil(STEPS_PER_TOKEN * np.minimum(np.exp(drawn), LIMIT)).astype(np.int64)
    return Lengths(f"mean {mean:,}", steps, LONGEST_STRIDE)


def measured(run: Path | None) -> Lengths:
    """Of every response of an RL run, or of the tiny model's that are kept here."""
    if run is None:
        orders = json.loads(Path(__file__).with_name("step_maps.json").read_text())  # "0010 0000": block by block
        return Lengths("tiny", np.array([sum(int(max(block)) + 1 for block in order.split()) for order in orders]), 1)
    files = sorted((run / "rollouts").glob("step-*.jsonl"))
    steps = np.array([json.loads(line)["steps"] for file in files for line in file.read_text().splitlines()])
    return Lengths(run.name, steps, 1)


def finish(slots: list[float], lengths: Sequence[float]) -> float:
    """Give the responses in order to the slot that is free first; returns when the last one ends. Slots: a heap."""
    end = 0.0
    for length in lengths:
        end = max(end, slots[0] + length)
        heapq.heapreplace(slots, slots[0] + length)
    return end


def fixed_split(lengths: np.ndarray, ranks: int) -> float:
    """Time of one step in which every rank draws its own share."""
    return max(finish([0.0] * SLOTS, share) for share in lengths.reshape(ranks, -1).tolist())


def shared_queue(lengths: np.ndarray, ranks: int) -> float:
    """Time of one step in which all slots draw from one queue."""
    return finish([0.0] * (ranks * SLOTS), lengths.tolist())


def apart(drawn: np.ndarray, ranks: int) -> float:
    """Share of time that is idle where half of the ranks draw steps, (steps, responses), while the others train."""
    training = drawn.sum(1).mean() / (ranks * SLOTS)  # of a step, by all ranks; by half of them twice that
    time = sum(max(shared_queue(row, ranks // 2), 2 * training) for row in drawn) / len(drawn)
    return 1 - 2 * training / time


def in_turn(waiting: float) -> float:
    """Share of time that is idle where all ranks draw, waiting so much, and then train."""
    drawing = 1 / (1 - waiting)  # in times of the training
    return 1 - 2 / (drawing + 1)


@dataclass
class Groups:
    """Groups that no step has trained on."""

    step: np.ndarray  # (groups,) that began each
    left: np.ndarray  # (groups, samples) denoising steps that their responses have still to make


@dataclass
class Step:
    """What one step under a rule came to."""

    taken: np.ndarray  # places of the groups that are trained on
    open: Groups  # that were begun, and are not
    made: int  # denoising steps, of all responses
    time: int


NO_GROUPS = Groups(np.zeros(0, np.int64), np.zeros((0, SAMPLES), np.int64))


def take_step(rule: Rule, known: Groups, new: np.ndarray) -> Step:
    """A step that goes on with the known groups and has new ones behind them, (groups, samples)."""
    step, left = np.append(known.step, [rule.step] * len(new)), np.concatenate([known.left, new])
    looks_needed = -(-left.ravel() // rule.stride)
    looks_left = looks_needed.copy()
    waiting = np.flatnonzero(looks_left)  # responses, in the order in which they begin
    missing = (left > 0).sum(1)
    seated, begun, looks = waiting[:0], 0, 0
    while True:
        complete = np.flatnonzero(missing == 0)[: rule.wanted]
        if len(complete) == rule.wanted:
            open_groups = np.zeros(len(left), bool)
            open_groups[: max(len(known.step), 1 + int(waiting[begun - 1]) // SAMPLES if begun else 0)] = True
            open_groups[complete] = False
            counts = np.bincount(step[open_groups], minlength=1).tolist()
            if rule.may_wait({began: count for began, count in enumerate(counts) if count}):
                break
        free = rule.seats - len(seated)
        seated, begun = np.append(seated, waiting[begun : begun + free]), min(begun + free, len(waiting))
        jump = looks_left[seated].min()  # nobody is done before
        looks += int(jump)
        looks_left[seated] -= jump
        over = looks_left[seated] == 0
        np.subtract.at(missing, seated[over] // SAMPLES, 1)
        seated = seated[~over]
    behind = np.maximum(0, left - (looks_needed - looks_left).reshape(left.shape) * rule.stride)
    return Step(
        complete, Groups(step[open_groups], behind[open_groups]), int((left - behind).sum()), looks * rule.stride
    )


def carry(lengths: Lengths, ranks: int, per_slot: int, rng: np.random.Generator) -> dict[str, float]:
    """A run of carried responses: its waiting, and how many steps after the one that began it a group is trained on."""
    seats = ranks * SLOTS
    wanted = seats * per_slot // SAMPLES
    known, steps, ages = NO_GROUPS, [], []
    for number in range(1, FIRST + STEPS + 1):
        rule = Rule(number, wanted, SAMPLES, seats, lengths.stride, True, 0, STALE, number + STALE, STALE)
        new = rng.choice(lengths.values, (rule.most_groups(wanted) - len(known.step), SAMPLES))
        steps.append(take_step(rule, known, new))
        begun = np.append(known.step, [number] * len(new))[steps[-1].taken]
        ages.append(float((number - begun).mean()))
        known = steps[-1].open
    made, time = (sum(getattr(step, name) for step in steps[FIRST:]) for name in ("made", "time"))
    return {"waiting": 1 - made / (time * seats), "age": sum(ages[FIRST:]) / STEPS}


def spare(lengths: Lengths, ranks: int, per_slot: int, rng: np.random.Generator) -> dict[str, float]:
    """Steps that take the first four of five groups: their waiting, and the taken ones' mean length over all's.

    What is dropped counts as waiting.
    """
    seats = ranks * SLOTS
    wanted = seats * per_slot // SAMPLES
    rule = Rule(1, wanted, SAMPLES, seats, lengths.stride, False, wanted // 4, 0, 1, 0)
    made, time, shorter = 0, 0, []
    for _ in range(STEPS):
        new = rng.choice(lengths.values, (rule.most_groups(wanted), SAMPLES))
        step = take_step(rule, NO_GROUPS, new)
        made, time = made + int(new[step.taken].sum()), time + step.time
        shorter.append(float(new[step.taken].mean() / new.mean()))
    return {"waiting": 1 - made / (time * seats), "length": sum(shorter) / STEPS}


def rows_of(lengths: Lengths, ranks: int, per_slot: int) -> tuple[dict[str, str], dict[str, str]]:
    """One line of each table."""
    rng = np.random.default_rng([ranks, per_slot])
    drawn = rng.choice(lengths.values, (STEPS, ranks * SLOTS * per_slot))
    waits = {
        name: 1 - drawn.sum() / (sum(time(row, ranks) for row in drawn) * ranks * SLOTS)
        for name, time in (("fixed split", fixed_split), ("shared queue", shared_queue))
    }
    carried, spared = carry(lengths, ranks, per_slot, rng), spare(lengths, ranks, per_slot, rng)
    idle = {name: in_turn(share) for name, share in (waits | {"carry": carried["waiting"]}).items()}
    idle["apart"] = apart(drawn, ranks)
    of = {"lengths": lengths.name, "responses a slot and step": str(per_slot), "ranks": f"{ranks:,}"}
    waiting = {
        **{name: f"{100 * share:.0f} %" for name, share in waits.items()},
        "carry": f"{100 * carried['waiting']:.0f} %",
        "age in steps": f"{carried['age']:.1f}",
        "spare": f"{100 * spared['waiting']:.0f} %",
        "length taken": f"{100 * spared['length']:.0f} %",
    }
    return of | waiting, of | {name: f"{100 * share:.0f} %" for name, share in idle.items()}


def main(run: Path | None) -> None:
    """Print the tables."""
    known = [measured(run)] if run else [*map(log_normal, MEANS), measured(None)]
    for one in known:
        low, middle, high = np.percentile(one.values, [5, 50, 95]).tolist()
        print(
            f"{one.name}: {middle:g} denoising steps (median), {one.values.mean():.0f} in the mean, {low:g} to "
            f"{high:g} (5 to 95 %), {one.values.max()} at most"
        )
    print(f"{SLOTS} slots a rank, {STEPS} steps, groups of {SAMPLES}")
    rows = [rows_of(one, ranks, per_slot) for one in known for per_slot in PER_SLOT for ranks in RANKS]
    for title, table in zip(
        ("slot time spent waiting", "device time in which nothing is drawn or trained"), zip(*rows)
    ):
        print_table(list(table), title=title)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
