"""Which node of a job this is, and where the first one is, by what schedulers and launchers put in the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError

PORT = 6379  # of the first node, where the launcher names none
# The variables of MLP, SLURM, torchrun and of those that set what torchrun is given: which node this is, how many there
# are, where the first or all of them are, and its port.
LAUNCHERS = (
    ("MLP_ROLE_INDEX", ("MLP_WORKER_NUM",), "MLP_WORKER_0_HOST", "MLP_WORKER_0_PORT"),
    ("SLURM_NODEID", ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"), "SLURM_JOB_NODELIST", ""),
    ("GROUP_RANK", ("GROUP_WORLD_SIZE",), "MASTER_ADDR", "MASTER_PORT"),
    ("NODE_RANK", ("NNODES", "NUM_NODES"), "MASTER_ADDR", "MASTER_PORT"),
)


@dataclass(frozen=True)
class Place:
    """A node's part in a job."""

    role: int  # 0 drives
    nodes: int
    hosts: tuple[str, ...]  # addresses, the first node's at least
    port: int

    @property
    def head(self) -> str:
        return self.hosts[0]


def find_place(environ: Mapping[str, str]) -> Place:
    """The node's place by the variables of the first of LAUNCHERS that has set any; alone where none has.

    UserError where a launcher set some of its variables and not the others.
    """
    for role, sizes, host, port in LAUNCHERS:
        if role not in environ:
            continue
        index, nodes = number(environ, role), number(environ, *sizes)
        if index >= nodes:
            raise UserError(
                f"{role}={index}, but the job has {nodes} nodes, counted from 0: correct the launcher's variables"
            )
        if not environ.get(host):
            raise UserError(f"{role} is set, but not {host}, the address of node 0: set it on every node")
        hosts = expand_hosts(environ[host]) if role == "SLURM_NODEID" else [environ[host]]
        if role == "MLP_ROLE_INDEX":
            names = [f"MLP_WORKER_{other}_HOST" for other in range(1, nodes)]
            hosts += [environ[name] for name in names if name in environ]
        # torchrun's own store listens on MASTER_PORT, so Ray takes the next one
        return Place(index, nodes, tuple(hosts), number(environ, port) + 1 if port in environ else PORT)
    return Place(0, 1, ("127.0.0.1",), 0)


def number(environ: Mapping[str, str], *names: str) -> int:
    """The whole number in the first of the variables that is set; UserError where none is or it is no number."""
    for name in names:
        if name in environ:
            if not environ[name].isdecimal():
                raise UserError(f"{name}={environ[name]}: expected a whole number")
            return int(environ[name])
    raise UserError(f"{' or '.join(names)} is not set: it holds the number of nodes of the job")


def expand_hosts(text: str) -> list[str]:
    """SLURM's list of nodes in full: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login."""
    hosts = []
    for prefix, numbers, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", text):
        if not numbers:
            hosts.append(prefix + suffix)
            continue
        for part in numbers.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            hosts += [f"{prefix}{index:0{len(first)}d}{suffix}" for index in span]
    return hosts
