"""A new random network of any family, under a million parameters, with a character tokenizer for arithmetic."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from models.family import Family, find_family
from models.llada import LLAMA_SHAPE, LLaDAConfig
from models.llada2 import LLADA2_SHAPE, LLaDA2MoeConfig
from models.mixture import MixtureNetwork
from models.sdar_moe import SDARMoeConfig

WIDTH, LAYERS, HEADS, KV_HEADS = 128, 4, 4, 2
MLP_RATIO = 3  # width of the feed-forward over that of the network
EXPERTS, ACTIVE = 8, 2  # of a mixture; together they are as wide as a dense feed-forward
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


def build_tiny(family_name: str, path: str | Path, seed: int, width: int = WIDTH) -> None:
    """Write a checkpoint folder of that family at `path`; the same seed writes the same bytes. width: of the network.

    UserError if the family is unknown. The global random state is left as it was.
    """
    family = find_family(family_name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer(family.mask_token)
    config = family.config_class.from_dict(published_config(family, tokenizer.get_vocab(), width))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        model = family.model_class(config)
    model.float().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {
        "additional_special_tokens": [TURN, REPLY],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "mask_token": family.mask_token,
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
    }
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def character_tokenizer(mask_token: str) -> Tokenizer:
    """Return a tokenizer with one id per character of arithmetic and one for `\\boxed{`; others are unknown."""
    special = [PAD, EOS, TURN, REPLY, UNKNOWN, mask_token]
    ids = {token: index for index, token in enumerate([*CHARACTERS, BOXED, *special])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def published_config(family: Family, ids: dict[str, int], width: int) -> dict[str, Any]:
    """Return the content of config.json: the sizes under the publisher's names, and the keys that only it has."""
    sizes = {
        "attention_dropout": 0.0,
        "eos_token_id": ids[EOS],
        "hidden_size": width,
        "initializer_range": 0.08,  # at the usual 0.02 so small a network learns several times slower
        "intermediate_size": MLP_RATIO * width,
        "mask_token_id": ids[family.mask_token],
        "max_position_embeddings": MAX_LENGTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "pad_token_id": ids[PAD],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": False,
        "vocab_size": len(ids),
    }
    if issubclass(family.config_class, LLaDAConfig):
        own = {key: allowed[0] for key, allowed in LLAMA_SHAPE.items() if key != "clip_qkv"}
        own |= {"mlp_ratio": MLP_RATIO, "vocab_size": len(ids)}
        # nothing reads the rest, which the publishers' checkpoints have too
        own |= {"embedding_dropout": 0.0, "residual_dropout": 0.0}
        own |= {"layer_norm_with_affine": True, "rope_full_precision": True}
        if family.model_type == "mmada":
            own |= {"llm_vocab_size": len(ids), "new_vocab_size": len(ids)}
            own |= {"codebook_size": 0, "num_new_special_tokens": 0, "num_vq_tokens": 0}
    else:
        own = {"hidden_act": "silu", "max_window_layers": LAYERS, "rope_scaling": None}
        own |= {"sliding_window": None, "use_sliding_window": False}
        if family.attention == "block":
            own |= {"attention_bias": False, "block_size": 4, "head_dim": width // HEADS}
        if issubclass(family.model_class, MixtureNetwork):
            own |= {"moe_intermediate_size": MLP_RATIO * width // EXPERTS, "norm_topk_prob": True}
            own |= {"num_experts": EXPERTS, "num_experts_per_tok": ACTIVE}
        if issubclass(family.config_class, SDARMoeConfig):
            own |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        if issubclass(family.config_class, LLaDA2MoeConfig):
            own |= {key: allowed[0] for key, allowed in LLADA2_SHAPE.items()}
            own |= {"first_k_dense_replace": 1, "num_shared_experts": 1, "use_qk_norm": True}
            own |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
            own |= {"partial_rotary_factor": 0.5, "rotary_dim": width // HEADS // 2}
    names = {ours: theirs for theirs, ours in family.config_class.attribute_map.items()}
    kind = {"architectures": [family.model_class.__name__], "model_type": family.model_type, "torch_dtype": "float32"}
    return kind | {names.get(key, key): value for key, value in sizes.items()} | own
