"""A new random network of any family, under a million parameters, with a character tokenizer for arithmetic."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from models.family import Family, find_family

WIDTH, LAYERS, FEED_FORWARD, HEADS, KV_HEADS = 128, 4, 384, 4, 2
MAX_LENGTH = 512
BOXED = "\\boxed{"
CHARACTERS = "0123456789+-*/=;}{()[]<>,.?:^% \n"
UNKNOWN, PAD, TURN, REPLY, EOS = "<|unk|>", "<|pad|>", "<|im_start|>", "<|assistant|>", "<|im_end|>"
# A prompt costs two tokens more than its text, and a conversation continues its own prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + REPLY + "{{ message['content'] }}" + EOS + "{% else %}"
    "" + TURN + "{{ message['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + REPLY + "{% endif %}"
)


def build_tiny(family_name: str, path: str | Path, seed: int) -> None:
    """Write a checkpoint folder of that family at `path`; the same seed writes the same bytes.

    UserError if the family is unknown or has no tiny config. The global random state is left as it was.
    """
    family = find_family(family_name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer(family.mask_token)
    ids = tokenizer.get_vocab()
    config = family.config_class.from_dict(_config(family, ids))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        model = family.model_class(config)
    model.float().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(family.mask_token))


def character_tokenizer(mask_token: str) -> Tokenizer:
    """Return a tokenizer with one id per character of arithmetic and one for `\\boxed{`; others are unknown."""
    special = [PAD, EOS, TURN, REPLY, UNKNOWN, mask_token]
    ids = {token: index for index, token in enumerate([*CHARACTERS, BOXED, *special])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _tokenizer_config(mask_token: str) -> dict[str, Any]:
    return {
        "additional_special_tokens": [TURN, REPLY],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "mask_token": mask_token,
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }


def _config(family: Family, ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json in the publisher's keys."""
    common = {
        "architectures": [family.model_class.__name__],
        "attention_dropout": 0.0,
        "eos_token_id": ids[EOS],
        "mask_token_id": ids[family.mask_token],
        "model_type": family.model_type,
        "pad_token_id": ids[PAD],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": len(ids),
    }
    return common | (_llada_keys(family, len(ids)) if family.model_type in ("llada", "mmada") else _qwen_keys(family))


def _qwen_keys(family: Family) -> dict[str, Any]:
    keys = {
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initializer_range": 0.08,  # at the usual 0.02 so small a network learns several times slower
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": MAX_LENGTH,
        "max_window_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rope_scaling": None,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    if family.attention == "block":
        keys |= {"attention_bias": False, "block_size": 4, "head_dim": WIDTH // HEADS}
    names = {ours: theirs for theirs, ours in family.config_class.attribute_map.items()}
    return {names.get(key, key): value for key, value in keys.items()}


def _llada_keys(family: Family, vocabulary: int) -> dict[str, Any]:
    keys = {
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": WIDTH,
        "embedding_dropout": 0.0,
        "embedding_size": vocabulary,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_std": 0.08,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "max_sequence_length": MAX_LENGTH,
        "mlp_hidden_size": FEED_FORWARD,
        "mlp_ratio": FEED_FORWARD // WIDTH,
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "n_layers": LAYERS,
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "weight_tying": True,
    }
    if family.model_type == "mmada":
        keys |= {"llm_vocab_size": vocabulary, "new_vocab_size": vocabulary, "num_new_special_tokens": 0}
        keys |= {"codebook_size": 0, "num_vq_tokens": 0}
    return keys


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
