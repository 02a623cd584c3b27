"""The value model: a family's network with a scalar head in place of its language head."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.errors import UserError
from models.family import load_network, local_folder, save_model
from models.files import told_as

HEAD_FILE = "value_head.safetensors"  # beside the checkpoint's own files, which stay loadable as they are


class ValueHead(torch.nn.Linear):
    """Hidden state to a scalar, in float32 whatever the network's precision; zero at first."""

    def __init__(self, width: int):
        super().__init__(width, 1)
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (…, width) → values (…), float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())[..., 0]


class ValueNetwork(torch.nn.Module):
    """The network and its scalar head. The language head stays, untrained, so that the checkpoint stays whole."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.network = network
        self.head = ValueHead(network.config.hidden_size).to(next(network.parameters()).device)
        if not network.config.tie_word_embeddings:
            network.lm_head.requires_grad_(False)


def load_value(
    path: str | Path, family_name: str, dtype: torch.dtype | str = torch.float32, device: str | torch.device = "cpu"
) -> ValueNetwork:
    """A value model from a checkpoint of the family; its head is zero where the folder holds none.

    UserError, naming the key, where the folder is unfit.
    """
    with told_as("model.value_base_model"):
        folder = local_folder(path)
        value = ValueNetwork(load_network(folder, family_name, dtype, device))
    if (folder / HEAD_FILE).is_file():
        where = f"model.value_base_model: {folder / HEAD_FILE}"
        try:
            head = load_file(folder / HEAD_FILE)
        except SafetensorError as error:
            raise UserError(f"{where} cannot be read ({error}); copy it anew") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in value.head.state_dict().items()}
        if shapes != wanted:
            raise UserError(f"{where} holds {shapes}, the network takes {wanted}")
        if not all(tensor.isfinite().all() for tensor in head.values()):
            raise UserError(f"{where} holds NaN or infinite values; the training that wrote it failed")
        value.head.load_state_dict(head)
    return value


def save_value(
    value: ValueNetwork,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write the family's checkpoint and the head beside it, as `load_value` reads them.

    state_dict: the value model's tensors, where the model itself is sharded.
    """
    state = value.state_dict() if state_dict is None else state_dict
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "head": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    save_model(value.network, tokenizer, path, None if state_dict is None else parts["network"])
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in parts["head"].items()}, Path(path) / HEAD_FILE
    )
