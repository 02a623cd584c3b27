"""Checkpoints that are damaged, unfit or of another kind: one line each, on every path that loads one, before a run's
folder is made."""

import json
import logging
import pickle
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.utils
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import models
import serve
from common.config import load_config
from common.errors import UserError
from models.family import local_folder
from models.tiny import build_tiny
from models.value import HEAD_FILE, load_value, save_value
from rollout import evaluate
from rollout.lm_harness import make_harness_model
from sample import show, traces
from train import rl_trainer, sft_trainer

ROOT = Path(__file__).resolve().parents[1]
TENSOR = "model.layers.1.mlp.up_proj.weight"
Spoil = Callable[[Path], None]


def written(name: str, content: bytes | str) -> Spoil:
    """Spoils a folder by a file of that content."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def edited(name: str, **changes: object) -> Spoil:
    """Spoils a folder by other values in one of its JSON files."""

    def spoil(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return spoil


def tensor(change: Callable[[torch.Tensor], torch.Tensor | None], name: str = TENSOR) -> Spoil:
    """Spoils a folder by another tensor, or none."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name].clone())
        kept = {key: value for key, value in tensors.items() if value is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return spoil


def set_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def cut(share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])

    return spoil


def with_index(index: object) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def in_torch_format(folder: Path) -> bytes:
    """Writes the weights as older repositories hold them; returns the file."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return (folder / "pytorch_model.bin").read_bytes()


def torch_file(content: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(content(in_torch_format(folder)))

    return spoil


def added_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 39, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


NOT_UTF8, DEEP = b"\xff\xfe{\x00}\x00", b"[" * 100_000
UNREAD = r"no weights that can be read|weights do not fit sdar"
ONE_SHARD = {"metadata": {}, "weight_map": {TENSOR: "model-00002-of-00002.safetensors"}}
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
FAULTS: list[tuple[str, Spoil, str]] = [
    *((f"{name} in UTF-16", written(name, NOT_UTF8), rf"{name} is not UTF-8") for name in JSON_FILES),
    *((f"{name} a list", written(name, "[1]"), rf"{name} holds a list") for name in JSON_FILES),
    *((f"{name} torn", written(name, '{"a": '), rf"{name} is not JSON") for name in JSON_FILES),
    ("config.json too deep", written("config.json", DEEP), r"config.json is not JSON"),
    ("config.json empty", written("config.json", ""), r"config.json is not JSON"),
    ("a template in UTF-16", written("chat_template.jinja", NOT_UTF8), r"chat_template.jinja is not UTF-8"),
    ("a tokenizer without a model", written("tokenizer.json", '{"version": "1.0"}'), r"tokenizer.json is no tokenizer"),
    (
        "a tokenizer's model of no kind",
        edited("tokenizer.json", model={"type": "None"}),
        r"tokenizer.json is no tokenizer",
    ),
    (
        "token settings of a wrong kind",
        edited("tokenizer_config.json", added_tokens_decoder=5),
        r"do not fit each other",
    ),
    *(
        (f"quantised by {method}", edited("config.json", quantization_config={"quant_method": method}), method)
        for method in ("bitsandbytes", "gptq", "awq", "fp8", "unheard_of")
    ),
    ("a quantisation without a method", edited("config.json", quantization_config={}), r"has a quantization_config"),
    ("bytes for floats", tensor(lambda one: one.to(torch.int8)), rf"tensor {TENSOR} of .* is of type I8"),
    ("8-bit floats", tensor(lambda one: one.to(torch.float8_e4m3fn)), r"is of type F8_E4M3"),
    ("a NaN", tensor(set_one(float("nan"))), rf"tensor {TENSOR} holds NaN"),
    ("an infinity", tensor(set_one(float("-inf")), "model.norm.weight"), r"tensor model.norm.weight holds NaN or inf"),
    ("a missing tensor", tensor(lambda one: None), rf"lacks tensor {TENSOR};"),
    ("a tensor of another shape", tensor(lambda one: one[:5].clone()), rf"tensor {TENSOR} has shape \(5, 128\)"),
    ("half of the weights", cut(0.5), r"no weights that can be read"),
    ("a header torn", cut(0.001), r"no weights that can be read"),
    ("no bytes of weights", cut(0), r"no weights that can be read"),
    ("a shard that is not there", with_index(ONE_SHARD), r"no weights that can be read"),
    ("an index without shards", with_index({"metadata": {}, "weight_map": {}}), r"is no index of shards"),
    ("an index of nothing", with_index({"weight_map": [1]}), r"is no index of shards"),
    (
        "an index that leads elsewhere",
        with_index({"metadata": {}, "weight_map": {TENSOR: "../other/model.safetensors"}}),
        r"is no index of shards",
    ),
    *(
        (
            f"torch's format, {share:.0%} of it",
            torch_file(lambda b, share=share: b[: int(share * len(b))]),
            UNREAD,
        )
        for share in (0, 0.001, 0.3, 0.9, 0.9999)
    ),
    ("a pointer for weights", torch_file(lambda _: b"version https://git-lfs.github.com/spec/v1\n"), UNREAD),
    ("a pickled list for weights", torch_file(lambda _: pickle.dumps([1, 2], protocol=2)), UNREAD),
    ("a token beyond the network", added_token, r"token '<\|new\|>' has id 39, the network only 39 ids"),
    ("a block size of no kind", edited("config.json", block_size="4"), r"block_size: '4' is no whole number"),
    (
        "an activation that is unknown",
        edited("config.json", hidden_act="nope"),
        r"do not fit sdar \(KeyError: 'nope'\)",
    ),
    ("a rotary table of no kind", edited("config.json", rope_theta=None), r"do not fit sdar"),
    ("a padding id beyond the network", edited("config.json", pad_token_id=500), r"do not fit sdar"),
]


@pytest.mark.parametrize("spoil, line", [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_fault_gets_its_line(spoil: Spoil, line: str, tiny_sdar: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdar, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(UserError) as caught:
        models.load_model(folder, "sdar")
    told = str(caught.value)
    assert "\n" not in told and len(told) < 500 and told.startswith("model.pretrained_model: ")
    assert re.search(line, told), told


def evaluated(folder: Path) -> None:
    data = "dataset.eval_dataset=arithmetic_4_test"
    evaluate.main(load_config("eval", [f"config={ROOT}/configs/eval_tiny.yaml", f"model={folder}", data]))


def shown(folder: Path) -> None:
    show.main(load_config("generate", [f"model={folder}", "prompt=1+1="]))


def drawn(folder: Path) -> None:
    traces.main(load_config("trace", [f"model={folder}", "prompt=1+1="]))


JOBS = [(evaluated, "model"), (shown, "model"), (drawn, "model"), (make_harness_model, "pretrained")]


@pytest.mark.parametrize("job, key", JOBS)
def test_each_job_names_its_own_key(job: Spoil, key: str, tiny_sdar: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdar, tmp_path / "model"))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=f"^{key}: .* has no config.json"):
        job(str(folder))


@pytest.mark.parametrize(
    "spoil, line",
    [(lambda file: file.write_bytes(b"torn"), "cannot be read"), (lambda file: nan_head(file), "holds NaN")],
)
def test_a_damaged_value_head(spoil: Callable[[Path], None], line: str, tiny_sdar: Path, tmp_path: Path) -> None:
    value, tokenizer = load_value(tiny_sdar, "sdar"), models.load_tokenizer(tiny_sdar)
    save_value(value, tokenizer, tmp_path / "value")
    spoil(tmp_path / "value" / HEAD_FILE)
    with pytest.raises(UserError, match=f"^model.value_base_model: .*{HEAD_FILE} {line}"):
        load_value(tmp_path / "value", "sdar")


def nan_head(file: Path) -> None:
    save_file({name: torch.full_like(one, float("nan")) for name, one in load_file(file).items()}, file)


# ---- every path that loads a model


def by_rl(folder: Path, runs: Path) -> None:
    tiny = f"config={ROOT}/configs/rl_tiny.yaml"
    config = load_config("rl", [tiny, f"model.pretrained_model={folder}", f"experiment.runs_dir={runs}"])
    rl_trainer.main(config)


def by_eval(folder: Path, runs: Path) -> None:
    tiny = f"config={ROOT}/configs/eval_tiny.yaml"
    evaluate.main(load_config("eval", [tiny, f"model={folder}", f"experiment.runs_dir={runs}"]))


def by_sft(folder: Path, runs: Path) -> None:
    tiny = f"config={ROOT}/configs/sft_tiny.yaml"
    config = load_config("sft", [tiny, f"model.pretrained_model={folder}", f"experiment.runs_dir={runs}"])
    sft_trainer.finetune(config)


def by_generate(folder: Path, runs: Path) -> None:
    show.main(load_config("generate", [f"model={folder}", "prompt=1+2"]))


def by_trace(folder: Path, runs: Path) -> None:
    traces.main(load_config("trace", [f"model={folder}", "prompt=1+2", f"out={runs}"]))


def by_harness(folder: Path, runs: Path) -> None:
    make_harness_model(str(folder))


def by_serve(folder: Path, runs: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.argv[1:] = [f"model={folder}", f"port={port}"]
    serve.main.__wrapped__()  # without the wrapper that prints the line


PATHS = (by_rl, by_eval, by_sft, by_generate, by_trace, by_harness, by_serve)
ON_ALL = ("config.json a list", "config.json in UTF-16", "tokenizer.json torn", "quantised by awq", "a NaN")
ON_ALL += ("a missing tensor", "half of the weights", "a token beyond the network")


@pytest.mark.parametrize("fault", ON_ALL)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_every_path_tells_it_before_anything_is_written(
    path: Callable[[Path, Path], None], fault: str, tiny_sdar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    spoil, line = next(row[1:] for row in FAULTS if row[0] == fault)
    folder = Path(shutil.copytree(tiny_sdar, tmp_path / "model"))
    spoil(folder)
    with pytest.raises(UserError, match=line):
        path(folder, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


# ---- weights in torch's own format


def test_weights_in_torchs_format_are_read(tiny_sdar: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sdar, tmp_path / "model"))
    in_torch_format(folder)
    got, wanted = (models.load_network(one, "sdar").state_dict() for one in (folder, tiny_sdar))
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in wanted)


class Program:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return open, (str(self.mark), "w")


def test_a_program_among_the_weights_is_not_run(tiny_sdar: Path, tmp_path: Path) -> None:
    folder, mark = Path(shutil.copytree(tiny_sdar, tmp_path / "model")), tmp_path / "was_run"
    in_torch_format(folder)
    torch.save({TENSOR: Program(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no file of plain tensors"):
        models.load_network(folder, "sdar")
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert mark.exists()  # the trap works


@pytest.mark.parametrize("names, wanted", [
    (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin", "x.gguf"],
     ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]),
])  # fmt: skip
def test_what_of_a_hub_repository_is_fetched(
    names: list[str], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(name: str, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None) -> str:
        for one in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / one).touch()
        return str(tmp_path)

    monkeypatch.setattr("models.family.snapshot_download", hub)
    assert local_folder("somebody/something") == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == wanted


# ---- the attention that a config.json asks for


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["flex_attention", "flash_attention_2"])
def test_an_attention_of_other_devices_is_replaced(
    key: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.Logger.warning_once.cache_clear()  # transformers': another test may have asked for the same kind
    build_tiny("sdar", tmp_path / "model", seed=3)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    edited("config.json", **{key: kind})(tmp_path / "model")
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    logits = model(ids).logits
    logits.logsumexp(-1).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert torch.equal(logits, plain(ids).logits)
    assert [kind in record.getMessage() for record in caplog.records if record.name == "models.original"] == [True]
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())[key] == kind  # as the publisher wrote it


def test_an_attention_that_is_asked_for_is_used(tmp_path: Path) -> None:
    build_tiny("sdar", tmp_path / "model", seed=3)
    edited("config.json", attn_implementation="flash_attention_2")(tmp_path / "model")
    for kind in ("flex_attention", "eager"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=kind)
        assert model.config._attn_implementation == kind
