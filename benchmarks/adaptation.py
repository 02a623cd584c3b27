"""An autoregressive model made a diffusion model, finetuned and improved by TraceRL, at the size of two cores.

    python -m benchmarks.adaptation [--seeds 1 2] [--table docs/adapt.md]     # goes on where it was stopped

For each seed: a tiny Qwen3 learns the next token of worked sums and is stopped early; `models.adapt` makes it a model
of family sdar; that is finetuned in blocks until it is as good as its parent, by the tasks of another split; TraceRL
goes on from there. Beside it a network that learned nothing before is finetuned until it is as good. All figures are
of the held-out tasks. The parent answers from left to right by transformers' own `generate`. The table goes to the
terminal, or between its two marks in --table.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from common.metrics import read_rows
from data.tasks import load_tasks
from models import Family, load_tokenizer
from models.original import FullAttention, OriginalConfig
from models.prompts import turns_text
from reward.math_reward import math_score

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- begin: benchmarks/adaptation.py -->", "<!-- end -->"
TASKS = "arithmetic_4_test"
PARENT_UPDATES = 200  # the next token is learned fast: much later little would be left to improve
LONGEST = 40  # tokens of an answer
BATCH = 128  # tasks answered side by side
# how rl.py's metrics name the settings of its evaluations
SETTINGS = [f"eval/{name}-top_k={k}/accuracy" for k in (0, 1) for name in ("static", "dynamic")]


class ParentConfig(OriginalConfig, Qwen3Config):
    """Qwen3's, with heads as wide as a tiny model's."""

    model_type = "tiny_parent"
    head_dim: int = 32


class ParentForCausalLM(FullAttention, Qwen3ForCausalLM):
    """Qwen3 in a form that finetuning can teach the next token (training.method=ar)."""

    config_class = ParentConfig


PARENT = Family(
    name="parent",
    model_type="tiny_parent",
    attention="full",
    logit_offset=-1,
    mask_token="<|unused|>",  # finetuning wants one, though the next token needs none
    config_class=ParentConfig,
    model_class=ParentForCausalLM,
    instructions={"math": "{question}"},
)


def as_published(trained: Path, folder: Path) -> None:
    """Write what finetuning made as a plain Qwen3, without a mask token."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in trained.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    own = {"config.json": ("mask_token_id",), "tokenizer_config.json": ("mask_token",)}
    for name, keys in own.items():
        content = json.loads((folder / name).read_text())
        for key in keys:
            content.pop(key, None)
        if name == "config.json":
            content |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
        (folder / name).write_text(json.dumps(content, indent=2))


