"""The table of `benchmarks.versus`: what this project does against plain readings of how the field does it.

Every row is a file in the folder `out`; a row that has one is not measured again, so that an interrupted run
goes on. Checkpoints are made there too: `tiny` of width 128, 4 layers and 39 words, `mid` of width 512, 8 layers and
32,000 words, with random weights under which about half of the candidates are sure.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import benchmarks  # noqa: F401 — before torch
from benchmarks.versus import Side, shown, versus
from common.errors import UserError
from common.metrics import print_table
from common.runtime import console
from models.family import find_family
from models.tiny import build_tiny

OUT = "runs/versus"
OURS, THEIRS = ROOMS = ("benchmarks.ours", "benchmarks.stand_ins")
SHAPES: Mapping[str, dict[str, int]] = {
    "tiny": {"width": 128, "layers": 4, "words": 39},
    "mid": {"width": 512, "layers": 8, "words": 32000},
}
SURE = 6.0  # weight of the last norm where candidates are to be sure: by so much logits are apart
LONGEST = 4096  # positions of a made network
FREED_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": "0",
}  # so that memory is what is used


@dataclass(frozen=True)
class Row:
    """A comparison: functions of benchmarks/ours.py and benchmarks/stand_ins.py, and what both are given."""

    name: str
    our: str
    their: str
    inputs: dict[str, Any]
    shape: str | None = None  # of the checkpoint
    family: str = "sdar"
    environment: dict[str, str] = field(default_factory=dict)

    def with_checkpoint(self, out: Path) -> dict[str, Any]:
        """The inputs, with the checkpoint that they are for."""
        if self.shape is None:
            return self.inputs
        samples = "prompts" in self.inputs
        folder = out / f"{self.family}-{self.shape}{'-sure' if samples else ''}"
        if not (folder / "config.json").is_file():
            make_checkpoint(self.family, self.shape, folder, SURE if samples else 1.0)
        return self.inputs | {"checkpoint": str(folder), "family": self.family}


def make_checkpoint(family_name: str, shape: str, folder: Path, sure: float) -> None:
    """A checkpoint of that shape with random weights, the tiny model's tokenizer in it; `sure`: of its last norm."""
    sizes, family = SHAPES[shape], find_family(family_name)
    build_tiny(family_name, folder, seed=3, width=sizes["width"])
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    own = {"num_hidden_layers": sizes["layers"], "n_layers": sizes["layers"], "vocab_size": sizes["words"]}
    own |= {"embedding_size": sizes["words"], "max_position_embeddings": LONGEST, "max_sequence_length": LONGEST}
    config |= {key: value for key, value in own.items() if key in config}
    for key in ("layer_types", "max_window_layers"):  # of as many layers as the tiny model has
        config.pop(key, None)
    config = family.config_class.from_dict(config)
    torch.manual_seed(3)
    model = family.model_class(config).float()
    torch.nn.init.constant_(model.model.norm.weight, sure)
    model.save_pretrained(folder)


def prompts(count: int) -> list[list[int]]:
    """Prompts of 16 to 48 tokens, their ids below 30."""
    return [[(n + 7 * i) % 30 for i in range(16 + 5 * n % 33)] for n in range(count)]


def block_row(shape: str, batch: int, tokens: int, temperature: float = 0.0, **keys: Any) -> Row:
    name = (
        f"block {shape}, batch {batch}" + (", temperature 1" if temperature else "") + (", threshold" if keys else "")
    )
    inputs = {"prompts": prompts(batch), "tokens": tokens, "temperature": temperature, "block_size": 4} | keys
    return Row(name, f"{OURS}:sampler", f"{THEIRS}:block_sampler", inputs, shape)


