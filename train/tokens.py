"""One record from the packed rows to the loss: what is known of each predicted token of an RL step.

Every field is a column, (predicted,), in the order of the step's rows. `learn` fills the columns one after another; an
update and a micro-batch select their tokens by index.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from common.trajectory import ScoredTrajectory
from train.packing import Row


@dataclass
class Tokens:
    """Predicted tokens; where a sequence has but one ratio, the loss takes a row for each sequence instead."""

    trajectory: Tensor  # which of the step's responses it belongs to
    response_index: Tensor | None = None  # where in the response
    trace_step: Tensor | None = None  # its step of the trace, the first of those merged; without a trace, its noising
    engine_logp: Tensor | None = None  # as it was drawn
    trainer_logp: Tensor | None = None  # the policy's before the step, on these views; None: not computed
    old_logp: Tensor | None = None  # what the ratio starts from; None: the policy's own in the update
    reference_logp: Tensor | None = None  # what the KL refers to; None: the policy's own in the update
    advantage: Tensor | None = None
    old_value: Tensor | None = None  # the value model's before the step
    returns: Tensor | None = None
    weight: Tensor | None = None  # in its update's loss: the whole denominator is in it

    def __len__(self) -> int:
        return len(self.trajectory)

    def __getitem__(self, index: np.ndarray) -> "Tokens":
        """Some of the tokens, by index or by bool."""
        chosen = torch.from_numpy(index)
        return self._each(lambda column: column[chosen])

    def to(self, device: torch.device) -> "Tokens":
        return self._each(lambda column: column.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return Tokens(**{name: column if column is None else function(column) for name, column in columns.items()})


def tokens_of(rows: Sequence[Row], samples: Sequence[ScoredTrajectory]) -> Tokens:
    """The predicted tokens of the rows, with the engine's logp and the advantage of their responses."""
    trajectory = np.repeat([row.trajectory for row in rows], [len(row.target) for row in rows])
    engine_logp = [np.asarray(samples[row.trajectory].trajectory.logp)[row.response_index] for row in rows]
    return Tokens(
        trajectory=torch.from_numpy(trajectory),
        response_index=torch.from_numpy(np.concatenate([row.response_index for row in rows])),
        trace_step=torch.from_numpy(np.concatenate([row.trace_step for row in rows])),
        engine_logp=torch.tensor(np.concatenate(engine_logp), dtype=torch.float32),
        advantage=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32)[trajectory],
    )
