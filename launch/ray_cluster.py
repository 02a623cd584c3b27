"""A Ray cluster of a job's nodes: the first one starts it and drives, the others join it and leave with the job.

Nothing outside the job is touched: Ray's processes are this process's children, and end with it.
"""

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.runtime import ROOT, console
from common.schema import EvalExperimentConfig
from launch.nodes import Place, find_place

AGENTS = ("dashboard-agent-grpc", "metrics-export", "dashboard-agent-listen", "runtime-env-agent")
FAREWELL = 10.0  # seconds in which the other nodes may leave before the first one does
STARTS = 3  # of Ray: on a busy machine its raylet may find its agents late and give up
JOB = "dllm-rl-job"  # the actor that knows how the job stands
ROLE = "role"  # Ray's label of a node: its number in the job


class Job:
    """Runs on the first node: whether the job is over, and with which exit code."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.roles_gone: set[int] = set()

    def status(self, role: int) -> int | None:
        """The job's exit code once it is over; a role that has read it leaves."""
        if self.code is not None:
            self.roles_gone.add(role)
        return self.code

    def finish(self, code: int) -> None:
        """Let the other nodes know that the job is over."""
        self.code = code

    def left(self) -> int:
        """How many nodes have read that the job is over."""
        return len(self.roles_gone)


def drive_or_follow(experiment: EvalExperimentConfig, drive: Callable[[int], int]) -> int:
    """Run `drive(number of nodes)` on the first node of a cluster of all of them, and nothing but Ray on the others.

    Returns the job's exit code, on every node. With experiment.ssh the first node starts the others.
    """
    place = find_place(os.environ)
    if place.role > 0:
        return follow(place, experiment)
    token = secrets.token_hex(32)
    code = 1
    with head_node(place, experiment, token), contextlib.ExitStack() as stack:
        import ray

        if experiment.ssh:
            stack.enter_context(started_by_ssh(place, experiment, token))
        job = ray.remote(Job).options(name=JOB, num_cpus=0, resources={"node:__internal_head__": 0.001}).remote()
        ray.get(job.left.remote())
        try:
            wait_for_nodes(place.nodes, experiment.join_timeout, place)
            code = drive(place.nodes)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        finally:
            others = len(live_nodes()) - 1
            ray.get(job.finish.remote(code))
            limit = time.monotonic() + FAREWELL
            while ray.get(job.left.remote()) < others and time.monotonic() < limit:
                time.sleep(0.2)
    return code


def live_nodes() -> list[dict]:
    """Ray's records of the nodes that are there, the head first."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return sorted(nodes, key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeID"]))


def role_of(node: dict) -> int:
    """A node's number in the job."""
    return int(node["Labels"].get(ROLE, 0))


def device_options(node: dict) -> list[dict[str, Any]]:
    """Of each device of a node what gives it to a Ray actor alone; of a node without any, what gives it a processor."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = int(node["Resources"].get("GPU", 0))
    options = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return [options] * (gpus or 1)


def wait_for_nodes(
    wanted: int, patience: float, place: Place | None = None, nodes: Callable[[], list[dict]] = live_nodes
) -> int:
    """Wait until so many nodes are there; returns how many came in time. With `place`, too few are a UserError."""
    limit = time.monotonic() + patience
    while (count := len(nodes())) < wanted and time.monotonic() < limit:
        time.sleep(0.3)
    if count < wanted and place is not None:
        here = {node["NodeManagerAddress"] for node in live_nodes()}
        missing = [host for host in place.hosts if host not in here]
        who = f"missing {', '.join(missing)}" if len(place.hosts) == wanted else f"there are {', '.join(sorted(here))}"
        raise UserError(
            f"experiment.join_timeout={patience:g}: {count} of {wanted} nodes came in that time ({who}); "
            "start the same command on them, or raise it"
        )
    return count


def use_own_interface() -> None:
    """Have gloo listen where the cluster's other nodes are: by the host's name it may find 127.0.0.1."""
    import psutil
    import ray

    address, interfaces = ray.util.get_node_ip_address(), psutil.net_if_addrs().items()
    interface = next(name for name, entries in interfaces if address in [entry.address for entry in entries])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


@contextlib.contextmanager
def head_node(place: Place, experiment: EvalExperimentConfig, token: str) -> Iterator[None]:
    """Ray's head on this node, and this process connected to it; its token where the other nodes find it."""
    with tempfile.TemporaryDirectory() as folder:
        use_token(token, Path(folder) / "token")
        import ray  # it reads how to show its token as it is imported

        if place.nodes == 1:
            ray.init(address="local", namespace=JOB, include_dashboard=False, num_cpus=os.cpu_count())
            try:
                yield
            finally:
                ray.shutdown()
            return
        shared = token_file(experiment)
        write_private(shared, token)
        arguments = ["--head", f"--node-ip-address={place.head}", f"--port={place.port}", "--include-dashboard=false"]
        arguments.append(f"--labels={ROLE}=0")
        try:
            with contextlib.ExitStack() as stack:
                for _ in range(STARTS):
                    process = stack.enter_context(ray_process(arguments, place.port, Path(folder)))
                    if connect(f"{place.head}:{place.port}", process, experiment.join_timeout):
                        break
                    stack.close()
                else:
                    last = (Path(folder) / "ray.log").read_text().strip().splitlines()[-1:]
                    raise UserError(f"Ray does not start at {place.head}:{place.port}: {' '.join(last)}")
                yield
                ray.shutdown()
        finally:
            shared.unlink(missing_ok=True)


