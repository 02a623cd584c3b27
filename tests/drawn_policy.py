"""A policy that has just drawn some responses, to learn from them in one call."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from scored import scored

from common.schema import OptimizerParams, RLTrainingConfig, Sampling, SchedulerConfig
from common.trajectory import Request, ScoredTrajectory
from models import load_model
from sample.engine import Engine
from train.learner import Learner, make_learner
from train.network import Policy
from train.rl_step import learn
from train.views import Layout

BLOCK = 4


@dataclass
class Drawn:
    """A policy and responses it drew at temperature 1."""

    learner: Learner
    samples: list[ScoredTrajectory]
    mask_id: int

    start: dict[str, torch.Tensor]  # the policy's weights

    def learn(
        self,
        samples: list[ScoredTrajectory] | None = None,
        exact: bool = True,
        critic: Learner | None = None,
        train_value: bool = True,
        **training: object,
    ) -> dict[str, float]:
        settings, layout = RLTrainingConfig(**training), Layout(self.mask_id, BLOCK)
        chosen = self.samples if samples is None else samples
        values = {"critic": critic, "train_value": train_value}
        return learn(self.learner, chosen, settings, layout, 16, seed=[0], exact=exact, **values)


@pytest.fixture
def drawn(tiny_sdar: Path) -> Drawn:
    loaded = load_model(tiny_sdar, "sdar")
    params = OptimizerParams(learning_rate=1e-3)
    learner = make_learner(Policy(loaded.model, loaded.mask_id), params, SchedulerConfig(), 10, RLTrainingConfig())
    settings = Sampling(max_token=16, remasking_strategy="low_confidence_static")
    requests = [Request(str(n), list(range(5 + n)), seed=1) for n in range(4)]
    trajectories = Engine(loaded.model, loaded.mask_id, loaded.stop_ids).generate(requests, settings)
    ordered = sorted(trajectories, key=lambda one: one.task_id)
    samples = [scored(one, (-1.0) ** n) for n, one in enumerate(ordered)]
    start = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    return Drawn(learner, samples, loaded.mask_id, start)
