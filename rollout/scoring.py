"""Scoring beside the rollout of the next responses: from a scorer to something that takes responses as they finish."""

import atexit
import pickle
from collections.abc import Callable
from concurrent.futures import Future

from common.trajectory import Score, Task
from reward.score import Scorer
from reward.workers import Workers

Submit = Callable[[str, Task, bool], "Future[Score]"]
_workers: dict[bytes, Workers] = {}  # kept from step to step, by the config that they were made from


def submitter(scorer: Callable[[str, Task, bool], Score]) -> Submit:
    """A function that has a response scored: by worker processes, or at once where the scorer knows of none."""
    if not isinstance(scorer, Scorer) or scorer.reward.workers == 0:
        return lambda text, task, truncated: _at_once(scorer, text, task, truncated)
    reward, data_type = scorer.reward, scorer.data_type
    key = pickle.dumps((reward, data_type))
    if key not in _workers:
        if not _workers:
            atexit.register(stop_workers)
        _workers[key] = Workers(reward, data_type, reward.workers)
    return _workers[key].submit


def stop_workers() -> None:
    """End all scoring processes; the next response that needs one starts it."""
    while _workers:
        _workers.popitem()[1].close()


def _at_once(scorer: Callable[[str, Task, bool], Score], text: str, task: Task, truncated: bool) -> Future[Score]:
    done: Future[Score] = Future()
    done.set_result(scorer(text, task, truncated))
    return done
