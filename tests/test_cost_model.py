"""benchmarks/cost_model.py against figures computed elsewhere: limits, a step's parts, training, memory."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cost_model
from benchmarks.cost_model import (
    CHIPS,
    GIB,
    HEAD_WORD,
    KEY_TILE,
    Load,
    Response,
    attention_bytes,
    draw_bytes,
    limit_rate,
    limit_seconds,
    memory_of,
    moved_rows,
    step_seconds,
)
from benchmarks.shapes import SHAPES
from common.errors import UserError
from common.memory import activation_bytes, cache_bytes, size_of
from common.schema import Sampling
from sample.draw import draw
from train import network

EIGHT, FOUR = size_of(SHAPES["8b"]), size_of(SHAPES["4b"])
TOLERANCE = 0.07  # of the parts of a step, whose figures have two digits or one
STEPS = {  # ms of the limit and of the parts as they were before, at a context of 1,000 and a longest of 2,048
    ("h200", 1): (3.2, 3.9, 3.4, 0.5, 0.3),
    ("h200", 64): (5.1, 7.1, 5.3, 5.4, 1.4),
    ("h200", 128): (10.2, 14.2, 8.5, 11, 2.4),
    ("h100", 1): (4.6, 5.6, 3.4, 0.5, 0.3),
    ("h100", 64): (7.3, 7.1, 6.7, 7.7, 1.8),
    ("h100", 128): (10.2, 14.2, 11, 15, 3.3),
}


@pytest.mark.parametrize("chip, batch", STEPS)
def test_a_step(chip: str, batch: int) -> None:
    limit, *parts = STEPS[chip, batch]
    assert 1e3 * limit_seconds(EIGHT, CHIPS[chip], batch, 1000) == pytest.approx(limit, rel=0.015)
    before = step_seconds(EIGHT, CHIPS[chip], Load(batch), before=True)
    assert [1e3 * before[part] for part in cost_model.PARTS] == pytest.approx(parts, rel=TOLERANCE, abs=0.05)
    now = step_seconds(EIGHT, CHIPS[chip], Load(batch))
    assert now["matrix products"] == before["matrix products"]
    assert now["small kernels"] < before["small kernels"] / 3
    assert draw_bytes(EIGHT, Load(batch)) < draw_bytes(EIGHT, Load(batch), before=True)
    assert sum(now.values()) < sum(before.values())


def test_attention_reads_what_is_seen() -> None:
    """Without a mask the keys in use, up to the kernel's tile; where commits ride along both read."""
    seen = cache_bytes(EIGHT, 1000 + KEY_TILE / 2)
    assert attention_bytes(EIGHT, Load(64)) == 64 * seen
    assert attention_bytes(EIGHT, Load(1)) == 2 * seen
    one, many = (step_seconds(EIGHT, CHIPS["h100"], Load(batch))["attention"] for batch in (1, 64))
    assert one == 36 * cost_model.SHORTEST_ATTENTION  # not by bytes
    assert many == pytest.approx(64 * seen / (cost_model.ATTENDED * 3.35e12))
    assert attention_bytes(EIGHT, Load(64, longest=4096)) == attention_bytes(EIGHT, Load(64))
    assert attention_bytes(EIGHT, Load(64, longest=4096), before=True) == 64 * cache_bytes(EIGHT, 4096)


def test_what_is_moved_before_and_now() -> None:
    few, many = moved_rows(EIGHT, [1, 128], 1000, 2048)
    assert float(many["keys and values seen"]) <= float(many["attention"]) < 0.51 * float(many["attention before"])
    assert float(many["attention before"]) == pytest.approx(38.7, abs=0.1)
    assert float(many["draw"]) == pytest.approx(2.18, abs=0.01)
    assert (few["kernels before"], few["kernels"], many["kernels"]) == (36 * 60 + 170, 36 * 21 + 177, 36 * 21 + 177)


@pytest.mark.parametrize(
    "batch, separate, merged", [(1, 392, 571), (16, 5466, 7959), (64, 15479, 15687), (256, 15676, 15687)]
)
def test_limits_in_tokens_a_second(batch: int, separate: float, merged: float) -> None:
    h200 = CHIPS["h200"]
    assert limit_rate(EIGHT, h200, batch, 1024, 2.2, merged=False) == pytest.approx(separate, rel=0.003)
    assert limit_rate(EIGHT, h200, batch, 1024, 2.2, merged=True) == pytest.approx(merged, rel=0.003)


def test_the_limit_of_4b() -> None:
    assert limit_rate(FOUR, CHIPS["h200"], 128, 1024, 2.2, merged=False) == pytest.approx(28_000, rel=0.01)


