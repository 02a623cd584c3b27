"""python -m common.doctor: what is there, and what a config will need."""

from pathlib import Path

import pytest
import torch

from common import doctor
from common.config import load_config
from common.doctor import GIB, advice, main, needs, read_size
from common.errors import UserError
from common.memory import Size
from models import load_network

EIGHT_B = Size(8_000_000_000, 36, 4096, 32, 8, 128, 12_288, 151_936)
RL = ["config=configs/rl_tiny.yaml", "rollout.max_active=128", "rollout.max_token=2000", "training.max_prompt_len=48"]


def test_the_size_of_a_checkpoint(tiny_sdar: Path) -> None:
    size, model = read_size(str(tiny_sdar)), load_network(tiny_sdar, "sdar")
    own = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert size == Size(sum(own.values()), 4, 128, 4, 2, 32, 384, model.config.vocab_size)


def test_needs_of_sampling_by_hand() -> None:
    config = load_config("rl", RL)
    found = needs("rl", config, EIGHT_B, low_precision=True)
    assert found["weights, sampling"] == 16e9
    assert found["keys and values"] == 2 * 36 * 1024 * 128 * 2048 * 2
    shared = {"float32": (False, 0), "ZeRO-2": (True, 2)}  # the learner's own weights are sampled from
    for low_precision, zero in shared.values():
        assert needs("rl", config, EIGHT_B, low_precision, zero)["weights, sampling"] == 0
    assert needs("rl", config, EIGHT_B, True, 3, 8)["weights, sampling"] == 16e9
    config.model.lora.r = 8
    assert needs("rl", config, EIGHT_B, True, 2, 8)["weights, sampling"] == 16e9  # adapters are merged into a copy
    assert needs("rl", config, EIGHT_B, False)["weights, sampling"] == 32e9
    config.rollout.tensor_parallel_size = 4
    found = needs("rl", config, EIGHT_B, True, 2, 8)
    assert found["weights, sampling"] == 4e9 and found["keys and values"] == 2 * 36 * 256 * 128 * 2048 * 2


def test_full_attention_keeps_keys_where_it_has_a_cache() -> None:
    config = load_config("rl", [*RL, "model.model_base=llada"])
    found = needs("rl", config, EIGHT_B, low_precision=True)
    assert "keys and values" not in found
    assert found["forward, sampling"] == 128 * 2048 * 2 * (2 * 4096 + 3 * 12288)  # prompts and canvases as a whole
    config.rollout.use_cache = True
    assert needs("rl", config, EIGHT_B, low_precision=True)["keys and values"] == 2 * 36 * 1024 * 128 * 2048 * 2


def test_the_draw_of_an_evaluation_is_that_of_its_dearest_setting() -> None:
    config = load_config("eval", ["config=configs/eval_tiny.yaml", "rollout.max_active=64"])
    config.rollout.block_size, config.rollout.top_k, config.rollout.top_p = [4, 32], [0, 5], [1.0, 0.9]
    chunk = 64 * 32 // 10 + 1  # 2,048 positions of 151,936 words are ten chunks
    assert needs("eval", config, EIGHT_B, True)["draw, sampling"] == pytest.approx(40 * chunk * 151_936, rel=1e-2)


def test_needs_of_training_by_hand() -> None:
    config = load_config("rl", RL)
    config.training.tokens_per_micro_batch = 16384
    found = needs("rl", config, EIGHT_B, low_precision=True)
    assert found["weights, gradients, Adam"] == 128e9
    wide = 3 * 12288 * 2  # the gradients of the feed-forward's three
    inside = 26 * 4096 + 10 * 4096 + 10 * 1024 + 8 * 12288
    assert found["activations"] == (36 * inside + wide) * 16384
    config.training.gradient_checkpointing_enable = True
    assert needs("rl", config, EIGHT_B, True)["activations"] == (36 * 4096 * 4 + inside + wide) * 16384
    assert needs("rl", config, EIGHT_B, True, 3, 8)["weights, gradients, Adam"] == 20e9
    config.training.kl_reference = "initial"
    assert needs("rl", config, EIGHT_B, True)["the first model"] == 32e9
    assert needs("rl", config, EIGHT_B, True, 3, 8)["the first model"] == 16e9  # whole on every rank


