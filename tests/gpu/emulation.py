"""A CUDA device that is not there: tensors that say they are on `cuda:0` and hold their values in the host's memory.

`patches.switch_on` makes torch use it for the rest of the process, so it belongs in a process of its own, before the
project is imported: `torch.cuda.is_available()` is True from then on, and the project takes the way that it takes on a
GPU.

    with DEVICE.watching() as log: ...  # log.waits, log.kernels, log.attention, log.sorted: what happened meanwhile
    DEVICE.captured, DEVICE.replayed  # CUDA graphs

What holds here as it holds on a GPU:
  * An operation on tensors of both devices raises, but for numbers (0 dimensions), indices and copies.
  * What makes the host wait is noted with its place: `.item()`, `.tolist()`, `nonzero`, a boolean index, copies.
  * While a graph is captured these raise, the capture is lost, and its stream stays the current one.
  * A graph holds operations and the memory they met. It carries nothing out when captured; a replay does it again on
    the same memory, and runs no Python.
  * A copy to the host that is not waited for holds garbage until an event behind it, or the device, was waited for;
    memory from `torch.empty` holds garbage.
  * An index out of range breaks the device: all that comes later raises a device-side assertion.
  * Autocast makes bfloat16 of matrix products and float32 of what CUDA's list names.
  * Attention notes the kernel that an H100 takes. FlexAttention's backward takes one dtype alone.
  * With deterministic algorithms, what CUDA then does by sorting is noted.

What is not seen: the rounding of CUDA's kernels, memory running out, races between streams, compilation, NCCL.
To autograd and the dispatcher these are tensors of the CPU; only Python sees the device. So nothing below Python asks
for a driver, and a backward pass runs in the thread that calls it.
"""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = str(Path(__file__).resolve().parents[2])
TESTS = str(Path(__file__).resolve().parents[1])
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
HOST_TO = Tensor.to  # torch's own, before it is patched

INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
BY_INDEX = INDEXING | {aten.gather, aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_, aten.index_copy,
                       aten.index_copy_, aten.index_select, aten.index_fill, aten.embedding}  # fmt: skip
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2,
           aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.masked_scatter}  # fmt: skip
# what deterministic algorithms do by sorting on CUDA (ATen/native/cuda/{Indexing,ScatterGatherKernel}.cu)
SORTED = {aten.index_copy, aten.index_copy_, aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_,
          aten.index_put, aten.index_put_, aten._index_put_impl_}  # fmt: skip
UNINITIALIZED = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}


