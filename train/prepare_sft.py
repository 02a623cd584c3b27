"""Turn a data set into prompts in the family's chat template, as ids, and say how long its samples are.

python -m train.prepare_sft config=configs/sft_trado.yaml dataset.optimization_data=org/name out=data/mine.jsonl

Reads what finetuning reads (records, chats, columns) by the same keys and writes one line for each turn of the
assistant: prompt_ids and response_ids to learn from, prompt and response to look at, step_map where there is one.
Nothing is dropped for its length. Of the model only the tokenizer is loaded.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from common.config import load_config
from common.errors import UserError, one_line_errors
from common.metrics import print_table
from common.runtime import console
from common.schema import SFTConfig
from data.sft_records import Rejected, Sample
from models.family import find_family, local_folder
from models.prompts import end_of_turn
from models.tokenizer import load_tokenizer
from train.sft_data import Samples, encode_or_reject, encode_sample, instruction_of, read_samples
from train.views import Example


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
    prepare(config, Path(out[0]))


def prepare(config: SFTConfig, out: Path) -> Samples:
    """Write the prepared samples to `out`; returns what was left out and why."""
    dataset = config.dataset
    tokenizer = load_tokenizer(local_folder(config.model.pretrained_model))
    around, stop = instruction_of(config, find_family(config.model.model_base)), end_of_turn(tokenizer)
    samples, examples = Samples(), []

    def encode(sample: Sample) -> list[Example]:
        return encode_sample(sample, tokenizer, dataset, around, stop)

    for place, sample in read_samples(dataset):
        turns = encode_or_reject(encode, sample, place)
        if isinstance(turns, Rejected):
            samples.leave_out(turns, dataset)
        else:
            examples += turns
    if not examples:
        raise UserError(f"dataset.optimization_data: {dataset.optimization_data} has no sample that can be learned")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for example in examples:
            line = {key: value for key, value in dataclasses.asdict(example).items() if value is not None}
            line["prompt"] = tokenizer.decode(example.prompt_ids)
            line["response"] = tokenizer.decode(example.response_ids[: example.length])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    report(config, examples, samples, out)
    return samples


def report(config: SFTConfig, examples: list[Example], samples: Samples, out: Path) -> None:
    """Lengths in tokens, how many are over the config's limits, and what was skipped."""
    rows = []
    limits = {"prompt": config.training.max_prompt_len, "response": config.training.max_gen_length}
    lengths = {
        "prompt": [len(example.prompt_ids) for example in examples],
        "response": [example.length for example in examples],
    }
    for name, values in lengths.items():
        row = {"tokens of": name, "mean": float(np.mean(values))}
        row |= {label: int(np.percentile(values, share)) for label, share in (("half", 50), ("90 %", 90), ("99 %", 99))}
        rows.append(row | {"longest": max(values), "over the limit": sum(value > limits[name] for value in values)})
    print_table(rows, title=f"{out}: {len(examples)} samples")
    console.print(
        "limits: training.max_prompt_len "
        f"{limits['prompt']}, training.max_gen_length {limits['response']}; longer samples are left out of finetuning"
    )
    if samples.left_out:
        console.print(f"left out: {samples.reasons(config.training)}")


if __name__ == "__main__":
    main()
