"""Turn a data set into prompts in the family's chat template, as ids, and say how long its samples are.

python -m train.prepare_sft config=configs/sft_trado.yaml dataset.optimization_data=org/name out=data/mine.jsonl

Reads what finetuning reads (records, chats, columns) by the same keys and writes one line for each turn of the
assistant: prompt_ids and response_ids to learn from, prompt and response to look at, step_map and overwritten
where there are such. Nothing is dropped for its length. Of the model only the tokenizer is loaded.
"""

import sys
from pathlib import Path

from common.config import load_config
from common.errors import UserError, one_line_errors


@one_line_errors
def main() -> None:
    argv = sys.argv[1:]
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        sys.exit(0 if argv else 2)
    out = [argument.removeprefix("out=") for argument in argv if argument.startswith("out=")]
    if len(out) != 1 or not out[0].endswith(".jsonl"):
        raise UserError("out= is missing: name the file to write, as out=data/mine.jsonl")
    config = load_config("sft", [argument for argument in argv if not argument.startswith("out=")])
    from train.sft_data import write_prepared  # torch and transformers, which --help does without

    write_prepared(config, Path(out[0]))


if __name__ == "__main__":
    main()