class CudaTensor(Tensor):
    """A tensor in the host's memory that says it is on `cuda:0`; its operations go through `Device.run`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, values: Tensor) -> "CudaTensor":
        """The same memory as `values`."""
        return Tensor._make_subclass(cls, values)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return DEVICE.run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter(self) else copied
        return memo[id(self)]

    def __repr__(self, **named: object) -> str:
        return f"CudaTensor({values_of(self)})"

    def get_device(self) -> int:
        return 0

    def pin_memory(self, *args: object) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *args: object, **named: object) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy


def is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def values_of(tensor: Tensor) -> Tensor:
    """A tensor of the host over the same memory."""
    with torch._C._DisableTorchDispatch():
        return Tensor._make_subclass(Tensor, tensor)


@dataclass
class Log:
    """What happened while it was open."""

    waits: list[tuple[str, str]] = field(default_factory=list)  # what the host waited for, and the lines that asked
    kernels: int = 0  # operations that are no views: about as many kernels
    attention: Counter = field(default_factory=Counter)  # the kernels that an H100 takes for it
    sorted: Counter = field(default_factory=Counter)  # operations that deterministic algorithms do by sorting
    filled: int = 0  # uninitialised memory that deterministic algorithms filled


@dataclass(eq=False)
class LateCopy:
    """A copy to the host on its way."""

    held: Tensor  # what the host has: garbage until it arrives
    arriving: Tensor


@dataclass
class Tape:
    """A graph: operations with the tensors they met, the results of each, and whether it writes to its arguments."""

    thread: int
    mode: str  # whether what other threads do spoils the capture: global or thread_local
    operations: list[tuple[Callable, tuple, dict, list[Tensor], bool]] = field(default_factory=list)
    before: dict[int, tuple] = field(default_factory=dict)  # by address: memory from outside, and what it held
    own: set[int] = field(default_factory=set)  # addresses of memory that was allocated within
    alive: list[Tensor] = field(default_factory=list)
    spoilt: bool = False


class Device:
    """The device: carries operations out, and holds the tape of a capture, late copies and open logs."""

    def __init__(self) -> None:
        self.free_memory = 60 * 2**30  # as torch.cuda.mem_get_info tells it
        self.logs: list[Log] = []
        self.tape: Tape | None = None
        self.late: list[LateCopy] = []
        self.captured = self.replayed = 0
        self.broken = False
        self.thread = threading.local()  # its current stream, and whether it is within one kernel

    @contextmanager
    def watching(self) -> Iterator[Log]:
        """A log of what happens within."""
        log = Log()
        self.logs.append(log)
        try:
            yield log
        finally:
            self.logs = [other for other in self.logs if other is not log]

    # ---- operations

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Carry out an operation that has at least one of the device's tensors among its arguments."""
        packet = func.overloadpacket
        if func is torch.ops.prim.device.default:
            return CUDA
        if composite(func):  # inference mode hands it over whole
            return func.decompose(*args, **kwargs)
        self.check_alive()
        self.check_devices(func, packet, args, kwargs)
        self.note(func, packet, args, kwargs)
        kwargs = {key: None if key == "device" else value for key, value in kwargs.items() if key != "pin_memory"}
        return self.carry_out(func, args, kwargs)

    def carry_out(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Do it in the host's memory, and put it on the tape of a capture."""
        tape, written = self.tape_of_this_thread(), written_by(func, args, kwargs)
        for tensor in written if tape else ():
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in tape.own and memory.data_ptr() not in tape.before:
                tape.before[memory.data_ptr()] = (memory, memory.clone())
        with torch._C._DisableTorchDispatch():
            result = self.launch(func, args, kwargs)
        outputs = tensors_in(result)
        inputs = {address(tensor) for tensor in tensors_in((args, kwargs))}
        view = not written and bool(outputs) and {address(tensor) for tensor in outputs} <= inputs
        if func.overloadpacket in UNINITIALIZED:
            spoil(outputs)
        if not view:
            self.count()
        if tape:
            tape.alive += outputs
            if not view:
                tape.operations.append((func, args, kwargs, outputs, bool(written)))
                tape.own |= {address(tensor) for tensor in outputs} - inputs
        return on_device(result)

    def launch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The operation itself; an index out of range breaks the device."""
        try:
            return func(*args, **kwargs)
        except (IndexError, RuntimeError) as error:
            if func.overloadpacket in BY_INDEX and ("out of bounds" in str(error) or "out of range" in str(error)):
                self.broken = True
                words = f"CUDA error: device-side assert triggered ({func}: {error}; {place()})"
                raise torch.AcceleratorError(words) from error
            raise

    def check_alive(self) -> None:
        if self.broken:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    def count(self) -> None:
        if not getattr(self.thread, "within_kernel", False):
            for log in self.logs:
                log.kernels += 1

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """What happens within is one kernel on a GPU."""
        self.count()
        self.thread.within_kernel = True
        try:
            yield
        finally:
            self.thread.within_kernel = False

    def check_devices(self, func: Any, packet: Any, args: tuple, kwargs: dict) -> None:
        """Raise where tensors of the host are among the arguments, but for those that CUDA's kernels take."""
        hosts = [one for one in tensors_in((args, kwargs)) if not isinstance(one, CudaTensor)]
        if not hosts or packet in (aten.copy_, aten.copy):
            return
        if packet in INDEXING and isinstance(args[0], CudaTensor):
            indices, values = tensors_in(args[1]), list(args[2:3])
            if not any(one.dim() for one in values if not isinstance(one, CudaTensor)):
                if not all(isinstance(one, CudaTensor) for one in indices):
                    self.wait("an index is copied from the host")
                elif not all(isinstance(one, CudaTensor) for one in values) and not is_mask(indices):
                    self.wait("a value is copied from the host")  # a mask and a number are masked_fill
                return
        elif all(one.dim() == 0 for one in hosts) and packet not in BY_INDEX:
            return
        found = ", ".join(f"{tuple(one.shape)} on {one.device.type}" for one in tensors_in((args, kwargs)))
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {found} ({place()})")

    def note(self, func: Any, packet: Any, args: tuple, kwargs: dict) -> None:
        """Note what the operation makes the host wait for, and what deterministic algorithms make of it."""
        if packet in (aten.copy_, aten.copy) and not isinstance(args[0], CudaTensor):
            self.wait("copy to the host")
        elif packet in (aten.copy_, aten.copy) and not isinstance(args[1], CudaTensor):
            self.wait("copy from the host")
        elif packet in WAITING or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            self.wait(str(packet).removeprefix("aten."))
        elif packet in INDEXING and is_mask(tensors_in(args[1])) and not is_number(args[2:3]):
            self.wait("boolean index")
        if torch.are_deterministic_algorithms_enabled():
            by_number = func._overloadname.startswith("value")
            if packet in SORTED and not by_number:
                for log in self.logs:
                    log.sorted[f"{packet}, {place()}"] += 1
            if packet in UNINITIALIZED:
                self.note_filling()

    def note_filling(self) -> None:
        if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
            for log in self.logs:
                log.filled += 1

    def wait(self, what: str, copies: list[LateCopy] | None = None) -> None:
        """The host waits for all work so far, or for these copies; while a graph is captured it must not."""
        self.check_alive()
        for log in self.logs:
            log.waits.append((what, place()))
        tape = self.tape
        if tape is not None and (tape.thread == threading.get_ident() or tape.mode == "global"):
            tape.spoilt = True
            raise torch.AcceleratorError(
                f"CUDA error: operation not permitted when stream is capturing ({what}; {place()})"
            )
        for copy in self.late if copies is None else copies:
            if copy in self.late:
                copy.held.copy_(copy.arriving)
        self.late = [] if copies is None else [copy for copy in self.late if copy not in copies]

    # ---- copies between host and device

    def to_device(self, source: Tensor, dtype: torch.dtype, memory_format: dict) -> Tensor:
        self.wait("copy from the host")
        self.count()
        return CudaTensor(HOST_TO(source.detach(), dtype=dtype, copy=True, **memory_format))

    def to_host(self, source: Tensor, dtype: torch.dtype, memory_format: dict, non_blocking: bool) -> Tensor:
        if not non_blocking or self.tape_of_this_thread():
            self.wait("copy to the host")
        self.check_alive()
        self.count()
        arriving = HOST_TO(values_of(source), dtype=dtype, copy=True, **memory_format)
        if not non_blocking:
            return arriving
        held = arriving.clone()
        spoil([held])
        self.late.append(LateCopy(held, arriving))
        return held

    # ---- graphs

    def tape_of_this_thread(self) -> Tape | None:
        return self.tape if self.tape is not None and self.tape.thread == threading.get_ident() else None

    def begin_capture(self, mode: str) -> Tape:
        self.tape = Tape(threading.get_ident(), mode)
        return self.tape

    def end_capture(self) -> None:
        """Take back what was written to memory from outside: a capture carries nothing out."""
        tape, self.tape = self.tape, None
        for memory, held in tape.before.values():
            memory.copy_(held)
        tape.before = {}
        if tape.spoilt:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        self.captured += 1

    def replay(self, tape: Tape) -> None:
        self.check_alive()
        self.replayed += 1
        with torch.inference_mode(), torch._C._DisableTorchDispatch():
            for func, args, kwargs, outputs, writes in tape.operations:
                self.count()
                fresh = tensors_in(self.launch(func, args, kwargs))
                for held, new in zip(outputs, fresh) if not writes else ():
                    held.copy_(new)


@functools.cache
def composite(func: Any) -> bool:
    """Whether torch knows the operation by its parts alone."""
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


@functools.cache
def written_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(number, one.name) for number, one in arguments if one.alias_info is not None and one.alias_info.is_write]


