"""An autoregressive checkpoint made a diffusion model of a family: the same weights, and a mask token.

python -m models.adapt model=Qwen/Qwen3-0.6B family=sdar out=runs/qwen3-0.6b-sdar

model=PATH      Qwen3 (becomes sdar), Qwen2.5 (dream), Llama or SmolLM2 (llada), Qwen3-MoE (sdar_moe)
family=NAME     the family whose form it is written in
out=PATH        a new folder
block_size=4    tokens denoised together, of families with block attention

What is written is loaded again and must give the causal logits that the checkpoint gave. It is not a good diffusion
model yet: finetuning makes it one (docs/adapt.md).
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from common.config import parse_or_help
from common.errors import UserError, one_line_errors
from common.jobs import AdaptConfig
from common.runtime import console
from models.family import (
    FAMILIES,
    Family,
    find_family,
    find_stop_ids,
    load_model,
    local_folder,
    longest_sequence,
    read_network,
)
from models.files import KEY, TOKENIZER_FILES, read_config, told_as
from models.llada import LLaDAConfig
from models.original import DiffusionNetwork
from models.sdar_moe import SDARMoeForCausalLM
from models.tokenizer import load_tokenizer

BLOCK_SIZE = 4
ROWS = 128  # published vocabularies of every family are multiples of it
WORDS_COMPARED = 48
TOLERANCE = 1e-4  # of the largest logit, in float32; a wrong rotary base or norm moves them by 0.01 and more


class Llama(DiffusionNetwork, LlamaForCausalLM):
    """A Llama, SmolLM2 among them, as it is published."""


class Qwen2(DiffusionNetwork, Qwen2ForCausalLM):
    """A Qwen2 or Qwen2.5 as it is published."""


class Qwen3(DiffusionNetwork, Qwen3ForCausalLM):
    """A Qwen3 as it is published."""

    config_class = Qwen3Config


class Qwen3Moe(SDARMoeForCausalLM):
    """A Qwen3-MoE as it is published."""

    config_class = Qwen3MoeConfig


# by model_type of config.json: the class that reads it, and that of transformers which a family must be over
PARENTS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": (Llama, LlamaForCausalLM),
    "qwen2": (Qwen2, Qwen2ForCausalLM),
    "qwen3": (Qwen3, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3Moe, Qwen3MoeForCausalLM),
}


@one_line_errors
def main() -> None:
    config = parse_or_help("adapt", sys.argv[1:] or ["--help"], __doc__)
    with told_as("model", "family"):
        adapt(config)


def adapt(config: AdaptConfig) -> None:
    """Write the checkpoint `config.model` as one of `config.family` at `config.out`, beside it first.

    UserError where it cannot be one, or where what was written does not answer as its parent does.
    """
    family, out = find_family(config.family), Path(config.out)
    if config.block_size is not None and family.attention != "block":
        raise UserError(f"block_size={config.block_size}: {family.name} has full attention, no blocks; leave it out")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"out={out}: there is something already; name a new folder")
    folder = local_folder(config.model)
    model_class = parent_class(folder, family)
    tokenizer = load_tokenizer(folder)
    words = tokenizer.get_vocab()
    mask_id = add_mask(tokenizer, family, folder)
    parent = read_network(folder, model_class.__name__, model_class, "auto")
    if max(words.values()) >= parent.config.vocab_size:
        token = max(words, key=words.get)
        raise UserError(
            f"{KEY}: {folder}: the tokenizer's token {token!r} has id {words[token]}, the network only "
            f"{parent.config.vocab_size} ids: a mask token has no room; take another tokenizer or network"
        )
    check_mask_id(folder, mask_id, words, family)
    keys = config_of(folder, parent, family, mask_id, config.block_size)
    ids = compared_ids(parent, sorted(set(words.values()) - {mask_id}))
    dtype, stops = parent.dtype, find_stop_ids(parent, tokenizer)
    before = causal_logits(parent.float(), ids)
    adapted = with_mask(parent.to(dtype), family.model_class, keys, mask_id, new=family.mask_token not in words)
    del parent
    beside = out.with_name(f"{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        adapted.save_pretrained(beside)
        del adapted
        write_tokenizer(tokenizer, folder, beside)
        check_written(beside, family, mask_id, stops, ids, before)
        if out.is_dir():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    console.print(
        f"{out}: {folder} as {family.name}, mask token {family.mask_token} {mask_id}; causal logits are the parent's"
    )


def parent_class(folder: Path, family: Family) -> type[PreTrainedModel]:
    """The class that reads a checkpoint which the family can be made of; UserError where there is none."""
    model_type = read_config(folder).get("model_type")
    if model_type not in PARENTS:
        known = ", ".join(f"{name} ({', '.join(children(name))})" for name in PARENTS)
        raise UserError(f"{KEY}: {folder} has model_type {model_type!r}; what can be adapted is {known}")
    model_class, base = PARENTS[model_type]
    if not issubclass(family.model_class, base):
        others = " or ".join(children(model_type))
        raise UserError(f"family={family.name}: {folder} has model_type {model_type!r}, which becomes {others}")
    return model_class


def children(model_type: str) -> list[str]:
    """The families that a checkpoint of that type can be made."""
    return [family.name for family in FAMILIES.values() if issubclass(family.model_class, PARENTS[model_type][1])]


# --- the tokenizer


def add_mask(tokenizer: PreTrainedTokenizerBase, family: Family, folder: Path) -> int:
    """Give the tokenizer the family's mask token and return its id; UserError where it has another one already."""
    if tokenizer.mask_token not in (None, family.mask_token):
        raise UserError(
            f"{KEY}: the mask token of {folder} is {tokenizer.mask_token!r} already, {family.name}'s is "
            f"{family.mask_token}; take mask_token out of tokenizer_config.json"
        )
    tokenizer.add_special_tokens({"mask_token": AddedToken(family.mask_token, special=True, normalized=False)})
    return tokenizer.mask_token_id