def test_bytes_of_the_draw() -> None:
    plain, now = (
        {name: sum(moved.values()) for name, moved in draws.items()}
        for draws in (cost_model.PLAIN_DRAWS, cost_model.DRAWS)
    )
    greedy, drawn, filtered, _ = plain.values()
    assert (greedy, drawn) == (58, 105) and filtered == pytest.approx(230, rel=0.05)
    assert now["greedy"] == now["temperature 1"] == 20 + 2 * HEAD_WORD
    assert now["temperature 1"] * 3.7 < drawn and now["greedy"] * 2 < greedy
    assert now["temperature, top-k and top-p"] * 2 < filtered


class Moved(TorchDispatchMode):
    """Bytes of a vocabulary's size or more that operations read and write, as they come."""

    def __init__(self, words: int):
        super().__init__()
        self.words, self.bytes = words, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        results = result if isinstance(result, tuple) else (result,)
        read = [one for one in args if isinstance(one, torch.Tensor)]
        read += [one for each in args if isinstance(each, (list, tuple)) for one in each if torch.is_tensor(one)]
        some = any(word in function.name() for word in ("fill", "gather"))  # of a few places alone
        written = [one for one in results if torch.is_tensor(one)]
        for one in [*read, *written]:
            if one.numel() >= self.words and not some:
                self.bytes += one.numel() * one.element_size()
        return result


@pytest.mark.parametrize("draw_name, keys", [("greedy", {"temperature": 0.0}), ("temperature 1", {})])
def test_the_draw_moves_what_is_counted(draw_name: str, keys: dict) -> None:
    words = 128 * 100
    logits, uniform = torch.randn(8, words).to({2: torch.bfloat16, 4: torch.float32}[HEAD_WORD]), torch.rand(8)
    with Moved(8 * (words - 100)) as moved:
        draw(logits, uniform, 3, Sampling(remasking_strategy="low_confidence_static", **keys))
    assert moved.bytes / (8 * words) == pytest.approx(sum(cost_model.DRAWS[draw_name].values()), rel=0.02)


def test_training_of_a_response() -> None:
    assert Response().tokens == 6700
    full, lora = (cost_model.training_flops(EIGHT, Response(), frozen) for frozen in (False, True))
    assert full == pytest.approx(3.9e14, rel=0.04)
    assert lora / full == pytest.approx(3 / 4, rel=0.03)  # forward, the same anew, activations' gradients


def test_memory_of_training() -> None:
    def gib(kind: str, **options: object) -> dict[str, float]:
        return {part: held / GIB for part, held in memory_of(EIGHT, kind, 16384, 64, **options).items()}

    lora, frozen = gib("LoRA"), gib("LoRA, bfloat16 base")
    assert lora["sampler's weights"] == pytest.approx(15.3, rel=0.005)
    # the adapters' gradients and moments, 1.95 GiB, stand beside weights of 31.2 and 15.9
    assert lora["weights and states"] == pytest.approx(31.2 + 1.95, rel=0.005)
    assert frozen["weights and states"] == pytest.approx(15.9 + 1.95, rel=0.005)
    assert lora["activations"] == pytest.approx(14.5, rel=0.05)
    assert frozen["activations"] == pytest.approx(9.7, rel=0.05)
    assert sum(lora.values()) == pytest.approx(62, rel=0.02)
    assert sum(gib("full, ZeRO-3", devices=8).values()) == pytest.approx(43, rel=0.03)
    assert gib("full")["weights and states"] == pytest.approx(122, rel=0.005)
    assert activation_bytes(EIGHT, 16384, False, "autocast") / GIB == pytest.approx(137, rel=0.05)
    assert gib("full, ZeRO-3", devices=8, value_model=True)["value model"] == pytest.approx(19.1, rel=0.01)


def test_the_chunk_of_the_head_is_the_trainers() -> None:
    assert max(network.LEAST_POSITIONS, network.CHUNK_ELEMENTS // EIGHT.vocabulary) == cost_model.HEAD_POSITIONS


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SHAPES["4b"]))
    monkeypatch.setattr(sys, "argv", ["cost_model", "--config", str(config), "--chip", "4090", "--batch", "1"])
    cost_model.main()
    printed = capsys.readouterr().out
    assert "one step of the sampler, ms, before" not in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--before"])
    cost_model.main()
    printed = capsys.readouterr().out
    assert "one step of the sampler, ms, before" in printed and "kernels before" in printed
    assert "4.02 B" in printed and "4090" in printed and "LoRA, bfloat16 base" in printed
    config.write_text("[]")
    with pytest.raises(SystemExit) as ended:
        cost_model.main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: --config: ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "no/such.json"], "error: --config: no/such.json cannot be read: No such file or directory"),
        (["--config", "."], "error: --config: . cannot be read: Is a directory"),
        (["--devices", "0"], "error: --devices: must be above 0"),
        (["--batch", "8", "-5"], "error: --batch: must be above 0"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cost_model", *arguments])
    with pytest.raises(SystemExit) as ended:
        cost_model.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(line) and told.count("\n") == 1


def test_another_json_file_is_no_config() -> None:
    with pytest.raises(UserError, match=r"config.json gives hidden_size or d_model, and this has none"):
        size_of({"version": "1.0"})
