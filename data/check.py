"""Is a file fit for use? python -m data.check FILE

Reads it as tasks (question with ground_truth_answer or tests), or as SFT samples where its first record has no
`question` but `response`, `response_ids`, `messages` or `text`; names the first record and field that are wrong. Exit
code 0 or 2.
"""

import collections
import sys

from common.errors import UserError, one_line_errors
from data.sft_records import Answer, Chat, Ids, Rejected, Text, load_samples
from data.tasks import load_records, load_tasks

KINDS = {Answer: "answers", Chat: "conversations", Text: "texts", Ids: "token ids"}
SFT_FIELDS = {"response", "response_ids", "messages", "conversations", "text"}


@one_line_errors
def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    print(check_file(sys.argv[1]))


def check_file(name: str) -> str:
    """A line on what a good file holds; UserError for the first bad record."""
    first = load_records(name, "file")[0]
    if "question" not in first and SFT_FIELDS & first.keys():
        samples = [sample for _, sample in load_samples(name, "file")]
        for sample in samples:
            if isinstance(sample, Rejected):
                raise UserError(f"file: {sample.message}")
        kinds = collections.Counter(KINDS[type(sample)] for sample in samples)
        traced = sum(getattr(sample, "step_map", None) is not None for sample in samples)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"{name}: {len(samples)} SFT samples ({counts}), {traced} with a step map"
    tasks = load_tasks(name, "file")
    kinds = collections.Counter(task.record.get("test_method") or "answer" for task in tasks)
    repeated = len(tasks) - len({task.question for task in tasks})
    note = f"; {repeated} questions stand there more than once" if repeated else ""
    return f"{name}: {len(tasks)} tasks ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}){note}"


if __name__ == "__main__":
    main()
