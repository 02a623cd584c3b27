"""Which experts a mixture's tokens were given to while they were drawn, kept for a trainer that gives them to the same.

A denoising step leaves one tensor on the device. Some steps are gathered before the host looks at them, so that it does
not wait for each; then every sequence's log takes its part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from common.trajectory import Routes

GATHERED = 64  # steps
CLEAN = -1  # in place of a denoising step: the forward was the block's commit; less than that: of a finished row


@dataclass(frozen=True)
class StepRoutes:
    """What one forward of all rows gave to which experts; it may have carried previous blocks along."""

    experts: Tensor  # (rows + carried, block, layers, chosen)
    state: Tensor  # (rows, 4) block_start, cached, the denoising step or CLEAN, whether that step was the commit too
    carried: Tensor | None  # (carried,) the rows of further lines: the block before theirs, to be committed

    def copied(self) -> "StepRoutes":
        """The same in memory of its own: a CUDA graph writes to these tensors again."""
        if self.experts.device.type == "cpu":
            return self
        return StepRoutes(self.experts.clone(), self.state.clone(), None if self.carried is None else self.carried + 0)


class RouteLog:
    """Of one sequence: the experts of its committed tokens, and of its block at every denoising step."""

    def __init__(self, tokens: int, denoised: np.ndarray | None = None):
        """Of that many tokens to the end of its canvas; `denoised`: of the steps that another engine made."""
        self.tokens = tokens
        self.committed: np.ndarray | None = None  # (tokens, layers, chosen)
        # (block, layers, chosen) each
        self.steps: dict[int, np.ndarray] = {} if denoised is None else dict(enumerate(denoised))

    def commit(self, start: int, experts: np.ndarray) -> None:
        """Tokens from `start` on were given to these experts, (length, layers, chosen), when their keys were made."""
        if self.committed is None:
            self.committed = np.zeros((self.tokens, *experts.shape[1:]), experts.dtype)
        self.committed[start : start + len(experts)] = experts

    def denoised(self, steps: int) -> np.ndarray:
        """The experts of the block at each of the first `steps` steps, (steps, block, layers, chosen)."""
        return np.stack([self.steps[step] for step in range(steps)])

    def record(self, length: int, steps: int) -> Routes:
        """The record of a sequence of `length` tokens that was denoised in `steps` steps."""
        denoised = self.denoised(steps)
        if self.committed is None:  # all of it is in one block
            return Routes(np.zeros((length, *denoised.shape[2:]), denoised.dtype), denoised)
        return Routes(self.committed[:length].copy(), denoised)


class RouteKeeper:
    """Hands what the steps leave to the logs of the sequences that were in their rows."""

    def __init__(self) -> None:
        self.pending: list[tuple[list[RouteLog | None], StepRoutes]] = []

    def note(self, logs: Sequence[RouteLog | None], step: StepRoutes) -> None:
        """A step was made with those logs' sequences in its first rows; None: in a row that none was in."""
        self.pending.append((list(logs), step.copied()))
        if len(self.pending) >= GATHERED:
            self.flush()

    def flush(self) -> None:
        """Bring the logs up to date."""
        for logs, step in self.pending:
            experts, state = step.experts.cpu().numpy(), step.state.tolist()
            size = experts.shape[1]
            for log, given, (start, _, number, commits) in zip(logs, experts, state):
                if number >= 0:
                    log.steps[number] = given.copy()
                if number == CLEAN or commits:
                    log.commit(start, given)
            carried = [] if step.carried is None else step.carried.tolist()
            for row, given in zip(carried, experts[len(state) :]):
                start, cached, *_ = state[row]
                if row < len(logs) and logs[row] is not None and cached < start:
                    logs[row].commit(start - size, given)
        self.pending = []
