"""common/memory.py: sizes are those of the networks, and a layer keeps what the formulas say."""

from pathlib import Path

import peft
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.shapes import SHAPES
from common.memory import Arithmetic, activation_bytes, adapter_parameters, cache_bytes, size_of, state_bytes
from common.schema import LoraSettings
from models import load_network
from models.sdar import SDARConfig, SDARForCausalLM
from models.tiny import build_tiny
from sample.cache import bytes_per_token

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
