"""Trajectories of random ids for timing the update, their blocks unmasked in the order of real rollouts."""

import json
from pathlib import Path

import numpy as np

from common.trajectory import Trajectory
from train.views import Layout

VOCABULARY, PROMPT, BLOCK = 32_000, 64, 4
MASK = VOCABULARY - 1
LAYOUT = Layout(MASK, BLOCK)


def make_trajectories(count: int, lengths: list[int]) -> list[Trajectory]:
    """Random ids whose blocks are unmasked as in real rollouts, one response after another."""
    rng = np.random.default_rng(0)
    orders = json.loads(Path(__file__).with_name("step_maps.json").read_text())
    blocks = [[int(digit) for digit in block] for order in orders for block in order.split()]
    result, place = [], 0
    for number in range(count):
        size = lengths[number % len(lengths)] // BLOCK * BLOCK
        step_map, first = [], 0
        while len(step_map) < size:
            order = blocks[place % len(blocks)]
            step_map += [first + step for step in order]
            first, place = first + max(order) + 1, place + 1
        ids = rng.integers(0, MASK, PROMPT + size).tolist()
        logp = (-np.log(VOCABULARY) + rng.normal(0, 0.3, size)).tolist()
        result.append(
            Trajectory("t", number, ids[:PROMPT], ids[PROMPT:], step_map, logp, [], 1.0, "stop", size, first, 0, 1.0)
        )
    return result
