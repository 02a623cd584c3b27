"""What an RL run holds: what it reads before any network, how far it is, and all that lives through it."""

from dataclasses import dataclass

from common.runtime import Stopwatch
from common.schema import RLConfig
from common.trajectory import Task
from reward.score import RewardScorer
from rollout.report import RunPage
from sample.engine import Engine
from train.learner import Learner
from train.run import HeldOut, Progress, Run


@dataclass(frozen=True)
class Inputs:
    """What a run reads before any network: tasks, and the functions that score answers to them."""

    tasks: list[Task]
    scorer: RewardScorer
    held_out: HeldOut


@dataclass
class RLProgress(Progress):
    """How far an RL run is."""

    cursor: int = 0  # position in the endless sequence of shuffled tasks


@dataclass(kw_only=True)
class RLRun(Run):
    """All that lives through an RL run."""

    config: RLConfig
    progress: RLProgress
    tasks: list[Task]
    scorer: RewardScorer
    engine: Engine
    reference: Learner | None  # the frozen first model, where the KL refers to it
    page: RunPage
    stages: Stopwatch  # seconds by stage of the whole run
