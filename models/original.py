"""What every family's classes share: the publisher's config keys kept, full attention by default, no `generate`."""

import copy
from typing import Any, ClassVar, NoReturn

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.core_model_loading import WeightConverter
from transformers.utils import logging

from common.errors import UserError

EVERYWHERE = ("sdpa", "eager")  # implementations of attention that every device has
logger = logging.get_logger(__name__)


class OriginalConfig:
    """Mix-in, named before a transformers config class: `to_dict` and `save_pretrained` speak the publisher's keys.

    A config read from a checkpoint is written as it was read, save what was changed since. A config made in Python is
    written whole. `attribute_map` (transformers' own) holds the publisher's names: {theirs: ours}.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers applies attribute_map last, after it has derived values such as head_dim from the names it maps
        for theirs, ours in self.attribute_map.items():
            value = kwargs.pop(theirs, None)
            if value is not None:
                setattr(self, ours, value)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the config of a parsed config.json, or (config, unused kwargs) where the caller asks for both."""
        original = copy.deepcopy(config_dict)
        config_dict = dict(config_dict)
        for key in ("attn_implementation", "_attn_implementation"):
            if (asked := config_dict.pop(key, None)) not in (None, *EVERYWHERE):
                # once for each kind in a process
                logger.warning_once(
                    "config.json: attn_implementation: %r is no choice for every device: torch's sdpa is used, unless "
                    "from_pretrained is called with attn_implementation=%r",
                    asked,
                    asked,
                )
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        loaded = super(OriginalConfig, config).to_dict()
        config._original, config._loaded = original, loaded
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json under the publisher's keys."""
        ours = super().to_dict()
        original, loaded = ours.pop("_original", {}), ours.pop("_loaded", {})
        changed = {key: value for key, value in ours.items() if key not in loaded or loaded[key] != value}
        if ours.get("dtype") is not None:
            changed["dtype"] = ours["dtype"]  # its reader may have asked for another dtype than the file names
        if "architectures" in original:
            changed.pop("architectures", None)
        return original | self._published(changed, original) | {"transformers_version": ours["transformers_version"]}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes: all of `to_dict` for a config that was read, else what differs."""
        config = {key: value for key, value in self.to_dict().items() if key != "_name_or_path"}
        if "_original" in self.__dict__:
            return config
        defaults = PreTrainedConfig().to_dict()
        return {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}

    def _published(self, ours: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
        names = {mine: theirs for theirs, mine in self.attribute_map.items()}
        if "dtype" not in original:
            names["dtype"] = "torch_dtype"
        theirs = {names.get(key, key): value for key, value in ours.items()}
        if "rope_parameters" in theirs and "rope_parameters" not in original:
            rope = dict(theirs.pop("rope_parameters") or {})
            theirs["rope_theta"] = rope.pop("rope_theta", None)
            theirs["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        return theirs


class DiffusionNetwork:
    """Mix-in, named before a transformers causal language model.

    `tensor_names` pairs a part of the publisher's tensor names with transformers' part, in the order of replacement.
    `tensor_joins` make tensors of the publisher's into transformers' where that takes more than a name.
    """

    tensor_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    tensor_joins: ClassVar[tuple[WeightConverter, ...]] = ()

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # transformers freezes the padding row, but here padding is often the EOS token, which a canvas is full of
        self.model.embed_tokens.padding_idx = None

    @classmethod
    def original_name(cls, name: str) -> str:
        """Return the publisher's name of a tensor that transformers calls `name`."""
        for theirs, ours in reversed(cls.tensor_names):
            name = name.replace(ours, theirs, 1)
        return name

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the checkpoint as transformers does, with no more of generation_config.json than the ids."""
        kept = self.generation_config
        # transformers refuses to save some published combinations of sampling flags, none of which is used here
        ids = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.generation_config = GenerationConfig(**ids)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.generation_config = kept

    def generate(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise UserError: transformers would sample left to right from a network that was not trained to."""
        raise UserError(
            f"{type(self).__name__}.generate: a diffusion language model is not sampled left to right; "
            "call block_diffusion_generate or diffusion_generate of generate.py"
        )


class FullAttention(DiffusionNetwork):
    """A network whose tokens see each other in both directions when no mask says otherwise."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return transformers' output, logits (batch, length, vocabulary).

        attention_mask: none (every token is seen), (batch, keys) with true at the tokens to be seen, or
        (batch, 1, queries, keys) boolean, used as it is.
        """
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        if attention_mask is None and past_key_values is None:
            attention_mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.bool()[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
