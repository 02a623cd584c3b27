"""The table of model families, and how a checkpoint becomes a network and a tokenizer, and a checkpoint again.

A family is a row: its classes are small subclasses of transformers', its manner is data. docs/families.md adds one
from outside.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.initialization import no_init_weights

from common.errors import UserError, load_object
from common.runtime import keep_freed_memory, settle_threads
from models.files import FAMILY_KEY, KEY, MALFORMED, TOKENIZER_FILES, check_files, read_config
from models.mixture import MixtureNetwork, check_split_tensors
from models.norms import fuse_norms
from models.tokenizer import check_ids_readable, has_tokenizer, load_tokenizer, no_code_for, save_tokenizer

# Instructions around a task; `{question}` is replaced by it.
MATH_STEPS = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
MATH_FINAL = "You need to put your final answer in \\boxed{}. This is the problem:\n{question}"
SHARED = {
    "code_function": "{question}\nPlace your code within a single Python code block ```python ```. "
    "Do not include more than one code block. ",
    "code_stdio": "This is the problem:\n{question}\nYou should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script. ",
    "option": "This is the problem:\n{question}\nYou need to think step by step and put the final option "
    "(A, B, C, or D only—no other character) in \\boxed{}. ",
}
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|role_end|>")


@dataclass(frozen=True)
class Family:
    """What sampling and training must know about a kind of model."""

    name: str
    model_type: str  # in config.json
    attention: Literal["block", "full"]
    logit_offset: Literal[0, -1]  # the prediction for position i is at logits[i + logit_offset]
    mask_token: str
    config_class: type
    model_class: type
    instructions: dict[str, str]  # kind: text around {question}; kind_think: where the answer begins with a thought
    published_turn: str = ""  # the whole prompt around the user's {turn} in its published evaluation; empty: none
    sampling: dict[str, Any] = field(default_factory=dict)  # keys of `Sampling` where a config says nothing
    block_size: int | None = None  # of checkpoints whose config.json names none


@dataclass(frozen=True)
class LoadedModel:
    """A network with what its checkpoint says about ids and blocks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    mask_id: int
    stop_ids: tuple[int, ...]  # ascending
    block_size: int | None = None  # None: neither config.json nor the family names one


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family to the table; transformers' Auto classes know it then, and its tensors by the publisher's names."""
    FAMILIES[family.name] = family
    AutoConfig.register(family.model_type, family.config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(family.config_class, family.model_class, exist_ok=True)
    renamings = [WeightRenaming(re.escape(theirs), re.escape(ours)) for theirs, ours in family.model_class.tensor_names]
    conversions = [*family.model_class.tensor_joins, *renamings]
    register_checkpoint_conversion_mapping(family.model_type, conversions, overwrite=True)
    no_code_for(family.model_type)


def find_family(name: str) -> Family:
    """Return the family of that name, or register the one that `my_module:MY_FAMILY` names; UserError for neither."""
    if ":" in name:
        family = load_object(FAMILY_KEY, name, "family", lambda found: isinstance(found, Family))
        register(family)
        return family
    if name not in FAMILIES:
        raise UserError(
            f"{FAMILY_KEY}: {name!r} is no model family; choose one of {', '.join(FAMILIES)}, "
            "or name one of your own as my_module:MY_FAMILY"
        )
    return FAMILIES[name]


def load_model(
    path: str | Path, family_name: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load network and tokenizer from a checkpoint's folder or hub name; UserError where they are unfit."""
    folder, family = local_folder(path), find_family(family_name)
    model = load_network(folder, family_name, dtype, device)
    if torch.device(device).type == "cpu":
        settle_threads(model.num_parameters())
        keep_freed_memory()
    tokenizer = load_tokenizer(folder)
    mask_id = find_mask_id(model, tokenizer, family)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if largest >= model.config.vocab_size:
        raise UserError(
            f"{KEY}: {folder}: the tokenizer's token {token!r} has id {largest}, the network only "
            f"{model.config.vocab_size} ids; enlarge it (resize_token_embeddings), or take the token out"
        )
    return LoadedModel(
        model, tokenizer, family, mask_id, find_stop_ids(model, tokenizer), own_block_size(folder, family)
    )


