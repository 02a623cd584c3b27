"""lm-evaluation-harness with the models of this project:

    python -m rollout.lm_harness --model dllm_rl --model_args pretrained=PATH,max_token=512 --tasks gsm8k

Arguments are lm_eval's own (`pip install lm_eval`, 0.4). `model_args` takes `pretrained`, `model_base`, `dtype`,
`seed`, `masks` (patterns for a log-likelihood) and every sampling key, as `remasking_strategy` or `block_size`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from common.config import load_config
from common.errors import UserError, one_line, one_line_errors
from common.schema import Sampling
from common.trajectory import Request
from models import LoadedModel
from models.defaults import load_one
from models.files import told_as
from models.prompts import stop_ids_of, turns_text
from rollout.likelihood import response_elbo
from sample.engine import Engine

HARNESS_WRITES = ("prompt", "prompt_template", "start_with_think")  # keys of generate.py that say what a prompt is
DEFAULT_MASKS = 128  # LLaDA's choice for most tasks
# The harness's names of generation settings → ours.
GENERATION = {"max_gen_toks": "max_token", "max_new_tokens": "max_token"}
GENERATION |= {name: name for name in ("temperature", "top_p", "top_k")}


@dataclasses.dataclass
class HarnessModel:
    """What the harness asks of a model, without the harness: lists of (context, …) in, lists of answers out."""

    loaded: LoadedModel
    settings: Sampling
    seed: int
    masks: int
    engine: Engine = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.engine = Engine(self.loaded.model, self.loaded.mask_id, self.loaded.stop_ids)

    def generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """A text for each (context, generation settings), cut at the first of its `until`; drawn side by side."""
        texts = [""] * len(asked)
        alike: dict[str, tuple[Sampling, list[Request]]] = {}  # requests of the same settings share forwards
        for number, (context, wanted) in enumerate(asked):
            settings = generation_settings(self.settings, wanted)
            _, requests = alike.setdefault(repr(settings), (settings, []))
            requests.append(Request(str(number), self.encode(context), seed=self.seed))
        stops = stop_ids_of(self.loaded, self.settings.stop_token_list)
        for settings, requests in alike.values():
            for trajectory in self.engine.generate(requests, settings, stop_ids=stops):
                number, ids = int(trajectory.task_id), trajectory.response_ids[: trajectory.length]
                text = self.loaded.tokenizer.decode(ids, skip_special_tokens=True)
                texts[number] = cut(text, asked[number][1].get("until") or [])
        return texts

    def loglikelihood(self, asked: Sequence[tuple[str, str]]) -> list[float]:
        """A Monte Carlo estimate of a lower bound on log p(continuation | context), nats."""
        block = self.settings.block_size if self.loaded.family.attention == "block" else None
        return [
            response_elbo(self.loaded, *self.encode_pair(context, continuation), block, self.masks, self.seed)
            for context, continuation in asked
        ]

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands: the harness applies the chat template itself (--apply_chat_template)."""
        return self.loaded.tokenizer.encode(text, add_special_tokens=False)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both parts, split where the whole text's ids are; spaces at the context's end go with what follows."""
        whole, prompt = self.encode(context + continuation), self.encode(context.rstrip(" "))
        if not prompt:  # full attention needs a token before the response
            return list(self.loaded.stop_ids[:1]), whole
        return whole[: len(prompt)], whole[len(prompt) :]


def generation_settings(settings: Sampling, wanted: dict[str, Any]) -> Sampling:
    """Our settings with what a harness task asks for; `do_sample: False` is temperature 0."""
    changes = {ours: wanted[theirs] for theirs, ours in GENERATION.items() if theirs in wanted}
    if wanted.get("do_sample") is False:
        changes["temperature"] = 0.0
    return dataclasses.replace(settings, **changes)


def cut(text: str, until: str | Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    stops = [until] if isinstance(until, str) else until
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def make_harness_model(pretrained: str, **given: Any) -> HarnessModel:
    """Load a model by the harness's `model_args`; UserError for an unknown or wrong key."""
    for key in HARNESS_WRITES:
        if key in given:
            raise UserError(f"{key}={given[key]}: the harness makes the prompts; leave it out")
    masks, seed = int(given.pop("masks", DEFAULT_MASKS)), int(given.pop("seed", 0))
    arguments = [f"model={pretrained}", "prompt=unused", *(f"{key}={value}" for key, value in given.items())]
    config = load_config("generate", arguments)
    with told_as("pretrained", "model_base"):
        loaded = load_one(config)
    settings = Sampling(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)})
    return HarnessModel(loaded, settings, seed, masks)


def register_with_harness() -> None:
    """Make `--model dllm_rl` known to lm_eval; UserError where it is not installed."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError:
        raise UserError("lm_eval is not installed: pip install lm_eval") from None

    @register_model("dllm_rl")
    class DiffusionLM(LM):  # the harness's interface asks for a subclass
        def __init__(self, pretrained: str, batch_size: Any = None, device: Any = None, **given: Any) -> None:
            super().__init__()
            if batch_size is not None and str(batch_size).isdigit():
                given.setdefault("max_active", int(batch_size))
            self.ours = make_harness_model(pretrained, **given)

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            return self.ours.generate([request.args for request in requests])

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            # whether the continuation is the greedy one is not known without drawing it: never claimed
            return [(value, False) for value in self.ours.loglikelihood([request.args for request in requests])]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            return self.ours.loglikelihood([("", request.args[0]) for request in requests])

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return turns_text(self.ours.loaded.tokenizer, chat_history, whole=not add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            return self.ours.loaded.tokenizer.name_or_path.replace("/", "__")


@one_line_errors
def main() -> None:
    """lm_eval's command line, with our models in its table. UserError where a task's data cannot be fetched."""
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    register_with_harness()
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except BrokenPipeError:  # a ConnectionError too
        raise
    except ConnectionError as error:
        raise UserError(
            f"--tasks: {one_line(error)}; without a network, run the tasks once where there is one, copy its "
            "~/.cache/huggingface (or what HF_HOME names) here and set HF_HUB_OFFLINE=1"
        ) from None


if __name__ == "__main__":
    main()
