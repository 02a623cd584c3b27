"""LoRA: adapters are what is trained, the engine has them merged, and both forms of the result load."""

from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from test_rl import rows_of, run_rl
from test_sft import RECORDS, finetune, sft_config

from common.errors import UserError
from common.schema import LoraSettings
from models import load_network
from models.lora import add_lora, is_adapter, plain_name
from train import rl_trainer
from train.learner import whole_weights
from train.run import export

LORA = LoraSettings(r=4, alpha=8.0)


def test_adapters_add_nothing_at_first_and_alone_are_trained(tiny_sdar: Path) -> None:
    plain, network = load_network(tiny_sdar, "sdar"), load_network(tiny_sdar, "sdar")
    add_lora(network, LORA)
    before = dict(plain.named_parameters())
    weights = dict(whole_weights(network))
    assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    layers = plain.config.num_hidden_layers
    assert len(trained) == 2 * layers * len(LORA.targets) and all(".lora_" in name for name in trained)


def test_merged_weights_give_the_adapted_networks_logits(tiny_sdar: Path) -> None:
    plain, network = load_network(tiny_sdar, "sdar"), load_network(tiny_sdar, "sdar")
    add_lora(network, LORA)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        plain.load_state_dict(dict(whole_weights(network)), strict=False)
        ids = torch.arange(4, 12)[None]
        adapted, merged = network(ids).logits, plain(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    assert not torch.allclose(adapted, load_network(tiny_sdar, "sdar")(ids).logits, atol=1e-2)


def test_a_run_saves_both_forms_and_resumes_exactly(tiny_sdar: Path, tmp_path: Path) -> None:
    changes = {"model__lora__r": 4, "experiment__total_step": 2, "experiment__eval_every": 0}
    changes |= {"evaluation__num_task": 2, "optimizer__params__learning_rate": 1e-3}
    whole = run_rl(tiny_sdar, tmp_path / "whole", **changes)
    run_rl(tiny_sdar, tmp_path / "parts", **changes | {"experiment__total_step": 1})
    parts = run_rl(tiny_sdar, tmp_path / "parts", **changes, experiment__start_from_scratch=False)
    steps = [[row for row in rows_of(folder, untimed=True) if "reward" in row] for folder in (whole, parts)]
    assert steps[0] == steps[1] and steps[0][1]["logp_diff_max"] <= 2e-5
    merged = load_network(whole / "ckpt" / "optimized", "sdar")
    again = load_network(parts / "ckpt" / "optimized", "sdar")
    assert all(torch.equal(one, other) for one, other in zip(merged.parameters(), again.parameters(), strict=True))
    first = load_network(tiny_sdar, "sdar")
    assert torch.equal(first.lm_head.weight, merged.lm_head.weight)
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.get_parameter(changed), merged.get_parameter(changed))
    adapted = peft.PeftModel.from_pretrained(first, whole / "ckpt" / "optimized_adapter").merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(adapted.get_parameter(name), parameter, atol=1e-6), name
    for other in ({"model__lora__r": 8}, {"model__lora__targets": "[q_proj,lm_head]"}):
        with pytest.raises(UserError, match=r"^model\.lora: .*step-0002 holds no such adapters: .*start_from_scratch"):
            run_rl(tiny_sdar, tmp_path / "parts", **changes | other, experiment__start_from_scratch=False)


@pytest.fixture
def own_arithmetic() -> Iterator[None]:
    """accelerate keeps the first run's precision for the whole process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("own_arithmetic")
def test_frozen_weights_are_kept_in_the_dtype_that_is_drawn_in(tiny_sdar: Path, tmp_path: Path) -> None:
    """Two steps under bfloat16: only the adapters move, in float32; what is saved and goes to the engine is W + BA."""
    changes = {"model__lora__r": 4, "model__dtype": "bfloat16", "optimizer__params__learning_rate": 1e-3}
    changes |= {"experiment__total_step": 2, "experiment__eval_every": 0, "evaluation__num_task": 2}
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl_trainer, "export", lambda run: runs.append(run) or export(run))
        whole = run_rl(tiny_sdar, tmp_path / "whole", **changes)
    run_rl(tiny_sdar, tmp_path / "parts", **changes | {"experiment__total_step": 1})
    parts = run_rl(tiny_sdar, tmp_path / "parts", **changes, experiment__start_from_scratch=False)
    learned, engine = runs[0].learner.network.saved, dict(runs[0].engine.model.named_parameters())
    first = dict(load_network(tiny_sdar, "sdar").named_parameters())
    for name, parameter in learned.named_parameters():
        assert parameter.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16), name
        assert is_adapter(name) or torch.equal(parameter, first[plain_name(name)].bfloat16()), name
    merged = dict(load_network(whole / "ckpt" / "optimized", "sdar", "auto").named_parameters())
    again = dict(load_network(parts / "ckpt" / "optimized", "sdar", "auto").named_parameters())
    for name, parameter in merged.items():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, again[name]), name
        assert torch.equal(parameter, engine[name]), name
    layer = learned.model.layers[0].self_attn.q_proj
    wanted = first["model.layers.0.self_attn.q_proj.weight"].bfloat16().float() + layer.get_delta_weight("default")
    assert torch.equal(merged["model.layers.0.self_attn.q_proj.weight"], wanted.bfloat16())
    assert not torch.equal(wanted, wanted.bfloat16().float())  # else nothing was rounded


def test_finetuning_trains_adapters_alone(tmp_path: Path) -> None:
    changes = {"training__max_steps": 2, "dataset__eval_dataset": "", "model__lora__r": 4}
    target, rows = finetune(sft_config(tmp_path, RECORDS, lr_scheduler__params__warmup_steps=0, **changes))
    assert len(rows) == 2 and (target.parent / "optimized_adapter" / "adapter_config.json").exists()
    first, merged = load_network(target.parents[1] / "untrained", "sdar"), load_network(target, "sdar")
    assert torch.equal(first.lm_head.weight, merged.lm_head.weight)
    adapted = peft.PeftModel.from_pretrained(first, target.parent / "optimized_adapter").merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(adapted.get_parameter(name), parameter, atol=1e-6), name


def test_a_layer_that_is_not_there_is_named(tiny_sdar: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.lora\.targets: 'attention' is no layer of the model; there are .*q_proj"
    ):
        add_lora(load_network(tiny_sdar, "sdar"), LoraSettings(r=2, targets=["attention"]))