def load_network(
    path: str | Path, family_name: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Load the network alone, in eval mode; UserError if folder, family or a tensor is not what it should be."""
    family, folder = find_family(family_name), local_folder(path)
    check_model_type(folder, family)
    model = read_network(folder, family.name, family.model_class, dtype, device)
    if torch.device(device).type == "cuda":
        fuse_norms(model)
    return model


def read_network(
    folder: Path,
    name: str,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype | str,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The network of a checkpoint's folder in a class of `DiffusionNetwork`, in eval mode.

    UserError if a file or a tensor is not what it should be; `name` is what the network is called there.
    """
    check_files(folder)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its report on loading is a table of what is told below in one line
    try:
        if issubclass(model_class, MixtureNetwork):
            check_split_tensors(folder, name, model_class)
        model, report = model_class.from_pretrained(
            str(folder),
            dtype=dtype,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # they are reported below, by the name they have in the file
            output_loading_info=True,
        )
    except (UserError, torch.OutOfMemoryError):
        raise
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{KEY}: {folder}/config.json does not fit {name} ({reason})") from error
    except (OSError, SafetensorError, UnpicklingError, EOFError) as error:
        # torch's own words on pickles advise to run them
        reason = "no file of plain tensors" if isinstance(error, UnpicklingError) else one_line(error)
        raise UserError(f"{KEY}: {folder} holds no weights that can be read ({reason})") from error
    except (RuntimeError, *MALFORMED) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{KEY}: {folder}/config.json or its weights do not fit {name} ({reason})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    check_tensors(folder, name, model_class, report)
    model = model.to(device)
    check_finite(folder, model)
    return model


def empty_network(like: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A network as `like`, in eval mode and without memory for its weights: they are on torch's device meta."""
    with torch.device("meta"), no_init_weights():
        network = type(like)(copy.deepcopy(like.config))
    network.tie_weights()
    return network.to(dtype).eval()


@torch.no_grad()
def give_memory(network: PreTrainedModel, like: PreTrainedModel) -> None:
    """Put an empty network where `like` is, in place; its weights hold nothing yet, its tables are those of `like`.

    Where its weights are divided over processes, so is the memory.
    """
    tied = network.lm_head.weight is network.model.embed_tokens.weight
    network.to_empty(device=like.device)
    if tied:
        network.lm_head.weight = network.model.embed_tokens.weight
    tables = dict(like.named_buffers())
    for name, buffer in network.named_buffers():
        buffer.copy_(tables[name])
    if like.device.type == "cuda":
        fuse_norms(network)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint folder with the publisher's keys, tensor names, tokenizer files and Python files.

    state_dict: the tensors under transformers' names, where the model itself is sharded.
    """
    folder = Path(path)
    model.save_pretrained(folder, state_dict=state_dict)
    save_tokenizer(tokenizer, folder)
    source = Path(model.config.name_or_path or "")
    if model.config.name_or_path and source.is_dir() and source.resolve() != folder.resolve():
        # a tool that runs the publisher's own code looks for it beside the weights: copied here, never run
        for file in (*source.glob("*.py"), *source.glob("generation_config.json")):
            (folder / file.name).write_bytes(file.read_bytes())


def local_folder(path: str | Path, weights: bool = True) -> Path:
    """Return the folder that `path` names, downloaded first if it is a hub name; UserError if there is neither.

    Without `weights` only config and tokenizer are downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    way_out = "give a folder with config.json, or a hub name such as JetLM/SDAR-1.7B-Chat"
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)):
        raise UserError(f"{KEY}: no folder {str(path)!r}; {way_out}")
    try:
        if not weights:
            return Path(snapshot_download(str(path), allow_patterns=["config.json", *TOKENIZER_FILES]))
        folder = Path(snapshot_download(str(path), ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf"]))
        if not any(folder.glob("*.safetensors")):  # an older repository: torch's own format, read without its pickles
            folder = Path(snapshot_download(str(path), allow_patterns=["pytorch_model*.bin"]))
        return folder
    except (OSError, ValueError) as error:
        raise UserError(
            f"{KEY}: {str(path)!r} is no folder and could not be downloaded ({type(error).__name__}); {way_out}"
        ) from error


def family_of_network(model: PreTrainedModel) -> Family:
    """The first family of the network's model type; rows that share a type differ in nothing that a network has."""
    for family in FAMILIES.values():
        if family.model_type == model.config.model_type:
            return family
    raise UserError(f"model_type {model.config.model_type!r}: no family of {', '.join(FAMILIES)} is of that type")


def family_of(path: str | Path) -> str:
    """The first family that reads the checkpoint's model type; UserError where none does."""
    model_type = read_config(local_folder(path)).get("model_type")
    for family in FAMILIES.values():
        if family.model_type == model_type:
            return family.name
    raise UserError(f"model: {path} has model_type {model_type!r}; no family of {', '.join(FAMILIES)} reads that type")


def own_block_size(folder: Path, family: Family) -> int | None:
    """The block size that a checkpoint's config.json names, else the family's; UserError if unfit.

    None where there is none, or the family does not attend by blocks.
    """
    size = read_config(folder).get("block_size", family.block_size) if family.attention == "block" else None
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UserError(f"{KEY}: {folder}/config.json: block_size: {size!r} is no whole number above 0; correct it")
    return size


def longest_sequence(config: Any) -> int:
    """Positions that a network knows, prompt and response together; a scaled rotary table (YaRN) knows more of them."""
    rope = getattr(config, "rope_parameters", None) or {}
    length = config.max_position_embeddings
    if rope.get("rope_type", "default") in ("default", "llama3", "longrope"):
        return length
    original = rope.get("original_max_position_embeddings") or length
    return max(length, int(original * (rope.get("factor") or 1.0)))


def check_model_type(folder: Path, family: Family) -> None:
    """Raise UserError unless config.json names the family's model type."""
    model_type = read_config(folder).get("model_type")
    if model_type == family.model_type:
        return
    fits = [row.name for row in FAMILIES.values() if row.model_type == model_type]
    way_out = f"set it to {' or '.join(fits)}" if fits else f"no family of {', '.join(FAMILIES)} reads that type"
    raise UserError(f"{FAMILY_KEY}: {family.name!r}, but {folder} has model_type {model_type!r}; {way_out}")


def check_tensors(folder: Path, name: str, model_class: type[PreTrainedModel], report: dict[str, Any]) -> None:
    """Raise UserError naming the first tensor that is missing, misshapen or unknown; report: from_pretrained's."""
    if missing := report["missing_keys"]:
        raise UserError(f"{KEY}: {folder} lacks {_counted(model_class, missing)}; is the checkpoint whole?")
    if report["mismatched_keys"]:
        tensor, found, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{KEY}: {folder}: tensor {model_class.original_name(tensor)} has shape "
            f"{tuple(found)}, config.json asks for {tuple(wanted)}"
        )
    unknown = [tensor for tensor in report["unexpected_keys"] if not tensor.endswith("rotary_emb.inv_freq")]
    if unknown:
        tensors = _counted(model_class, unknown)
        raise UserError(f"{KEY}: {folder} has {tensors}, which {name} has no parameter for")


@torch.no_grad()
def check_finite(folder: Path, model: PreTrainedModel) -> None:
    """Raise UserError naming the first tensor with a value that is no number; a shard is looked at where it lies."""
    for name, parameter in model.named_parameters():
        tensor = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's ZeRO-3 keeps a rank's part there
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
            raise UserError(
                f"{KEY}: {folder}: tensor {model.original_name(name)} holds NaN or infinite values; "
                "the training that wrote it failed, or the file is damaged"
            )


def find_mask_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: Family) -> int:
    """Return the id of the mask token by tokenizer, then config.

    UserError if neither has one that the network has, or if it is that of another token.
    """
    where = f"{KEY}: {model.config.name_or_path}"
    mask_id = tokenizer.mask_token_id
    if mask_id is None:
        mask_id = tokenizer.get_vocab().get(family.mask_token)
    if mask_id is None:
        mask_id = getattr(model.config, "mask_token_id", None)
        named = None if mask_id is None else tokenizer.convert_ids_to_tokens(mask_id)
        if named is not None:
            raise UserError(
                f"{where}: mask_token_id {mask_id} of config.json is the tokenizer's {named!r}; set mask_token in "
                f"tokenizer_config.json ({family.name}'s is {family.mask_token}; {named!r} if it is that one)"
            )
    elif mask_id in find_stop_ids(model, tokenizer):
        raise UserError(
            f"{where}: the tokenizer's mask token {tokenizer.convert_ids_to_tokens(mask_id)!r} is also one that ends a "
            f"response; set mask_token in tokenizer_config.json ({family.name}'s is {family.mask_token})"
        )
    if mask_id is None:
        raise UserError(
            f"{where}: the tokenizer has no mask token; set mask_token in tokenizer_config.json "
            f"({family.name}'s is {family.mask_token}) or mask_token_id in config.json"
        )
    if not 0 <= mask_id < model.config.vocab_size:
        raise UserError(f"{where}: mask token id {mask_id} is outside the {model.config.vocab_size} ids of the network")
    return mask_id


