"""An RL run's records: what it reads at first, how far it is, what a step has drawn, and all that lives through it."""

from dataclasses import dataclass, field

from common.jobs import RLConfig
from common.runtime import Stopwatch
from common.trajectory import ScoredTrajectory, Task
from reward.score import RewardScorer
from rollout.carry import Group
from rollout.report import RunPage
from sample.engine import Engine
from train.ahead import Ahead, Engines
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


@dataclass
class Drawn:
    """What an RL step has drawn so far."""

    cursor: int  # place behind the last task of the endless sequence that was begun
    carried: list[Group]  # responses that are begun
    groups: list[list[ScoredTrajectory]] = field(default_factory=list)
    samples: list[ScoredTrajectory] = field(default_factory=list)  # of them, what is learned from
    steps: int = 0  # denoising steps, and those for which there were seats, where the first groups are taken
    room: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, where they are drawn beside the step before


@dataclass(kw_only=True)
class RLRun(Run):
    """All that lives through an RL run."""

    config: RLConfig
    progress: RLProgress
    tasks: list[Task]
    scorer: RewardScorer
    engine: Engine | Engines | None  # what draws; None: rank 0 has the engines, which lie elsewhere
    reference: Learner | None  # the frozen first model, where the KL refers to it
    page: RunPage
    stages: Stopwatch  # seconds by stage of the whole run
    ahead: Ahead[Drawn] | None = None  # where the engines lie elsewhere, and draw a step ahead
