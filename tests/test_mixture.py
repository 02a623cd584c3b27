"""Mixtures of experts: the reference's routing, logits and responses; what a wrong reading of a checkpoint would give;
checkpoints kept byte for byte, and refused where they are another network's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import models
from common.errors import UserError
from common.schema import Sampling
from common.trajectory import Request
from models.mixture import expert_biases
from models.tiny import build_tiny
from sample.engine import Engine
from sample.network import Network, OwnKeys
from tests.reference import sample_block_attention

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("sdar_moe", "llada2")
# family, logits, ids, block
LOGITS = [
    ("sdar_moe", "logits", "input_ids", 4),
    ("sdar_moe", "logits_block_32", "input_ids_block_32", 32),
    ("llada2", "logits", "input_ids", 32),
    ("llada2", "logits_block_4", "input_ids", 4),
]


def expected(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / name / "expected.safetensors")


def golden(name: str) -> torch.nn.Module:
    return models.load_network(GOLDEN / name, name)


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor, block: int) -> torch.Tensor:
    number = torch.arange(ids.shape[1]) // block
    seen = (number[:, None] >= number[None]).expand(len(ids), 1, -1, -1)
    return model(ids, attention_mask=seen, use_cache=False).logits


def off_by(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference over the largest logit."""
    return float((logits - reference).abs().max() / reference.abs().max())


