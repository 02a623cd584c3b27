"""Is a file fit for use? python -m data.check FILE

Reads it as tasks (question with ground_truth_answer or tests), or as SFT samples where its first record has `prompt`
and `response` and no `question`; names the first record and field that are wrong. Exit code 0 or 2.
"""

from __future__ import annotations

import collections
import sys

from common.errors import one_line_errors
from data.tasks import load_records, load_sft_records, load_tasks


@one_line_errors
def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    print(check_file(sys.argv[1]))


def check_file(name: str) -> str:
    """A line on what a good file holds; UserError for the first bad record."""
    first = load_records(name, "file")[0]
    if "question" not in first and {"prompt", "response"} <= first.keys():
        records = load_sft_records(name, "file")
        return f"{name}: {len(records)} SFT samples, {sum('step_map' in one for one in records)} with a step map"
    tasks = load_tasks(name, "file")
    kinds = collections.Counter(task.record.get("test_method") or "answer" for task in tasks)
    repeated = len(tasks) - len({task.question for task in tasks})
    note = f"; {repeated} questions stand there more than once" if repeated else ""
    return f"{name}: {len(tasks)} tasks ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}){note}"


if __name__ == "__main__":
    main()
