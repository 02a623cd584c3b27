"""What a network takes of a device's memory, in bytes by arithmetic: weights in training, activations, the cache.

Nothing is loaded. `common.doctor` asks for a config, `benchmarks.cost_model` and `benchmarks.scale` for shapes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError

# The arithmetic that activations are in: float32 weights under bfloat16 autocast, the same with all but adapters
# frozen, weights in bfloat16 (DeepSpeed), float32 throughout.
Arithmetic = Literal["autocast", "frozen", "bfloat16", "float32"]
# Bytes that a layer keeps of a token for its backward pass, for each number of the widths of (hidden states, queries,
# keys, feed-forward). Under bfloat16 the norms still keep float32.
KEPT: dict[Arithmetic, tuple[int, int, int, int]] = {
    "autocast": (26, 10, 10, 8),
    "frozen": (18, 10, 8, 8),
    "bfloat16": (16, 10, 10, 8),
    "float32": (24, 16, 16, 16),
}
PREFILL_TOKENS = 16384  # in one forward of prompts, so that its mask and activations stay small
DRAW_ELEMENTS = 1 << 25  # logits in a chunk of the draw: 128 MiB for each float32 tensor of their size
# Bytes at the peak of a draw, for each position and word: logits and weights in float32, and what is made of them for
# entropy, for top-k or for top-p.
DRAW_BYTES = {"plain": 16, "top_k": 20, "top_p": 40}
# by these names every network's config has what `size_of` asks for, whatever its config.json calls them
NETWORK_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim")
NETWORK_SIZES += ("intermediate_size", "vocab_size", "tie_word_embeddings")
GRAPHS = 2.0**30  # bytes of the CUDA graphs themselves, a guess; vLLM logs 0.3 to 1 GiB for as many
HEAD_COPIES = 16  # bytes of a word's logit in training: the head's output, float32, probabilities, their gradients


@dataclass(frozen=True)
class Size:
    """A dense network's sizes."""

    parameters: int  # the embedding and the head among them; once where they are one
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int

    @property
    def kv_width(self) -> int:
        """Numbers of a token's keys in one layer."""
        return self.kv_heads * self.head_width

    @property
    def query_width(self) -> int:
        """Numbers of a token's queries in one layer."""
        return self.heads * self.head_width

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices by name, (inputs, outputs) each."""
        hidden, query, kv, wide = self.hidden, self.query_width, self.kv_width, self.feed_forward
        return {
            "q_proj": (hidden, query),
            "k_proj": (hidden, kv),
            "v_proj": (hidden, kv),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, wide),
            "up_proj": (hidden, wide),
            "down_proj": (wide, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Numbers in one layer's matrices."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def head_weights(self) -> int:
        """Numbers in the language head, and as many in the embedding."""
        return self.hidden * self.vocabulary


def size_of(config: Mapping[str, Any], parameters: int | None = None) -> Size:
    """The sizes that a config.json has, under the names of any family; parameters are counted where none are given.

    UserError where one of the sizes is missing.
    """

    def first(*names: str) -> int:
        found = next((int(config[name]) for name in names if config.get(name)), None)
        if found is None:
            raise UserError(f"a model's config.json gives {' or '.join(names)}, and this has none; name that file")
        return found

    hidden, heads = first("hidden_size", "d_model"), first("num_attention_heads", "n_heads")
    size = Size(
        parameters=parameters or 0,
        layers=first("num_hidden_layers", "n_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=first("num_key_value_heads", "n_kv_heads", "num_attention_heads", "n_heads"),
        head_width=int(config.get("head_dim") or hidden // heads),
        feed_forward=first("intermediate_size", "mlp_hidden_size"),
        vocabulary=first("embedding_size", "vocab_size"),
    )
    if parameters:
        return size
    tied = config.get("tie_word_embeddings") or config.get("weight_tying")
    norms = (2 * size.layers + 1) * hidden  # those of heads and biases are a few thousand numbers
    counted = size.layers * size.layer_weights + norms + (1 if tied else 2) * size.head_weights
    return Size(**{**vars(size), "parameters": counted})


def adapter_parameters(size: Size, rank: int, targets: Iterable[str]) -> int:
    """Numbers in LoRA adapters of that rank on the layers' matrices `targets`; other layers are not counted."""
    linear = size.linear
    return rank * size.layers * sum(sum(linear[target]) for target in targets if target in linear)


