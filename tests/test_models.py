"""Model families: the reference's logits, checkpoints kept as they were, no code of a checkpoint run, clear errors."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

import models
from common.errors import UserError
from models.llada import LLaDAConfig
from models.original import DiffusionNetwork, OriginalConfig
from models.sdar import SDARConfig
from models.tiny import build_tiny

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FAMILIES = ("sdar", "dream", "llada", "mmada")
FAMILIES = ("sdar", "trado", "dream", "llada", "mmada")
ARITHMETIC = "4+2=6;6+8=14;14+1=15;\\boxed{15}"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name in FAMILIES:
        build_tiny(name, root / name, seed=7)
    return {name: root / name for name in FAMILIES}


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def edit_json(file: Path, **changes: object) -> dict:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))
    return content


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors")) if file.name != "expected.safetensors"]
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for tensors in files for k, v in tensors.items()}


def attention_mask(family: str, batch: int, length: int) -> torch.Tensor:
    block = torch.arange(length) // 4
    seen = block[:, None] >= block[None] if models.FAMILIES[family].attention == "block" else block[None] >= 0
    return seen.expand(length, length)[None, None].expand(batch, 1, length, length)


def logits_of(model: torch.nn.Module, family: str, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    mask = attention_mask(family, *ids.shape)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def fails(call: object, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the reference's numbers


@pytest.mark.parametrize("name", GOLDEN_FAMILIES)
def test_logits_equal_the_reference(name: str) -> None:
    expected = load_file(GOLDEN / name / "expected.safetensors")
    logits = logits_of(models.load_network(GOLDEN / name, name), name, expected["input_ids"])
    # logits reach 18, where fp32 sums in another order differ by 1e-6 of that: the reference itself is 1.7e-5 from fp64
    assert (logits - expected["logits"]).abs().max() <= 1.5e-6 * expected["logits"].abs().max()
    torch.testing.assert_close(logits.log_softmax(-1), expected["logits"].log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("dream", "llada", "mmada"))
def test_full_attention_needs_no_mask(name: str) -> None:
    model = models.load_network(GOLDEN / name, name)
    ids = load_file(GOLDEN / name / "expected.safetensors")["input_ids"][:1]
    with torch.no_grad():
        plain = model(ids).logits
        padded = model(
            torch.cat([ids[:, :3], ids], dim=1),
            attention_mask=torch.cat([torch.zeros(1, 3), torch.ones(ids.shape)], dim=1),
            position_ids=torch.cat([torch.zeros(1, 3), torch.arange(ids.shape[1])[None]], dim=1).long(),
        ).logits[:, 3:]
    torch.testing.assert_close(plain, logits_of(model, name, ids), rtol=0, atol=0)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=2e-5)


class PrefixCache(Cache):
    """Keys and values of a prefix, joined to those of each forward and never grown."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx not in self.kept:
            self.kept[layer_idx] = (key_states, value_states)
            return key_states, value_states
        keys, values = self.kept[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)


def test_a_cache_of_ones_own_gives_the_logits_of_the_whole() -> None:
    model = models.load_network(GOLDEN / "sdar", "sdar")
    ids = load_file(GOLDEN / "sdar" / "expected.safetensors")["input_ids"]
    positions, mask, cache = torch.arange(24).expand(2, 24), attention_mask("sdar", 2, 24), PrefixCache()
    with torch.no_grad():
        model(ids[:, :16], attention_mask=mask[:, :, :16, :16], position_ids=positions[:, :16], past_key_values=cache)
        rest = model(
            ids[:, 16:20],
            attention_mask=mask[:, :, 16:20, :20],
            position_ids=positions[:, 16:20],
            past_key_values=cache,
            use_cache=False,
        ).logits
    torch.testing.assert_close(rest, logits_of(model, "sdar", ids)[:, 16:20], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", GOLDEN_FAMILIES)
def test_the_padding_row_is_trained(name: str) -> None:
    model = models.load_network(GOLDEN / name, name)
    pad = model.config.pad_token_id
    logits = model(torch.full((1, 4), pad), attention_mask=attention_mask(name, 1, 4)).logits
    logits.logsumexp(-1).sum().backward()
    assert model.model.embed_tokens.weight.grad[pad].abs().sum() > 0


def test_generate_is_refused() -> None:
    model = models.load_network(GOLDEN / "dream", "dream")
    assert "block_diffusion_generate" in fails(model.generate, torch.tensor([[1, 2]]))


# ---- checkpoints stay as they were


@pytest.mark.parametrize("name", GOLDEN_FAMILIES)
def test_load_and_save_keep_every_tensor_and_key(name: str, tmp_path: Path) -> None:
    models.load_network(GOLDEN / name, name).save_pretrained(tmp_path)
    assert tensor_bytes(tmp_path) == tensor_bytes(GOLDEN / name)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (GOLDEN / name, tmp_path))
    assert before | {"transformers_version": after["transformers_version"]} == after


