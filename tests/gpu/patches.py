"""torch's functions that choose by device, for the emulated one: copies, autocast, attention, and torch.cuda."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from emulation import CUDA, DEVICE, HOST_TO, CudaTensor, LateCopy, Tape, address, spoil, values_of
from torch import Tensor
from torch.utils._device import _device_constructors

aten = torch.ops.aten
# torch's own, before they are patched
HOST_TENSOR, HOST_ATTENTION = torch.tensor, torch.nn.functional.scaled_dot_product_attention
# of CUDA's autocast lists (ATen/autocast_mode.h), what a network may meet
TO_FLOAT32 = ("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "rsqrt", "reciprocal", "exp", "expm1", "log",
              "log1p", "softplus", "logsumexp", "layer_norm", "nll_loss", "softmax.int", "log_softmax.int", "cumsum",
              "cumprod", "sum", "sum.dim_IntList", "prod")  # fmt: skip


# ---- torch's functions that choose by device


def to(tensor: Tensor, *args: Any, **named: Any) -> Tensor:
    """`Tensor.to`."""
    like = next((one for one in args if isinstance(one, Tensor)), named.pop("other", None))
    places = [one for one in (*args, named.pop("device", None)) if isinstance(one, (str, torch.device))]
    kinds = [one for one in (*args, named.pop("dtype", None)) if isinstance(one, torch.dtype)]
    flags = [one for one in args if isinstance(one, bool)]
    device = like.device if like is not None else torch.device((places or [tensor.device])[0])
    dtype = like.dtype if like is not None else (kinds or [tensor.dtype])[0]
    non_blocking = named.pop("non_blocking", (flags or [False])[0])
    copy = named.pop("copy", len(flags) > 1 and flags[1])
    if "meta" in (device.type, tensor.device.type) or device.type == tensor.device.type:
        place = {} if device.type == tensor.device.type else {"device": device}
        return HOST_TO(tensor, dtype=dtype, copy=copy, **place, **named)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("not emulated: a copy between devices that a gradient goes through")
    if device.type == "cuda":
        return DEVICE.to_device(tensor, dtype, named)
    return DEVICE.to_host(tensor, dtype, named, non_blocking)


def tensor(data: Any, *, device: Any = None, **named: Any) -> Tensor:
    """`torch.tensor` and `torch.as_tensor`."""
    made = HOST_TENSOR(data, **named)
    return made if device is None else to(made, device)


def empty(size: Any, *strides: Any, dtype: Any = None, memory_format: Any = None, **named: Any) -> Tensor:
    """The allocation under all factories with a device: `empty` and `empty_strided`."""
    DEVICE.check_alive()
    made = torch.empty_strided(size, *strides, dtype=dtype) if strides else torch.empty(size, dtype=dtype)
    spoil([made])
    if tape := DEVICE.tape_of_this_thread():
        tape.own.add(address(made))
        tape.alive.append(made)
    DEVICE.note_filling()
    return CudaTensor(made)


def in_float32(operation: Any) -> Callable:
    """The operation as CUDA's autocast has it, for the device's tensors."""
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def cast(one: Any) -> Any:
        half = isinstance(one, CudaTensor) and one.dtype in (torch.float16, torch.bfloat16)
        return one.float() if half else one

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return operation(*([cast(one) for one in args] if kwargs.get("dtype") is None else args), **kwargs)

    return run


# ---- attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **named: Any
) -> Tensor:
    """`scaled_dot_product_attention`, with a note of the kernel that an H100 takes."""
    if not isinstance(query, CudaTensor):
        return HOST_ATTENTION(query, key, value, attn_mask, *args, **named)
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        query, key, value = (one.to(half) for one in (query, key, value))
        attn_mask = attn_mask.to(half) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype: {query.dtype}, {value.dtype}")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError(f"Expected attn_mask dtype to be bool or to match query dtype: {attn_mask.dtype}")
    kernel = kernel_for(query, key, value, attn_mask)
    for log in DEVICE.logs:
        log.attention[kernel] += 1
    with DEVICE.one_kernel():
        out = HOST_ATTENTION(query, key, value, attn_mask, *args, **named)
        # they lay out (rows, length, heads, width), the host's kernel what it returns (seen on an H100, torch 2.11)
        return out if kernel == "math" else out.transpose(1, 2).contiguous().transpose(1, 2)


def kernel_for(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """The kernel that torch 2.13 takes on an H100 (ATen/native/transformers/cuda/sdp_utils.cpp), and what it costs."""
    half, width = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    straight = all(one.stride(-1) == 1 for one in (query, key, value))
    same_heads = query.shape[1] == key.shape[1]
    if torch.backends.cuda.cudnn_sdp_enabled() and half and straight and width % 8 == 0 and width <= 128:
        return "cudnn" if key.shape[2] > 1 else "efficient"  # cuDNN makes a plan for every shape
    if half and straight and mask is None and width <= 256:
        return "flash"
    if straight and same_heads and width % (8 if half else 4) == 0 and (mask is None or mask.stride(-1) == 1):
        return "efficient" if mask is None or mask.shape[-1] % 16 == 0 else "efficient, mask padded"
    return "math"


HALF = {torch.float16, torch.bfloat16}
TAKEN = set(HALF)  # what FlashAttention takes; a scenario that compares numbers adds float32


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    seqused_k: Tensor | None = None, **named: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`aten._flash_attention_forward` of sequences laid end to end, computed in float32; what it needs is checked."""
    query, key, value, cum_seq_q, cum_seq_k, seqused_k = map(
        values_of, (query, key, value, cum_seq_q, cum_seq_k, seqused_k)
    )
    assert query.dtype in TAKEN and query.dtype == key.dtype == value.dtype, "FlashAttention only support fp16 and bf16"
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in (cum_seq_q, cum_seq_k, seqused_k))
    assert all(one.stride(-1) == 1 and one.dim() == 3 for one in (query, key, value)) and not is_causal
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert TAKEN - HALF or (query.shape[-1] % 8 == 0 and query.shape[-1] <= 256), "width of heads"
    lengths_q = cum_seq_q.diff()
    assert lengths_q.shape == seqused_k.shape and cum_seq_k.shape == cum_seq_q.shape and cum_seq_q[0] == 0
    assert bool((lengths_q > 0).all()) and cum_seq_q[-1] == len(query), "queries are laid end to end"
    assert bool((lengths_q <= max_q).all() and (seqused_k <= max_k).all()), "longer than it is said"
    # of keys a start and a number are all that is read (flash_fwd_kernel's BlockInfo)
    assert bool((cum_seq_k >= 0).all() and (cum_seq_k[:-1] + seqused_k <= len(key)).all() and (seqused_k > 0).all())
    for log in DEVICE.logs:
        log.attention["flash, pool"] += 1
    out, mass = torch.empty_like(query), torch.empty(query.shape[1], len(query))
    scale, groups = scale or query.shape[-1] ** -0.5, query.shape[1] // key.shape[1]
    starts = zip(cum_seq_q.tolist(), cum_seq_q[1:].tolist(), cum_seq_k.tolist(), seqused_k.tolist())
    for first, last, start, used in starts:
        own, keys, values = (
            store.transpose(0, 1).float()
            for store in (query[first:last], *(x[start : start + used] for x in (key, value)))
        )
        keys, values = (store.repeat_interleave(groups, 0) for store in (keys, values))
        scores = own @ keys.transpose(1, 2) * scale
        mass[:, first:last] = scores.logsumexp(-1)
        out[first:last] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
    nothing = torch.zeros(0)
    return out, mass, nothing, nothing, nothing