def check_mask_id(folder: Path, mask_id: int, words: dict[str, int], family: Family) -> None:
    """UserError where the id is another token's, by the tokenizer as it was or by config.json."""
    named = read_config(folder).get("mask_token_id")
    for id in (mask_id, *([named] if isinstance(named, int) else [])):
        token = next((token for token, other in words.items() if other == id), family.mask_token)
        if token != family.mask_token:
            whose = "mask_token_id of config.json" if id == named else "the id that the mask token would get"
            raise UserError(f"{KEY}: {folder}: {whose}, {id}, is the tokenizer's {token!r}; correct one of them")


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """The tokenizer's files as they were at `source`, and the mask token in those that list such tokens."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    token, id = tokenizer.mask_token, tokenizer.mask_token_id
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("auto_map", None)  # of files that are not copied
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        listed[str(id)] = {"content": token} | flags | {"special": True}
    write_json(folder / "tokenizer_config.json", settings | {"mask_token": token})
    for name, entry in (("special_tokens_map.json", {"mask_token": token}), ("added_tokens.json", {token: id})):
        if (folder / name).is_file():
            write_json(folder / name, read_json(folder / name) | entry)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file that was checked before; empty where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- the network


def config_of(folder: Path, parent: PreTrainedModel, family: Family, mask_id: int, block_size: int | None) -> Any:
    """The parent's config as one of the family; UserError where the family has no words for it."""
    keys = parent.config.to_dict()
    for theirs, ours in parent.config.attribute_map.items():  # Qwen3-MoE's number of experts
        if ours in keys:
            keys[theirs] = keys.pop(ours)
    told = {} if not issubclass(family.config_class, LLaDAConfig) else unsaid_by_llada(keys)
    told |= {"layer_types": {"full_attention"}}
    for key, allowed in told.items():
        for value in keys[key] if isinstance(keys.get(key), list) else [keys.get(key)]:
            if value not in (None, *allowed):
                raise UserError(
                    f"{KEY}: {folder}/config.json: {key}: {value!r} is not possible in {family.name}; "
                    f"it must be {next(iter(allowed))!r}"
                )
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "layer_types"):
        keys.pop(key, None)
    keys |= {"dtype": parent.dtype, "mask_token_id": mask_id, "vocab_size": rows_for(mask_id, parent.config.vocab_size)}
    if family.attention == "block":
        keys["block_size"] = block_size or family.block_size or BLOCK_SIZE
    published = family.config_class(**keys).to_diff_dict() | {"architectures": [family.model_class.__name__]}
    return family.config_class.from_dict(published)


