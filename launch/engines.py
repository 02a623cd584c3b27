"""Engines on many nodes, one on every device: requests are handed out as they become free, results taken once.

In an evaluation they load the model that is evaluated. In RL the trainer's first rank sends them weights, and those
that come in between draw nothing until the next sending.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from common.errors import UserError
from common.ranks import Queue
from common.runtime import console, device_and_dtype
from common.schema import Sampling
from common.stop import beat
from common.trajectory import Request, Segment, Trajectory
from launch.broadcast import TIMEOUT, Broadcast, Meeting, open_store, visit_store
from launch.ray_cluster import device_options, live_nodes, use_own_interface
from models import load_model
from models.mixture import named_weights
from sample.engine import Engine

LOOK_EVERY = 2.0  # seconds after which nodes that have come are looked for
PAUSE = 0.2  # seconds between two looks where nobody draws
SENDINGS = 3  # of the same weights, where they fail though no engine is lost
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_USE_DEEPSPEED": "false"}  # else a training rank's


class EngineWorker:
    """An engine of its own on one device."""

    def __init__(self, model: str, model_base: str, dtype: str):
        use_own_interface()
        device, kind = device_and_dtype(dtype)
        self.loaded = load_model(model, model_base, kind, device)
        self.engine = Engine(self.loaded.model, self.loaded.mask_id, self.loaded.stop_ids)
        self.broadcast: Broadcast | None = None
        self.names: list[str] = []  # of the weights, in the order in which they are sent

    def ids(self) -> tuple[int, tuple[int, ...]]:
        """The mask token and the stop tokens."""
        return self.loaded.mask_id, self.loaded.stop_ids

    def kinds(self) -> tuple[str, dict[str, torch.dtype]]:
        """The kind of device, and every weight's dtype by its name."""
        weights = named_weights(self.loaded.model)
        return self.loaded.model.device.type, {name: weight.dtype for name, weight in weights.items()}

    def generate(self, requests: list[Request], settings: Sampling, stop_ids: list[int]) -> list[Trajectory]:
        """A trajectory for every request."""
        return list(self.engine.generate(requests, settings, stop_ids=stop_ids))

    def join(self, meeting: Meeting, member: int, names: list[str]) -> None:
        """Become that member of a group, in which weights of these names will be sent."""
        if self.broadcast is not None:
            self.broadcast.close()
        self.broadcast, self.names = None, names
        self.broadcast = Broadcast(meeting, member, visit_store(meeting))

    def receive(self) -> None:
        """Take the weights that are being sent."""
        own = named_weights(self.loaded.model)

        def received() -> Iterator[tuple[str, Tensor]]:
            for name in self.names:
                room = torch.empty(own[name].shape, dtype=own[name].dtype, device=self.broadcast.device)
                yield name, self.broadcast(room)

        self.engine.load_weights(received())


@dataclass(eq=False)
class Worker:
    """What is known of an engine elsewhere."""

    actor: Any
    address: str  # of its node
    loading: Any  # returns, when its network is loaded, its `kinds`
    device: str = ""  # none until then
    dtypes: dict[str, torch.dtype] | None = None
    step: int | None = None  # RL step that begins with its weights; None: it has none to draw with yet


