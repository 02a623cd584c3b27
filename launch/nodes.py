"""Which node of a job this is, and where the first one is, by what schedulers and launchers put in the environment."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError

PORT = 6379  # of the first node, where the launcher names none


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
    """The node's place by the variables of MLP, SLURM, torchrun, or MASTER_ADDR and NODE_RANK; alone where none is set.

    UserError where a launcher set some of its variables and not the others.
    """
    if "MLP_ROLE_INDEX" in environ:
        nodes = number(environ, "MLP_WORKER_NUM")
        wanted = [f"MLP_WORKER_{index}_HOST" for index in range(nodes)]
        hosts = tuple(environ[name] for name in wanted if name in environ)
        return place(environ, "MLP_ROLE_INDEX", nodes, hosts, wanted[0], "MLP_WORKER_0_PORT")
    if "SLURM_NODEID" in environ:
        nodes = number(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
        hosts = tuple(expand_hosts(environ.get("SLURM_JOB_NODELIST", "")))
        return place(environ, "SLURM_NODEID", nodes, hosts, "SLURM_JOB_NODELIST", None)
    for role, sizes in (("GROUP_RANK", ("GROUP_WORLD_SIZE",)), ("NODE_RANK", ("NNODES", "NUM_NODES"))):
        if role in environ:
            hosts = tuple(filter(None, [environ.get("MASTER_ADDR")]))
            return place(environ, role, number(environ, *sizes), hosts, "MASTER_ADDR", "MASTER_PORT")
    return Place(0, 1, ("127.0.0.1",), 0)


def place(
    environ: Mapping[str, str], role: str, nodes: int, hosts: tuple[str, ...], host_key: str, port_key: str | None
) -> Place:
    """A Place of checked values; the keys are the variables they came from."""
    index = number(environ, role)
    if index >= nodes:
        raise UserError(f"{role}={index}, but the job has {nodes} nodes, counted from 0: mend the launcher's variables")
    if not hosts:
        raise UserError(f"{role} is set, but not {host_key}, the address of node 0: set it on every node")
    # torchrun's own store listens on MASTER_PORT, so Ray takes the next one
    port = number(environ, port_key) + 1 if port_key and port_key in environ else PORT
    return Place(index, nodes, hosts, port)


def number(environ: Mapping[str, str], *names: str) -> int:
    """The whole number in the first of the variables that is set; UserError where none is or it is no number."""
    for name in names:
        if name in environ:
            if not environ[name].isdecimal():
                raise UserError(f"{name}={environ[name]}: expected a whole number")
            return int(environ[name])
    raise UserError(f"{' or '.join(names)} is not set: it says how many nodes the job has")


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
