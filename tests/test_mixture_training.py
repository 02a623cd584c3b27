"""Training mixtures of experts: what is routed where is counted, routers and biases do as they are told, experts have
adapters, and what is trained is what was sampled."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_rl import rows_of, run_rl
from test_sft import RECORDS, finetune, sft_config

from common.errors import UserError
from common.schema import LoraSettings, RLTrainingConfig
from models import load_network
from models.lora import add_lora
from models.mixture import expert_biases, routers
from models.tiny import build_tiny
from train.learner import whole_weights
from train.packing import PackedBatch
from train.routing import FIGURES, Routing, prepare_routers

NAMES = ("sdar_moe", "llada2")
SHORT = {"experiment__total_step": 2, "experiment__eval_every": 0, "evaluation__num_task": 2}
ROUTER, EXPERTS = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.5.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.expert_bias"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name in NAMES:
        build_tiny(name, root / name, seed=3)
    return {name: root / name for name in NAMES}


def steps_of(folder: Path) -> list[dict]:
    return [row for row in rows_of(folder, untimed=True) if "reward" in row]


def batch_of(ids: torch.Tensor, trajectory: torch.Tensor, rows: int = 1) -> PackedBatch:
    """Rows (rows, tokens) of which nothing but their padding and for how many each stands is looked at."""
    at = torch.zeros(1, dtype=torch.long)
    return PackedBatch(ids, ids, trajectory, trajectory, ids, ids, at, at, at.numpy(), rows * (trajectory >= 0))


# ---- what is trained is what was sampled


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns_what_was_sampled(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = SHORT | {"training__replay_routes": name == "llada2"}
    folder = run_rl(tiny[name], tmp_path, model__model_base=name, training__updates_per_step=2, **changes)
    steps = steps_of(folder)
    assert len(steps) == 2 and all(0 <= step["logp_diff_max"] <= 2e-5 for step in steps)
    assert all(step["route_flips"] == 0 for step in steps)
    for step in steps:
        assert set(FIGURES) <= step.keys()
        assert 1 / 8 < step["busiest_expert"] <= 1 and 0 < step["routing_entropy"] <= 2.0795  # log 8
        assert 0 <= step["expert_tokens_least"] <= step["expert_tokens"]
    trained, start = (load_file(path / "model.safetensors") for path in (folder / "ckpt" / "optimized", tiny[name]))
    assert trained.keys() == start.keys()
    changed = {key for key in start if not torch.equal(trained[key], start[key])}
    assert {ROUTER, EXPERTS} <= changed and BIAS not in changed


def test_moving_biases_are_synced_saved_and_resumed(tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = SHORT | {"model__model_base": "llada2", "training__expert_bias_rate": 0.02}
    whole = run_rl(tiny["llada2"], tmp_path / "whole", **changes)
    run_rl(tiny["llada2"], tmp_path / "parts", **changes | {"experiment__total_step": 1})
    parts = run_rl(tiny["llada2"], tmp_path / "parts", **changes, experiment__start_from_scratch=False)
    assert steps_of(whole) == steps_of(parts)
    one, other = (load_file(folder / "ckpt" / "optimized" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)
    moved = (one[BIAS] / 0.02).abs()
    assert torch.allclose(moved, moved.round(), atol=1e-5) and 1 <= moved.max() <= 4  # one up or down an update


def test_a_frozen_router_stays(tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = SHORT | {"experiment__total_step": 1, "model__model_base": "sdar_moe", "training__freeze_router": True}
    folder = run_rl(tiny["sdar_moe"], tmp_path, **changes)
    trained, start = (
        load_file(folder / "ckpt" / "optimized" / "model.safetensors"),
        load_file(tiny["sdar_moe"] / "model.safetensors"),
    )
    assert torch.equal(trained[ROUTER], start[ROUTER]) and not torch.equal(trained[EXPERTS], start[EXPERTS])


def test_what_a_network_has_not_is_refused(tiny: dict[str, Path], tiny_sdar: Path) -> None:
    with pytest.raises(UserError, match=r"training\.freeze_router: the model has no experts"):
        prepare_routers(load_network(tiny_sdar, "sdar"), RLTrainingConfig(freeze_router=True))
    with pytest.raises(UserError, match=r"training\.expert_bias_rate: the model's routers have no biases \(llada2's"):
        prepare_routers(load_network(tiny["sdar_moe"], "sdar_moe"), RLTrainingConfig(expert_bias_rate=0.1))


# ---- what is counted


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_counted_without_padding_and_once(name: str, tiny: dict[str, Path]) -> None:
    network = load_network(tiny[name], name).train()
    network.gradient_checkpointing_enable()  # its second forward is not counted
    routing, chosen = Routing(network, 0.0), []
    ids = torch.arange(24).view(2, 12)
    trajectory = torch.zeros(2, 12, dtype=torch.long)
    trajectory[1, 7:] = -1
    with routing.counting(batch_of(ids, trajectory)):
        logits = network(ids).logits
    logits.sum().backward()
    with routing.counting(batch_of(ids, trajectory, rows=0)):
        network(ids)
    for router in routers(network):
        router.register_forward_hook(lambda _, inputs, output: chosen.append((inputs[0], *output)))
    network(ids)
    real, wanted, entropies = (trajectory >= 0).flatten(), [], []
    for hidden, scores, _, experts in chosen:
        wanted.append([(experts[real] == expert).sum().item() for expert in range(8)])
        share = scores.sigmoid() if name == "llada2" else scores.softmax(-1)
        share = (share / share.sum(-1, keepdim=True))[real]
        entropies.append(-(share * share.log()).sum(-1))
        assert hidden.shape[-1] == 128
    assert len(wanted) == {"sdar_moe": 4, "llada2": 3}[name] and all(sum(counts) == 2 * 19 for counts in wanted)
    assert routing.counts.tolist() == wanted
    figures = routing.end_update(taken=True)
    assert figures["expert_tokens"] == 2 * 19 / 8 and figures["expert_tokens_least"] == min(map(min, wanted))
    assert figures["busiest_expert"] == pytest.approx(max(map(max, wanted)) / 38)
    assert figures["routing_entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)
    assert not routing.counts.any() and not any(bias.any() for _, bias in expert_biases(network))


def test_biases_even_out_the_use_of_experts(tiny: dict[str, Path]) -> None:
    network = load_network(tiny["llada2"], "llada2")
    ids = torch.arange(33).repeat(4, 1)
    routing, busiest = Routing(network, 0.01), []
    for _ in range(60):
        with routing.counting(batch_of(ids, torch.zeros_like(ids))), torch.no_grad():
            network(ids)
        busiest.append(routing.end_update(taken=True)["busiest_expert"])
    assert busiest[-1] < 0.7 * busiest[0]
    before = {name: bias.clone() for name, bias in expert_biases(network)}
    with routing.counting(batch_of(ids, torch.zeros_like(ids))), torch.no_grad():
        network(ids)
    routing.end_update(taken=False)
    assert all(torch.equal(bias, before[name]) for name, bias in expert_biases(network))


# ---- adapters


def test_default_adapters_would_leave_experts_out(tiny: dict[str, Path]) -> None:
    for name in NAMES:
        with pytest.raises(UserError, match=r"targets: gate_proj, up_proj, down_proj would adapt no expert"):
            add_lora(load_network(tiny[name], name), LoraSettings(r=2))
    network = load_network(tiny["llada2"], "llada2")
    add_lora(network, LoraSettings(r=2, targets=["q_proj", "v_proj"]))
    assert not any("experts" in name for name, one in network.named_parameters() if one.requires_grad)


@pytest.mark.parametrize("targets", [["experts"], ["q_proj", "o_proj", "experts"]], ids=len)
@pytest.mark.parametrize("name", NAMES)
def test_merged_experts_are_the_adapted_ones(name: str, targets: list[str], tiny: dict[str, Path]) -> None:
    plain, network = load_network(tiny[name], name), load_network(tiny[name], name)
    start = {key: tensor.clone() for key, tensor in plain.named_parameters()}
    add_lora(network, LoraSettings(r=2, alpha=4.0, targets=targets))
    assert all(".lora_" in key for key, one in network.named_parameters() if one.requires_grad)
    ids = torch.arange(4, 16)[None]
    torch.manual_seed(0)
    with torch.no_grad():
        weights = dict(whole_weights(network))
        assert weights.keys() == plain.state_dict().keys() - {"lm_head.weight"}  # tied
        assert all(torch.equal(weights[key], start[key]) for key in start)
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
        adapted = network(ids).logits
        plain.load_state_dict(dict(whole_weights(network)), strict=False)
        assert torch.allclose(plain(ids).logits, adapted, atol=1e-4)
    for joined in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{joined}"
        assert not torch.equal(plain.get_parameter(key), start[key])


def test_a_run_trains_adapters_of_experts(tiny: dict[str, Path], tmp_path: Path) -> None:
    changes = {"model__lora__r": 4, "model__lora__targets": "[q_proj,experts]", "model__model_base": "llada2"}
    changes |= SHORT | {"optimizer__params__learning_rate": 1e-3, "training__expert_bias_rate": 0.02}
    folder = run_rl(tiny["llada2"], tmp_path, **changes)
    steps = steps_of(folder)
    assert len(steps) == 2 and all(step["logp_diff_max"] <= 2e-5 for step in steps)  # the engine has the new biases
    start, merged = load_network(tiny["llada2"], "llada2"), load_network(folder / "ckpt" / "optimized", "llada2")
    for joined in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{joined}"
        assert not torch.equal(start.get_parameter(key), merged.get_parameter(key))
    assert torch.equal(start.lm_head.weight, merged.lm_head.weight)
    adapter = folder / "ckpt" / "optimized_adapter"
    assert "mlp.experts.down_proj" in json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
    adapted = peft.PeftModel.from_pretrained(start, adapter).merge_and_unload()
    for key, parameter in merged.named_parameters():
        assert torch.allclose(adapted.get_parameter(key), parameter, atol=1e-6), key


# ---- finetuning


def test_finetuning_counts_and_moves_what_it_should(tmp_path: Path) -> None:
    changes = {"training__max_steps": 2, "dataset__eval_dataset": "", "training__expert_bias_rate": 0.01}
    changes |= {"model__model_base": "llada2", "lr_scheduler__params__warmup_steps": 0}
    target, rows = finetune(sft_config(tmp_path, RECORDS, **changes))
    assert len(rows) == 2 and all(set(FIGURES) <= row.keys() and row["busiest_expert"] < 1 for row in rows)
    trained = load_file(target / "model.safetensors")
    start = load_file(target.parents[1] / "untrained" / "model.safetensors")
    same = {key for key in start if torch.equal(start[key], trained[key])}
    assert len(same) < 10 and all(".experts." in key or key.endswith("expert_bias") for key in same)  # of rare use
    assert any(trained[key].any() for key in trained if key.endswith("expert_bias"))