def flex_attention(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **named: Any) -> Any:
    """What compiled FlexAttention gives, from the block mask's own rule (transformers' compile_friendly_…)."""
    block_mask, rows, lengths = named["block_mask"], query.shape[0], (query.shape[2], key.shape[2])
    kinds = [one.dtype for one in (query, key, value)]
    if len(set(kinds)) > 1 and torch.is_grad_enabled():
        raise ValueError(f"Backward pass with mixed query, key, and value dtype is not supported, got {kinds}")
    if query.shape[-1] < 16:
        raise NotImplementedError("NYI: embedding dimension of the query, key, and value must be at least 16")
    if not isinstance(block_mask.kv_num_blocks, CudaTensor):
        raise RuntimeError("Expect q/k/v and block_mask to be on the same device")
    if block_mask.shape[-2:] != lengths:
        raise ValueError(f"block_mask was created for {block_mask.shape} but got {lengths} tokens")
    with DEVICE.one_kernel():
        of_query, of_key = (torch.arange(length, device=CUDA) for length in lengths)
        batch = torch.arange(rows, device=CUDA)[:, None, None]
        mask = block_mask.mask_mod(batch, None, of_query[:, None], of_key[None])[:, None]
        mask = mask | ~mask.any(-1, keepdim=True)
        key, value = key.to(query.dtype), value.to(query.dtype)
        options = {"scale": named.get("scale"), "enable_gqa": named.get("enable_gqa", False)}
        out = HOST_ATTENTION(query, key, value, mask, **options).to(kinds[2])
        lse = torch.zeros(out.shape[:3], device=CUDA)
    return (out, SimpleNamespace(lse=lse)) if "return_aux" in named else (out, lse)


# ---- torch.cuda


class Stream:
    """A stream; all work of a process is in order, whatever its stream."""

    device = CUDA

    def __init__(self, *args: object, **named: object): ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None:
        DEVICE.wait("stream")


DEFAULT_STREAM, CAPTURING_STREAM = Stream(), Stream()


def current_stream(device: object = None) -> Stream:
    return getattr(DEVICE.thread, "stream", DEFAULT_STREAM)