def unsaid_by_llada(keys: dict[str, Any]) -> dict[str, set[Any]]:
    """What LLaDA's config has no key for, or one with a single value here."""
    width = keys["hidden_size"] // keys["num_attention_heads"]
    return {"attention_bias": {False}, "mlp_bias": {False}, "hidden_act": {"silu"}, "head_dim": {width}}


def rows_for(mask_id: int, vocabulary: int) -> int:
    """Rows of embedding and head that hold the mask token: as many as there are, or the next multiple of ROWS."""
    return vocabulary if mask_id < vocabulary else -(-(mask_id + 1) // ROWS) * ROWS


def with_mask(
    parent: PreTrainedModel, model_class: type[PreTrainedModel], config: Any, mask_id: int, new: bool
) -> PreTrainedModel:
    """The parent's weights in the family's class, in their dtype; it takes them over, none is copied.

    A `new` mask token's rows of embedding and head, and those behind the parent's last, are the mean of those of the
    words before the mask token. As a head's row the mean gives a word no more than 1 / words of the probability,
    whatever the context: its logit is the mean of theirs, and the exponential is convex.
    """
    state = parent.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = state[name]  # (vocabulary, hidden)
        mean = rows[:mask_id].float().mean(0).to(rows.dtype)
        state[name] = torch.cat([rows, mean.expand(config.vocab_size - len(rows), -1)])
        if new:
            state[name][mask_id] = mean
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.generation_config = parent.generation_config
    return model


# --- the check


def compared_ids(parent: PreTrainedModel, words: list[int]) -> Tensor:
    """Ids spread over the vocabulary, (length,)."""
    count = min(WORDS_COMPARED, len(words), longest_sequence(parent.config))
    return torch.tensor(words)[torch.linspace(0, len(words) - 1, count).long()]


@torch.no_grad()
def causal_logits(network: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (length, vocabulary) where each token of ids (length,) sees itself and those before it."""
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    return network(input_ids=ids[None], attention_mask=seen[None, None], use_cache=False).logits[0]


def check_written(
    folder: Path, family: Family, mask_id: int, stops: tuple[int, ...], ids: Tensor, before: Tensor
) -> None:
    """UserError unless what was written loads as the family's, ends and masks as meant, and has the parent's logits.

    before: those of ids, (length, the parent's vocabulary); the mask token's are left out.
    """
    loaded = load_model(folder, family.name)
    after = causal_logits(loaded.model, ids)[:, : before.shape[1]]
    compared = torch.arange(before.shape[1]) != mask_id
    moved = float((after - before)[:, compared].abs().max() / before[:, compared].abs().max())
    if not moved <= TOLERANCE:
        raise UserError(
            f"{KEY}: as {family.name} it gives other causal logits, by {moved:.1e} of the largest; config.json must "
            f"say what {family.name} has no key for, so nothing was written"
        )
    if (loaded.mask_id, loaded.stop_ids) != (mask_id, stops):
        raise UserError(
            f"{KEY}: as {family.name} its mask token is {loaded.mask_id} and its stop tokens are {loaded.stop_ids}, "
            f"not {mask_id} and {stops}; nothing was written"
        )


if __name__ == "__main__":
    main()