@pytest.mark.parametrize("name", ("sdar", "llada"))
def test_the_dtype_written_is_the_dtype_of_the_tensors(name: str, tmp_path: Path) -> None:
    model = models.load_network(GOLDEN / name, name, torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    models.load_network(tmp_path / "half", name, torch.bfloat16).save_pretrained(tmp_path / "again")
    assert tensor_bytes(tmp_path / "half") == tensor_bytes(tmp_path / "again")
    by_auto = AutoModel.from_pretrained(tmp_path / "half", dtype=torch.float32)
    for model in (models.load_network(tmp_path / "half", name), by_auto):
        model.save_pretrained(tmp_path / "full")
        assert json.loads((tmp_path / "full/config.json").read_text())["torch_dtype"] == "float32"


def test_what_was_changed_is_written_under_the_publishers_name(tmp_path: Path) -> None:
    model = models.load_network(GOLDEN / "llada", "llada")
    model.config.max_position_embeddings = 77
    model.config.note = "mine"
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["max_sequence_length"], config["note"]) == (77, "mine")
    assert "max_position_embeddings" not in config


def test_keys_of_transformers_5_are_kept_too(tmp_path: Path) -> None:
    folder = copied(GOLDEN / "sdar", tmp_path / "new")
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    del config["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config))
    model = models.load_network(folder, "sdar")
    expected = load_file(GOLDEN / "sdar" / "expected.safetensors")
    logits = logits_of(model, "sdar", expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    after = json.loads((tmp_path / "saved/config.json").read_text())
    assert config | {"transformers_version": after["transformers_version"]} == after


def test_a_config_made_in_python_is_written_whole(tmp_path: Path) -> None:
    LLaDAConfig(d_model=64, n_heads=4, n_layers=2, mlp_hidden_size=96, vocab_size=50, rope_theta=123.0).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 96, "rope_theta": 123.0}
    wanted |= {"vocab_size": 50, "embedding_size": 50, "model_type": "llada", "block_type": "llama", "rope": True}
    assert wanted.items() <= config.items()
    assert not {"hidden_size", "rope_parameters", "num_attention_heads"} & config.keys()
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.hidden_size, again.head_dim, again.vocab_size) == (64, 16, 50)


def test_save_model_keeps_files_beside_the_weights(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["dream"], tmp_path / "source")
    (folder / "modeling_dream.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")
    edit_json(folder / "generation_config.json", temperature=0.2, alg="entropy")
    loaded = models.load_model(folder, "dream")
    models.save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    before, after = hashes(folder), hashes(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] in ([], ["config.json"])  # its version


def test_save_model_writes_a_changed_tokenizer_and_given_tensors(tiny: dict[str, Path], tmp_path: Path) -> None:
    loaded = models.load_model(tiny["llada"], "llada")
    loaded.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    state = {name: torch.zeros_like(tensor) for name, tensor in loaded.model.state_dict().items()}
    models.save_model(loaded.model, loaded.tokenizer, tmp_path, state)
    again = models.load_model(tmp_path, "llada")
    assert again.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert not any(parameter.any() for parameter in again.model.parameters())


@pytest.mark.parametrize(
    "name, tie, embedding, head",
    [
        ("sdar", "tie_word_embeddings", "model.embed_tokens.weight", "lm_head.weight"),
        ("dream", "tie_word_embeddings", "model.embed_tokens.weight", "lm_head.weight"),
        ("llada", "weight_tying", "model.transformer.wte.weight", "model.transformer.ff_out.weight"),
    ],
)
def test_tied_embeddings(name: str, tie: str, embedding: str, head: str, tmp_path: Path) -> None:
    folder = copied(GOLDEN / name, tmp_path / "tied")
    edit_json(folder / "config.json", **{tie: True})
    edit_tensors(folder, **{head: None})
    model = models.load_network(folder, name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_file(folder / "model.safetensors")[embedding])
    model.save_pretrained(tmp_path / "saved")
    assert tensor_bytes(tmp_path / "saved") == tensor_bytes(folder)


