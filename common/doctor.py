"""What this machine has, and what a config will need: python -m common.doctor [config=configs/X.yaml] [key=value …]

The memory is an estimate by the formulas in `needs`, for one device; nothing is loaded or run.
"""

import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from common.config import load_any
from common.config_files import accelerate_config, find_config
from common.errors import UserError, one_line_errors
from common.memory import (
    Arithmetic,
    Drawing,
    Size,
    activation_bytes,
    adapter_parameters,
    cache_bytes,
    head_bytes,
    kept_bytes,
    sampling_bytes,
    size_of,
    state_bytes,
)
from common.records import read_object
from common.runtime import project_version, version_of
from common.schema import CPU_TOKENS, CUDA_TOKENS

REQUIRED = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "omegaconf", "rich")
OPTIONAL = {
    "datasets": "data sets of the hub",
    "math-verify": "answers that are no numbers",
    "deepspeed": "training over several devices",
    "ray": "several nodes",
    "peft": "low-rank adapters",
    "flash-attn": "its attention on CUDA; torch's own is used without",
    "wandb": "curves at wandb",
    "trackio": "curves in trackio",
    "matplotlib": "curves.png",
    "fastapi": "serve.py",
    "uvicorn": "serve.py",
    "lm_eval": "lm-evaluation-harness",
    "playwright": "the tests of pages",
}
GIB = 2**30


def main_report() -> list[dict[str, str]]:
    """Versions, devices, memory, disk, and what is missing; one row each."""
    other = "" if (3, 11) <= sys.version_info < (3, 13) else "3.11 or 3.12 is needed"
    rows = [("project", project_version(), ""), ("python", platform.python_version(), other)]
    for package in REQUIRED:
        found = version_of(package)
        rows.append((package, found or "missing", "" if found else "make setup"))
    rows += devices()
    free = shutil.disk_usage(".").free / GIB
    rows.append(("disk", f"{free:.0f} GiB free here", "" if free > 20 else "little"))
    optional = {package: (version_of(package), use) for package, use in OPTIONAL.items()}
    optional["nvidia-smi"] = (shutil.which("nvidia-smi"), "NVIDIA's driver")
    rows += [(name, found or "–", "" if found else f"optional: {use}") for name, (found, use) in optional.items()]
    rows.append(("sandbox", *sandbox()))
    return [dict(zip(("what", "found", "note"), row)) for row in rows]


def sandbox() -> tuple[str, str]:
    """The kind of sandbox that code rewards get here, and what it holds; one is started and ended."""
    from reward.sandbox import SANDBOX

    try:
        return SANDBOX.report()
    except UserError as error:
        return "none", str(error)
    finally:
        SANDBOX.close()


