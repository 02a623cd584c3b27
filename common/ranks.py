"""The ranks of a job: one process per device, started by accelerate; everything here does for one process too.

What ranks agree on travels over gloo, apart from the gradients, so that records and CPU tensors need no device.
"""

import contextlib
import contextvars
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # of a collective that some rank does not come to


def join() -> None:
    """Join the other ranks, if a launcher started any: what a job that trains nothing needs of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def rank() -> int:
    """This process's number among the ranks, 0 where it is alone."""
    return dist.get_rank() if _many() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _many() else 1


def is_main() -> bool:
    """Whether this rank writes files and speaks."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank. All ranks must call it."""
    if not _many():
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value, group=_control())
    return values


def from_main(value: T) -> T:
    """Rank 0's value, on every rank. All ranks must call it."""
    if not _many():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control())
    return box[0]


def add_up(tensor: Tensor) -> Tensor:
    """The sum over ranks of a CPU tensor, in place. All ranks must call it."""
    if _many():
        dist.all_reduce(tensor, group=_control())
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank. All ranks must call it."""
    return bool(add_up(torch.tensor(float(flag))))


def any_of_tensor_group(flag: bool, size: int) -> bool:
    """Whether the flag is set on some rank of this rank's tensor group of `size`. All its ranks must call it."""
    if size == 1:
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, group=_tensor_group(size))
    return bool(found)


def is_first_of_tensor_group(size: int) -> bool:
    """Whether this rank speaks for its tensor group; tensor groups are `size` ranks that follow one another."""
    return rank() % size == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it this thread's rank is the only one: for what it does by itself beside what all ranks do together."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


def wait_for_all() -> None:
    """Return once every rank has called it."""
    if _many():
        dist.barrier(group=_control())


class Queue(Generic[T]):
    """Items taken until none is left, each once. A shared one is made by all ranks, and each item goes to one of them.

    Every rank then holds all the items, in one order; a counter that the ranks share says which are taken.
    Where `tensor_group` ranks sample together, each item goes to all of one group, whose ranks must take alike.
    """

    def __init__(self, items: Iterable[T], shared: bool, tensor_group: int = 1):
        self.items: Sequence[T] = list(items)
        self.tensor_group = tensor_group
        self.next = 0  # the place of the next free item, as far as this rank knows
        self.counter = next(_numbers) if shared and _many() else None

    def __len__(self) -> int:
        """How many items were left when this rank last looked."""
        return max(0, len(self.items) - self.next)

    def __iter__(self) -> Iterator[T]:
        """All the items, taken or not."""
        return iter(self.items)

    def share(self) -> int:
        """How many items are a rank's when they are dealt out evenly."""
        return len(self.items) if self.counter is None else -(-len(self.items) * self.tensor_group // world())

    def take(self, count: int) -> Sequence[T]:
        """Up to `count` items that nobody has taken."""
        before = self.next if self.counter is None else self._first_free(count)
        self.next = before + count
        return self.items[before : self.next]

    def _first_free(self, count: int) -> int:
        """The place of the next item that no rank has, now this tensor group's with those behind it."""
        place, store = torch.zeros((), dtype=torch.long), _store()  # which all ranks must ask for
        if is_first_of_tensor_group(self.tensor_group):
            place.fill_(store.add(f"queue-{self.counter}", count) - count)
        if self.tensor_group > 1:
            dist.broadcast(place, src=rank() - rank() % self.tensor_group, group=_tensor_group(self.tensor_group))
        return int(place)


def _many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1 and not _is_alone.get()


@functools.cache
def _control() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


@functools.cache
def _tensor_group(size: int) -> dist.ProcessGroup:
    """This rank's tensor group. All ranks must come here for a size's first time."""
    return dist.new_subgroups(size, backend="gloo")[0]


@functools.cache
def _store() -> dist.TCPStore:
    """A store of this job's own; rank 0 serves it on a free port."""
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=300)
    store, port = None, 0
    if is_main():
        store = dist.TCPStore(host, 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
        port = store.port
    port = from_main(port)
    return store or dist.TCPStore(host, port, None, is_master=False, timeout=timeout, wait_for_workers=False)


_is_alone = contextvars.ContextVar("is_alone", default=False)  # every thread has its own
# of shared queues: the same on every rank, since all ranks make the same ones in the same order
_numbers = itertools.count(1)