@contextmanager
def stream_as_context(chosen: Stream | None) -> Iterator[None]:
    before = current_stream()
    DEVICE.thread.stream = before if chosen is None else chosen
    try:
        yield
    finally:
        DEVICE.thread.stream = before


class Event:
    """An event; late copies that were begun before it was recorded have arrived when it was waited for."""

    def __init__(self, *args: object, **named: object):
        self.copies: list[LateCopy] = []

    def record(self, stream: object = None) -> None:
        self.copies = list(DEVICE.late)

    def synchronize(self) -> None:
        DEVICE.wait("event", self.copies)

    def query(self) -> bool:
        return not set(self.copies) & set(DEVICE.late)

    def wait(self, stream: object = None) -> None: ...

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


class CUDAGraph:
    """A graph, empty until it was captured."""

    def __init__(self, *args: object, **named: object):
        self.tape: Tape | None = None

    def replay(self) -> None:
        DEVICE.replay(self.tape)

    def reset(self) -> None:
        self.tape = None


class Capture:
    """`torch.cuda.graph`. Like torch's it leaves the capturing stream current where the end of the capture raises."""

    def __init__(
        self, graph: CUDAGraph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ):
        self.graph, self.mode, self.stream = graph, capture_error_mode, stream or CAPTURING_STREAM

    def __enter__(self) -> None:
        DEVICE.wait("synchronize")
        self.before, DEVICE.thread.stream = current_stream(), self.stream
        self.tape = DEVICE.begin_capture(self.mode)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        DEVICE.end_capture()
        DEVICE.thread.stream = self.before
        self.graph.tape = self.tape if kind is None else None


PROPERTIES = SimpleNamespace(
    name="Emulated H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, gcnArchName=""
)
STAND_INS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *args, **named: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "device": lambda device: nullcontext(),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda device=None: PROPERTIES,
    "synchronize": lambda device=None: DEVICE.wait("synchronize"),
    "empty_cache": lambda: None,
    "mem_get_info": lambda device=None: (DEVICE.free_memory, PROPERTIES.total_memory),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "current_stream": current_stream,
    "default_stream": lambda device=None: DEFAULT_STREAM,
    "stream": stream_as_context,
    "is_current_stream_capturing": lambda: DEVICE.tape_of_this_thread() is not None,
    "graph_pool_handle": lambda: (0, 1),
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": Capture,
}
LIBRARIES: list[torch.library.Library] = []  # what is registered lasts as long as these


def switch_on() -> None:
    """Patch torch for the rest of the process; before the project is imported, which holds functions by name."""
    assert not {"sample", "train"} & {name.partition(".")[0] for name in sys.modules}, "the project is imported"
    _device_constructors()  # is kept: `with torch.device(…)` goes on to know torch's own functions
    made = torch.empty  # memory is never pinned here
    torch.empty = lambda *size, pin_memory=False, **named: made(*size, **named)
    torch.compile = lambda function, **_: function
    counted = torch.histc  # the host's takes no integers, CUDA's does
    torch.histc = lambda one, *rest, **named: counted(one.float() if one.is_cuda else one, *rest, **named).to(one.dtype)
    for name, stand_in in STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    Tensor.to = to
    Tensor.cpu = lambda self: to(self, "cpu")
    Tensor.cuda = lambda self, *args, **named: to(self, CUDA)
    torch.nn.Module._apply = swapping(torch.nn.Module._apply)
    torch.tensor = torch.as_tensor = tensor
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.backends.cuda.is_flash_attention_available = lambda: True
    for name in ("set_autocast_enabled", "set_autocast_dtype"):
        setattr(torch, name, for_host_too(getattr(torch, name)))
    library = torch.library.Library("aten", "IMPL")
    LIBRARIES.append(library)
    for name in ("empty.memory_format", "empty_strided"):
        library.impl(name, empty, "CUDA")
    library.impl("_flash_attention_forward", flash_attention, "CPU")
    library.impl("mm.dtype", lambda left, right, dtype: left.to(dtype) @ right.to(dtype), "CPU")
    for name in TO_FLOAT32:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
            packet, _, overload = name.partition(".")
            library.impl(name, in_float32(getattr(getattr(aten, packet), overload or "default")), "AutocastCPU")
    from transformers.integrations import flex_attention as transformers_flex

    transformers_flex.compile_friendly_flex_attention = flex_attention


def swapping(apply: Callable) -> Callable:
    """`Module._apply` that puts the new tensor in the old one's place, so that tied weights stay tied."""

    def run(module: torch.nn.Module, *args: Any, **named: Any) -> torch.nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(module, *args, **named)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return run


def for_host_too(function: Callable) -> Callable:
    """What is set of CUDA's autocast is set of the CPU's, which is the one that acts on these tensors."""

    def run(kind: str, value: Any) -> None:
        function(kind, value)
        if kind == "cuda":
            function("cpu", value)

    return run
