"""Is a published accuracy reproduced? python -m rollout.verify_published MODEL BENCHMARK [key=value …]

Runs the evaluation that stands for the published figure, as eval.py would, and says whether its accuracy lies within
the sampling error: verify.md and verify.json in the run's folder, exit code 0 where all figures do, 1 where one does
not. Without arguments it lists the rows. Keys are those of eval.py (model=PATH for a copy of the model,
rollout.num_task=50 for a first look); rows=FILE takes other rows than those of rollout/published.yaml.
"""

import difflib
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from common.config import load_config
from common.errors import UserError, one_line, one_line_errors
from common.metrics import print_table
from rollout.results import markdown_table

ROOT = Path(__file__).resolve().parents[1]
ROWS = Path(__file__).with_name("published.yaml")
WIDTH = 1.96  # standard errors on each side of a difference of 0 that hold 95 % of what chance gives


@dataclass(frozen=True)
class PublishedRow:
    """A model's published accuracies on a benchmark, and the evaluation that stands for them."""

    model: str
    benchmark: str
    published: dict[str, float]  # setting → accuracy in %
    tasks: int | None  # behind the published figure; None: not told
    responses: int  # to each task
    source: str
    config: str
    differs: str  # from the published protocol
    data_type: str = "math"
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.published, dict):
            raise TypeError(f"`published` of {self.benchmark} is no setting: accuracy in %")

    def arguments(self, further: Sequence[str]) -> list[str]:
        """The arguments of eval.py; `further` ones win."""
        own = {
            "experiment.project": f"verify_{self.model.rpartition('/')[2]}_{self.benchmark}",
            "model": self.model,
            "dataset.eval_dataset": self.benchmark,
            "dataset.data_type": self.data_type,
            "rollout.num_response_per_task": self.responses,
        }
        return [f"config={self.config}", *(f"{key}={value}" for key, value in own.items()), *self.overrides, *further]


def read_rows(file: Path) -> list[PublishedRow]:
    """The rows of a file, each with its group's fields; UserError for what is no such file."""
    try:
        groups = yaml.safe_load(file.read_text(encoding="utf-8"))
        found = []
        for group in groups:
            shared = {key: value for key, value in group.items() if key != "rows"}
            for row in group["rows"]:
                overrides = [*shared.get("overrides", []), *row.get("overrides", [])]
                found.append(PublishedRow(**shared | row | {"overrides": overrides}))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        wanted = ", ".join(one.name for one in fields(PublishedRow))
        raise UserError(
            f"rows={file} cannot be read ({one_line(error)}); give groups with rows of {wanted}, as rollout/"
            f"{ROWS.name} has them"
        ) from None
    return found


def find_row(rows: Sequence[PublishedRow], model: str, benchmark: str) -> PublishedRow:
    """The row of a model, by its id or what stands behind the slash, and a benchmark; UserError names the nearest."""
    models = {name: row.model for row in rows for name in (row.model, row.model.rpartition("/")[2])}
    name = models[_one_of("MODEL", model, models)]
    by_benchmark = {row.benchmark: row for row in rows if row.model == name}
    return by_benchmark[_one_of(f"BENCHMARK of {name}", benchmark, by_benchmark)]


def _one_of(what: str, wanted: str, names: Iterable[str]) -> str:
    """The name that is wanted, in whatever case; UserError with the nearest, or all of them."""
    spelled = {name.casefold(): name for name in names}
    if wanted.casefold() in spelled:
        return spelled[wanted.casefold()]
    close = difflib.get_close_matches(wanted.casefold(), spelled, n=1)
    hint = f"did you mean '{spelled[close[0]]}'?" if close else f"use one of {', '.join(spelled.values())}"
    raise UserError(f"{what}: '{wanted}' has no published row; {hint}")


