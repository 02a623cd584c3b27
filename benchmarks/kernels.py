"""How many kernels CUDA would launch for a denoising step: python -m benchmarks.kernels

Counted, not measured: a network of an 8B's 36 layers and a narrow width takes a step on the CPU, in bfloat16 and in the
shapes of a CUDA graph, and every operation that is no view of its input counts as one kernel. torch's attention and its
`rms_norm` are one each, as on CUDA; rotary embedding and gate are as many as inductor makes of them on the CPU. Fused,
attention is FlashAttention's over the pool of keys. The CPU has none: each call is one kernel that does nothing.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import metrics
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.rollout import requests_of
from benchmarks.shapes import SHAPES
from common.metrics import print_table
from common.ranks import Queue
from common.schema import Sampling
from models.family import find_family
from models.gates import gate
from models.mixture import MixtureNetwork
from models.norms import fuse_norms
from sample import network as network_module
from sample import step
from sample.draw import STREAMS, _hash, _shift_right, _signed
from sample.engine import Engine
from sample.kernels import PLAIN, Kernels, rotate
from sample.step import Graphs

ROWS, PROMPT, WIDTH = 32, 32, 16  # rows: on CUDA their commits still ride along
ONE_KERNEL = (torch.nn.functional.scaled_dot_product_attention, torch.rms_norm, torch.nn.functional.rms_norm)


class Count(TorchDispatchMode):
    """Counts what is computed while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # inference mode hands it over whole
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        made = [one for one in tree_leaves(result) if isinstance(one, Tensor) and one.numel()]
        is_view = all(one.untyped_storage().data_ptr() in given for one in made)
        self.kernels += func._schema.is_mutable or not is_view
        return result


class Whole(TorchFunctionMode):
    """Counts a function of `ONE_KERNEL` once, whatever the CPU makes of it."""

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in ONE_KERNEL:
            return func(*args, **kwargs or {})
        self.count.kernels += 1
        with _disable_current_modes():
            return func(*args, **kwargs or {})


def main() -> None:
    """Both ways for each kind of network, and a table."""
    rows = []
    for family in ("sdar", "sdar_moe", "llada2"):
        for name, fused in (("as transformers' modules launch them", False), ("fused", True)):
            layers, whole = kernels_of_a_step(fused, family)
            per_layer = layers / SHAPES["8b"]["num_hidden_layers"]
            found = {"a layer": per_layer, "all layers": layers, "a step": whole}
            rows.append({"family": family, "small operations": name} | found)
    print_table(rows)


def kernels_of_a_step(fused: bool, family: str = "sdar") -> tuple[int, int]:
    """Kernels of the layers' forward, and of the whole step that it is in."""
    model = make_model(family)
    if fused:
        fuse_norms(model)
    pool = patch.multiple(
        network_module,
        OPERATOR=lambda query, *_, **__: (torch.empty_like(query), None),
        multiprocessors=lambda _: 132,  # an H100's
    )
    engine = Engine(model, mask_id=0, stop_ids=(1,))
    engine.graphs = Graphs()
    engine.graphs.usable = False
    settings = Sampling(max_token=32, remasking_strategy="low_confidence_static", compile_kernels=False)
    requests = Queue(requests_of(ROWS, PROMPT), shared=False)
    engine.set_up(settings, requests)
    engine.take_from(requests)
    engine.step()
    count, network = Count(), engine.denoise.network
    network.kernels = counted_kernels(count, network.cosine.shape[-1]) if fused else PLAIN
    network.kernel = "torch" if fused else "bias"
    layers, forward = [], network.forward

    def counted_forward(*args: Any) -> Tensor:
        before = count.kernels
        hidden = forward(*args)
        layers.append(count.kernels - before)
        return hidden

    network.forward = counted_forward
    with patch.object(step, "uniforms", uniforms_of_cuda), pool, torch.inference_mode(), count, Whole(count):
        engine.denoise(ROWS, engine.reach())
    return layers[0], count.kernels


def make_model(family: str) -> torch.nn.Module:
    """The 8B's layers and grouped heads, a narrow width, bfloat16; a mixture has 8 experts, 2 of them a token."""
    row = find_family(family)
    sizes = SHAPES["8b"] | {"hidden_size": 8 * WIDTH, "intermediate_size": 64, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "head_dim": WIDTH, "vocab_size": 64, "max_position_embeddings": 256}
    if issubclass(row.model_class, MixtureNetwork):
        sizes |= {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    if family == "llada2":
        sizes |= {"n_group": 4, "topk_group": 2, "num_shared_experts": 1, "first_k_dense_replace": 1}
        sizes |= {"partial_rotary_factor": 0.5}
    return row.model_class(row.config_class(**sizes)).to(torch.bfloat16).eval()


def counted_kernels(count: Count, rotated: int) -> Kernels:
    """The plain functions, counted as what inductor makes of them; `rotated`: of the width of a head."""

    def as_many(kernels: int, function: Callable) -> Callable:
        def call(*tensors: Tensor) -> Any:
            count.kernels += kernels
            with _disable_current_modes():
                return function(*tensors)

        return call

    cosine = torch.zeros(8, rotated)
    turned = inductor_kernels(rotate, torch.zeros(8, 4, WIDTH), torch.zeros(8, 2, WIDTH), cosine, cosine)
    gated = inductor_kernels(gate, torch.zeros(8, 64), torch.zeros(8, 64))
    return Kernels(as_many(turned, PLAIN.rotate), as_many(gated, PLAIN.gate))


def inductor_kernels(function: Callable, *tensors: Tensor) -> int:
    """How many kernels inductor makes of a function, on the CPU."""
    before = metrics.generated_kernel_count
    torch.compile(function)(*tensors)
    return metrics.generated_kernel_count - before


def uniforms_of_cuda(key: Tensor, position: Tensor, step: Tensor, stream: str) -> Tensor:
    """`sample.draw.uniforms` as CUDA computes them."""
    hashed = _hash(key, position, step, STREAMS[stream], _shift_right, _signed)
    return _shift_right(hashed, 40).to(torch.float32) * 2.0**-24


if __name__ == "__main__":
    main()