def follow(place: Place, experiment: EvalExperimentConfig, token: str | None = None) -> int:
    """Join the first node's cluster, stay until the job is over, and return its exit code."""
    limit = time.monotonic() + experiment.join_timeout
    address, shared = f"{place.head}:{place.port}", token_file(experiment)
    while True:
        # the first node writes the token before it listens, so that one of an older job is not taken
        if (own := own_address(place)) and (token or shared.exists()):
            with tempfile.TemporaryDirectory() as folder:
                use_token(token or shared.read_text(), Path(folder) / "token")
                arguments = [f"--address={address}", f"--node-ip-address={own}", f"--labels={ROLE}={place.role}"]
                with ray_process(arguments, place.port, Path(folder)) as process:
                    if connect(address, process, limit - time.monotonic()):
                        code = stay(place, process)
                        if code is not None:
                            return code
                        limit = time.monotonic() + experiment.join_timeout
        if time.monotonic() > limit:
            raise UserError(
                f"experiment.join_timeout={experiment.join_timeout:g}: no cluster at {address} in that time; is node 0 "
                f"running, and {shared} on storage that all nodes share?"
            )
        time.sleep(0.5)


def stay(place: Place, process: subprocess.Popen) -> int | None:
    """Wait until the job is over; its exit code, None where the connection to it is lost."""
    import ray

    while process.poll() is None:
        try:
            code = ray.get(ray.get_actor(JOB).status.remote(place.role), timeout=20)
            if code is not None:
                ray.shutdown()
                return code
        except ValueError:  # the job is not there yet
            pass
        except (ray.exceptions.RayError, ConnectionError, OSError):
            break
        time.sleep(0.5)
    console.print(f"node {place.role}: lost the first node; trying to join again")
    ray.shutdown()
    return None


@contextlib.contextmanager
def ray_process(arguments: Sequence[str], port: int, folder: Path) -> Iterator[subprocess.Popen]:
    """`ray start` with those arguments; it and all that it started end with the context."""
    fixed = [
        "--block",
        "--disable-usage-stats",
        f"--num-cpus={os.cpu_count()}",
        f"--num-gpus={torch.cuda.device_count()}",
        # named, for a raylet waits but 15 s for its agents to say which they took
        *(f"--{name}-port={port + number}" for number, name in enumerate(AGENTS, 11)),
    ]
    # a short folder: Ray makes sockets in it, whose names may have 107 characters
    temporary = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    if "--head" in arguments:
        fixed.append(f"--temp-dir={temporary}")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *fixed]
    with open(folder / "ray.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is not None:
            last_lines = (folder / "ray.log").read_text().strip().splitlines()[-15:]
            print("Ray ended by itself on this node:", *last_lines, sep="\n  ", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def connect(address: str, process: subprocess.Popen, patience: float) -> bool:
    """Connect this process to the cluster once it is up; False where `ray start` ended before."""
    import ray

    limit = time.monotonic() + max(patience, 1)
    while process.poll() is None:
        try:
            ray.init(address=address, namespace=JOB, logging_level="ERROR")
            return True
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            if time.monotonic() > limit:
                raise UserError(f"Ray at {address} cannot be reached ({str(error).splitlines()[0]})") from error
            time.sleep(0.5)
    return False


@contextlib.contextmanager
def started_by_ssh(place: Place, experiment: EvalExperimentConfig, token: str) -> Iterator[None]:
    """The other nodes joined by ssh, for jobs whose other nodes wait idly; the token goes through standard input."""
    module = [sys.executable, "-m", "launch.join", str(place.nodes), str(place.port), str(experiment.join_timeout)]
    processes = []
    for role, host in enumerate(place.hosts[1:], 1):
        remote = ["cd", str(ROOT)], ["exec", *module, str(role), place.head, host]
        command = [*experiment.ssh, host, " && ".join(shlex.join(part) for part in remote)]  # ssh takes one line
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        process.stdin.write(token + "\n")
        process.stdin.close()
        processes.append(process)
    try:
        yield
    finally:
        for process in processes:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.terminate()


def token_file(experiment: EvalExperimentConfig) -> Path:
    """Where the first node leaves the cluster's token for the others, on the storage that they share."""
    return Path(experiment.runs_dir) / f".{experiment.project}.ray-token"


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read, in one rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".writing")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(text)
    beside.rename(file)


def use_token(token: str, file: Path) -> None:
    """From here on Ray, in this process and in those that it starts, demands and shows the token."""
    write_private(file, token)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def own_address(place: Place) -> str | None:
    """The address by which the first node sees this one; None where it does not listen."""
    try:
        with socket.create_connection((place.head, place.port), timeout=2) as connection:
            own = connection.getsockname()[0]
    except OSError:
        return None
    return socket.gethostbyname(place.hosts[place.role]) if len(place.hosts) > place.role else own