class RemoteEngines:
    """Engines on all nodes, used as one is: `generate` yields every request's trajectory once.

    What a lost engine had is drawn again by others, to the same response; a node that comes later is used too. One
    thread may draw while another sends weights.
    """

    tensor_group = 1  # each engine draws alone

    def __init__(
        self,
        model: str,
        model_base: str,
        dtype: str,
        patience: float,
        nodes: Callable[[], list[dict]] = live_nodes,
        trained: bool = False,
    ):
        """`trained`: their weights are sent to them. Seconds of `patience` pass before having no engine is an error."""
        self.model = (model, model_base, dtype)
        self.patience, self.nodes, self.trained = patience, nodes, trained
        self.workers: list[Worker] = []
        self.used: set[str] = set()  # nodes that have workers
        self.answered: set[str] = set()  # addresses of nodes that have returned responses
        self.idle_since: float | None = time.perf_counter()
        self.lock = threading.Lock()  # for the workers that there are
        self.store: TCPStore | None = None  # where groups meet
        self.group: Broadcast | None = None  # of this process and those that have joined it
        self.joined: list[Worker] = []
        self.groups = 0  # so far
        self.failed = 0  # sendings, since the last that did not, in which no engine was lost
        self.use_new_nodes()

    def use_new_nodes(self) -> None:
        """Start a worker on every device of nodes that have none."""
        import ray

        with self.lock:
            nodes, used = self.nodes(), self.used
            self.used = {node["NodeID"] for node in nodes}
            for node in [node for node in nodes if node["NodeID"] not in used]:
                for options in device_options(node):
                    kind = ray.remote(EngineWorker).options(runtime_env={"env_vars": ALONE}, **options)
                    actor = kind.remote(*self.model)
                    worker = Worker(actor, node["NodeManagerAddress"], actor.kinds.remote())
                    worker.step = None if self.trained else 0
                    self.workers.append(worker)

    def lose(self, worker: Worker, news: str) -> None:
        """Do without a worker, and say so once."""
        with self.lock:
            if worker in self.workers:
                self.workers.remove(worker)
                console.print(f"the worker on {worker.address} is lost; {news}")

    # ---- responses

    def generate(
        self,
        requests: Iterable[Request],
        settings: Sampling,
        on_step: Callable[[], None] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> Iterator[Trajectory]:
        """Yield a trajectory for every request, in the order in which the workers return them.

        Where weights are sent, a training response's segment says whose drew it. UserError where no engine is left.
        """
        import ray

        waiting = deque(requests.items if isinstance(requests, Queue) else requests)
        stops = sorted(stop_ids or [])
        running: dict[Any, tuple[Worker, int, list[Request]]] = {}  # what a worker will return → it, and what it draws
        last_seen = time.monotonic()
        if waiting:
            self.idle_since = None
        while waiting or running:
            busy = {worker for worker, *_ in running.values()}
            drawing = [worker for worker in list(self.workers) if worker.step is not None]
            for worker in [worker for worker in drawing if worker not in busy]:
                # half of an even share, so that the last ones end at about the same time
                share = min(-(-len(waiting) // (2 * len(drawing))), 4 * settings.max_active)
                if chunk := [waiting.popleft() for _ in range(share)]:
                    running[worker.actor.generate.remote(chunk, settings, stops)] = worker, worker.step, chunk
            if running:
                ready, _ = ray.wait(list(running), timeout=LOOK_EVERY)
            else:
                ready = []
                time.sleep(PAUSE)
            for result in ready:
                worker, step, chunk = running.pop(result)
                try:
                    trajectories = ray.get(result)
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError):
                    waiting.extendleft(reversed(chunk))
                    self.lose(worker, f"its {len(chunk)} responses are drawn by others")
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, UserError) else error from None
                if not waiting and not running:
                    self.idle_since = time.perf_counter()
                if worker.address not in self.answered:
                    self.answered.add(worker.address)
                    console.print(f"first responses from {worker.address}")
                if self.trained and chunk[0].step:  # evaluations are of step 0
                    for trajectory in trajectories:
                        trajectory.segments = [Segment(step, 0)]
                yield from trajectories
            if on_step is not None:
                on_step()
            if not ready:
                self.use_new_nodes()
            if self.workers:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > self.patience:
                raise self.no_engine()

    def no_engine(self) -> UserError:
        """What ends a job whose engines are all lost."""
        return UserError(
            f"experiment.join_timeout={self.patience:g}: no engine is left, and no node came in that time; start the "
            "command on a node again, and resume"
        )

    # ---- weights

    def newcomers(self) -> bool:
        """Whether an engine is ready that has no weights yet."""
        return any(worker.step is None for worker in self.loaded())

    def wants_weights(self) -> bool:
        """Whether responses wait for them: no engine has any, and one is ready."""
        loaded = self.loaded()
        return bool(loaded) and all(worker.step is None for worker in list(self.workers))

    def keep_weights(self, step: int) -> None:
        """Let the weights that the engines have be those with which RL step `step` begins too."""
        for worker in list(self.workers):
            if worker.step is not None:
                worker.step = step

    def send(self, names: Sequence[str], weights: Iterator[tuple[str, Tensor]], step: int) -> int | None:
        """Give all engines the weights with which RL step `step` begins; the bytes sent, None where one was lost.

        All of `weights` is gone through, whose names come in that order. UserError where no engine comes in time.
        """
        import ray

        workers = self.members()
        for worker in workers:
            worker.step = None  # until it has all of them
        meeting = self.call_together(workers, names)
        receiving = {worker.actor.receive.remote(): worker for worker in workers}
        sent, fault, lost = 0, None, False
        try:
            if self.group is None:
                self.group = Broadcast(meeting, 0, self.store)
        except RuntimeError as error:
            fault = error
        for name, tensor in weights:
            beat()
            if fault is None:
                tensor = tensor.detach().to(self.group.device, workers[0].dtypes[name]).contiguous()
                try:
                    sent += self.group(tensor).nbytes
                except RuntimeError as error:
                    fault = error
        if fault is not None:
            self.leave()  # so that nobody goes on waiting for it
        done, late = ray.wait(list(receiving), num_returns=len(receiving), timeout=TIMEOUT.total_seconds())
        for result in done:
            try:
                ray.get(result)
            except ray.exceptions.RayActorError:
                lost = True
                self.lose(receiving[result], "the others are sent the weights")
            except ray.exceptions.RayTaskError as error:
                fault = fault or error
        for result in late:
            lost = True
            ray.kill(receiving[result].actor)
            self.lose(receiving[result], "the others are sent the weights")
        if fault is None and not lost:
            self.failed = 0
            for worker in workers:
                worker.step = step
            return sent
        self.leave()
        self.failed += not lost
        if self.failed == SENDINGS:
            raise fault
        return None

    def members(self) -> list[Worker]:
        """The engines that may be sent weights; where none ever was, all that are being loaded."""
        limit = time.monotonic() + self.patience
        while True:
            self.use_new_nodes()
            loaded = self.loaded()
            if loaded and (self.store is not None or len(loaded) == len(self.workers)):
                return loaded
            if time.monotonic() > limit:
                if loaded:
                    return loaded
                raise self.no_engine()
            beat()
            time.sleep(PAUSE)

    def loaded(self) -> list[Worker]:
        """Those whose network is loaded."""
        import ray

        loading = {worker.loading: worker for worker in list(self.workers) if worker.dtypes is None}
        done, _ = ray.wait(list(loading), num_returns=len(loading), timeout=0) if loading else ([], [])
        for result in done:
            worker = loading[result]
            try:
                worker.device, worker.dtypes = ray.get(result)
            except ray.exceptions.RayActorError as error:
                self.lose(worker, f"it could not start ({str(error).strip().splitlines()[-1]})")
        return [worker for worker in list(self.workers) if worker.dtypes is not None]

    def call_together(self, workers: list[Worker], names: Sequence[str]) -> Meeting | None:
        """Have these make a group with this process, unless they have one."""
        import ray

        if self.group is not None and self.joined == workers:
            return None
        self.leave()
        host = ray.util.get_node_ip_address()
        self.store = self.store or open_store(host)
        self.groups += 1
        on_gpus = torch.cuda.is_available() and all(worker.device == "cuda" for worker in workers)
        backend = "nccl" if on_gpus else "gloo"
        meeting = Meeting(host, self.store.port, f"group-{self.groups}", len(workers) + 1, backend)
        for member, worker in enumerate(workers, 1):
            worker.actor.join.remote(meeting, member, list(names))
        self.joined = workers
        return meeting

    def leave(self) -> None:
        """Leave the group, if there is one."""
        if self.group is not None:
            self.group.close()
        self.group = None