def full_row(shape: str, batch: int, tokens: int, way: str) -> Row:
    keys = {"no cache": {}, "prefix cache": {"use_cache": True}, "threshold": {"remasking_strategy": DYNAMIC}}[way]
    inputs = {"prompts": prompts(batch), "tokens": tokens, "block_size": 8, "steps": tokens // 2} | keys
    return Row(
        f"full {shape}, batch {batch}, {way}", f"{OURS}:sampler", f"{THEIRS}:full_sampler", inputs, shape, "llada"
    )


def rl_row(shape: str, family: str, trace: str, lengths: list[int], memory: bool = False) -> Row:
    kind = "block" if family == "sdar" else "full"
    name = f"TraceRL {kind} {shape}, {trace} trace" + (", memory" if memory else "")
    inputs, environment = {"lengths": lengths, "trace": trace}, FREED_AT_ONCE if memory else {}
    return Row(name, f"{OURS}:rl_step", f"{THEIRS}:rl_step", inputs, shape, family, environment)


def sft_row(shape: str, family: str, lengths: list[int]) -> Row:
    kind = "block" if family == "sdar" else "full"
    name, inputs = f"SFT {kind} {shape}, mixed lengths", {"lengths": lengths}
    return Row(name, f"{OURS}:sft_step", f"{THEIRS}:sft_step", inputs, shape, family)


DYNAMIC = "low_confidence_dynamic"
MIXED = [32, 48, 64, 64, 96, 128, 160, 256, 384]  # tokens of prompt and response
ANSWERS = ("\\frac{1}{%d}", "%d", "\\sqrt{%d}", "(%d, 2)")
TOKENS = {"tiny": 64, "mid": 16}
FULL_TOKENS = {"tiny": 64, "mid": 16}


def math_row(count: int) -> Row:
    answers = [form % number for number in range(3, 3 + count // len(ANSWERS)) for form in ANSWERS]
    texts = [f"so it is \\boxed{{{answers[n - n % 3]}}}." for n in range(len(answers))]  # a third of them right
    tasks = [{"answer": answer} for answer in answers]
    return Row("rewards, maths", f"{OURS}:rewards", f"{THEIRS}:maths", {"texts": texts, "tasks": tasks, "kind": "math"})


def code_row(count: int) -> Row:
    texts = [f"```python\ndef f(x):\n    return x * x + {n % 2}\n```" for n in range(count)]
    test = {"test_method": "function", "test_list": ["assert f(3) == 10", "assert [f(1), f(2)] == [2, 5]"]}
    inputs = {"texts": texts, "tasks": [test] * count, "kind": "code"}
    return Row("rewards, code", f"{OURS}:rewards", f"{THEIRS}:programs", inputs)


ROWS = [
    *(block_row("tiny", batch, TOKENS["tiny"]) for batch in (1, 8, 32, 64)),
    *(block_row("tiny", batch, TOKENS["tiny"], 1.0) for batch in (1, 32)),
    *(block_row("tiny", batch, TOKENS["tiny"], remasking_strategy=DYNAMIC) for batch in (1, 32)),
    *(full_row("tiny", batch, FULL_TOKENS["tiny"], way) for way in ("no cache", "prefix cache", "threshold")
      for batch in (1, 4, 16)),
    *(rl_row("tiny", family, trace, lengths) for family, lengths in (("sdar", [64, 128, 192, 256]), ("llada", [32, 48]))
      for trace in ("real", "static")),
    *(sft_row("tiny", family, MIXED) for family in ("sdar", "llada")),
    *(rl_row("tiny", "sdar", trace, [128, 192, 256, 320], memory=True) for trace in ("real", "static")),
    math_row(96),
    code_row(24),
    *(block_row("mid", batch, TOKENS["mid"]) for batch in (1, 8)),
    *(block_row("mid", batch, TOKENS["mid"], remasking_strategy=DYNAMIC) for batch in (1, 8)),
    *(full_row("mid", batch, FULL_TOKENS["mid"], way) for way in ("no cache", "prefix cache", "threshold")
      for batch in (1, 4)),
    *(rl_row("mid", family, trace, lengths) for family, lengths in (("sdar", [16, 32]), ("llada", [16]))
      for trace in ("real", "static")),
    *(sft_row("mid", family, [32, 48, 64]) for family in ("sdar", "llada")),
    *(rl_row("mid", "sdar", trace, [32, 48], memory=True) for trace in ("real", "static")),
]  # fmt: skip


def table(words: Mapping[str, str], rounds: int) -> None:
    """Measure the rows whose names hold the words of `rows`, those that were not before, and print the table."""
    out, wanted = Path(words.get("out", OUT)), words["rows"].split()
    if extra := set(words) - {"rows", "out", "rounds"}:
        raise UserError(f"{min(extra)}: with rows= there are out and rounds")
    rows = [row for row in ROWS if wanted == ["all"] or set(wanted) <= set(row.name.replace(",", "").split())]
    if not rows:
        known = "; ".join(row.name for row in ROWS)
        raise UserError(f"rows={words['rows']}: no row has these words; the rows: {known}")
    out.mkdir(parents=True, exist_ok=True)
    sides: dict[str, tuple[Side, Side]] = {}  # by environment
    with ExitStack() as stack:
        for row in rows:
            file = file_of(row, out)
            if file.is_file():
                continue
            console.print(row.name)
            key = json.dumps(row.environment)
            if key not in sides:
                sides[key] = tuple(stack.enter_context(Side(name, environment=row.environment)) for name in ROOMS)
            told = versus(*sides[key], row.our, row.their, row.with_checkpoint(out), rounds)
            file.write_text(json.dumps({"row": row.name} | told, indent=1) + "\n", encoding="utf-8")
    found = [json.loads(file_of(row, out).read_text(encoding="utf-8")) for row in rows]
    print_table([shown(row["row"], row) for row in found], title=f"one thread, processor seconds, from {out}")


def file_of(row: Row, out: Path) -> Path:
    return out / f"{row.name.replace(', ', '-').replace(' ', '-')}.json"