def left_to_right(folder: Path, sampled: bool, seed: int) -> float:
    """The share of held-out tasks that a plain Qwen3 answers right, at temperature 1 (`sampled`) or greedily."""
    network, tokenizer = Qwen3ForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    tasks = load_tasks(TASKS, "tasks")
    torch.manual_seed(seed)
    right = 0
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        texts = [turns_text(tokenizer, [{"role": "user", "content": task.question}]) for task in part]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = network.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            do_sample=sampled,
            top_k=0 if sampled else None,
            max_new_tokens=LONGEST,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(ids[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
        right += sum(math_score(answer, task.ground_truth_answer).correct for answer, task in zip(answers, part))
    return right / len(tasks)


# --- the stages of a seed; each is left out where what it makes is there


def parent(runs: Path, seed: int) -> Path:
    """The folder of the seed's parent, a plain Qwen3."""
    folder, project = runs / f"parent_{seed}", f"sft_parent_{seed}"
    if not folder.is_dir():
        keys = {
            "model.model_base": "benchmarks.adaptation:PARENT",
            "dataset.optimization_data": "arithmetic_4_train",
            "dataset.eval_dataset": "",
            "training.method": "ar",
            "training.stop_at_accuracy": "null",
            "training.max_steps": PARENT_UPDATES,
            "training.batch_size": 24,
            "training.max_gen_length": LONGEST,
            "optimizer.params.learning_rate": 1e-3,
        }
        finetune(runs, project, seed, keys)
        as_published(runs / project / "ckpt" / "optimized", folder)
    return folder


def adapted(runs: Path, seed: int) -> Path:
    """The folder of the parent as a model of family sdar."""
    folder = runs / f"adapted_{seed}"
    if not folder.is_dir():
        arguments = [f"model={parent(runs, seed)}", "family=sdar", f"out={folder}"]
        call(["-m", "models.adapt", *arguments], runs / f"adapt_{seed}.log")
    return folder


def finetune(runs: Path, project: str, seed: int, keys: dict[str, object]) -> None:
    """One run of configs/sft_tiny.yaml."""
    own = {"experiment.project": project, "experiment.runs_dir": runs, "training.seed": seed}
    own |= {"experiment.trackers": "[]", "experiment.start_from_scratch": "false", "experiment.save_every": 20}
    arguments = [f"{key}={value}" for key, value in (own | keys).items()]
    call(["train/sft_sdar.py", "config=configs/sft_tiny.yaml", *arguments], runs / f"{project}.log")


def call(arguments: list[str], log: Path) -> None:
    """Run a Python command on one thread, its output in a log; stop where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{log.stem} …", flush=True)
    with log.open("a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=output, env=environment)
    if done.returncode:
        sys.exit(f"{log.stem} failed with exit code {done.returncode}; see {log}")


def improve(runs: Path, seed: int) -> dict[str, float]:
    """TraceRL from the adapted model; accuracy before and after, by sampling setting."""
    project = f"rl_adapted_{seed}"
    if not (runs / project / "results.json").is_file():
        strategies = ["low_confidence_static", "low_confidence_dynamic"] * 2
        keys = {
            "experiment.project": project,
            "experiment.runs_dir": runs,
            "experiment.start_from_scratch": "false",
            "experiment.trackers": "[]",
            "experiment.save_every": 5,
            "experiment.eval_every": 0,
            "model.pretrained_model": runs / f"sft_from_adapted_{seed}" / "ckpt" / "optimized",
            "model.made_by": "null",
            "training.seed": seed,
            "optimizer.params.learning_rate": 1e-4,  # at 3e-4 the first update takes it far off (docs/log.md)
            "lr_scheduler.params.warmup_steps": 10,
            "evaluation.remasking_strategy": f"[{','.join(strategies)}]",
            "evaluation.top_k": "[0,0,1,1]",
        }
        arguments = [f"{key}={value}" for key, value in keys.items()]
        call(["rl.py", "config=configs/rl_tiny.yaml", *arguments], runs / f"{project}.log")
    rows = read_rows(runs / project / "metrics.jsonl")
    measured = [row for row in rows if any(key.endswith("/accuracy") for key in row)]
    return {
        f"{moment} {key}": value
        for moment, row in (("before", measured[0]), ("after", measured[-1]))
        for key, value in row.items()
        if key.endswith("/accuracy")
    }


def updates(runs: Path, name: str, model: Path | str, seed: int, goal: float) -> int:
    """Finetune a model until its accuracy reaches the goal; how many updates that took."""
    project = f"sft_from_{name}_{seed}"
    if not (runs / project / "results.json").is_file():
        finetune(runs, project, seed, {"model.pretrained_model": model, "training.stop_at_accuracy": goal})
    return len(read_rows(runs / project / "metrics.jsonl"))


def run(runs: Path, seed: int) -> dict[str, float]:
    """All stages of a seed; its figures, which lie in a file as they come."""
    file = runs / f"figures_{seed}.json"
    figures = json.loads(file.read_text()) if file.is_file() else {}
    stages = {
        "parent": lambda: {"parent": left_to_right(parent(runs, seed), True, seed)},
        "greedy parent": lambda: {"greedy parent": left_to_right(parent(runs, seed), False, seed)},
        "adapted": lambda: {"adapted": updates(runs, "adapted", adapted(runs, seed), seed, figures["parent"])},
        f"after {SETTINGS[0]}": lambda: improve(runs, seed),
        "nothing": lambda: {"nothing": updates(runs, "nothing", "tiny", seed, figures["parent"])},
    }
    for name, stage in stages.items():
        if name not in figures:
            figures |= stage()
            file.write_text(json.dumps(figures, indent=1))
    return figures


def table_of(figures: dict[int, dict[str, float]]) -> str:
    """Markdown, a line for each seed."""
    head = ["seed", "parent, T 1", "parent, greedy", "updates, adapted", "updates, from nothing"]
    head += [
        f"{name}: before → after RL" for name in ("static, T 1", "dynamic, T 1", "static, greedy", "dynamic, greedy")
    ]
    lines = [head, ["---"] * len(head)]
    for seed, one in figures.items():
        cells = [str(seed), percent(one["parent"]), percent(one["greedy parent"])]
        cells += [str(one["adapted"]), str(one["nothing"])]
        cells += [f"{percent(one[f'before {key}'])} → {percent(one[f'after {key}'])}" for key in SETTINGS]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "adaptation")
    parser.add_argument("--table", type=Path, help="a Markdown file that has the two marks")
    options = parser.parse_args()
    table = table_of({seed: run(options.runs, seed) for seed in options.seeds})
    print(table)
    if options.table:
        text = options.table.read_text(encoding="utf-8")
        before, behind = text.split(BEGIN)[0], text.split(BEGIN)[1].split(END, 1)[1]
        options.table.write_text(f"{before}{BEGIN}\n{table}\n{END}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
