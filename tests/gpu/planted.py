"""Faults planted into the project, which the scenarios must catch, and what the emulated device itself must do."""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import emulation
import on_engine
import on_training
import patches
import torch
from on_engine import BLOCK, FIGURES, LENGTHS, STOP, WatchedStep, check_runs, check_same, on_both, responses

import sample.engine
import train.attention
from sample import block_attention
from sample.engine import Engine
from sample.network import Network
from sample.slots import Slots, Watch


def caught(fault: str) -> dict[str, str]:
    """What is said of a fault, a function of this module; AssertionError where nothing is."""
    try:
        globals()[fault]()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    raise AssertionError(f"{fault} is not caught")


def sampling(lengths: tuple[int, ...] = LENGTHS, **settings: object) -> FIGURES:
    return check_runs("sdar", [(replace(BLOCK, **settings), lengths)])


def in_the_step(extra: Callable[[Any, Any], object], method: str = "advance") -> None:
    """Run `extra(step, slots)` behind a method of the device's steps."""
    original = getattr(WatchedStep, method)

    def changed(self: WatchedStep, slots: Slots, *rest: Any) -> Any:
        result = original(self, slots, *rest)
        extra(self, slots)
        return result

    setattr(WatchedStep, method, changed)
    sampling()


def host_read_in_the_step() -> None:
    in_the_step(lambda step, slots: slots.finished.any().item())


def tensor_made_in_the_step() -> None:
    in_the_step(lambda step, slots: torch.tensor([1, 2], device=slots.tokens.device))


def nonzero_in_the_step() -> None:
    in_the_step(lambda step, slots: slots.finished.nonzero())


def boolean_index_in_the_step() -> None:
    in_the_step(lambda step, slots: slots.tokens[slots.finished])


def host_tensor_in_the_step() -> None:
    """The stop tokens stay on the host."""
    stop = WatchedStep.stop

    def changed(self: WatchedStep, tokens: torch.Tensor) -> torch.Tensor:
        self.stops = self.stops.cpu()
        return stop(self, tokens)

    WatchedStep.stop = changed
    sampling()


def counter_in_the_step() -> None:
    """The number of the step comes from Python: right for a sequence alone, but for graphs."""
    advance = WatchedStep.advance

    def changed(self: WatchedStep, slots: Slots, *rest: Any) -> None:
        advance(self, slots, *rest)
        self.calls = getattr(self, "calls", 0) + 1
        slots.step.fill_(self.calls)

    WatchedStep.advance = changed
    sampling((3,), max_token=40, remasking_strategy="sequential", merge_commit=True)


def memory_replaced() -> None:
    """New weights in new tensors, while graphs read the old ones."""
    on_cpu, on_device = on_both("sdar")
    engine = on_engine.watched_engine(on_device)
    responses(engine, BLOCK)
    other_on_cpu, other_on_device = on_both("sdar", seed=4)
    for own, other in zip(on_device.model.modules(), other_on_device.model.modules()):
        own._parameters.update(other._parameters)
    check_same(responses(engine, BLOCK), responses(Engine(other_on_cpu.model, on_cpu.mask_id, [STOP]), BLOCK))


def copy_not_waited_for() -> None:
    """The look at the flags forgets to wait for its copy."""
    look = Watch.look

    def changed(self: Watch, slots: Slots) -> Any:
        self.event = self.event and type("NoEvent", (), {"synchronize": lambda self: None})()
        return look(self, slots)

    Watch.look = changed
    sampling()