def devices() -> list[tuple[str, str, str]]:
    """A row for each accelerator, one for the processor, and the kernel that denoises blocks on the first of them."""
    import torch

    from sample.attention_kernel import attention_kernel

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    rows = [("processor", f"{os.cpu_count()} cores, {memory:.0f} GiB", "")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        note = "" if torch.cuda.get_device_capability(index) >= (8, 0) else "no bfloat16: set dtype to float32"
        shown = f"{torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        rows.append((f"cuda:{index}", shown, note))
    if not torch.cuda.device_count():
        rows.append(("cuda", "none", "everything runs on the processor, in float32"))
    accelerated = torch.cuda.is_available()
    dtype = torch.bfloat16 if accelerated else torch.float32
    kernel = attention_kernel(torch.device("cuda" if accelerated else "cpu"), dtype, head_width=128)
    return [*rows, ("attention, sampling", *kernel)]


def read_size(model: str) -> Size:
    """A network's size from its folder, or the hub's cache; UserError where neither has it."""
    folder = _local(model)
    return size_of(read_object(folder / "config.json", "model"), _parameters(folder))


def _local(model: str) -> Path:
    if (Path(model) / "config.json").is_file():
        return Path(model)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(model, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
    raise UserError(f"model: {model} is neither a checkpoint's folder nor in the hub's cache; download it first")


def _parameters(folder: Path) -> int:
    """How many numbers the checkpoint's tensors hold, from the headers of its files."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    if not count:
        raise UserError(f"model: {folder} holds no .safetensors files")
    return count


def needs(
    job: str, config: Any, size: Size, low_precision: bool, zero: int = 0, devices: int = 1, value: Size | None = None
) -> dict[str, float]:
    """Bytes on one device by part, an estimate; `value` is the value model's size, where there is one.

    Sampling: weights (2 bytes a parameter in bfloat16, else 4), keys and values of every position of every slot where
    they are kept, and what draw, forward and CUDA graphs take. common/memory.py has the formulas. Adapters leave the
    weights frozen, in float32; the value model is trained whole, and its activations are not there at the same time.
    """
    word = 2 if low_precision else 4
    lora = config.model.lora if job != "eval" else None
    adapters = adapter_parameters(size, lora.r, lora.targets) if lora else 0
    found: dict[str, float] = {}
    if job in ("rl", "eval"):
        sampling, limit = config.rollout, (config.training if job == "rl" else config).max_prompt_len
        group, rows = sampling.tensor_parallel_size, sampling.max_active
        full = full_attention(config.model_base if job == "eval" else config.model.model_base)
        # the learner's own weights are sampled from where they are whole, unadapted and of that precision
        own = job == "rl" and zero != 3 and not adapters and group == 1 and (zero == 2 or not low_precision)
        found["weights, sampling"] = 0.0 if own else word * size.parameters / group
        longest = limit + sampling.max_token
        if sampling.use_cache or not full:
            found["keys and values"] = cache_bytes(size, rows * longest, word) / group
        sizes = sampling.block_size  # a schedule of sizes; an evaluation may have several settings, in lists
        block, top_k, top_p = (
            most(value if isinstance(value, list) else [value])
            for most, value in (
                (max, list(sizes.values()) if isinstance(sizes, dict) else sizes),
                (max, sampling.top_k),
                (min, sampling.top_p),
            )
        )
        parts = sampling_bytes(size, Drawing(rows, block, longest, full, top_k, top_p), word)
        found |= {f"{name}, sampling": taken for name, taken in parts.items()}
    if job in ("rl", "sft"):
        training = config.training
        trained, frozen = (adapters, size.parameters) if adapters else (size.parameters, 0)
        found["weights, gradients, Adam"] = state_bytes(trained, frozen, zero, devices, word)
        if value:
            found["value model"] = state_bytes(value.parameters, 0, zero, devices, word)
        if job == "rl" and training.kl_reference == "initial":
            found["the first model"] = (word if zero else 4) * size.parameters
        found["activations"] = activations(config, size, low_precision, zero, bool(adapters))
        if value:
            found["activations"] = max(found["activations"], activations(config, value, low_precision, zero, False))
        tokens = training.tokens_per_micro_batch or CUDA_TOKENS
        found["logits, training"] = head_bytes(size, min(2048, tokens))
        response = config.rollout.max_token if job == "rl" else training.max_gen_length
        clean = training.max_prompt_len + response
        if clean + response > tokens and not full_attention(config.model.model_base):  # with one view of each block
            found["kept for a row's pieces"] = kept_bytes(size, clean, word)
    return found


def full_attention(family: str) -> bool:
    """Whether a family's canvas is seen as a whole."""
    from models.family import find_family

    return find_family(family).attention == "full"


def activations(config: Any, size: Size, low_precision: bool, zero: int, frozen: bool) -> float:
    """Bytes that a micro-batch keeps for its backward pass."""
    arithmetic: Arithmetic = "float32"
    if low_precision:
        arithmetic = "frozen" if frozen else "bfloat16" if zero else "autocast"
    frozen_word = 2 if zero and low_precision else 4
    training = config.training
    checkpointing = training.gradient_checkpointing_enable
    tokens = training.tokens_per_micro_batch or CUDA_TOKENS
    return activation_bytes(size, tokens, checkpointing, arithmetic, frozen_word)


def advice(config: Any, found: dict[str, float], room: float) -> list[str]:
    """What to change where the sum exceeds the room: activations first where they are kept, then the largest parts."""
    if sum(found.values()) <= room:
        return []
    training = getattr(config, "training", None)
    recomputed = training is not None and training.gradient_checkpointing_enable
    devices = "more devices: accelerate_configs/*_deepspeed_zero3.yaml divides this part by them"
    adapters = "" if training is None or config.model.lora.r else "model.lora.r=64, or "
    ways = {
        "activations": "a smaller training.tokens_per_micro_batch; the update does not depend on it"
        if recomputed
        else "training.gradient_checkpointing_enable=True",
        "weights, gradients, Adam": adapters + devices,
        "value model": f"model.value_base_model=null, or {devices}",
        "keys and values": "a smaller max_active or max_token; responses do not depend on max_active",
        "draw, sampling": "a smaller max_active, or no top_p",
        "forward, sampling": "a smaller max_active or max_token",
        "graphs, sampling": "a smaller max_active",
        "weights, sampling": "bfloat16 weights (dtype), or a smaller model",
        "the first model": "training.kl_reference=old, which keeps no second model",
        "kept for a row's pieces": "shorter responses, or a training.tokens_per_micro_batch that holds whole rows",
        "logits, training": "a smaller training.tokens_per_micro_batch",
    }
    largest = sorted(found, key=lambda name: (name == "activations" and not recomputed, found[name]), reverse=True)
    return [f"{name} ({found[name] / GIB:.1f} GiB): {ways[name]}" for name in largest[:3] if found[name] > 0.05 * room]


def device_room() -> tuple[float, bool, int]:
    """Bytes of the first device, whether weights are bfloat16 there, and how many devices there are."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(0)[1]), True, torch.cuda.device_count()
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), False, 1


def sharing(job: str, config: Any, devices: int) -> tuple[int, int]:
    """ZeRO's stage, 0 without, and the ranks that share: as experiment.deepspeed_file says; finetuning, whose launcher
    alone knows, is taken to share by ZeRO-3 over all devices there are."""
    if job == "sft":
        return (3, devices) if devices > 1 else (0, 1)
    name = config.experiment.deepspeed_file
    if not name:
        return 0, 1
    launched = yaml.safe_load(accelerate_config(name).read_text(encoding="utf-8"))
    return launched.get("deepspeed_config", {}).get("zero_stage", 0), launched["num_processes"]


def memory_report(argv: Sequence[str]) -> None:
    """Print what a config needs, beside what a device has."""
    from common.metrics import print_table

    path = find_config(next(one for one in argv if one.startswith("config=")).partition("=")[2])
    job, config = load_any(path, [one for one in argv if not one.startswith("config=")])
    model, dtype = (
        (config.model, config.dtype) if job == "eval" else (config.model.pretrained_model, config.model.dtype)
    )
    room, on_gpu, devices = device_room()
    low_precision = dtype == "bfloat16" or (dtype == "auto" and on_gpu)
    if not on_gpu and job in ("rl", "sft"):
        config.training.tokens_per_micro_batch = config.training.tokens_per_micro_batch or CPU_TOKENS
    value = read_size(config.model.value_base_model) if job == "rl" and config.model.value_base_model else None
    found = needs(job, config, read_size(model), low_precision, *sharing(job, config, devices), value)
    parts = found | {"sum, an estimate": sum(found.values()), "there is": room}
    rows = [{"memory of one device": name, "GiB": round(size / GIB, 2)} for name, size in parts.items()]
    print_table(rows, title=f"\n{path.name}: {model}")
    lines = advice(config, found, 0.95 * room)
    print("it should fit" if not lines else "it will not fit; what helps:\n  " + "\n  ".join(lines))


@one_line_errors
def main(argv: list[str]) -> None:
    """Print the report, and a config's memory where one is given."""
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return
    from common.metrics import print_table  # with torch, which --help does without

    print_table(main_report())
    if any(one.startswith("config=") for one in argv):
        memory_report(argv)
    elif argv:
        raise UserError(f"{argv[0]}: give config=configs/X.yaml first")


if __name__ == "__main__":
    main(sys.argv[1:])