def written_by(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that the operation writes to."""
    found = [args[number] if number < len(args) else kwargs.get(name) for number, name in written_arguments(func)]
    return tensors_in(found)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among arguments or results, which hold lists, tuples and dicts of them."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [one for part in parts for one in tensors_in(part)]


def on_device(result: Any) -> Any:
    """An operation's result with the device's tensors in place of the host's."""
    if isinstance(result, (list, tuple)):
        return type(result)(map(on_device, result))
    return CudaTensor(result) if type(result) is Tensor else result


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_mask(indices: list[Tensor]) -> bool:
    return any(one.dtype in (torch.bool, torch.uint8) for one in indices)


def is_number(values: tuple[Tensor, ...]) -> bool:
    """Whether there is a value, a number of the host: written by a mask, that is masked_fill."""
    return bool(values) and values[0].dim() == 0 and not isinstance(values[0], CudaTensor)


def spoil(tensors: list[Tensor]) -> None:
    """Fill with garbage."""
    with torch._C._DisableTorchDispatch():
        for tensor in tensors:
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            else:
                tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 3)


def place() -> str:
    """The innermost two lines of the project that led here."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < 2:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith((TESTS, ROOT + "/.venv/")):
            found.append(f"{name.removeprefix(ROOT + '/')}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


DEVICE = Device()