def test_needs_with_adapters_and_a_value_model() -> None:
    config = load_config("rl", [*RL, "model.lora.r=64", "training.gradient_checkpointing_enable=True"])
    found = needs("rl", config, EIGHT_B, low_precision=True)
    adapters = 64 * 36 * (2 * 8192 + 2 * 5120 + 3 * 16384)
    assert found["weights, gradients, Adam"] == 32e9 + 16 * adapters
    assert "value model" not in found
    small = Size(1_000_000_000, 18, 2048, 16, 8, 128, 6144, 151_936)
    with_value = needs("rl", config, EIGHT_B, True, value=small)
    assert with_value["value model"] == 16e9  # it has no adapters
    assert with_value["activations"] == found["activations"]  # the larger of the two, which come one after the other
    assert needs("rl", config, small, True, value=EIGHT_B)["activations"] > found["activations"]


def test_ranks_share_as_the_config_says() -> None:
    config = load_config("rl", RL)
    assert doctor.sharing("rl", config, devices=8) == (0, 1)  # one process
    config.experiment.deepspeed_file = "1_node_8_gpus_deepspeed_zero2"
    assert doctor.sharing("rl", config, devices=8) == (2, 8)
    config.experiment.deepspeed_file = "1_node_1_gpus"
    assert doctor.sharing("rl", config, devices=8) == (0, 1)
    assert doctor.sharing("sft", config, devices=8) == (3, 8) and doctor.sharing("sft", config, devices=1) == (0, 1)


def test_advice_names_the_largest_parts() -> None:
    config = load_config("rl", RL)
    found = needs("rl", config, EIGHT_B, low_precision=True)
    lines = advice(config, found, room=80 * GIB)
    assert lines[0] == "activations (141.8 GiB): training.gradient_checkpointing_enable=True"
    assert lines[1].startswith("weights, gradients, Adam (119.2 GiB): model.lora.r=64, or more devices")
    assert advice(config, found, room=1e15) == []
    config.model.lora.r = 64  # what is done already is no advice
    found = needs("rl", config, EIGHT_B, low_precision=True, value=EIGHT_B)
    lines = advice(config, found, room=80 * GIB)
    assert lines[1].startswith("value model (119.2 GiB): model.value_base_model=null, or more devices")
    config.training.gradient_checkpointing_enable = True
    found = needs("rl", config, EIGHT_B, low_precision=True)
    assert any("weights, gradients, Adam" in line and "lora" not in line for line in advice(config, found, 40 * GIB))


def test_activations_that_are_kept_are_named_first() -> None:
    config = load_config("rl", RL)
    found = {"keys and values": 9.0, "weights, sampling": 8.0, "weights, gradients, Adam": 7.0, "activations": 1.0}
    lines = advice(config, found, room=10.0)
    assert lines[0].endswith("training.gradient_checkpointing_enable=True") and len(lines) == 3
    config.training.gradient_checkpointing_enable = True
    assert not any(line.startswith("activations") for line in advice(config, found, room=10.0))


def test_the_report(tiny_sdar: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == "deepspeed" else "1.0")
    main(["config=configs/eval_tiny.yaml", f"model={tiny_sdar}"])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("deepspeed")]
    assert "training over several devices" in line
    assert f"{torch.cuda.device_count() or 'none'}" in printed and "it should fit" in printed
    monkeypatch.setattr(doctor, "device_room", lambda: (2.0**20, False, 1))
    main(["config=configs/eval_tiny.yaml", f"model={tiny_sdar}"])
    assert "it will not fit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["config=configs/eval_tiny.yaml", "model=/absent"])
    assert "/absent is neither a checkpoint's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, line", [(b"[]", "holds a list"), (b"\xff\xfe{", "is not UTF-8"), (b"{", "is not JSON")]
)
def test_a_damaged_config(content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"^model: .*config.json {line}"):
        read_size(str(tmp_path))
