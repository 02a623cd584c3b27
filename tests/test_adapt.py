"""Autoregressive checkpoints made a family's: the parent's causal logits, nothing lost, mistakes told in one line."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from models import adapt, load_model, load_tokenizer, save_model
from models.tiny import CHAT_TEMPLATE, EOS, PAD, TURN, character_tokenizer

WORDS = 39  # of the tokenizer
TEXT = "<|im_start|>4+2=6;\\boxed{6}<|im_end|>"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that a mistake shows
    "eos_token_id": 34,
    "pad_token_id": 33,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
# name: family, config; vocabularies of 64 have a row for the mask token
PARENTS = {
    "qwen3": ("sdar", Qwen3Config(**SIZES, vocab_size=64, head_dim=16, rope_parameters=ROPE, tie_word_embeddings=True)),
    "qwen3, grown": ("sdar", Qwen3Config(**SIZES, vocab_size=WORDS, head_dim=8, attention_bias=True)),
    "qwen2": ("dream", Qwen2Config(**SIZES, vocab_size=WORDS, rope_parameters=ROPE, rms_norm_eps=0.1)),
    "llama": ("llada", LlamaConfig(**SIZES, vocab_size=64, rope_parameters=SCALED, rms_norm_eps=0.1)),
    "smollm": ("llada", LlamaConfig(**SIZES, vocab_size=WORDS, rope_parameters=ROPE, tie_word_embeddings=True)),
    "qwen3_moe": ("sdar_moe", Qwen3MoeConfig(**SIZES, **EXPERTS, vocab_size=64, head_dim=8, rope_parameters=ROPE)),
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small random checkpoint of each architecture, as transformers itself writes them."""
    root = tmp_path_factory.mktemp("parents")
    for name, (_, config) in PARENTS.items():
        torch.manual_seed(1)
        network = AutoModelForCausalLM.from_config(config)
        for _, weight in network.named_parameters():
            torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.3)
        network.generation_config = GenerationConfig(eos_token_id=[34, 33], pad_token_id=33)
        network.to(torch.bfloat16 if name == "qwen2" else torch.float32).save_pretrained(root / name)
        write_parents_tokenizer(root / name)
    return root