@pytest.mark.parametrize("name", ("sdar", "llada"))
def test_sharded_checkpoint(name: str, tmp_path: Path) -> None:
    models.load_network(GOLDEN / name, name).save_pretrained(tmp_path, max_shard_size="150KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(GOLDEN / name / "model.safetensors").keys()
    assert len(set(index["weight_map"].values())) > 2
    expected = load_file(GOLDEN / name / "expected.safetensors")
    logits = logits_of(models.load_network(tmp_path, name), name, expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=2e-5)


def test_a_head_wider_than_the_vocabulary(tmp_path: Path) -> None:
    folder = copied(GOLDEN / "llada", tmp_path / "wide")
    edit_json(folder / "config.json", embedding_size=176)
    names = ("model.transformer.wte.weight", "model.transformer.ff_out.weight")
    tensors = load_file(folder / "model.safetensors")
    edit_tensors(folder, **{name: torch.cat([tensors[name], torch.ones(16, 64)]) for name in names})
    model = models.load_network(folder, "llada")
    expected = load_file(GOLDEN / "llada" / "expected.safetensors")
    logits = logits_of(model, "llada", expected["input_ids"])
    assert logits.shape[-1] == model.config.vocab_size == 176
    torch.testing.assert_close(logits[..., :160], expected["logits"], rtol=1e-5, atol=2e-5)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert (config["vocab_size"], config["embedding_size"]) == (160, 176)


def test_llada_sizes_that_are_left_to_others(tmp_path: Path) -> None:
    folder = copied(GOLDEN / "llada", tmp_path / "null")
    edit_json(folder / "config.json", n_kv_heads=None, mlp_hidden_size=None, mlp_ratio=1.5, embedding_size=None)
    expected = load_file(GOLDEN / "llada" / "expected.safetensors")
    logits = logits_of(models.load_network(folder, "llada"), "llada", expected["input_ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=2e-5)


# ---- Auto classes, and no code of a checkpoint


@pytest.mark.parametrize("trust", (None, True))
@pytest.mark.parametrize("name", FAMILIES)
def test_auto_classes_run_no_code_of_the_checkpoint(
    name: str, trust: bool | None, tiny: dict[str, Path], tmp_path: Path
) -> None:
    folder, marker = copied(tiny[name], tmp_path / "trap"), tmp_path / "was_run"
    for module in ("configuration", "modeling", "tokenization"):
        (folder / f"{module}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('was run')\n")
    auto_map = {"AutoConfig": "configuration.C", "AutoModel": "modeling.M", "AutoModelForCausalLM": "modeling.M"}
    edit_json(folder / "config.json", auto_map=auto_map)
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization.DreamTokenizer", None]},
        tokenizer_class="DreamTokenizer",
    )
    given = {} if trust is None else {"trust_remote_code": trust}
    family, ids = models.FAMILIES[name], torch.tensor([[1, 2, 3, 4]])
    assert type(AutoConfig.from_pretrained(folder, **given)) is family.config_class
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, **given)
        assert type(model) is family.model_class
        assert model(ids).logits.shape == (1, 4, 39)
        assert model.config.auto_map == auto_map
    tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer.encode(ARITHMETIC)) == ARITHMETIC
    assert models.load_model(folder, name).mask_id == 38
    assert not marker.exists()


