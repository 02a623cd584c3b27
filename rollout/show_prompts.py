"""What the model is given: the prompts of a config's first tasks, as JSON lines.

python -m rollout.show_prompts config=X.yaml [key=value …] [n=2]

Takes a config of eval.py or rl.py, or of finetuning where it names dataset.eval_dataset. A line has `task_id`, `prompt`
(the whole text with its special tokens) and `tokens` (how many it is). Of the model only tokenizer and config are
loaded.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from common.config import load_any
from common.config_files import find_config
from common.errors import UserError, one_line_errors
from common.jobs import EvalConfig, RLConfig, SFTConfig

SHOWN = 2


@one_line_errors
def main(argv: list[str]) -> None:
    """Print the prompts that the arguments ask for."""
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        sys.exit(0 if argv else 2)
    for name in ("config", "n"):
        if len(given := [text for text in argv if text.startswith(f"{name}=")]) > 1:
            raise UserError(f"{' '.join(given)}: {name} is given {len(given)} times; give it once")
    config = next((text.removeprefix("config=") for text in argv if text.startswith("config=")), None)
    if config is None:
        raise UserError("config= is missing: name a config of eval.py, rl.py or finetuning, as config=X.yaml")
    count = next((text.removeprefix("n=") for text in argv if text.startswith("n=")), str(SHOWN))
    if not count.isdecimal() or count == "0":
        raise UserError(f"n={count}: expected how many tasks to show, at least 1")
    keys = [text for text in argv if not text.startswith(("config=", "n="))]
    job, loaded = load_any(find_config(config), keys)
    if not isinstance(loaded, (EvalConfig, RLConfig, SFTConfig)):
        raise UserError(f"config={config} is a config for {job}, which has no tasks; give one of eval.py or rl.py")
    from models.files import FAMILY_KEY, KEY, told_as

    with told_as(*(("model", "model_base") if isinstance(loaded, EvalConfig) else (KEY, FAMILY_KEY))):
        for line in prompt_lines(loaded, int(count)):
            print(json.dumps(line, ensure_ascii=False))


def prompt_lines(config: EvalConfig | RLConfig | SFTConfig, count: int) -> Iterator[dict[str, Any]]:
    """The first tasks' prompts, as the job would encode them: an RL config's training tasks, others' evaluation tasks.

    UserError where the config, its tasks or its tokenizer are unfit.
    """
    from data.tasks import load_tasks
    from models import find_family, load_tokenizer
    from models.family import local_folder
    from reward.score import check_tasks, evaluation_scorer, make_scorer
    from rollout.collect import prompt_texts

    if isinstance(config, EvalConfig):
        path, family, sampling = config.model, config.model_base, config.rollout
    else:
        path, family = config.model.pretrained_model, config.model.model_base
        sampling = config.rollout if isinstance(config, RLConfig) else config.evaluation
    field = "train_dataset" if isinstance(config, RLConfig) else "eval_dataset"
    tasks = load_tasks(getattr(config.dataset, field), f"dataset.{field}")[:count]
    scorer = evaluation_scorer if isinstance(config, SFTConfig) else make_scorer
    check_tasks(scorer(config.reward, config.dataset.data_type), tasks, f"dataset.{field}")
    tokenizer = load_tokenizer(local_folder(path, weights=False))
    texts = prompt_texts(tokenizer, find_family(family), tasks, config.dataset, sampling.start_with_think)
    for task, text in zip(tasks, texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        yield {"task_id": task.id, "prompt": text, "tokens": len(ids)}


if __name__ == "__main__":
    main(sys.argv[1:])