def state_bytes(
    trained: float, frozen: float = 0, zero: int = 0, devices: int = 1, word: int = 4, frozen_word: int = 4
) -> float:
    """Weights, gradients and AdamW's two moments on one device, of so many trained and frozen parameters.

    Without DeepSpeed (`zero` 0) all are float32, 16 bytes a trained parameter; frozen ones have `frozen_word` bytes.
    With it weights and gradients are of `word` bytes, 2 in bfloat16; then float32 weights and a float32 copy of the
    gradients at the step stand beside them. ZeRO-2 shares out all but the weights over devices, ZeRO-3 all.
    """
    if not zero:
        return 16 * trained + frozen_word * frozen
    weights = word * (trained + frozen) / (devices if zero == 3 else 1)
    return weights + (18 if word == 2 else 12) * trained / devices


def activation_bytes(
    size: Size, tokens: int, checkpointing: bool, arithmetic: Arithmetic, frozen_word: int = 4
) -> float:
    """What the layers keep of a micro-batch at the backward pass's peak.

    With checkpointing every layer's input and one layer's insides, else the insides of all; and the gradients of a
    feed-forward's three wide tensors. Attention keeps no scores: its kernels compute them anew.
    """
    widths = (size.hidden, size.query_width, size.kv_width, size.feed_forward)
    inside = sum(kept * width for kept, width in zip(KEPT[arithmetic], widths))
    gradients = 3 * size.feed_forward * (4 if arithmetic == "float32" else 2)
    stream = 2 if arithmetic == "bfloat16" or (arithmetic == "frozen" and frozen_word == 2) else 4
    layers = stream * size.hidden * size.layers + inside if checkpointing else inside * size.layers
    return float(tokens * (layers + gradients))


def kept_bytes(size: Size, tokens: float, word: int = 2) -> float:
    """Keys and values of a cut row's clean tokens, kept for all of its pieces, and their float32 gradients."""
    return cache_bytes(size, tokens, word) + cache_bytes(size, tokens, 4)


def head_bytes(size: Size, positions: int) -> float:
    """What the head takes in training, for a chunk of so many positions."""
    return float(HEAD_COPIES * positions * size.vocabulary)


def draw_bytes(positions: int, vocabulary: int, top_k: int = 0, top_p: float = 1.0) -> float:
    """What a draw for so many positions takes at its peak; it is made in chunks of `DRAW_ELEMENTS`."""
    kind = "top_p" if top_p < 1 else "top_k" if top_k > 0 else "plain"
    chunks = max(1, -(-positions * vocabulary // DRAW_ELEMENTS))
    return float(DRAW_BYTES[kind] * -(-positions // chunks) * vocabulary)


@dataclass(frozen=True)
class Drawing:
    """What is drawn side by side: `rows` responses in blocks, prompt and response of at most `longest` positions."""

    rows: int
    block: int
    longest: int
    full_attention: bool = False
    top_k: int = 0
    top_p: float = 1.0


def sampling_bytes(size: Size, drawing: Drawing, word: int = 2) -> dict[str, float]:
    """What sampling takes on a GPU beside the weights and the cache, by part.

    A forward keeps one layer's insides: hidden states, and the feed-forward's tensors or queries and keys; a prefill
    has a bias for each pair of its positions too. Graphs keep what the step that they recorded takes.
    """
    whole, blocks = drawing.rows * drawing.longest, 2 * drawing.rows * drawing.block  # with the commits of all

    def forward(tokens: int, keys: int) -> float:
        inside = max(3 * size.feed_forward, 2 * size.query_width + 4 * size.kv_width)
        return float(tokens * (word * (2 * size.hidden + inside) + (word + 1) * keys))

    if drawing.full_attention:  # every canvas as a whole
        step = largest = forward(whole, 0)
    else:
        step = forward(blocks, drawing.longest)
        largest = max(step, forward(max(drawing.longest, min(PREFILL_TOKENS, whole)), drawing.longest))
    draw = draw_bytes(drawing.rows * drawing.block, size.vocabulary, drawing.top_k, drawing.top_p)
    return {"draw": draw, "forward": largest, "graphs": GRAPHS + step + draw}


def cache_bytes(size: Size, tokens: float, word: int = 2) -> float:
    """Keys and values of so many positions in all layers."""
    return 2.0 * word * size.layers * size.kv_width * tokens