def write_parents_tokenizer(folder: Path) -> None:
    tokenizer = character_tokenizer("<|extra|>")
    tokenizer.post_processor = TemplateProcessing(single=f"{TURN} $A", special_tokens=[(TURN, 35)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": EOS, "pad_token": PAD}
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = tokenizer.get_added_tokens_decoder()
    listed = {str(id): {"content": token.content} | flags for id, token in added.items()}
    settings = {"chat_template": CHAT_TEMPLATE, "added_tokens_decoder": listed, "tokenizer_class": "Qwen2Tokenizer"}
    write_json(folder / "tokenizer_config.json", settings | special)
    write_json(folder / "special_tokens_map.json", special)


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def edit_json(file: Path, **changes: object) -> None:
    write_json(file, json.loads(file.read_text()) | changes)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["models/adapt.py", *map(str, arguments)])
    adapt.main()


def logits(network: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("name", PARENTS)
def test_causal_logits_are_the_parents(
    name: str, parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config = PARENTS[name]
    run(monkeypatch, f"model={parents / name}", f"family={family}", f"out={tmp_path / 'new'}")
    parent = AutoModelForCausalLM.from_pretrained(parents / name, dtype=torch.float32)
    loaded = load_model(tmp_path / "new", family)
    ids = torch.randint(0, WORDS, (2, 40), generator=torch.Generator().manual_seed(2))
    causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40)
    plain, ours = logits(parent, ids), logits(loaded.model, ids, attention_mask=causal)
    assert (plain - ours[..., : config.vocab_size])[..., :WORDS].abs().max() <= 1e-5 * plain.abs().max()
    assert plain.abs().max() > 1 and loaded.mask_id == WORDS and loaded.stop_ids == (33, 34)
    # the mask token's rows are the mean of the words', so that it is no likelier than one word of as many
    rows = loaded.model.get_input_embeddings().weight
    torch.testing.assert_close(rows[WORDS], rows[:WORDS].mean(0), rtol=1e-2, atol=5e-3)
    assert len(rows) == (64 if config.vocab_size == 64 else 128)
    assert (ours[..., WORDS] - ours[..., :WORDS].logsumexp(-1) + math.log(WORDS)).max() < 0.05
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["model_type"] == loaded.family.model_type and written["mask_token_id"] == WORDS
    assert written["torch_dtype"] == ("bfloat16" if name == "qwen2" else "float32")
    assert written.get("block_size") == (4 if loaded.family.attention == "block" else None)
    assert {file.name for file in tmp_path.iterdir()} == {"new"}


def test_the_tokenizer_is_the_parents_with_a_mask_token(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    run(monkeypatch, f"model={parents / 'qwen3'}", "family=trado", f"out={new}", "block_size=8")
    before, after = load_tokenizer(parents / "qwen3"), load_tokenizer(new)
    assert after.get_vocab() == before.get_vocab() | {"<|MASK|>": WORDS}
    assert after.encode(TEXT) == before.encode(TEXT) and after.chat_template == CHAT_TEMPLATE
    old, whole = (json.loads((folder / "tokenizer.json").read_text()) for folder in (parents / "qwen3", new))
    assert whole["added_tokens"].pop()["id"] == WORDS and whole == old
    assert after.encode("1<|MASK|>2") == [35, 1, WORDS, 2] and after.decode([1, WORDS], skip_special_tokens=True) == "1"
    assert after.eos_token == EOS and load_model(new, "trado").block_size == 8
    assert json.loads((new / "special_tokens_map.json").read_text())["mask_token"] == "<|MASK|>"
    assert json.loads((new / "tokenizer_config.json").read_text())["added_tokens_decoder"]["39"]["special"]


def test_vocabulary_and_merges_become_a_whole_tokenizer(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir(), folder.mkdir()
    write_json(source / "vocab.json", {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3})
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    write_json(source / "added_tokens.json", {"<|endoftext|>": 3})
    tokenizer = load_tokenizer(source)
    before = tokenizer.encode("abba")
    id = adapt.add_mask(tokenizer, adapt.find_family("dream"), source)
    adapt.write_tokenizer(tokenizer, source, folder)
    again = load_tokenizer(folder)
    assert again.mask_token_id == id == 4 and again.encode("abba") == before == [2, 1, 0]
    assert json.loads((folder / "added_tokens.json").read_text())["<|mask|>"] == 4


def test_an_adapted_checkpoint_is_saved_as_it_was_read(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, f"model={parents / 'smollm'}", "family=llada", f"out={tmp_path / 'new'}")
    loaded = load_model(tmp_path / "new", "llada")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_mask_token_that_the_parent_knows_keeps_its_row(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = shutil.copytree(parents / "qwen3", tmp_path / "parent")
    character_tokenizer("<|MASK|>").save(str(parent / "tokenizer.json"))
    edit_json(parent / "tokenizer_config.json", added_tokens_decoder={})
    run(monkeypatch, f"model={parent}", "family=sdar", f"out={tmp_path / 'new'}")
    before, after = (load_file(folder / "model.safetensors") for folder in (parent, tmp_path / "new"))
    assert load_model(tmp_path / "new", "sdar").mask_id == WORDS - 1
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_no_code_of_a_checkpoint_is_run_or_kept(parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = shutil.copytree(parents / "llama", tmp_path / "parent")
    (parent / "evil.py").write_text("raise SystemExit('run')")
    edit_json(parent / "config.json", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"})
    edit_json(parent / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.C", None]})
    run(monkeypatch, f"model={parent}", "family=llada", f"out={tmp_path / 'new'}")
    assert not list((tmp_path / "new").glob("*.py"))
    assert "auto_map" not in (tmp_path / "new" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "new" / "tokenizer_config.json").read_text()


# --- mistakes


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parent: Path, family: str, *more: str
) -> str:
    """The one line that ends the command with code 2; nothing is written."""
    out = parent.parent / "out"
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, f"model={parent}", f"family={family}", f"out={out}", *more)
    told = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "\n" not in told and told.startswith("error: ")
    assert not out.exists() and not list(parent.parent.glob("out.*"))
    return told.removeprefix("error: ")


def change(**keys: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **keys)


def change_tensors(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        changed = load_file(folder / "model.safetensors") | tensors
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return edit


def unknown_words(folder: Path) -> None:
    """A tokenizer of more words than the network has rows."""
    edit_json(folder / "config.json", vocab_size=36)
    tensors = load_file(folder / "model.safetensors")
    change_tensors(**{"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:36].clone()})(folder)


def id_taken(folder: Path) -> None:
    """A tokenizer with a gap in its ids, so that the next one by their number is a word's."""
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["5"]
    content["model"]["vocab"]["&"] = WORDS
    write_json(folder / "tokenizer.json", content)


NORM = "model.layers.1.input_layernorm.weight"
# a parent, a family, what is wrong with the folder, what is told
MISTAKES = [
    ("qwen3", "sdar", change(model_type="gpt2"), "model: .* has model_type 'gpt2'; what can be adapted is llama "),
    ("qwen3", "sdar", change(quantization_config={"quant_method": "awq"}), r"model: .*quantization_config \('awq'\)"),
    ("qwen3", "sdar", change_tensors(**{NORM: None}), rf"model: .* lacks tensor {NORM}"),
    ("llama", "llada", change_tensors(**{NORM: torch.ones(31)}), rf"model: .*tensor {NORM} has shape \(31,\)"),
    ("qwen3", "sdar", change_tensors(**{NORM: torch.full((32,), torch.nan)}), rf"model: .*{NORM} holds NaN"),
    ("qwen3", "sdar", change(mask_token_id=0), "model: .*mask_token_id of config.json, 0, is the tokenizer's '0'"),
    ("qwen3", "sdar", id_taken, "model: .*the id that the mask token would get, 39, is the tokenizer's '&'"),
    ("qwen3", "sdar", unknown_words, "model: .*has id 38, the network only 36 ids: a mask token has no room"),
    ("qwen3", "dream", change(), "family=dream: .* has model_type 'qwen3', which becomes sdar or trado"),
    ("qwen2", "river", change(), "family: 'river' is no model family; choose one of sdar"),
    ("llama", "llada", change(hidden_act="gelu"), "model: .*hidden_act: 'gelu' is not possible in llada.*'silu'"),
    ("qwen2", "dream", change(layer_types=["full_attention", "sliding_attention"]), "model: .*layer_types: 'sliding_"),
]


@pytest.mark.parametrize(("name", "family", "spoil", "told"), MISTAKES, ids=[one[3][:40] for one in MISTAKES])
def test_what_cannot_be_adapted_is_told_in_one_line(
    name: str,
    family: str,
    spoil: Callable[[Path], None],
    told: str,
    parents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parent = shutil.copytree(parents / name, tmp_path / "parent")
    spoil(parent)
    line = refusal(monkeypatch, capsys, parent, family)
    assert re.search(f"^{told}", line), line


def test_a_mask_token_of_another_name(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = shutil.copytree(parents / "qwen3", tmp_path / "parent")
    edit_json(parent / "tokenizer_config.json", mask_token=EOS)
    line = refusal(monkeypatch, capsys, parent, "sdar")
    assert "'<|im_end|>' already, sdar's is <|MASK|>; take mask_token out" in line


def test_arguments_that_do_not_fit(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refusal(monkeypatch, capsys, tmp_path / "nowhere", "sdar")
    assert told.startswith("model: no folder")
    parent = shutil.copytree(parents / "qwen2", tmp_path / "parent")
    assert refusal(monkeypatch, capsys, parent, "dream", "block_size=8").startswith("block_size=8: dream has full att")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    told = refusal(monkeypatch, capsys, parent, "dream", f"out={tmp_path / 'full'}")
    assert told.endswith("full: there is something already; name a new folder")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


def wrong_rope(config: object) -> None:
    config.rope_parameters["rope_theta"] = 6000.0


def wrong_norm(config: object) -> None:
    config.rms_norm_eps = 1e-3


def wrong_heads(config: object) -> None:
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 4, 4


@pytest.mark.parametrize("spoil", [wrong_rope, wrong_norm, wrong_heads])
def test_a_network_that_answers_otherwise_is_not_written(
    spoil: Callable[[object], None],
    parents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = adapt.config_of

    def wrong(*arguments: object) -> object:
        config = right(*arguments)
        spoil(config)
        return config

    monkeypatch.setattr(adapt, "config_of", wrong)
    parent = shutil.copytree(parents / "smollm", tmp_path / "parent")
    told = refusal(monkeypatch, capsys, parent, "llada")
    assert "as llada it gives other causal logits" in told


def test_a_weight_that_is_lost_is_seen(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = adapt.with_mask

    def wrong(*arguments: object, **more: object) -> PreTrainedModel:
        network = right(*arguments, **more)
        layer = network.model.layers[1].mlp
        layer.gate_proj, layer.up_proj = layer.up_proj, layer.gate_proj
        return network

    monkeypatch.setattr(adapt, "with_mask", wrong)
    parent = shutil.copytree(parents / "qwen2", tmp_path / "parent")
    assert "as dream it gives other causal logits" in refusal(monkeypatch, capsys, parent, "dream")
