"""python -m common.doctor: what is there, and what a config will need."""

from pathlib import Path

import pytest
import torch

from common import doctor
from common.config import load_config
from common.doctor import GIB, Size, advice, main, needs, read_size
from common.errors import UserError
from models import load_network

EIGHT_B = Size(8_000_000_000, 36, 4096, 1024, 151_936)
RL = ["config=configs/rl_tiny.yaml", "rollout.max_active=128", "rollout.max_token=2000", "training.max_prompt_len=48"]


def test_the_size_of_a_checkpoint(tiny_sdar: Path) -> None:
    size, model = read_size(str(tiny_sdar)), load_network(tiny_sdar, "sdar")
    own = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    assert size == Size(sum(own.values()), 4, 128, 64, model.config.vocab_size)


def test_needs_by_hand() -> None:
    config = load_config("rl", RL)
    config.training.tokens_per_micro_batch = 16384
    found = needs("rl", config, EIGHT_B, ranks=8, low_precision=True)
    assert found["weights, sampling"] == 16e9
    assert found["keys and values"] == 2 * 36 * 1024 * 128 * 2048 * 2
    assert found["weights, gradients, Adam"] == 16e9
    assert found["activations"] == 34 * 4096 * 36 * 16384 * 2
    config.training.gradient_checkpointing_enable = True
    assert needs("rl", config, EIGHT_B, 8, True)["activations"] == 2 * 4096 * 36 * 16384 * 2
    assert needs("rl", config, EIGHT_B, 1, False)["weights, sampling"] == 0  # shared with the learner


def test_advice_names_the_largest_parts() -> None:
    config = load_config("rl", RL)
    found = needs("rl", config, EIGHT_B, ranks=1, low_precision=True)
    lines = advice(config, found, room=80 * GIB)
    assert lines[0] == "activations (153.0 GiB): training.gradient_checkpointing_enable=True"
    assert lines[1].startswith("weights, gradients, Adam (119.2 GiB): more devices")
    assert advice(config, found, room=1e15) == []


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
