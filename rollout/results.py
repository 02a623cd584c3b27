"""The written form of an evaluation: results.json, results.md and the table on the console."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.evaluate import Evaluation
from rollout.fingerprint import Fingerprint


def write_results(folder: Path, results: Mapping[str, Evaluation], about: Fingerprint) -> None:
    """Write results.json (every figure, by setting) and results.md (tables and what they depend on)."""
    rows = {name: dataclasses.asdict(result) for name, result in results.items()}
    (folder / "results.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    (folder / "results.md").write_text(results_page(results, about), encoding="utf-8")


def table_rows(results: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """One row of readable figures for each setting."""
    return [_row(result) for result in results.values()]


def _row(result: Evaluation) -> dict[str, Any]:
    row = {
        "setting": result.setting,
        "tasks": result.tasks,
        "responses": result.responses,
        "accuracy": f"{100 * result.accuracy:.1f} % ± {100 * result.standard_error:.1f}",
    }
    if result.unanswered:
        row["unanswered, counted as wrong"] = result.unanswered
    row |= {f"pass@{k}": f"{100 * value:.1f} %" for k, value in result.pass_at.items()}
    row |= {f"majority@{k}": f"{100 * value:.1f} %" for k, value in result.majority_at.items()}
    return row | {
        "response_length": round(result.response_length, 1),
        "truncated": f"{100 * result.truncated:.1f} %",
        "tokens_per_forward": round(result.tokens_per_forward, 3),
        "tokens_per_second": round(result.tokens_per_second, 1),
    }


def results_page(results: Mapping[str, Evaluation], about: Fingerprint) -> str:
    """Markdown: all settings, accuracy by category, the fingerprint."""
    model, data = about["model"], about["data"]
    parts = [
        f"# {model['name']} on {data['name']}",
        markdown_table(table_rows(results)),
        "Accuracy ± one standard error, clustered by task. pass@k is the unbiased estimate; majority@k is the mean "
        "over subsets of k responses. tokens_per_forward counts denoising forwards.",
    ]
    first = next(iter(results.values()))
    for name, values in first.categories.items():
        rows = []
        for value, figures in values.items():
            row: dict[str, Any] = {name: value, "tasks": figures["tasks"]}
            for setting, result in results.items():
                one = result.categories[name][value]
                row[setting] = f"{100 * one['accuracy']:.1f} % ± {100 * one['standard_error']:.1f}"
            rows.append(row)
        parts += [f"## By {name}", markdown_table(rows)]
    weights = {file: digest for file, digest in model["files"].items() if file.endswith(".safetensors")}
    facts = {
        "id": about["id"],
        "model": ", ".join(f"{file} {digest[:12]}" for file, digest in weights.items()),
        "family, dtype, device": f"{model['family']}, {model['dtype']}, {about['device']}",
        "data": f"{data['tasks']} tasks, {data['sha256'][:12]}",
        "prompts": f"{about['prompts']['sha256'][:12]}, template {json.dumps(about['prompts']['template'])}",
        "seed": about["seed"],
        "versions": ", ".join(f"{package} {version}" for package, version in about["versions"].items()),
    }
    parts += ["## Fingerprint", markdown_table([{"what": key, "value": value} for key, value in facts.items()])]
    parts += ["Settings in full: fingerprint.json. Every response: samples.jsonl."]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which keys first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