def end_of_sequence_ids(named: Any) -> tuple[int, ...]:
    """The ids that a config or a tokenizer names as the end of sequence; none where it names none."""
    value = getattr(named, "eos_token_id", None)
    ids = value if isinstance(value, (list, tuple)) else [value]
    return tuple(id for id in ids if id is not None)


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the ids that end a response, ascending: every end of sequence named, and the chat turn's end."""
    added = tokenizer.added_tokens_decoder if tokenizer else {}
    ids = {id for id, token in added.items() if token.special and str(token) in END_OF_TURN}
    for holder in (model.generation_config, model.config, tokenizer):
        ids.update(end_of_sequence_ids(holder))
    return tuple(sorted(i for i in ids if 0 <= i < model.config.vocab_size))


def stop_ids_of_network(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that end a response, for a network alone: those of `find_stop_ids`, by the tokenizer beside its weights.

    A network that was not read from a checkpoint has those of its configs.
    """
    return find_stop_ids(model, _tokenizer_beside(model.config.name_or_path or ""))


def check_prompt_of_network(model: PreTrainedModel, ids: Iterable[int]) -> None:
    """UserError where a prompt's ids have the unknown token of the tokenizer beside the network's weights."""
    if tokenizer := _tokenizer_beside(model.config.name_or_path or ""):
        check_ids_readable(tokenizer, ids, "prompt")


@cache
def _tokenizer_beside(name_or_path: str) -> PreTrainedTokenizerBase | None:
    folder = Path(name_or_path)
    if name_or_path and not folder.is_dir():
        try:
            folder = Path(snapshot_download(name_or_path, allow_patterns=TOKENIZER_FILES, local_files_only=True))
        except (OSError, ValueError):  # it is no hub name, or its tokenizer was never fetched
            return None
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def one_line(error: BaseException) -> str:
    """The first sentence of what an error says."""
    return (str(error).strip().splitlines() or [""])[0].split(". ")[0]


def _counted(model_class: type[PreTrainedModel], names: Iterable[str]) -> str:
    """The first of some tensors by the publisher's name, and how many more there are."""
    names = sorted(map(model_class.original_name, names))
    return f"tensor {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