def test_the_trap_works(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["sdar"], tmp_path / "trap")
    (folder / "configuration.py").write_text("raise RuntimeError('was run')\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "configuration.C"}, model_type="unheard_of")
    with pytest.raises(RuntimeError, match="was run"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_tokenizer_of_vocabulary_and_merges(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["dream"], tmp_path / "bpe")
    (folder / "tokenizer.json").unlink()
    vocabulary = ["4", "+", "2", "Ġ", "4+", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n4 +\n")
    mask = {"content": "<|mask|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
    config = {"tokenizer_class": "DreamTokenizer", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    config |= {"auto_map": {"AutoTokenizer": ["tokenization.DreamTokenizer", None]}}
    config |= {"added_tokens_decoder": {"6": mask}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.decode(tokenizer.encode("2 4")) == "2 4"
    assert models.load_model(folder, "dream").mask_id == 6


def test_other_model_types_are_left_to_transformers(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["sdar"], tmp_path / "other")
    edit_json(folder / "config.json", model_type="qwen3")
    assert type(AutoConfig.from_pretrained(folder)) is Qwen3Config
    assert AutoTokenizer.from_pretrained(folder).mask_token == "<|MASK|>"


def test_a_family_of_ones_own(tiny: dict[str, Path], tmp_path: Path) -> None:
    class MineConfig(OriginalConfig, Qwen3Config):
        model_type = "mine"

    class MineForCausalLM(DiffusionNetwork, Qwen3ForCausalLM):
        config_class = MineConfig

    instructions = {"math": "{question}"}
    models.register(models.Family("mine", "mine", "block", 0, "<|MASK|>", MineConfig, MineForCausalLM, instructions))
    try:
        folder = copied(tiny["sdar"], tmp_path / "mine")
        edit_json(folder / "config.json", model_type="mine")
        assert type(models.load_model(folder, "mine").model) is MineForCausalLM
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is MineForCausalLM
        assert "set it to mine" in fails(models.load_network, folder, "sdar")
    finally:
        del models.FAMILIES["mine"]


# ---- what the user is told


def test_errors_of_name_and_folder(tmp_path: Path) -> None:
    sdar = GOLDEN / "sdar"
    assert "model.model_base: 'lada'" in fails(models.load_network, sdar, "lada")
    assert "model.pretrained_model: no folder" in fails(models.load_model, tmp_path / "nowhere", "sdar")
    assert "could not be downloaded" in fails(models.load_model, "nobody/nothing", "sdar")
    assert "has no config.json" in fails(models.load_network, tmp_path, "sdar")
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in fails(models.load_network, tmp_path, "sdar")
    message = fails(models.load_network, sdar, "dream")
    assert "model.model_base: 'dream'" in message and "'sdar'" in message and "set it to sdar or trado" in message
    assert "set it to llada" in fails(models.load_network, GOLDEN / "llada", "mmada")
    wrong = copied(sdar, tmp_path / "wrong")
    edit_json(wrong / "config.json", hidden_size="wide")
    assert "config.json does not fit sdar" in fails(models.load_network, wrong, "sdar")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "no family of sdar, trado, dream, llada, mmada" in fails(models.load_network, tmp_path, "sdar")


@pytest.mark.parametrize(
    "name, tensor",
    [("sdar", "model.layers.1.mlp.up_proj.weight"), ("llada", "model.transformer.blocks.1.ff_out.weight")],
)
def test_errors_of_tensors(name: str, tensor: str, tmp_path: Path) -> None:
    folder = copied(GOLDEN / name, tmp_path / "broken")
    edit_tensors(folder, **{tensor: None})
    assert f"lacks tensor {tensor};" in fails(models.load_network, folder, name)
    edit_tensors(folder, **{tensor: torch.zeros(3, 5)})
    assert f"tensor {tensor} has shape (3, 5)" in fails(models.load_network, folder, name)
    edit_tensors(folder, **{tensor: load_file(GOLDEN / name / "model.safetensors")[tensor], "extra": torch.ones(1)})
    assert "has tensor extra, which" in fails(models.load_network, folder, name)
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    assert "no weights that can be read" in fails(models.load_network, folder, name)
    (folder / "model.safetensors").unlink()
    assert "no weights that can be read" in fails(models.load_network, folder, name)


@pytest.mark.parametrize("key, value", [("alibi", True), ("block_type", "sequential"), ("include_qkv_bias", True)])
def test_a_llada_that_is_not_llamas_shape(key: str, value: object, tmp_path: Path) -> None:
    folder = copied(GOLDEN / "llada", tmp_path / "odd")
    edit_json(folder / "config.json", **{key: value})
    assert f"config.json: {key}: {value!r}" in fails(models.load_network, folder, "llada")


def test_errors_of_the_tokenizer(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["dream"], tmp_path / "none")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in fails(models.load_model, folder, "dream")
    shutil.copy(tiny["sdar"] / "tokenizer.json", folder)  # another family's mask token
    edit_json(folder / "tokenizer_config.json", mask_token=None)
    edit_json(folder / "config.json", mask_token_id=None)
    message = fails(models.load_model, folder, "dream")
    assert "no mask token" in message and "<|mask|>" in message
    edit_json(folder / "config.json", mask_token_id=39)
    assert "outside the 39 ids" in fails(models.load_model, folder, "dream")


def test_where_the_mask_id_comes_from(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["sdar"], tmp_path / "mask")
    edit_json(folder / "config.json", mask_token_id=5)
    assert models.load_model(folder, "sdar").mask_id == 38  # the tokenizer's mask_token
    edit_json(folder / "tokenizer_config.json", mask_token=None)
    assert models.load_model(folder, "sdar").mask_id == 38  # the family's, in the vocabulary
    text = (folder / "tokenizer.json").read_text().replace("<|MASK|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    assert models.load_model(folder, "sdar").mask_id == 5  # the config's


def test_where_the_stop_ids_come_from(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(tiny["llada"], tmp_path / "stop")
    assert models.load_model(folder, "llada").stop_ids == (34,)
    edit_json(folder / "tokenizer_config.json", eos_token="<|pad|>")  # the turn's end is still a special token
    edit_json(folder / "generation_config.json", eos_token_id=[7, 9, 5000])
    edit_json(folder / "config.json", eos_token_id=8)
    assert models.load_model(folder, "llada").stop_ids == (7, 8, 9, 33, 34)


# ---- the tiny model


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_is_the_same_for_the_same_seed(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    state, numbers = torch.get_rng_state(), random.getstate()
    build_tiny(name, tmp_path / "same", seed=7)
    build_tiny(name, tmp_path / "other", seed=8)
    assert torch.equal(state, torch.get_rng_state()) and numbers == random.getstate()
    same, other = hashes(tmp_path / "same"), hashes(tmp_path / "other")
    assert same == hashes(tiny[name])
    assert [file for file in same if same[file] != other[file]] == ["model.safetensors"]


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_loads_and_returns(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    loaded = models.load_model(tiny[name], name)
    assert loaded.mask_id == loaded.tokenizer.convert_tokens_to_ids(loaded.family.mask_token)
    assert loaded.model.model.embed_tokens.weight.std().item() == pytest.approx(0.08, rel=0.05)
    assert 0.7e6 < sum(parameter.numel() for parameter in loaded.model.parameters()) < 0.9e6
    assert logits_of(loaded.model, name, torch.arange(39)[None]).isfinite().all()
    models.save_model(loaded.model, loaded.tokenizer, tmp_path)
    assert hashes(tmp_path) == hashes(tiny[name])


def test_tiny_tokenizer(tiny: dict[str, Path]) -> None:
    tokenizer = models.load_tokenizer(tiny["trado"])
    ids = tokenizer.encode(ARITHMETIC)
    assert len(ids) == len(ARITHMETIC) - len("\\boxed{") + 1
    for text in (ARITHMETIC, "(3 - 1) * 2 = 4;", "7\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    special = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    assert tokenizer.decode([special[2], *ids, *special], skip_special_tokens=True) == ARITHMETIC
    assert tokenizer.convert_ids_to_tokens(special) == ["<|im_end|>", "<|pad|>", "<|MASK|>"]
    assert tokenizer.encode("é") == [tokenizer.unk_token_id]


def test_tiny_chat_template(tiny: dict[str, Path]) -> None:
    tokenizer = models.load_tokenizer(tiny["llada"])
    short, long = ([{"role": "user", "content": text}] for text in ("4+2", "4+2+8"))
    batch = tokenizer.apply_chat_template(
        [short, long],
        add_generation_prompt=True,
        return_dict=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert batch["input_ids"].shape == (2, 5 + 2)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
    prompt = batch["input_ids"][1].tolist()
    conversation = [*long, {"role": "assistant", "content": ARITHMETIC}]
    whole = tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"]
    assert whole == [*prompt, *tokenizer.encode(ARITHMETIC), tokenizer.eos_token_id]


# ---- the table


def test_instructions_hold_the_question() -> None:
    for family in models.FAMILIES.values():
        assert {"math", "code_function", "code_stdio", "option"} <= family.instructions.keys()
        for instruction in family.instructions.values():
            assert "{1+1}?" in instruction.replace("{question}", "{1+1}?")
        assert "\\boxed{}." in family.instructions["math"]
    wording = {name: family.instructions["math"] for name, family in models.FAMILIES.items()}
    assert wording["sdar"] == wording["trado"] != wording["dream"] == wording["llada"] == wording["mmada"]


def test_the_rows() -> None:
    assert list(models.FAMILIES) == list(FAMILIES)
    assert {row.name: (row.attention, row.logit_offset) for row in models.FAMILIES.values()} == {
        "sdar": ("block", 0),
        "trado": ("block", 0),
        "dream": ("full", -1),
        "llada": ("full", 0),
        "mmada": ("full", 0),
    }
    assert issubclass(models.FAMILIES["trado"].config_class, SDARConfig)
