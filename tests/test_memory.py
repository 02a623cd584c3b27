"""common/memory.py: sizes are those of the networks, and a layer keeps what the formulas say."""

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import SHAPES
from common.memory import (
    DRAW_ELEMENTS,
    GRAPHS,
    PREFILL_TOKENS,
    Arithmetic,
    Drawing,
    Size,
    activation_bytes,
    adapter_parameters,
    cache_bytes,
    draw_bytes,
    sampling_bytes,
    size_of,
    state_bytes,
)
from common.schema import LoraSettings, Sampling
from models import load_network
from models.sdar import SDARConfig, SDARForCausalLM
from models.tiny import build_tiny
from sample.cache import bytes_per_token
from sample.draw import draw

SHAPE = {"vocab_size": 64, "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPE |= {"intermediate_size": 320, "tie_word_embeddings": True}
TARGETS = LoraSettings().targets


def network_of(layers: int, dtype: torch.dtype = torch.float32) -> SDARForCausalLM:
    model = SDARForCausalLM(SDARConfig(**SHAPE, num_hidden_layers=layers)).train().to(dtype)
    model.config._attn_implementation = "sdpa"
    return model


@pytest.mark.parametrize("shape, billions", [("1.7b", 1.72), ("4b", 4.02), ("8b", 8.19), ("32b", 32.8)])
def test_published_sizes(shape: str, billions: float) -> None:
    assert size_of(SHAPES[shape]).parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_counted_parameters_are_the_networks(tmp_path: Path) -> None:
    for family in ("sdar", "dream", "llada"):  # under three publishers' names
        build_tiny(family, tmp_path / family, seed=0)
        model = load_network(tmp_path / family, family)
        size = size_of(model.config.to_dict())
        held = sum(one.numel() for one in {id(one): one for one in model.parameters()}.values())
        assert size.parameters == pytest.approx(held, rel=2e-3)  # but for the norms of heads and biases
        assert cache_bytes(size, 1, word=4) == bytes_per_token(model)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were there at one time, of those made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in (one for one in tree_leaves(result) if isinstance(one, torch.Tensor)):
            memory = tensor.untyped_storage()
            if memory._cdata not in self.known:
                self.known.add(memory._cdata)
                self.now += memory.nbytes()
                weakref.finalize(memory, self.gone, memory._cdata, memory.nbytes())
        self.most = max(self.most, self.now)
        return result

    def gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"remasking_strategy": "entropy_bounded"},
        {"top_k": 50},
        {"top_p": 0.9},
    ],
    ids=str,
)
def test_a_draw_takes_what_is_said(settings: dict) -> None:
    positions, vocabulary = 16, 20_001
    drawn, counted = Sampling(**settings), LiveBytes()
    with counted:
        draw(torch.randn(positions, vocabulary), torch.rand(positions), 7, drawn)
    told = draw_bytes(positions, vocabulary, drawn.top_k, drawn.top_p)
    assert 0.4 * told < counted.most <= 1.02 * told, counted.most / positions / vocabulary


def test_a_draw_is_made_in_chunks() -> None:
    whole = DRAW_ELEMENTS // 1000
    assert draw_bytes(10, 1000) == 16 * 10_000
    assert draw_bytes(whole, 1000, top_k=1) == 20 * whole * 1000
    assert draw_bytes(8 * whole, 1000, top_p=0.5) <= 40 * DRAW_ELEMENTS
    assert draw_bytes(3, 2 * DRAW_ELEMENTS) == 16 * 2 * DRAW_ELEMENTS  # a position at a time


def test_sampling_by_hand() -> None:
    size = Size(0, 36, 4096, 32, 8, 128, 12_288, 1000)
    found = sampling_bytes(size, Drawing(rows=64, block=4, longest=2048))
    token = 2 * (2 * 4096 + 3 * 12_288)
    assert found["forward"] == PREFILL_TOKENS * (token + 3 * 2048)
    assert found["draw"] == 16 * 256 * 1000
    assert found["graphs"] == GRAPHS + found["draw"] + 512 * (token + 3 * 2048)
    full = sampling_bytes(size, Drawing(64, 32, 2048, full_attention=True))
    assert full["forward"] == 64 * 2048 * token and full["graphs"] == GRAPHS + full["draw"] + full["forward"]


def test_adapters_are_counted_as_peft_makes_them() -> None:
    model = network_of(2)
    peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=TARGETS), model)
    held = sum(one.numel() for name, one in model.named_parameters() if "lora_" in name)
    assert adapter_parameters(size_of(SHAPE | {"num_hidden_layers": 2}), 8, TARGETS) == held
    assert adapter_parameters(size_of(SHAPE | {"num_hidden_layers": 2}), 8, ["other"]) == 0


def test_states_by_hand() -> None:
    assert state_bytes(10) == 160
    assert state_bytes(1, 10) == 16 + 40
    assert state_bytes(1, 10, frozen_word=2) == 16 + 20
    assert state_bytes(10, 0, zero=2, devices=5, word=2) == 20 + 36
    assert state_bytes(10, 0, zero=3, devices=5, word=2) == 40
    assert state_bytes(10, 0, zero=3, devices=5, word=4) == 32


def kept_bytes(layers: int, tokens: int, arithmetic: Arithmetic) -> int:
    """Bytes that autograd keeps of a forward, parameters apart."""
    model = network_of(layers, torch.bfloat16 if arithmetic == "bfloat16" else torch.float32)
    if arithmetic == "frozen":
        model.requires_grad_(False)
        peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=TARGETS), model)
        model.enable_input_require_grads()
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=arithmetic in ("autocast", "frozen"))
    with saved_tensors_hooks(keep, lambda tensor: tensor), mixed:
        model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("arithmetic", ["autocast", "frozen", "bfloat16", "float32"])
def test_a_layer_keeps_what_the_formula_says(arithmetic: Arithmetic) -> None:
    def per_layer(tokens: int) -> int:
        return kept_bytes(2, tokens, arithmetic) - kept_bytes(1, tokens, arithmetic)

    per_token = (per_layer(192) - per_layer(128)) / 64  # casts of weights, the same for any number of tokens, drop out
    one, two = (size_of(SHAPE | {"num_hidden_layers": layers}) for layers in (1, 2))
    expected = activation_bytes(two, 1, False, arithmetic) - activation_bytes(one, 1, False, arithmetic)
    assert per_token == pytest.approx(expected, rel=0.03)


def test_checkpointing_keeps_inputs_and_one_layer() -> None:
    one, nine = (size_of(SHAPE | {"num_hidden_layers": layers}) for layers in (1, 9))
    grown = activation_bytes(nine, 10, True, "autocast") - activation_bytes(one, 10, True, "autocast")
    assert grown == 8 * 10 * 96 * 4
    frozen = [activation_bytes(nine, 10, True, "frozen", word) for word in (4, 2)]
    assert frozen[0] - frozen[1] == 9 * 10 * 96 * 2