def uninitialised_memory() -> None:
    def bias_of(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(visible.shape, dtype=dtype, device=visible.device)
        return made.masked_fill_(~visible, float("-inf")) if made.is_cuda else original(visible, dtype)

    original, block_attention.bias_of = block_attention.bias_of, bias_of
    sampling()


def mixed_dtype_in_flex() -> None:
    forward = train.attention.flex_attention_forward
    train.attention.flex_attention_forward = lambda module, query, *rest, **named: forward(
        module, query.float(), *rest, **named
    )
    on_training.objectives("sdar", "auto")


def stale_row() -> None:
    """A freed row keeps where its last sequence was, and rotary tables end where the present requests do."""

    class ShortTables(Network):
        def __init__(self, model: torch.nn.Module, positions: int, *rest: Any, **named: Any):
            super().__init__(model, min(positions, engine.room.longest), *rest, **named)

    def free(self: Slots, rows: torch.Tensor, start: int, end: int) -> None:
        self.finished[rows] = True

    sample.engine.Network, Slots.free = ShortTables, free
    _, on_device = on_both("sdar")
    engine = on_engine.watched_engine(on_device)
    settings = replace(BLOCK, max_active=4, dynamic_threshold=0.0)
    for lengths, tokens in (((50, 70, 90, 60, 80), 60), ((3, 4, 5), 4)):
        responses(engine, replace(settings, max_token=tokens), lengths)


def hangs() -> None:
    time.sleep(60)


# ---- the device itself


def raises(kind: type[Exception], work: Callable[[], object], words: str = "") -> bool:
    try:
        work()
    except kind as error:
        return words in str(error)
    return False


def captured(work: Callable[[], object], **options: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, **options):
        work()
    return graph


def properties_of_the_device() -> dict[str, int]:
    """That it does what its page says: `checked` is the number of things seen."""
    device, checked = emulation.DEVICE, []
    check = checked.append
    numbers = torch.arange(4.0).to("cuda")

    # where tensors are
    check(numbers.is_cuda and numbers.device == torch.device("cuda", 0) and not numbers.cpu().is_cuda)
    check(raises(RuntimeError, lambda: numbers + torch.ones(4), "same device"))
    check((numbers + torch.tensor(1.0)).is_cuda and raises(TypeError, numbers.numpy))
    tied = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    check(tied.to("cuda")["b"].weight is tied["a"].weight and tied["a"].weight.is_cuda)
    check(copy.deepcopy(tied)["a"].weight.is_cuda and isinstance(tied["a"].weight, torch.nn.Parameter))

    # waits, and copies that are not waited for
    with device.watching() as log:
        numbers.sum().item(), numbers.tolist(), numbers.nonzero(), numbers[numbers > 1]
        check(
            [what for what, _ in log.waits] == ["_local_scalar_dense", "copy to the host", "nonzero", "boolean index"]
        )
    with device.watching() as log:
        numbers[1:3] = 7
        numbers[numbers > 8] = 0.0
        numbers.gather(0, torch.zeros(1, dtype=torch.long, device="cuda"))
        check(not log.waits and log.kernels == 5)
    event, late = torch.cuda.Event(), numbers.to("cpu", non_blocking=True)
    event.record()
    later = numbers.to("cpu", non_blocking=True)
    check(bool(late.isnan().all()) and not event.query())
    event.synchronize()
    check(late.tolist() == [0.0, 7.0, 7.0, 3.0] and bool(later.isnan().all()))
    torch.cuda.synchronize()
    check(later.tolist() == late.tolist() and bool(torch.empty(3, device="cuda").isnan().all()))

    # graphs
    total, calls = torch.zeros(1, device="cuda"), []
    graph = captured(lambda: (total.add_(1), calls.append(1)))
    check(total.tolist() == [0.0])
    graph.replay(), graph.replay()
    check(total.tolist() == [2.0] and len(calls) == 1)
    check(raises(torch.AcceleratorError, lambda: captured(lambda: total.item()), "previous error during capture"))
    check(torch.cuda.current_stream() is not torch.cuda.default_stream())
    with torch.cuda.stream(torch.cuda.default_stream()):
        for mode, spoilt in (("global", True), ("thread_local", False)):
            reader = threading.Thread(target=raises, args=(RuntimeError, numbers.cpu))
            beside = lambda reader=reader: (reader.start(), reader.join(), total.add_(1))  # noqa: E731
            check(raises(RuntimeError, lambda: captured(beside, capture_error_mode=mode)) == spoilt)  # noqa: B023

    # precision and kernels
    weight = torch.ones(4, 4, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = torch.nn.functional.linear(numbers, weight)
        check(half.dtype == torch.bfloat16 and half.softmax(-1).dtype == half.pow(2).dtype == torch.float32)
        with torch.autocast("cuda", enabled=False):
            check(torch.nn.functional.linear(numbers, weight).dtype == torch.float32)
    half.sum().backward()
    check(weight.grad.is_cuda and weight.grad.dtype == torch.float32)
    query = torch.zeros(1, 2, 3, 32, device="cuda", dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    check(patches.kernel_for(query, query, query, mask) == "cudnn")
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION]):
        check(patches.kernel_for(query, query, query, mask) == "efficient, mask padded")
    torch.use_deterministic_algorithms(True, warn_only=True)
    first = torch.zeros(1, dtype=torch.long, device="cuda")
    with device.watching() as log:
        numbers.index_copy_(0, first, numbers[:1].clone())
        torch.empty(2, device="cuda")
        check(sum(log.sorted.values()) == 1 and log.filled == 1)

    # an index out of range, at last
    check(raises(torch.AcceleratorError, lambda: numbers[torch.tensor([4], device="cuda")], "device-side assert"))
    check(raises(torch.AcceleratorError, lambda: numbers + 1, "device-side assert"))
    wrong = [number for number, seen in enumerate(checked) if not seen]
    assert not wrong, f"checks number {wrong} of {len(checked)} fail"
    return {"checked": len(checked)}
