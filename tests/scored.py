"""Scored trajectories for tests of the learner, which reads of a score the reward alone."""

from common.trajectory import Score, ScoredTrajectory, Task, Trajectory


def scored(
    trajectory: Trajectory, advantage: float = 0.0, reward: float = 0.0, token_rewards: list[float] | None = None
) -> ScoredTrajectory:
    """The trajectory with that advantage and reward."""
    score = Score(reward, reward > 0, "passed", token_rewards)
    return ScoredTrajectory(Task(trajectory.task_id, ""), trajectory, score, advantage)


def all_right(text: str, task: Task) -> float:
    """A reward function that every response pleases."""
    return 1.0