def spoiled(name: str, tmp_path: Path, config: dict | None = None, **tensors: torch.Tensor | None) -> Path:
    """A copy of the golden checkpoint with keys of its config.json and tensors changed, or left out."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(content))
    state = {
        key.replace("__", "."): tensor for key, tensor in (load_file(folder / "model.safetensors") | tensors).items()
    }
    for key, tensor in tensors.items():
        if tensor is None:
            del state[key.replace("__", ".")]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def tensor_bytes(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    files = [load_file(file) for file in sorted(folder.glob("model*.safetensors"))]
    return {
        name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for tensors in files
        for name, tensor in tensors.items()
    }


# ---- the reference's numbers


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name, logits, ids, block", LOGITS)
def test_logits_equal_the_reference(name: str, logits: str, ids: str, block: int, implementation: str) -> None:
    model, numbers = golden(name), expected(name)
    model.set_experts_implementation(implementation)
    assert off_by(logits_of(model, numbers[ids], block), numbers[logits]) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_not_run_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = golden(name), []
    chosen = ALL_EXPERTS_FUNCTIONS[model.config._experts_implementation]

    def counted(experts: torch.nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        calls.append(experts)
        return chosen(experts, *inputs)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, model.config._experts_implementation, counted)
    logits_of(model, torch.arange(8)[None], 4)
    layers = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    assert calls == layers and len(layers) == {"sdar_moe": 3, "llada2": 2}[name]


@pytest.mark.parametrize("name, block", [("sdar_moe", 4), ("llada2", 32)])
def test_tokens_are_routed_as_the_reference_does(name: str, block: int) -> None:
    model, numbers, routed = golden(name), expected(name), {}
    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            keep = lambda module, inputs, output, number=number: routed.update({number: output[1:]})  # noqa: E731
            layer.mlp.gate.register_forward_hook(keep)
    logits_of(model, numbers["input_ids"], block)
    assert len(routed) == {"sdar_moe": 3, "llada2": 2}[name]
    for number, (weights, experts) in routed.items():
        order = experts.argsort(-1)
        shape = numbers[f"experts_{number}"].shape
        assert torch.equal(experts.gather(1, order).view(shape), numbers[f"experts_{number}"])
        found = weights.gather(1, order).view(shape)
        torch.testing.assert_close(found, numbers[f"expert_weights_{number}"], rtol=1e-5, atol=1e-6)


def gates(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def no_bias(model: torch.nn.Module) -> None:
    for _, bias in expert_biases(model):
        bias.zero_()


def no_group_limit(model: torch.nn.Module) -> None:
    for gate in gates(model):
        gate.topk_group = gate.num_group


def no_normalisation(model: torch.nn.Module) -> None:
    for gate in gates(model):
        gate.norm_topk_prob = False


def no_scaling(model: torch.nn.Module) -> None:
    for gate in gates(model):
        gate.routed_scaling_factor = 1.0


def full_rotary(model: torch.nn.Module) -> None:
    rotary = model.model.rotary_emb
    width = model.config.head_dim
    rotary.inv_freq = 600000 ** (-torch.arange(0, width, 2) / width)


def gate_and_up_swapped(model: torch.nn.Module) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            joined = layer.mlp.experts.gate_up_proj.data
            joined.copy_(torch.cat(joined.chunk(2, dim=1)[::-1], 1))


MISTAKES: list[tuple[str, Callable[[torch.nn.Module], None]]] = [
    ("llada2", no_bias),
    ("llada2", no_group_limit),
    ("llada2", no_normalisation),
    ("llada2", no_scaling),
    ("llada2", full_rotary),
    ("llada2", gate_and_up_swapped),
    ("sdar_moe", no_normalisation),
    ("sdar_moe", gate_and_up_swapped),
]


@pytest.mark.parametrize("name, mistake", MISTAKES, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_mistake_moves_the_logits(name: str, mistake: Callable[[torch.nn.Module], None]) -> None:
    model, numbers, block = golden(name), expected(name), {"sdar_moe": 4, "llada2": 32}[name]
    assert off_by(logits_of(model, numbers["input_ids"], block), numbers["logits"]) <= 1e-5
    mistake(model)
    assert off_by(logits_of(model, numbers["input_ids"], block), numbers["logits"]) > 0.05


@pytest.mark.parametrize("name, logits, ids, block", LOGITS)
def test_a_wrong_block_moves_the_logits(name: str, logits: str, ids: str, block: int) -> None:
    numbers = expected(name)
    assert off_by(logits_of(golden(name), numbers[ids], 4 + 32 - block), numbers[logits]) > 0.05


# ---- the reference's responses


CASES = [
    (name, case)
    for name in NAMES
    for case in json.loads((GOLDEN / name / "expected.json").read_text())["cases"]
    if case.get("algorithm") != "llada2.1"  # edits what it wrote
]


@pytest.mark.parametrize("name, case", CASES, ids=lambda value: value if isinstance(value, str) else value["prompt"])
def test_greedy_responses_and_step_maps(name: str, case: dict) -> None:
    model, numbers = golden(name), expected(name)
    early = case.get("eos_early_stop")
    stop_ids = case["stop_ids"] or [] if name == "sdar_moe" else [157]
    settings = Sampling(
        block_size=case["block_size"],
        denoising_steps_per_block=case["denoising_steps"],
        max_token=case["gen_length"],
        temperature=0.0,
        remasking_strategy=case.get("remasking_strategy", "low_confidence_dynamic"),
        dynamic_threshold=case["threshold"],
    )
    request = Request("one", numbers[case["prompt"]].tolist())
    (got,) = Engine(model, 159, stop_ids).generate([request], settings)
    prompt, length = len(request.prompt_ids), case["length"]
    tokens, steps = numbers[case["tokens"]].tolist()[prompt:], numbers[case["step_map"]].tolist()
    assert got.length == length
    # what lies behind an end that the reference stops at, in the midst of a block, is denoised here
    whole = length if early else len(got.response_ids)
    assert got.response_ids[:whole] == tokens[:whole]
    assert got.step_map[: min(whole, case["gen_length"])] == steps[:whole]
    if not early:
        assert got.steps == case["nfe"]
    plain = sample_block_attention(model, 159, stop_ids, request, settings)
    assert (got.response_ids, got.step_map, got.forwards) == (plain.response_ids, plain.step_map, plain.forwards)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_equals_the_plain_loop(name: str, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn at temperature 1, side by side, slots refilled, the prefix of a task's samples computed once."""
    build_tiny(name, tmp_path, seed=3)
    loaded, prefixes = models.load_model(tmp_path, name), []
    for _, bias in expert_biases(loaded.model):
        bias.copy_(torch.linspace(-0.2, 0.2, len(bias)))
    forward = Network.forward

    def counted(network: Network, ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        if isinstance(attention, OwnKeys):  # of a prefill
            prefixes.extend(ids.tolist())
        return forward(network, ids, positions, attention)

    monkeypatch.setattr(Network, "forward", counted)
    prompts = {"a": [(7 * i) % 33 for i in range(13)], "b": [(3 + 5 * i) % 33 for i in range(6)]}
    requests = [Request(task, ids, sample=sample) for sample in range(3) for task, ids in prompts.items()]
    settings = Sampling(max_token=11, dynamic_threshold=0.1, max_active=4, merge_commit=merge)
    got = list(Engine(loaded.model, loaded.mask_id, [14]).generate(requests, settings))
    assert len(got) == 6 and 2 <= len(prefixes) < 6
    for one in got:
        request = Request(one.task_id, one.prompt_ids, sample=one.sample)
        plain = sample_block_attention(loaded.model, loaded.mask_id, [14], request, settings)
        for figure in ("response_ids", "step_map", "finish_reason", "length", "steps", "forwards"):
            assert getattr(one, figure) == getattr(plain, figure), figure
        assert one.logp == pytest.approx(plain.logp, rel=0, abs=1e-5)


# ---- checkpoints stay as they were


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("name", NAMES)
def test_load_and_save_keep_every_byte(name: str, shard: str, tmp_path: Path) -> None:
    model = golden(name)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    assert (tmp_path / "a" / "model.safetensors").exists() == (shard == "5GB")
    models.load_network(tmp_path / "a", name).save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert tensor_bytes(folder) == tensor_bytes(GOLDEN / name)
        before, after = (json.loads((path / "config.json").read_text()) for path in (GOLDEN / name, folder))
        assert before | {"transformers_version": after["transformers_version"]} == after


@pytest.mark.parametrize("of_biases", [torch.bfloat16, torch.float32])
def test_biases_are_written_as_they_were_read(of_biases: torch.dtype, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "llada2", tmp_path / "half"))
    state = {
        name: tensor.to(of_biases if name.endswith("expert_bias") else torch.bfloat16)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = models.load_network(folder, "llada2", torch.bfloat16)
    assert all(bias.dtype == torch.float32 for _, bias in expert_biases(model))
    model.save_pretrained(tmp_path / "saved")
    assert tensor_bytes(tmp_path / "saved") == tensor_bytes(folder)


def test_biases_stay_float32_and_have_no_gradient() -> None:
    model = golden("llada2")
    before = {name: bias.clone() for name, bias in expert_biases(model)}
    assert len(before) == 2 and all(bias.any() for bias in before.values())
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(torch.equal(bias, before[name]) for name, bias in expert_biases(model))
    model.float()(torch.arange(8)[None]).logits.square().sum().backward()
    assert not any(bias.requires_grad for _, bias in expert_biases(model))
    assert not {name for name, _ in model.named_parameters()} & before.keys()


# ---- what the user is told


def fails(call: Callable, *inputs: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*inputs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXPERT, QKV = "model.layers.1.mlp.experts.3", "model.layers.2.attention.query_key_value.weight"
FAULTS: list[tuple[str, str, torch.Tensor | None, str]] = [
    ("sdar_moe", f"{EXPERT}.up_proj.weight", None, f"lacks tensor {EXPERT}.up_proj.weight; is the checkpoint whole"),
    ("llada2", f"{EXPERT}.down_proj.weight", None, f"lacks tensor {EXPERT}.down_proj.weight; is the checkpoint whole"),
    ("sdar_moe", f"{EXPERT}.down_proj.weight", torch.ones(64, 16), "has shape (64, 16), config.json asks for (64, 32)"),
    ("llada2", f"{EXPERT}.gate_proj.weight", torch.ones(16, 64), "has shape (16, 64), config.json asks for (32, 64)"),
    ("llada2", "model.layers.1.mlp.experts.8.up_proj.weight", torch.ones(32, 64), "llada2 has no parameter for"),
    ("llada2", QKV, None, f"lacks tensor {QKV}; is the checkpoint whole"),
    ("llada2", QKV, torch.ones(192, 64), "has shape (192, 64), config.json asks for (256, 64)"),
    ("llada2", "model.layers.2.mlp.gate.expert_bias", None, "lacks tensor model.layers.2.mlp.gate.expert_bias;"),
    ("sdar_moe", f"{EXPERT}.up_proj.weight", torch.full((32, 64), torch.nan), "holds NaN or infinite values"),
    ("sdar_moe", f"{EXPERT}.up_proj.weight", torch.ones(32, 64, dtype=torch.int8), "quantised weights are not read"),
]


@pytest.mark.parametrize("name, tensor, value, line", FAULTS)
def test_a_damaged_tensor_is_named(
    name: str, tensor: str, value: torch.Tensor | None, line: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = spoiled(name, tmp_path, **{tensor.replace(".", "__"): value})
    assert line in fails(models.load_network, folder, name)
    assert not capfd.readouterr().err.strip()


@pytest.mark.parametrize(
    "name, key, value, line",
    [
        ("llada2", "score_function", "softmax", "config.json: score_function: 'softmax' is not supported"),
        ("llada2", "moe_router_enable_expert_bias", False, "moe_router_enable_expert_bias: False"),
        ("llada2", "router_dtype", "bf16", "router_dtype: 'bf16'"),
        ("llada2", "use_qk_norm", False, "use_qk_norm: False"),
        ("llada2", "use_sliding_window", True, "use_sliding_window: True"),
        ("sdar_moe", "use_sliding_window", True, "use_sliding_window: True"),
        ("llada2", "block_topk_experts", 48, "config.json: block_topk_experts: 48 is a way of routing"),
        ("llada2", "delete_token_id", 156896, "config.json: delete_token_id: LLaDA2.2"),
        ("llada2", "n_group", 3, "config.json: n_group: 3: 2 of 8 experts cannot be chosen"),
        ("llada2", "quantization_config", {"quant_method": "fp8"}, "quantization_config ('fp8'); quantised"),
        ("sdar_moe", "quantization_config", {"quant_method": "awq"}, "quantization_config ('awq'); quantised"),
        ("llada2", "model_type", "llada3_moe", "no family of sdar, "),
    ],
)
def test_another_network_is_refused(name: str, key: str, value: object, line: str, tmp_path: Path) -> None:
    assert line in fails(models.load_network, spoiled(name, tmp_path, {key: value}), name)


def test_the_mask_token_is_no_other_token(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    build_tiny("llada2", folder, seed=1)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert models.load_model(folder, "llada2").mask_id == 38
    file.write_text(json.dumps(settings | {"mask_token": settings["eos_token"]}))
    assert "mask token '<|im_end|>' is also one that ends a response" in fails(models.load_model, folder, "llada2")
    file.write_text(json.dumps(settings | {"mask_token": None}))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|mask|>", "<|role_end|>"))
    message = fails(models.load_model, folder, "llada2")
    assert "mask_token_id 38 of config.json is the tokenizer's '<|role_end|>'; set mask_token" in message


def test_a_turns_end_stops_a_response(tmp_path: Path) -> None:
    build_tiny("llada2", tmp_path, seed=1)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace("<|assistant|>", "<|role_end|>"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = ["<|im_start|>", "<|role_end|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert models.load_model(tmp_path, "llada2").stop_ids == (34, 36)


def test_blocks_are_of_32_where_the_checkpoint_names_no_size(tmp_path: Path) -> None:
    for name, size in (("llada2", 32), ("sdar_moe", None)):
        build_tiny(name, tmp_path / name, seed=1)
        assert models.load_model(tmp_path / name, name).block_size == 4
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["block_size"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        assert models.load_model(tmp_path / name, name).block_size == size
