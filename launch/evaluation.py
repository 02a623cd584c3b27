"""Where an evaluation runs: in this process, in a rank for each device of this node, or on many nodes.

Over nodes every device has an engine of its own. Requests are handed out as engines become free, results taken once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from common.errors import UserError
from common.ranks import Queue
from common.runtime import console, device_and_dtype
from common.schema import EvalConfig, Sampling
from common.stop import exit_code_of
from common.trajectory import Request, Trajectory
from launch.accelerate import launch_ranks, launched
from launch.ray_cluster import device_options, live_nodes
from launch.start_model import make_missing_model
from models import LoadedModel, find_family, load_model, load_tokenizer
from models.family import check_model_type, local_folder, own_block_size
from models.files import check_files
from rollout import evaluate
from sample.engine import Engine

LOOK_EVERY = 2.0  # seconds after which nodes that have come are looked for


def evaluate_here(config: EvalConfig, arguments: Sequence[str]) -> int:
    """Run eval.py's job, started with these arguments, on this node; returns the exit code."""
    if config.experiment.deepspeed_file and not launched():
        return launch_ranks(config, "eval.py", arguments)

    def job() -> None:
        if not launched():
            make_missing_model(config)
        evaluate.main(config)

    return exit_code_of(job)


class EngineWorker:
    """An engine of its own on one device."""

    def __init__(self, model: str, model_base: str, dtype: str):
        device, kind = device_and_dtype(dtype)
        self.loaded = load_model(model, model_base, kind, device)
        self.engine = Engine(self.loaded.model, self.loaded.mask_id, self.loaded.stop_ids)

    def ids(self) -> tuple[int, tuple[int, ...]]:
        """The mask token and the stop tokens."""
        return self.loaded.mask_id, self.loaded.stop_ids

    def generate(self, requests: list[Request], settings: Sampling, stop_ids: list[int]) -> list[Trajectory]:
        """A trajectory for every request."""
        return list(self.engine.generate(requests, settings, stop_ids=stop_ids))


class RemoteEngines:
    """Engines on all nodes, used as one is: `generate` yields every request's trajectory once.

    What a lost worker had is drawn again by others, to the same response; a node that comes later is used too.
    """

    tensor_group = 1  # each engine draws alone

    def __init__(self, config: EvalConfig):
        self.config = config
        self.workers: dict[Any, str] = {}  # actor → its node's address
        self.used: set[str] = set()  # nodes that have workers
        self.answered: set[str] = set()  # nodes that have returned responses
        self.use_new_nodes()

    def use_new_nodes(self) -> None:
        """Start a worker on every device of nodes that have none."""
        import ray

        nodes, used = live_nodes(), self.used
        self.used = {node["NodeID"] for node in nodes}
        for node in [node for node in nodes if node["NodeID"] not in used]:
            for options in device_options(node):
                kind = ray.remote(EngineWorker).options(**options)
                worker = kind.remote(self.config.model, self.config.model_base, self.config.dtype)
                self.workers[worker] = node["NodeManagerAddress"]

    def generate(
        self,
        requests: Iterable[Request],
        settings: Sampling,
        on_step: Callable[[], None] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield a trajectory for every request, in the order in which the workers return them."""
        import ray

        waiting = deque(requests.items if isinstance(requests, Queue) else requests)
        stops = sorted(stop_ids or [])
        running: dict[Any, tuple[Any, list[Request]]] = {}  # what a worker will return → the worker, its requests
        while waiting or running:
            busy = {worker for worker, _ in running.values()}
            for worker in [worker for worker in self.workers if worker not in busy]:
                # half of an even share, so that the last ones end at about the same time
                share = min(-(-len(waiting) // (2 * len(self.workers))), 4 * settings.max_active)
                if chunk := [waiting.popleft() for _ in range(share)]:
                    running[worker.generate.remote(chunk, settings, stops)] = worker, chunk
            ready, _ = ray.wait(list(running), timeout=LOOK_EVERY) if running else ([], [])
            for result in ready:
                worker, chunk = running.pop(result)
                try:
                    trajectories = ray.get(result)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    waiting.extendleft(reversed(chunk))
                    where = self.workers.pop(worker)
                    console.print(f"the worker on {where} is lost; its {len(chunk)} responses are drawn by others")
                else:
                    if (node := self.workers[worker]) not in self.answered:
                        self.answered.add(node)
                        console.print(f"first responses from {node}")
                    yield from trajectories
            if on_step is not None:
                on_step()
            if not ready:
                self.use_new_nodes()


def load_everywhere(config: EvalConfig) -> tuple[LoadedModel, RemoteEngines]:
    """The engines of all nodes, and what this process needs of the model beside them: no weights."""
    import ray

    folder, family = local_folder(config.model), find_family(config.model_base)
    check_model_type(folder, family)
    check_files(folder)
    tokenizer = load_tokenizer(folder)  # before any worker: a mistake is told here
    engines = RemoteEngines(config)
    mask_id, stop_ids = ray.get(next(iter(engines.workers)).ids.remote())
    return LoadedModel(None, tokenizer, family, mask_id, stop_ids, own_block_size(folder, family)), engines


def evaluate_over_nodes(config: EvalConfig) -> int:
    """As `rollout.evaluate.main`, by the engines of all nodes; returns the exit code."""
    size = config.rollout.tensor_parallel_size
    if size > 1:
        raise UserError(
            f"rollout.tensor_parallel_size: {size}, but over nodes every device has an engine of its own; set it to 1, "
            "or run eval.py with experiment.deepspeed_file on one node"
        )
    make_missing_model(config)
    evaluate.main(config, load_everywhere)
    return 0
