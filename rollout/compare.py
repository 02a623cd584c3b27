"""Two evaluations of the same tasks: python -m rollout.compare A B [setting=NAME]

A and B are run folders (or samples.jsonl files) of eval.py or rl.py; `runs/demo@0` is a run's evaluation after 0 steps,
without `@` the last one; `runs/demo:dynamic` is one of its settings, so that two of a run can be compared. Tasks are
paired by id; the p-value is that of the exact paired permutation test, the interval a bootstrap over tasks.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors
from common.metrics import print_table
from common.runtime import console
from rollout.fingerprint import differences
from rollout.samples import read_lines
from rollout.statistics import bootstrap_interval, mean_and_error, sign_flip_test

READ = ("task_id", "question", "correct", "length", "steps")  # of a line of samples.jsonl


@dataclass
class Responses:
    """One setting's responses of one evaluation, by task."""

    correct: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    questions: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    steps: int = 0  # denoising forwards


def compare(a: str, b: str, only: str | None = None) -> list[dict[str, Any]]:
    """A row of figures for each setting that both have, or for their only ones; UserError where none can be paired."""
    first, second = read_evaluation(a), read_evaluation(b)
    return [paired_row(name, first[left], second[right], a, b) for name, left, right in pairs(first, second, only)]


def read_evaluation(name: str) -> dict[str, Responses]:
    """The responses of a run's evaluation, by setting."""
    path, wanted, setting = _samples_file(name)
    by_training_step: dict[int, dict[str, Responses]] = defaultdict(lambda: defaultdict(Responses))
    for line in read_lines(path):
        if missing := [field for field in READ if field not in line]:
            raise UserError(f"{path} has a line without `{missing[0]}`; give a samples.jsonl of eval.py or rl.py")
        responses = by_training_step[line.get("step", 0)][line.get("setting", "")]
        responses.correct[line["task_id"]].append(line["correct"])
        responses.questions[line["task_id"]] = line["question"]
        responses.tokens += line["length"]
        responses.steps += line["steps"]
    if not by_training_step:
        raise UserError(f"{path} holds no responses; give the folder of an evaluation that ran")
    if wanted is not None and wanted not in by_training_step:
        there = ", @".join(map(str, by_training_step))
        raise UserError(f"{name}: there is no evaluation after {wanted} steps; use @{there}")
    found = by_training_step[max(by_training_step) if wanted is None else wanted]
    if setting and setting not in found:
        raise UserError(f"{name}: there is no setting {setting}; use :{', :'.join(found)}")
    return {setting: found[setting]} if setting else found


def pairs(first: dict[str, Responses], second: dict[str, Responses], only: str | None) -> list[tuple[str, str, str]]:
    """(shown name, setting of A, setting of B): those of the same name, or the only one of each."""
    shared = [name for name in first if name in second and only in (None, name)]
    if shared:
        return [(name, name, name) for name in shared]
    if only is None and len(first) == len(second) == 1:
        (left,), (right,) = first, second
        return [(f"{left} / {right}", left, right)]
    raise UserError(f"setting: A has {', '.join(first)}, B has {', '.join(second)}; give one that both have")


def paired_row(name: str, a: Responses, b: Responses, name_a: str, name_b: str) -> dict[str, Any]:
    """Accuracies, their difference B − A with interval and p, and on how many tasks each was better."""
    tasks = [task for task in a.correct if task in b.correct]
    if not tasks:
        raise UserError(f"{name_a} and {name_b} have no task in common; compare evaluations of the same data")
    other = next((task for task in tasks if a.questions[task] != b.questions[task]), None)
    if other is not None:
        raise UserError(f"task {other} is another question in {name_a} than in {name_b}: their data differ")
    unit = math.lcm(*(len(side.correct[task]) for task in tasks for side in (a, b)))
    shares = [[sum(side.correct[task]) * unit // len(side.correct[task]) for task in tasks] for side in (a, b)]
    counts = [right - left for left, right in zip(*shares)]  # in parts of `unit`: whole numbers, so the test is exact
    gains = [count / unit for count in counts]
    mean, error = mean_and_error(gains)
    low, high = bootstrap_interval(gains)
    return {
        "setting": name,
        "tasks": len(tasks),
        "unpaired": len(a.correct) + len(b.correct) - 2 * len(tasks),
        "A": f"{100 * sum(shares[0]) / unit / len(tasks):.1f} %",
        "B": f"{100 * sum(shares[1]) / unit / len(tasks):.1f} %",
        "B - A": f"{100 * mean:+.1f} ± {100 * error:.1f}",
        "95 % interval": f"{100 * low:+.1f} … {100 * high:+.1f}",
        "p": f"{sign_flip_test(counts):.2g}",
        "A better": sum(gain < 0 for gain in gains),
        "B better": sum(gain > 0 for gain in gains),
        "tokens/forward A": f"{a.tokens / a.steps:.2f}",
        "tokens/forward B": f"{b.tokens / b.steps:.2f}",
    }


def changes_between(a: str, b: str) -> list[str]:
    """What the fingerprints of two evaluations say differs; empty where either has none."""
    files = [_samples_file(name)[0].with_name("fingerprint.json") for name in (a, b)]
    if not all(file.is_file() for file in files):
        return []
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return [line for line in differences(before, after) if not line.startswith("id:")]


def _samples_file(name: str) -> tuple[Path, int | None, str]:
    """The file of an evaluation, and the steps and the setting that stand behind it as `@steps` and `:setting`."""
    text, setting = name, ""
    if not Path(name).exists():
        text, _, setting = name.partition(":")
    before, at, step = text.rpartition("@")
    text, step = (before, step) if at and step.isdigit() else (text, "")
    path = Path(text) / "samples.jsonl" if Path(text).is_dir() else Path(text)
    if not path.is_file():
        raise UserError(f"{name}: no {path}; give the folder of a run of eval.py or rl.py")
    return path, int(step) if step else None, setting


@one_line_errors
def main(argv: list[str]) -> None:
    """Print the comparison."""
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    names = [argument for argument in argv if not argument.startswith("setting=")]
    only = next((argument.partition("=")[2] for argument in argv if argument.startswith("setting=")), None)
    if len(names) != 2:
        raise UserError("give two evaluations: python -m rollout.compare runs/a runs/b [setting=dynamic]")
    rows = compare(*names, only)
    columns = [{"": key} | {row["setting"]: row[key] for row in rows} for key in rows[0] if key != "setting"]
    print_table(columns, title=f"A: {names[0]}, B: {names[1]}")
    for line in changes_between(*names):
        console.print(f"differs: {line}")


if __name__ == "__main__":
    main(sys.argv[1:])
