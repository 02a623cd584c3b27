"""A collective by which the trainer's first rank sends its weights to engines on other nodes.

Torch's default process group is the training ranks' own already, so this one stands beside it, on a store of its own.
`ray.util.collective` does not serve here: its gloo groups are made of torch's default group, and its NCCL wants cupy.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=120)  # for all members to come, and for one tensor
# so that a member that is gone raises an error in the others; by itself torch would end their processes
RAISES = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group find each other, and how they send."""

    host: str
    port: int
    name: str  # every group's own
    size: int
    backend: str  # nccl or gloo


def open_store(host: str) -> dist.TCPStore:
    """A store at a free port of that address alone, for groups to meet."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, None, True, TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach())


def visit_store(meeting: Meeting) -> dist.TCPStore:
    """The store that the first member opened."""
    return dist.TCPStore(meeting.host, meeting.port, None, False, TIMEOUT, wait_for_workers=False)


class Broadcast:
    """A group of which member 0 sends. Whatever a member that is gone makes fail is a RuntimeError."""

    def __init__(self, meeting: Meeting, member: int, store: dist.Store):
        """Returns when all members have come."""
        own = dist.PrefixStore(meeting.name, store)
        self.device = torch.device("cuda" if meeting.backend == "nccl" else "cpu")
        if meeting.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = TIMEOUT
            with environment(RAISES):
                self.group = dist.ProcessGroupNCCL(own, member, meeting.size, options)
        else:
            self.group = dist.ProcessGroupGloo(own, member, meeting.size, TIMEOUT)

    def __call__(self, tensor: Tensor) -> Tensor:
        """Send the tensor, or receive into it: any shape, contiguous, on the group's device."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self.group.broadcast([tensor], options).wait()
        return tensor

    def close(self) -> None:
        """Leave; members that wait for this one raise an error."""
        self.group.abort()
        self.group = None


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Within it the environment has those variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