def verdict_of(row: PublishedRow, setting: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    """How a setting's measured figures stand to the published one: a row of the table, accuracies in %.

    Both figures err: the measured one by its standard error, clustered by task; the published one, whose responses
    nobody has, by that of as many tasks which are right or wrong as wholes, √(p(1 − p) / tasks). The interval is what
    95 % of differences lie within when both come from the same model; it takes tasks as drawn anew for each figure,
    so that over the very same tasks it is wide.
    """
    published = row.published[setting]
    accuracy, error = 100 * measured["accuracy"], 100 * measured["standard_error"]
    error_published = math.sqrt(published * (100 - published) / (row.tasks or measured["tasks"]))
    margin = WIDTH * math.hypot(error, error_published)
    difference = accuracy - published
    inside = abs(difference) <= margin
    return {
        "setting": setting,
        "tasks": measured["tasks"],
        "responses": measured["responses"],
        "accuracy": round(accuracy, 2),
        "standard_error": round(error, 2),
        "published": published,
        "difference": round(difference, 2),
        "sampling_error": round(margin, 2),
        "verdict": "within" if inside else "above" if difference > 0 else "below",
    }


def verify(row: PublishedRow, further: Sequence[str]) -> list[dict[str, Any]]:
    """Run a row's evaluation and compare; writes verify.json and verify.md into its folder."""
    arguments = row.arguments(further)
    config = load_config("eval", arguments)  # a mistake is told before anything starts
    folder = Path(config.experiment.runs_dir) / config.experiment.project
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), *arguments])
    if done.returncode:
        sys.exit(done.returncode)
    if not (folder / "results.json").is_file():
        raise UserError(
            f"{folder}: the evaluation was stopped; repeat the command with experiment.start_from_scratch=False"
        )
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if missing := [setting for setting in row.published if setting not in results]:
        raise UserError(
            f"rollout.remasking_strategy: the evaluation has the settings {', '.join(results)}, the published row "
            f"{', '.join(missing)}; leave the row's own settings as they are"
        )
    found = [verdict_of(row, setting, results[setting]) for setting in row.published]
    about = {"model": config.model, "published_model": row.model, "benchmark": row.benchmark, "source": row.source}
    about |= {"differs": row.differs, "arguments": arguments}
    (folder / "verify.json").write_text(json.dumps(about | {"figures": found}, indent=2), encoding="utf-8")
    page = [
        f"# {row.model} on {row.benchmark}, published and here",
        markdown_table(found),
        "Accuracies in %. `within`: the difference is no more than `sampling_error`, 1.96 standard errors of the two "
        "figures together.",
        f"Published by {row.source}. What differs: {row.differs}.",
        "    python eval.py " + " ".join(arguments),
    ]
    (folder / "verify.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print_table(found, title=f"{row.model} on {row.benchmark}: {row.source}")
    if row.tasks and any(figures["tasks"] != row.tasks for figures in found):
        print(f"the published figure is of {row.tasks} tasks, this one of {found[0]['tasks']}")
    print(f"what differs: {row.differs}; written: {folder}/verify.md, verify.json")
    return found


def listed(rows: Sequence[PublishedRow]) -> list[dict[str, Any]]:
    """A line of the list for each row."""
    return [
        {
            "model": row.model,
            "benchmark": row.benchmark,
            "tasks": row.tasks,
            "responses": row.responses,
            "published, %": ", ".join(f"{setting} {value}" for setting, value in row.published.items()),
            "config": row.config,
        }
        for row in rows
    ]


@one_line_errors
def main(argv: Sequence[str]) -> None:
    """List the rows, or run one and end with code 1 where a figure lies outside."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
    names = [argument for argument in argv if "=" not in argument]
    further = [argument for argument in argv if "=" in argument and not argument.startswith("rows=")]
    file = next((Path(argument[len("rows=") :]) for argument in argv if argument.startswith("rows=")), ROWS)
    rows = read_rows(file)
    if not names and not further:
        print_table(listed(rows))
        return
    if len(names) != 2:
        raise UserError("give a model and a benchmark: python -m rollout.verify_published TraDo-8B-Instruct MATH500")
    figures = verify(find_row(rows, *names), further)
    sys.exit(any(figure["verdict"] != "within" for figure in figures))


if __name__ == "__main__":
    main(sys.argv[1:])
